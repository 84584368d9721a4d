"""dmoe::route against the eager rules of passes/, interpreted on the CPU, and compiled for the GPUs we know.

Expert ids are compared exactly: inputs have no ties, or ties that every rule gives to the lower expert.

T: tokens; E, k: experts, experts a token; N: blocks
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from dmoe_compile.kernels.route import NUM_WARPS, _route_kernel, launch, route
from dmoe_compile.kernels.route_arguments import constants, unsupported
from dmoe_compile.passes.limit import COLD, DECODED, HOT, IDLE
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses import FakeTensorMode

import ahead_of_time
from ahead_of_time import TARGETS
from dmoe_compile.testing.interpreter import interpreted
from route_rules import METHODS, Case, check, distinct, run, top

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
    "logits, bias, scale and roles are on 2 devices: cpu, meta": dict(
        roles=torch.zeros(12, dtype=torch.int8, device="meta")
    ),
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
