"""TEAM inside diffusers' own pipelines, against the same pipelines on an eager model that reuses by the book.

L: tokens of a block or canvas
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline, EntropyBoundScheduler, LLaDA2Pipeline
from torch import Tensor, nn

import dmoe_compile
import zoo
from dmoe_compile.context import current
from test_pipelines import MASK, SPECIAL, L, tokenizer
from tiny_moe import ATEN

CACHE = {"passes": ["team"], "team.limit": False, **ATEN}
PROMPTS = [" ".join(f"w{20 + (7 * i + 31 * row) % 100}" for i in range(10 + row)) for row in range(2)]


class Reuse:
    """Gives decoded tokens the expert outputs of the last forward, module by module; `served` counts them.

    `decoded(ids, last)`: [B, S] bool from what goes in and what went in last; None where the forward is the first.
    """

    def __init__(self, model: nn.Module, ids: str, key: str | None) -> None:
        self.model, self.ids, self.key = model, ids, key
        self.last: Tensor | None = None
        self.place: Any = None
        self.decoded: Tensor | None = None
        self.stored: dict[nn.Module, Tensor] = {}
        self.served = 0

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs[self.ids]
        place = ids.shape if self.key is None else int(kwargs[self.key][0, 0])
        self.decoded = None
        if self.last is not None and place == self.place:
            self.decoded = (ids == self.last) & (ids != MASK) if self.key is None else ids == self.last
            self.served += int(self.decoded.sum())
        self.last, self.place = ids.clone(), place

    def experts(self, module: nn.Module, _: Any, out: Tensor) -> Tensor:
        if self.decoded is not None:
            out = torch.where(self.decoded.reshape(-1, 1), self.stored[module], out.reshape(-1, out.shape[-1]))
        self.stored[module] = out.reshape(-1, out.shape[-1])
        return out

    @contextmanager
    def __call__(self) -> Iterator[Reuse]:
        hooks = [self.model.register_forward_pre_hook(self.before, with_kwargs=True)]
        decoder = self.model.model.decoder if self.key else self.model
        banks = [module for name, module in decoder.named_modules() if name.endswith(".experts")]
        assert banks
        hooks += [bank.register_forward_hook(self.experts) for bank in banks]
        yield self
        for hook in hooks:
            hook.remove()


def llada2(model: nn.Module, **kwargs: Any) -> tuple[LLaDA2Pipeline, dict[str, Any]]:
    """The answer ends with a block: what comes behind it is padding, which TEAM does not route and Reuse would."""
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(), tokenizer(128))
    pipe.set_progress_bar_config(disable=True)
    how = {"use_chat_template": False, "gen_length": 21, "block_length": L, "num_inference_steps": 8, "threshold": 0.9}
    return pipe, {**how, "sampling_method": "greedy", "eos_early_stop": False, **kwargs}


def gemma(model: Any, scheduler: Any, **kwargs: Any) -> tuple[DiffusionGemmaPipeline, dict[str, Any]]:
    pipe = DiffusionGemmaPipeline(model, scheduler, tokenizer(512))
    pipe.set_progress_bar_config(disable=True)
    how = {"gen_length": 2 * zoo.CANVAS, "num_inference_steps": 5, "cache_implementation": "static"}
    return pipe, {**how, "eos_early_stop": False, "confidence_threshold": None, **kwargs}


def build_llada2() -> nn.Module:
    model = zoo.build("qwen3_moe", num_layers=2)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 0  # a logit of 0 is never the highest of 128: a trained model writes no [MASK]
    return model


@pytest.mark.parametrize("editing", [None, 0.02])
def test_llada2_reuses_decoded_tokens(editing: float | None) -> None:
    model = build_llada2()
    pipe, how = llada2(model, editing_threshold=editing)
    stock = pipe(PROMPTS, **how).sequences
    with Reuse(model, "input_ids", None)() as reuse:
        wanted = pipe(PROMPTS, **how).sequences
    assert reuse.served

    compiled = torch.compile(model, backend="dmoe", options=CACHE)
    pipe, how = llada2(compiled, editing_threshold=editing)
    with dmoe_compile.StepCallback(pipe) as callback:
        tokens = pipe(PROMPTS, callback_on_step_end=callback, **how).sequences
        assert torch.equal(tokens, wanted)
        assert not torch.equal(tokens, stock)  # reuse changes what comes out: the equality above is not an empty one
        stored = callback.context.nbytes
        again = pipe(PROMPTS, callback_on_step_end=callback, **how).sequences
        assert torch.equal(again, wanted)  # nothing of the first call is left
    assert stored > 0
    assert callback.context.nbytes == 0
    # The first step of a block computes all tokens; then what is decoded activates no expert.
    unique = [sum(step.unique_experts.values()) for step in callback.stats]
    assert min(unique) < 0.7 * max(unique)
    assert torch.equal(pipe(PROMPTS, **how).sequences, stock)  # without the callback the model is plain


def test_llada2_limits_cold_tokens() -> None:
    model = build_llada2()
    counts = {}
    for limit in (False, True):
        options = {**CACHE, "team.limit": limit, "team.distance": 1, "team.confidence": 1.0}
        pipe, how = llada2(torch.compile(model, backend="dmoe", options=options, isolate_recompiles=True))
        with dmoe_compile.StepCallback(pipe) as callback:
            out = pipe(PROMPTS, callback_on_step_end=callback, **{**how, "threshold": 2.0})
        assert not (out.sequences == MASK).any()
        counts[limit] = [sum(step.unique_experts.values()) for step in callback.stats]
    assert sum(counts[True]) < sum(counts[False])


@pytest.mark.parametrize("scheduler", [BlockRefinementScheduler, EntropyBoundScheduler])
@pytest.mark.parametrize("part", ["whole", "decoder"])
def test_diffusion_gemma_reuses_tokens_that_stay(scheduler: Any, part: str) -> None:
    """The whole model compiled; then the decoder alone, which is how diffusers' documentation compiles it."""
    model = zoo.build("diffusion_gemma", num_layers=1)
    settings = {"entropy_bound": 20.0} if scheduler is EntropyBoundScheduler else {}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    pipe, how = gemma(model, scheduler(**settings))
    with Reuse(model, "decoder_input_ids", "decoder_position_ids")() as reuse:
        wanted = pipe(PROMPTS[:1], generator=seeded(), **how).sequences
    assert reuse.served
    assert not torch.equal(pipe(PROMPTS[:1], generator=seeded(), **how).sequences, wanted)

    if part == "whole":
        pipe, how = gemma(torch.compile(model, backend="dmoe", options=CACHE), scheduler(**settings))
    else:
        model.model.decoder = torch.compile(model.model.decoder, backend="dmoe", options=CACHE)
    with dmoe_compile.StepCallback(pipe) as callback:
        for _ in range(2):
            tokens = pipe(PROMPTS[:1], generator=seeded(), callback_on_step_end=callback, **how).sequences
            assert torch.equal(tokens, wanted)
    unique = [sum(step.unique_experts.values()) for step in callback.stats]
    assert min(unique) < max(unique)


def test_other_pipelines_are_refused_by_name() -> None:
    class SomePipeline:
        model = torch.compile(zoo.build("qwen3_moe", num_layers=1), backend="dmoe", options=CACHE)

    with pytest.raises(ValueError, match=r"SomePipeline is no pipeline that TEAM is defined for: LLaDA2Pipeline and"):
        dmoe_compile.StepCallback(SomePipeline())
    with pytest.raises(ValueError, match="NoneType is no pipeline"):
        dmoe_compile.StepCallback(None)


def test_a_model_without_the_pass_is_refused() -> None:
    model = zoo.build("qwen3_moe", num_layers=1)
    for compiled in (model, torch.compile(model, backend="dmoe"), torch.compile(model)):
        with pytest.raises(ValueError, match="not compiled with the pass 'team'"):
            dmoe_compile.StepCallback(llada2(compiled)[0])
    model.compile(backend="dmoe", options=CACHE)
    with pytest.raises(ValueError, match=r"compiled by model\.compile\(\), which traces hooks too"):
        dmoe_compile.StepCallback(llada2(model)[0])


def test_diffusion_gemma_without_the_cache_is_refused() -> None:
    options = {**CACHE, "team.cache": False}
    pipe, _ = gemma(torch.compile(zoo.build("diffusion_gemma", num_layers=1), backend="dmoe", options=options), None)
    with pytest.raises(ValueError, match=r"team\.cache=False leaves nothing to do in DiffusionGemmaPipeline"):
        dmoe_compile.StepCallback(pipe)


def test_it_works_only_entered_and_once() -> None:
    pipe, how = llada2(torch.compile(build_llada2(), backend="dmoe", options=CACHE))
    callback = dmoe_compile.StepCallback(pipe)
    with pytest.raises(RuntimeError, match="call the pipeline inside"):
        pipe(PROMPTS, callback_on_step_end=callback, **how)
    with callback, pytest.raises(RuntimeError, match="entered already"):
        callback.__enter__()


def test_an_interrupt_leaves_no_context() -> None:
    model = build_llada2()
    pipe, how = llada2(torch.compile(model, backend="dmoe", options=CACHE))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), dmoe_compile.StepCallback(pipe) as callback:
        pipe(PROMPTS, callback_on_step_end=callback, **how)
    hook.remove()
    assert current() is None
    with dmoe_compile.StepCallback(pipe) as callback:
        assert callback.context.nbytes == 0


def test_a_second_callback_on_a_model_is_refused() -> None:
    pipe, _ = llada2(torch.compile(build_llada2(), backend="dmoe", options=CACHE))
    other = dmoe_compile.StepCallback(pipe)
    with dmoe_compile.StepCallback(pipe), pytest.raises(RuntimeError, match="another one of the same model"):
        other.__enter__()


def test_a_prompt_word_is_no_special_token() -> None:
    assert MASK < len(SPECIAL) <= 20  # the words above begin at w20
