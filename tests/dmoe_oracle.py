"""The dMoE rule in plain Python, in exact arithmetic: votes, and the coreset that they choose."""

from __future__ import annotations

from fractions import Fraction

import hypothesis
from dmoe_compile.passes.dmoe import Options
from hypothesis import assume
from torch import Tensor

# Shares are float32, the oracle's are exact: a prefix within 64 roundings of 6e-8 of top_p may fall on either side.
ROUNDING = Fraction(1, 250_000)


def oracle_votes(scores: Tensor, ids: Tensor, voting: Tensor) -> list[Fraction]:
    """The votes: sums of selected scores, above the token's smallest selected one where any is negative."""
    votes = [Fraction(0)] * scores.shape[-1]
    for row, chosen, votes_too in zip(scores[0].tolist(), ids[0].tolist(), voting[0].tolist(), strict=True):
        if not votes_too:
            continue
        selected = [Fraction(row[e]) for e in chosen]
        lowest = min(selected) if any(score < 0 for score in selected) else 0
        for e, score in zip(chosen, selected, strict=True):
            votes[e] += score - lowest
    return votes


def oracle(votes: list[Fraction], top_k: int, options: Options) -> set[int]:
    """The coreset: the shortest prefix whose mass exceeds top_p, at least min_experts, never below k."""
    order = sorted(range(len(votes)), key=lambda e: (-votes[e], e))
    top_p, total = Fraction(options.top_p), sum(votes)
    chosen: set[int] = set()
    mass = Fraction(0)
    for e in order:
        if total and hypothesis.currently_in_test_context():
            assume(abs(mass / total - top_p) > ROUNDING)
        if len(chosen) >= max(min(options.min_experts, len(votes)), top_k) and total and mass > top_p * total:
            break
        chosen.add(e)
        mass += votes[e]
    return chosen


def members(coresets: Tensor) -> list[set[int]]:
    """Return the experts of each coreset [N, E]."""
    return [set(row.nonzero().flatten().tolist()) for row in coresets]
