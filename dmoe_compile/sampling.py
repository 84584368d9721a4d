"""How a decoding chooses and commits tokens: its settings, and diffusers' scheduler that follows them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dmoe_compile.config import check_int, check_number


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and committed.

    Attributes:
        mask_token_id: the id of a token that is not known yet.
        block_length: tokens that are denoised together, L.
        steps: denoising steps of a block; with fewer than L, at least L / steps tokens are committed in each.
        threshold: tokens that are surer than this are committed at once; above 1 the schedule alone decides.
        temperature: 0 is greedy.
        top_k, top_p: what is sampled from, at temperatures above 0.
        editing_threshold: committed tokens change where the model is surer than this of another; None never.
        max_post_steps: with editing, forwards of a block without masks, as long as each changes a token.
        eos_token_ids: a sequence ends with the block in which one of these comes first.
    """

    mask_token_id: int
    block_length: int = 32
    steps: int = 32
    threshold: float = 0.9
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    editing_threshold: float | None = None
    max_post_steps: int = 16
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_int("block_length", self.block_length, "the tokens that are denoised together; 32 is usual")
        check_int("steps", self.steps, "denoising steps of a block")
        check_int("max_post_steps", self.max_post_steps, "forwards of a block without masks", least=0)
        check_int("mask_token_id", self.mask_token_id, "the id of a token", least=0)
        check_number(
            "threshold", self.threshold, "above 0 and finite: a probability; 0.9 is usual", lambda x: 0 < x < math.inf
        )
        check_number(
            "temperature", self.temperature, "of at least 0, which is greedy, and finite", lambda x: 0 <= x < math.inf
        )
        if self.top_k is not None:
            check_int("top_k", self.top_k, "tokens that a sample is drawn from; None draws from all")
        if self.top_p is not None:
            check_number("top_p", self.top_p, "in (0, 1], or None", lambda x: 0 < x <= 1)
        if self.editing_threshold is not None:
            rule = "above 0 and finite, or None not to edit"
            check_number("editing_threshold", self.editing_threshold, rule, lambda x: 0 < x < math.inf)


def scheduler_of(sampling: Sampling) -> Any:
    """Return diffusers' scheduler; how sure it is of a token is the token's whole probability, before any filter."""
    from diffusers import BlockRefinementScheduler

    scheduler: Any = BlockRefinementScheduler  # its decorators hide its types
    made = scheduler(sampling.block_length, sampling.steps, sampling.threshold)
    if sampling.temperature:
        sample = made._sample_from_logits

        def sampled(logits: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            tokens, _ = sample(logits, **kwargs)
            return tokens, logits.float().softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

        made._sample_from_logits = sampled
    return made
