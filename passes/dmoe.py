"""dMoE: the tokens of a block vote for a small coreset of experts that all of them share.

A token votes for its own top-k with their selection scores. Votes are summed over the block and
normalised to 1; the coreset is the shortest prefix of experts, most votes first, whose share exceeds
`top_p`, at least `min_experts` of them and never fewer than k.
Source: dMoE (arXiv 2605.30876).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dmoe_compile.passes.votes import count_votes
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Options of the `dmoe` pass.

    Attributes:
        top_p: share of the votes that the coreset must exceed, in (0, 1]; 1 keeps every expert.
            0.6 is what the published models were trained with; without fine-tuning choose a larger one.
        min_experts: smallest coreset, in experts; more than the layer has means all of them.
    """

    top_p: float = 0.6
    min_experts: int = 16

    def __post_init__(self) -> None:
        top_p, least = (None if isinstance(value, bool) else value for value in (self.top_p, self.min_experts))
        if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
            raise ValueError(
                f"dmoe.top_p={self.top_p!r} must be a number in (0, 1]: a share of the block's votes; 0.6 is usual"
            )
        if not isinstance(least, int) or least < 1:
            raise ValueError(f"dmoe.min_experts={self.min_experts!r} must be an integer of at least 1; 16 is usual")

    def all_experts(self) -> Options:
        """Return the options under which the rule runs in full and changes nothing."""
        return Options(self.top_p, min_experts=2**31)


def coreset(scores: Tensor, ids: Tensor, voting: Tensor, options: Options) -> Tensor:
    """Return which experts each block may use, [N, E] bool.

    Args:
        scores: [N, L, E] fp32, selection scores of N blocks of L tokens.
        ids: [N, L, k] int64, every token's own top-k, best first.
        voting: [N, L] bool, the tokens that vote: not padding, not served from a cache.
        options: see Options.
    """
    votes = count_votes(scores, ids, voting)
    num_experts, top_k = votes.shape[-1], ids.shape[-1]
    share = votes / (
        votes.sum(-1, keepdim=True) + 1e-20
    )  # 1e-20 as released: a block without votes has share 0, not NaN
    ranked, order = share.sort(dim=-1, descending=True, stable=True)  # stable: a tie goes to the lower index
    before = torch.nn.functional.pad(ranked.cumsum(-1)[:, :-1], (1, 0))  # what the better experts hold together
    rank = torch.arange(num_experts, device=votes.device)
    kept = rank < max(min(options.min_experts, num_experts), top_k)
    if options.top_p < 1:  # the shares of all experts sum to 1, which never exceeds 1
        kept = kept | (before <= options.top_p)
    else:
        kept = kept | (rank >= 0)
    return torch.zeros_like(share, dtype=torch.bool).scatter(-1, order, kept.expand_as(share))


def kernel(options: Options, top_k: int) -> tuple[str, float, int]:
    """Return what tells kernels/route.py to run this rule: its method, p and size."""
    return "dmoe", options.top_p, options.min_experts
