"""dmoe::route against the eager rules of passes/, interpreted on the CPU, and compiled for the GPUs we know.

Expert ids are compared exactly: inputs have no ties, or ties that every rule gives to the lower expert.

T: tokens; E, k: experts, experts a token; N: blocks
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from dmoe_compile.kernels.route import NUM_WARPS, _route_kernel, launch, route
from dmoe_compile.kernels.route_arguments import constants, unsupported
from dmoe_compile.passes import des, dmoe, limit
from dmoe_compile.passes.coreset import Blocks, choose, penalise, restrict, restrict_groups
from dmoe_compile.passes.limit import COLD, DECODED, HOT, IDLE
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import ahead_of_time
from ahead_of_time import TARGETS
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
        ids, weights, active, counts = torch.ops.dmoe.route(logits, bias, scale, roles, *case.arguments)
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
    inside = _inside(case, scores, rows, ties)
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


def _inside(case: Case, scores: Tensor, rows: Tensor, ties: bool) -> Tensor:
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


# Against the eager rules.


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "logits"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, score: str) -> None:
    case = Case(score=score, seq=20, block_length=17).named(method)
    number = list(METHODS).index(method) + ["softmax", "sigmoid", "logits"].index(score)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]  # every method and every score meets all three
    check(case, distinct(case, 60, dtype))


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 1), (5, 5), (16, 3), (128, 8), (300, 7), (512, 8)])
def test_every_size(num_experts: int, top_k: int) -> None:
    """Lanes without an expert, slots without a choice; a token, less than a chunk, a block of one after a full one."""
    for tokens in (1, 7, 33):
        case = Case(top_k=top_k, seq=tokens, p=0.4)
        check(case, distinct(case, num_experts), torch.randn(num_experts))


@pytest.mark.parametrize("method", ["dmoe", "vote", "own"])
def test_long_blocks(method: str) -> None:
    case = Case(top_k=8, seq=256, block_length=256).named(method)
    check(case, distinct(case, 128))


GROUPS = {  # E, groups, top_groups
    "8 groups": (64, 8, 4),
    "LLaDA2": (256, 8, 4),
    "one of 15": (60, 4, 1),
    "20 in each": (160, 8, 3),
    "5 groups": (15, 5, 2),
    "all groups": (12, 6, 6),
}


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("method", ["own", "dmoe, small", "seq, one", "vote"])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups(groups: str, method: str, group_score: str) -> None:
    num_experts, count, kept = GROUPS[groups]
    case = Case(score="sigmoid", groups=count, top_groups=kept, group_score=group_score, scale=2.5, seq=12)
    check(case.named(method), distinct(case, num_experts), 0.2 * torch.randn(num_experts))


def test_starved_groups() -> None:
    """A token whose one group holds less than k experts of the coreset takes the best of the coreset elsewhere."""
    case = Case(score="sigmoid", groups=4, method="des_vote", size=10, seq=20)
    ids, *_ = check(case, distinct(case, 60))
    assert ids[:, 0].div(15, rounding_mode="floor").unique().numel() > 1
    assert ids.div(15, rounding_mode="floor").diff(dim=1).ne(0).any(1).all()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("weighting", ["scores", "renormalised", "softmax"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "logits"])
def test_weights(score: str, weighting: str, groups: int) -> None:
    case = Case(score=score, weighting=weighting, groups=groups, top_groups=-(-groups // 2), scale=1.5, seq=5)
    case = case.named("own")
    logits = distinct(case, 24).abs()  # no sum of weights near 0, which would lose digits in any order
    for dtype in (torch.float32, torch.bfloat16):
        bias, scale = torch.randn(24, dtype=dtype), torch.rand(24, dtype=dtype)
        check(case, logits, bias, scale)
        check(case, logits, None, scale)


LAYOUTS = {
    "even": dict(batch=2, seq=24, block_length=8),
    "ragged": dict(batch=3, seq=11, block_length=4),
    "a tail of one": dict(batch=2, seq=9, block_length=4),
    "shorter than a block": dict(batch=3, seq=5, block_length=32),
    "blocks of one": dict(batch=2, seq=3, block_length=1),
    "one block": dict(batch=3, seq=7, block_length=4, whole=True),
    "candidates": dict(batch=8, seq=8, block_length=8, candidates=4),
    "candidates, ragged": dict(batch=4, seq=11, block_length=4, candidates=2),
    "candidates in one block": dict(batch=4, seq=6, block_length=4, candidates=2, whole=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["dmoe, small", "seq"])
def test_blocks(method: str, layout: str) -> None:
    case = Case(top_k=3, **LAYOUTS[layout]).named(method)
    check(case, distinct(case, 24))


def _roles(case: Case, kind: str) -> Tensor:
    everywhere = torch.ones(case.tokens, dtype=torch.int8)
    if kind == "mixed":
        return torch.randint(4, (case.tokens,), dtype=torch.int8)
    if kind == "one sequence decoded":
        return torch.where(torch.arange(case.tokens) < case.tokens // 2, DECODED, _roles(case, "mixed")).to(torch.int8)
    if kind == "no hot token":
        return COLD + 2 * torch.randint(2, (case.tokens,), dtype=torch.int8)
    if kind == "one hot token":
        return torch.where(torch.arange(case.tokens) == case.tokens - 1, HOT, everywhere).to(torch.int8)
    return everywhere * {"hot": HOT, "cold": COLD, "decoded": DECODED, "idle": IDLE}[kind]


KINDS = ["mixed", "one sequence decoded", "no hot token", "one hot token", "hot", "cold", "decoded", "idle"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "groups"), [("own", 1), ("own", 4), ("dmoe", 4), ("seq", 1)])
def test_roles(method: str, groups: int, kind: str) -> None:
    case = Case(top_k=4, groups=groups, top_groups=-(-groups // 2), batch=8, seq=5, candidates=4).named(method)
    roles = _roles(case, kind)
    ids, weights, *_ = check(case, distinct(case, 48), torch.rand(48), None, roles)
    assert ids[roles >= DECODED].eq(48).all()
    assert weights[roles >= DECODED].eq(0).all()


def test_roles_of_one_sequence_in_a_whole_forward() -> None:
    case = Case(top_k=3, batch=4, seq=9, block_length=4, candidates=4, whole=True)
    check(case, distinct(case, 32), None, None, _roles(case, "mixed"))


def test_roles_have_the_numbers_of_the_pass() -> None:
    """One token of each role: the kernel has numbers of its own, passes can't be imported there."""
    case = Case(top_k=2, method="own", seq=4)
    logits = distinct(case, 24)
    ids = run(case, logits, None, None, torch.tensor([HOT, COLD, DECODED, IDLE], dtype=torch.int8))[0]
    own = top(logits, 2)
    assert torch.equal(ids[0], own[0])
    assert set(ids[1].tolist()) == set(own[0].tolist())
    assert ids[2:].eq(24).all()


@settings(max_examples=settings().max_examples // 2)  # an interpreted launch takes a tenth of a second
@given(data=st.data())
def test_exactly_the_rules(data: st.DataObject) -> None:
    """Small integers as scores: no sum is rounded, so votes tie often, and every tie must go the same way."""
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    num_experts = groups * draw(st.integers(2, 6))
    candidates = draw(st.integers(1, 2))
    case = Case(
        top_k=draw(st.integers(1, min(5, num_experts))),
        score="logits",
        groups=groups,
        top_groups=draw(st.integers(1, groups)),
        group_score=draw(st.sampled_from(["max", "top2"])),
        weighting="softmax",
        batch=candidates * draw(st.integers(1, 2)),
        seq=draw(st.integers(1, 7)),
        block_length=draw(st.integers(4, 7)),
        whole=draw(st.booleans()),
        candidates=candidates,
        method=draw(st.sampled_from(["own", "dmoe", "des_seq", "des_vote"])),
        p=draw(st.sampled_from([0.0731, 0.3141, 0.6137, 0.8713, 1.0])),  # no share of so few small votes
        size=draw(st.integers(1, 8)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    offset = draw(st.sampled_from([0, num_experts // 2]))
    logits = (torch.rand(case.tokens, num_experts, generator=generator).argsort() - offset).float()
    roles = None
    if draw(st.booleans()) and (case.batch == candidates if case.whole else case.seq <= case.block_length):
        roles = torch.randint(4, (case.tokens,), generator=generator, dtype=torch.int8)
    check(case, logits, None, None, roles)


@pytest.mark.parametrize("method", ["dmoe, small", "seq, one", "vote"])
def test_negative_scores(method: str) -> None:
    """Votes are then relative to a token's smallest selected score."""
    case = Case(score="logits", weighting="softmax", seq=12).named(method)
    check(case, distinct(case, 60) - 20)


# Ties, NaN, infinity.


@pytest.mark.parametrize("method", [m for m in METHODS if m != "seq, more than k"])  # whose rule has a torch.topk
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_a_tie_goes_to_the_lower_expert(levels: int, method: str) -> None:
    case = Case(top_k=4, score="logits", weighting="softmax", seq=17).named(method)
    if method == "dmoe":  # shares of equal votes add up to this one only within rounding
        case = replace(case, p=0.6137)
    check(case, torch.randint(levels, (17, 24)).float(), ties=True)


def test_a_tie_of_groups_goes_to_the_lower_group() -> None:
    case = Case(top_k=4, score="logits", groups=6, top_groups=2, group_score="top2", method="own", seq=1)
    assert run(case, torch.ones(1, 24))[0].tolist() == [[0, 1, 2, 3]]
    logits = torch.ones(1, 24).index_fill(1, torch.tensor([9, 21, 22]), 2)  # sums 2 2 3 2 2 4
    assert run(case, logits)[0].tolist() == [[9, 21, 22, 8]]


def test_both_zeros_are_equal() -> None:
    case = Case(top_k=3, score="logits", method="own", seq=1, weighting="scores")
    logits, bias = torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0]]), torch.full((5,), -0.0)  # without a bias, 0 is added
    assert run(case, logits, bias)[0].tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "logits"])
@pytest.mark.parametrize("method", ["own", "dmoe, small", "seq", "vote"])
def test_a_token_that_can_not_be_counted(method: str, score: str, bad: float) -> None:
    """It is routed, NaN first, but does not vote: the rest of its block is as it is without it."""
    case = Case(score=score, weighting="scores", seq=12, block_length=6).named(method)
    logits = distinct(case, 24)
    bias = 3 * torch.rand(24) if score == "sigmoid" else None
    logits[5, 3] = bad
    logits[10] = bad
    check(case, logits, bias, ties=True)


def test_nan_and_groups() -> None:
    """A token with NaN in a group-limited router still chooses different experts inside its coreset."""
    case = Case(score="sigmoid", groups=4, top_groups=2, group_score="top2", weighting="scores", seq=12, p=0.3)
    logits = distinct(case, 24)
    logits[5, 3] = torch.nan
    ids, *_ = run(case, logits)
    inside = _inside(case, logits.sigmoid(), torch.zeros(1, 12, dtype=torch.int8), ties=False)
    assert inside.gather(1, ids).all()
    assert len(set(ids[5].tolist())) == case.top_k
    others = torch.arange(12) != 5
    assert torch.equal(ids[others], expected(case, logits)[0][others])


def test_a_share_of_exactly_top_p_is_not_exceeded() -> None:
    """Four experts with a quarter of the votes each: two of them hold 0.5, a third makes the share exceed it."""
    case = Case(top_k=2, score="logits", weighting="scores", p=0.5, size=1, seq=2)
    logits = torch.tensor([[1.0, 1, 0, 0, -1], [0, 0, 1, 1, -1]])
    ids, *_ = check(case, logits, ties=True)
    assert ids.tolist() == [[0, 1], [2, 0]]


def test_all_shares_keep_every_expert() -> None:
    """These six add up to 1.0000001 in fp32; the second token does not vote, and wants the experts without votes."""
    case = Case(top_k=6, score="logits", weighting="scores", p=1.0, size=1, seq=2)
    logits = torch.full((2, 12), -1.0)
    logits[0, :6] = torch.tensor([37.0, 18, 8, 15, 32, 16])
    logits[1, 6:] = torch.tensor([torch.inf, 5, 4, 3, 2, 1])
    assert check(case, logits)[0][1].tolist() == [6, 7, 8, 9, 10, 11]


def test_a_block_in_which_nobody_votes() -> None:
    for method in METHODS:
        case = Case(seq=4, score="sigmoid", weighting="scores").named(method)
        check(case, torch.full((4, 24), torch.nan), ties=True)


def test_weights_that_vanish_are_zero() -> None:
    """exp(-200) is 0 in fp32; 0 / 0 would be NaN."""
    case = Case(top_k=2, score="sigmoid", method="own", seq=1)
    assert run(case, torch.full((1, 4), -200.0))[1].tolist() == [[0.0, 0.0]]


def test_equal_inputs_give_equal_outputs() -> None:
    """Whatever the order of programs: nothing that one writes is read by another."""
    case = Case(batch=3, seq=12, block_length=8)
    logits = distinct(case, 64)
    first, second = run(case, logits), run(case, logits)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_anything(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(30):
        _check_anything(draw)


def _check_anything(draw: random.Random) -> None:
    torch.manual_seed(draw.randrange(2**31))
    groups = draw.choice([1, 1, 2, 4, 8])
    num_experts = draw.choice([8, 16, 40, 64, 120, 128, 256, 384 if groups == 1 else 256, 512])
    candidates, blocks = draw.choice([1, 1, 2, 4]), draw.random() < 0.5
    case = Case(
        top_k=draw.randint(1, 8),
        score=draw.choice(["softmax", "sigmoid", "logits"]),
        groups=groups,
        top_groups=draw.randint(1, groups),
        group_score=draw.choice(["max", "top2"]) if num_experts > groups else "max",
        weighting=draw.choice(["scores", "softmax"]),
        scale=draw.choice([1.0, 2.5]),
        batch=candidates * draw.randint(1, 3),
        seq=draw.randint(1, 64),
        block_length=draw.choice([4, 16, 32]) if blocks else 64,
        whole=draw.random() < 0.2,
        candidates=candidates,
    ).named(draw.choice(list(METHODS)))
    bias = torch.randn(num_experts) if draw.random() < 0.5 else None
    one = case.batch == candidates if case.whole else case.seq <= case.block_length
    roles = torch.randint(4, (case.tokens,), dtype=torch.int8) if one and draw.random() < 0.5 else None
    check(case, distinct(case, num_experts, draw.choice([torch.float32, torch.bfloat16])), bias, None, roles)


@pytest.mark.nightly
def test_the_largest_block() -> None:
    case = Case(top_k=8, batch=4, seq=256, block_length=256, candidates=4, method="dmoe", p=0.6)
    check(case, distinct(case, 512), None, None, _roles(case, "mixed"))


# As an operator.


def _arguments(case: Case, num_experts: int = 24, **tensors: Any) -> list[Any]:
    given = dict(logits=distinct(case, num_experts), bias=None, expert_scale=None, roles=None) | tensors
    return [*given.values(), *case.arguments]


def test_as_an_operator() -> None:
    case = Case(batch=2, seq=9, block_length=4)
    with interpreted():
        torch.library.opcheck(route, _arguments(case, bias=torch.rand(24)))


def test_while_traced() -> None:
    """Shapes and dtypes without a launch."""
    case = Case(top_k=3, batch=4, seq=9, block_length=4, candidates=2)
    with FakeTensorMode():
        logits = torch.empty(36, 24, dtype=torch.bfloat16)
        outputs = torch.ops.dmoe.route(logits, None, None, None, *case.arguments)
    shapes = [[36, 3], [36, 3], [6, 24], [6]]
    dtypes = [torch.int64, torch.float32, torch.int32, torch.int32]
    assert [[*x.shape] for x in outputs] == shapes
    assert [x.dtype for x in outputs] == dtypes


UNSUPPORTED = {
    "score='tanh' is none of: softmax, sigmoid, logits": dict(score="tanh"),
    "group_score='mean' is none of": dict(group_score="mean"),
    "weighting='equal' is none of": dict(weighting="equal"),
    "method='cover' is none of: own, dmoe, des_seq, des_vote": dict(method="cover"),
    r"logits must be \[T, E\], .* got torch.float32 \[12, 24\] with strides \(1, 12\)": dict(
        logits=torch.rand(24, 12).t()
    ),
    r"logits must .* got torch.float64": dict(logits=torch.rand(12, 24, dtype=torch.float64)),
    r"logits must .* got torch.int32": dict(logits=torch.ones(12, 24, dtype=torch.int32)),
    r"logits must .* got torch.float32 \[12, 2, 12\]": dict(logits=torch.rand(12, 2, 12)),
    r"bias must be \[24\], fp32, bf16 or fp16, contiguous; got torch.float32 \[1, 24\]": dict(bias=torch.rand(1, 24)),
    r"bias must be .* strides \(2,\)": dict(bias=torch.rand(48)[::2]),
    r"expert_scale must be .* got torch.int64 \[24\]": dict(expert_scale=torch.ones(24, dtype=torch.int64)),
    r"roles must be \[12\] int8, contiguous; got torch.int64": dict(roles=torch.zeros(12, dtype=torch.int64)),
    r"roles must be .* got torch.int8 \[1, 12\]": dict(roles=torch.zeros(1, 12, dtype=torch.int8)),
    "513 experts are more than 512": dict(logits=torch.rand(12, 513)),
    "0 tokens are not between 1 and 1024": dict(logits=torch.rand(0, 24), seq=0),
    "1025 tokens are not between 1 and 1024": dict(logits=torch.rand(1025, 24), seq=1025),
    "12 tokens are not batch=1 rows of seq=11": dict(seq=11),
    "top_k=0 is not between 1 and 24": dict(top_k=0),
    "top_k=25 is not between 1 and 24": dict(top_k=25),
    "24 experts can't be cut into groups=5": dict(groups=5),
    "24 experts can't be cut into groups=0": dict(groups=0),
    "each token keeps top_groups=5": dict(groups=4, top_groups=5),
    "each token keeps top_groups=0": dict(groups=4, top_groups=0),
    "groups=24 of one expert have no best two": dict(groups=24, group_score="top2"),
    "groups=3 of 150 experts need more than 512 lanes": dict(logits=torch.rand(12, 450), groups=3),
    "size=0 must be at least 1": dict(size=0),
    "block_length=0 must be at least 1": dict(block_length=0),
    "batch=1 rows are not sequences of candidates=2": dict(candidates=2),
    "batch=1 rows are not sequences of candidates=0": dict(candidates=0),
    "so it must be one block; got .* block_length=4": dict(block_length=4, roles=torch.zeros(12, dtype=torch.int8)),
    "so it must be one block; got batch=2, .* whole=True": dict(
        batch=2, seq=6, whole=True, roles=torch.zeros(12, dtype=torch.int8)
    ),
}


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_what_is_not_supported_is_said(why: str) -> None:
    changes = dict(UNSUPPORTED[why])
    tensors = {name: changes.pop(name) for name in ("logits", "bias", "expert_scale", "roles") if name in changes}
    case = Case(seq=12)
    assert unsupported(*_arguments(case)) is None
    arguments = _arguments(replace(case, **changes), **({"logits": distinct(case, 24)} | tensors))
    with pytest.raises(ValueError, match=f"^route: .*{why}"):
        launch(*arguments)


# On GPUs.

KERNELS = {  # E, logits, bias, roles
    "LLaDA2": (
        256,
        "fp32",
        True,
        True,
        Case(top_k=8, score="sigmoid", groups=8, top_groups=4, group_score="top2", scale=2.5, p=0.6, size=16),
    ),
    "dmoe": (128, "bf16", False, False, Case(top_k=8, size=16)),
    "des_vote": (128, "bf16", False, False, Case(top_k=8, method="des_vote", size=36)),
    "512 experts": (
        512,
        "fp32",
        True,
        True,
        Case(top_k=8, groups=8, top_groups=4, group_score="top2", method="des_seq", candidates=4),
    ),
}
OFTEN = {("LLaDA2", "sm_90"), ("LLaDA2", "gfx942"), ("512 experts", "sm_80"), ("dmoe", "sm_100")}  # 3 s each


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiled(name: str, target: str, request: pytest.FixtureRequest) -> None:
    if (name, target) not in OFTEN and not request.config.getoption("--nightly"):
        pytest.skip("runs only with --nightly")
    num_experts, dtype, bias, roles, case = KERNELS[name]
    pointers = {"logits": dtype, "ids": "i64", "weights": "fp32", "active": "i32", "counts": "i32"}
    pointers |= {"bias": "fp32"} if bias else {}
    pointers |= {"roles": "i8"} if roles else {}
    signature = {f"{pointer}_ptr": f"*{kind}" for pointer, kind in pointers.items()}
    signature |= {"seq": "i32", "length": "i32", "count": "i32"}
    given = constants(num_experts, *case.arguments[:10], case.candidates)
    given |= {pointer: None for pointer in ("bias_ptr", "expert_scale_ptr", "roles_ptr") if pointer not in signature}
    compiled = ahead_of_time.compile(_route_kernel, signature, given, target, num_warps=NUM_WARPS)
    assert compiled.stats.stack == 0
    if target != "gfx942":  # there masks spill to vector registers, which are not memory
        assert compiled.stats.spills == 0
    ahead_of_time.check_budget(f"route, {name}", compiled)
