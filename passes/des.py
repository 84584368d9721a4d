"""DES: the tokens of a block share a coreset of experts, with no training for it. Two ways to choose it:

    seq    (intra-sequence sharing)   the union of every token's best `keep` experts
    vote   (saliency-aware voting)    the `coreset_size` experts with most votes, which are counted as dMoE does

Either has at least k experts: a smaller union is topped up by votes. `vote` has the size that was asked for, so that
bytes and shapes are the same in every forward.
Source: DES (arXiv 2602.00879). No code was released; the rules are reconstructed from the paper and from the figures
that the dMoE paper (arXiv 2605.30876) reports for its own re-implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from dmoe_compile.passes.votes import best, count_votes, topped_up, union
from torch import Tensor

Variant = Literal["seq", "vote"]


@dataclass(frozen=True)
class Options:
    """Options of the `des` pass.

    Attributes:
        variant: "seq" or "vote".
        keep: experts of each token that "seq" keeps; None means half of the model's k, rounded up.
        coreset_size: experts of a block that "vote" keeps, at least k of them; None means 4k + 4.
    """

    variant: Variant = "seq"
    keep: int | None = None
    coreset_size: int | None = None

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"des.variant={self.variant!r} must be one of: {', '.join(get_args(Variant))}")
        for name, what in (
            ("keep", "experts of each token; half of the model's k is usual"),
            ("coreset_size", "experts of a block; 4k + 4 is usual"),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"des.{name}={value!r} must be an integer of at least 1, or None: {what}")

    def all_experts(self) -> Options:
        """Return the options under which the rule runs in full and changes nothing."""
        return replace(self, keep=2**31, coreset_size=2**31)


def coreset(scores: Tensor, ids: Tensor, voting: Tensor, options: Options) -> Tensor:
    """Return which experts each block may use, [N, E] bool.

    Args:
        scores: [N, L, E] fp32, selection scores of N blocks of L tokens.
        ids: [N, L, k] int64, every token's own top-k, best first.
        voting: [N, L] bool, the tokens that vote: not padding, not served from a cache.
        options: see Options.
    """
    num_experts, top_k = scores.shape[-1], ids.shape[-1]
    votes = count_votes(scores, ids, voting)
    method, _, size = kernel(options, top_k)
    if method == "des_vote":
        return best(votes, max(size, top_k))
    keep = min(size, num_experts)
    kept = ids[..., :keep] if keep <= top_k else scores.topk(keep, dim=-1).indices
    return topped_up(union(kept, voting, num_experts), votes, top_k)


def kernel(options: Options, top_k: int) -> tuple[str, float, int]:
    """Return what tells kernels/route.py to run this rule: its method, p (unused) and size."""
    if options.variant == "vote":
        return "des_vote", 0.0, 4 * top_k + 4 if options.coreset_size is None else options.coreset_size
    return "des_seq", 0.0, (top_k + 1) // 2 if options.keep is None else options.keep
