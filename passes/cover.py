"""cover: the smallest coreset, greedily, that keeps a promise to every token.

Every voting token keeps at least `mass` of the routing weight that its own top-k would have had: its experts in the
coreset hold that much of it. dmoe::cover chooses, and says how far greedy may be from the smallest there is.
Group-limited routers keep their own groups, so that what is promised is also selected.
Where `max_experts` is too small for the promise, the tokens that fall short are counted (routing_stats, explain).
"""

from __future__ import annotations

from dataclasses import dataclass

from dmoe_compile.kernels.cover import cover  # also registers dmoe::cover
from dmoe_compile.passes.votes import count_votes, topped_up, union
from torch import Tensor

needs_weights = True


@dataclass(frozen=True)
class Options:
    """Options of the `cover` pass.

    Attributes:
        mass: share of a token's routing weight that it keeps at least, in (0, 1]; with 1 nothing changes.
        max_experts: largest coreset, in experts, at least k of them; None means as many as it takes.
    """

    mass: float = 0.9
    max_experts: int | None = None

    def __post_init__(self) -> None:
        mass, most = (None if isinstance(value, bool) else value for value in (self.mass, self.max_experts))
        if not isinstance(mass, int | float) or not 0 < mass <= 1:
            raise ValueError(
                f"cover.mass={self.mass!r} must be a number in (0, 1]: a share of routing weight; 0.9 is usual"
            )
        if self.max_experts is not None and (not isinstance(most, int) or most < 1):
            raise ValueError(f"cover.max_experts={self.max_experts!r} must be an integer of at least 1, or None")

    def all_experts(self) -> Options:
        """Return the options under which the rule runs in full and changes nothing."""
        return Options(mass=1.0)


def coreset(scores: Tensor, ids: Tensor, voting: Tensor, options: Options, weights: Tensor) -> Tensor:
    """Return which experts each block may use, [N, E] bool.

    Args:
        scores: [N, L, E] fp32, selection scores of N blocks of L tokens.
        ids: [N, L, k] int64, every token's own top-k.
        voting: [N, L] bool, the tokens that a promise is made to: not padding, not served from a cache.
        options: see Options.
        weights: [N, L, k] fp32, what the model weighs `ids` by.
    """
    num_experts, top_k = scores.shape[-1], ids.shape[-1]
    most = num_experts if options.max_experts is None else min(max(options.max_experts, top_k), num_experts)
    votes = count_votes(scores, ids, voting)
    if options.mass == 1 and most == num_experts:
        # All experts, not the union of what tokens chose: a top-k that does not sort may order the same ids otherwise.
        return topped_up(union(ids, voting, num_experts), votes, num_experts)
    inside = cover(ids, weights.abs(), voting, num_experts, float(options.mass), most)
    return topped_up(inside, votes, top_k)


def promise(options: Options) -> float:
    """Return the share of its own routing weight that every voting token keeps."""
    return options.mass
