"""The arguments of dmoe::route, and what it must return by the eager rules of passes/.

T: tokens; E, k: experts, experts a token; N: blocks
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from dmoe_compile.kernels.route import route
from dmoe_compile.passes import des, dmoe, limit
from dmoe_compile.passes.coreset import Blocks, choose, penalise, restrict, restrict_groups
from dmoe_compile.passes.limit import COLD, DECODED, HOT
from torch import Tensor
from torch.testing import assert_close

from dmoe_compile.testing.interpreter import interpreted

# Sums of at most 512 exponentials, and quotients of at most 8 weights, each rounded to fp32: 2**-24 apiece, in another
# order than torch's. The sums of positive numbers don't cancel.
TOLERANCE = dict(rtol=32 * 2**-24, atol=2**-30)
METHODS = {
    "own": ("own", 0.0, 1),
    "dmoe": ("dmoe", 0.6, 16),
    "dmoe, small": ("dmoe", 0.2137, 1),
    "dmoe, all": ("dmoe", 1.0, 1),
    "seq": ("des_seq", 0.0, 3),
    "seq, one": ("des_seq", 0.0, 1),
    "seq, more than k": ("des_seq", 0.0, 9),
    "vote": ("des_vote", 0.0, 20),
    "vote, fewer than k": ("des_vote", 0.0, 1),
    "vote, all": ("des_vote", 0.0, 2**31),
}


@dataclass(frozen=True)
class Case:
    """The arguments of route() but for its tensors."""

    top_k: int = 6
    score: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    weighting: str = "renormalised"
    scale: float = 1.0
    method: str = "dmoe"
    p: float = 0.6
    size: int = 4
    batch: int = 1
    seq: int = 33
    block_length: int = 32
    whole: bool = False
    candidates: int = 1

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def named(self, method: str) -> Case:
        return replace(self, **dict(zip(("method", "p", "size"), METHODS[method], strict=True)))


def distinct(case: Case, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return logits [T, E], those of a token all different, also in a dtype of few numbers."""
    pool = (2 * torch.randn(8192)).to(dtype).unique()
    return pool[torch.rand(case.tokens, len(pool)).argsort()[:, :num_experts]]


def run(case: Case, logits: Tensor, bias: Any = None, scale: Any = None, roles: Any = None) -> list[Tensor]:
    """Return ids and weights, and the experts of each block; in a random order of programs."""
    with interpreted(seed=int(torch.randint(2**31, ()))) as launches:
        ids, weights, active, counts = route(logits, bias, scale, roles, *case.arguments)
    assert len(launches) == 1
    assert active.eq(logits.shape[1]).sum(1).tolist() == (logits.shape[1] - counts).tolist()  # the rest of a list
    assert launches[0].grid == (len(counts), 1, 1)
    return [ids, weights, *(row[:number] for row, number in zip(active, counts.tolist(), strict=True))]


def expected(
    case: Case, logits: Tensor, bias: Any = None, scale: Any = None, roles: Any = None, ties: bool = False
) -> list[Tensor]:
    """Return what run() should, by the rules that graphs are rewritten with."""
    gates = {"softmax": partial(torch.softmax, dim=-1), "sigmoid": torch.sigmoid, "logits": torch.clone}
    gate = gates[case.score](logits.float())
    scores = gate if bias is None else gate + bias.float()
    roles = torch.zeros(case.tokens, dtype=torch.int8) if roles is None else roles
    rows = roles.view(case.batch, case.seq)
    inside = inside_of(case, scores, rows, ties)
    ids = top(_ranked(case, scores, inside, rows), case.top_k)
    weights = gate.gather(1, ids)
    if case.weighting == "softmax":
        weights = weights.softmax(-1)
    elif case.weighting == "renormalised":
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * case.scale * (1 if scale is None else scale.float()[ids])
    unrouted = (roles >= DECODED).unsqueeze(-1)
    ids, weights = ids.masked_fill(unrouted, logits.shape[1]), weights.masked_fill(unrouted, 0)
    return [ids, weights, *_active(case, ids, logits.shape[1])]


def inside_of(case: Case, scores: Tensor, rows: Tensor, ties: bool) -> Tensor:
    """Return the coreset of each token's block, [T, E] bool."""
    if case.method == "own":
        return torch.ones_like(scores, dtype=torch.bool)
    if case.method == "dmoe":
        rule = partial(dmoe.coreset, options=dmoe.Options(case.p, case.size))
    elif case.method == "des_seq":
        rule = partial(des.coreset, options=des.Options("seq", keep=case.size))
    else:
        rule = partial(des.coreset, options=des.Options("vote", coreset_size=case.size))
    blocks = Blocks(case.batch, case.seq, case.block_length, None, case.whole, rows != HOT, case.candidates)
    if not ties:
        return choose(scores, blocks, case.top_k, rule)
    ids = top(scores, case.top_k)  # torch.topk gives ties to any expert
    return choose(scores, blocks, case.top_k, lambda *args, weights: rule(*args), (ids, ids.float()))


def _ranked(case: Case, scores: Tensor, inside: Tensor, rows: Tensor) -> Tensor:
    """Return what the selection ranks: scores inside the coresets, with cold tokens limited."""
    lowered = penalise(scores, inside)
    masked = _group_mask(case, lowered)

    def ranked(inside: Tensor) -> Tensor:
        return restrict(scores, inside) if case.groups == 1 else restrict_groups(masked, lowered, inside, case.top_k)

    limited = limit.allowed(ranked(inside), inside, rows == HOT, rows == COLD, case.candidates, case.top_k)
    return ranked(limited)


def _group_mask(case: Case, scores: Tensor) -> Tensor:
    grouped = scores.view(len(scores), case.groups, -1)
    best = grouped.amax(-1) if case.group_score == "max" else grouped.topk(min(2, grouped.shape[-1])).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, top(best, case.top_groups), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).view_as(scores)


def _active(case: Case, ids: Tensor, num_experts: int) -> list[Tensor]:
    """Return the experts that each block uses, ascending; a loop over tokens."""
    in_row = 1 if case.whole else -(-case.seq // case.block_length)
    active: list[set[int]] = [set() for _ in range(1 if case.whole else case.batch // case.candidates * in_row)]
    for token, chosen in enumerate(ids.tolist()):
        row, position = divmod(token, case.seq)
        block = 0 if case.whole else row // case.candidates * in_row + position // case.block_length
        active[block].update(set(chosen) - {num_experts})
    return [torch.tensor(sorted(experts), dtype=torch.int32) for experts in active]


def top(x: Tensor, size: int) -> Tensor:
    """Return the ids of the best `size`, best first, [..., size]; the lower one of two that are equal."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :size]


def check(case: Case, *tensors: Any, **kwargs: Any) -> list[Tensor]:
    ours, theirs = run(case, *tensors), expected(case, *tensors, **kwargs)
    assert torch.equal(ours[0], theirs[0])
    assert_close(ours[1], theirs[1], **TOLERANCE, equal_nan=True)
    assert [block.tolist() for block in ours[2:]] == [block.tolist() for block in theirs[2:]]
    return ours
