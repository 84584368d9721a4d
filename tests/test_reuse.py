"""dmoe::reuse: interpreted against its reference, bit for bit, and compiled for every target.

P: partial sums; R, S: rows, tokens of a row; H: width
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from dmoe_compile.kernels.reuse import _reuse_kernel, _tile, reference, reuse
from dmoe_compile.passes.limit import COLD, DECODED, HOT, IDLE
from dmoe_compile.passes.team import reused
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from ahead_of_time import LOAD_128, STORE_128, TARGETS, Compiled, check_budget, compile
from dmoe_compile.testing import interpreter
from dmoe_compile.testing.interpreter import Launch, interpreted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Args(NamedTuple):
    """What dmoe::reuse takes."""

    partials: Tensor
    stored: Tensor
    rows: Tensor
    roles: Tensor
    candidates: int


def arguments(
    partials: int = 4,
    sequences: int = 2,
    candidates: int = 4,
    seq: int = 7,
    width: int = 300,
    dtype: torch.dtype = torch.bfloat16,
) -> Args:
    """Every role, and rows that go on from each other's: the last candidate from the first, and the other way round."""
    batch = sequences * candidates
    rows = torch.arange(batch).view(sequences, candidates).flip(1).flatten()
    roles = torch.randint(0, 4, (batch, seq), dtype=torch.int8)
    stored = torch.randn(batch, seq, width).to(dtype)
    return Args(torch.randn(partials, batch * seq, width), stored, rows, roles, candidates)


def expected(args: Args) -> tuple[Tensor, Tensor]:
    """Return the output and what is stored then, of the reference."""
    stored = args.stored.clone()
    return reference(*args._replace(stored=stored)), stored


def got(args: Args, seed: int | None = 0) -> tuple[Tensor, Tensor]:
    """Return the output and what is stored then, of the kernel; nothing else may change."""
    copy = Args(*(each.clone() for each in args[:4]), args.candidates)
    with interpreted(seed=seed) as launches:
        out = reuse(*copy)
    assert len(launches) == 1
    for name in ("partials", "rows", "roles"):
        assert torch.equal(getattr(copy, name).view(torch.uint8), getattr(args, name).view(torch.uint8))
    return out, copy.stored


def assert_same(pair: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for one, two in zip(pair, other, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


@pytest.mark.parametrize("tiles", ["less than one", "one and a part", "two"])
@pytest.mark.parametrize("seq", [1, 7, 33])
@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("partials", [1, 4, 8])
def test_is_its_reference(partials: int, candidates: int, seq: int, tiles: str) -> None:
    _, block = _tile(candidates)
    width = {"less than one": 40, "one and a part": block + 6, "two": 2 * block}[tiles]
    dtype = list(DTYPES.values())[(partials + candidates + seq) % 3]  # each with every size, not with every pair
    args = arguments(partials, 1 if seq == 33 else 2, candidates, seq, width, dtype)
    assert_same(got(args), expected(args))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("candidates", [1, 2, 3, 4])  # three, which nobody decodes with, leave a lane empty
def test_takes_every_dtype_and_number_of_candidates(candidates: int, dtype: torch.dtype) -> None:
    args = arguments(candidates=candidates, dtype=dtype)
    assert_same(got(args), expected(args))


def test_is_what_the_pass_does_in_a_graph() -> None:
    """The reference against passes/team.py: a sum of four, in any order, is within three roundings of its parts."""
    args = arguments(dtype=torch.float32)
    out, stored = expected(args)
    in_graph = reused(args.partials.sum(0), *args[1:4])
    torch.testing.assert_close(out, in_graph, rtol=0, atol=3 * 2**-24 * float(args.partials.abs().sum(0).max()))
    assert torch.equal(stored.view_as(out), out)
    assert stored.data_ptr() != out.data_ptr()


@pytest.mark.parametrize("role", [HOT, COLD, DECODED, IDLE])
def test_only_decoded_tokens_take_what_was_stored(role: int) -> None:
    args = arguments(partials=2)
    args.roles.fill_(role)
    out, stored = got(args)
    computed = args.partials[0] + args.partials[1]
    taken = args.stored[args.rows].flatten(0, 1)
    assert torch.equal(out, taken if role == DECODED else computed.bfloat16())
    assert torch.equal(stored.flatten(0, 1), out)
    assert stored.data_ptr() != out.data_ptr()


def test_the_order_of_programs_does_not_matter() -> None:
    args = arguments()
    first = got(args, seed=None)
    for seed in range(3):
        assert_same(got(args, seed), first)


def test_nothing_leaks_from_what_is_not_taken() -> None:
    """NaN wherever nothing is to be read: in what is stored of computed tokens, in partial sums of decoded ones."""
    args = arguments()
    args.roles.copy_(torch.randint(0, 4, (2, 1, 7)).expand(2, 4, 7).reshape(8, 7))  # alike in all rows that go together
    decoded = args.roles == DECODED
    assert decoded.any()
    args.stored[~decoded] = float("nan")
    args.partials[:, decoded.flatten()] = float("nan")
    out, stored = got(args)
    assert out.isfinite().all()
    assert stored.isfinite().all()
    assert_same((out, stored), expected(args))


def test_reads_nothing_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a decoded token its stored output, of another one its partial sums, each element once."""
    read: Counter[str] = Counter()
    load = interpreter._Builder.create_masked_load

    def counted(self: object, pointers: TensorHandle, mask: TensorHandle, *rest: object) -> TensorHandle:
        read[str(pointers.get_element_ty())] += int(mask.data.sum())
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(interpreter._Builder, "create_masked_load", counted)
    args = arguments(partials=4, width=300)
    got(args)
    decoded = int((args.roles == DECODED).sum())
    assert (read["bf16"], read["fp32"]) == (decoded * 300, 4 * (args.roles.numel() - decoded) * 300)


def test_one_launch_of_one_program_for_each_place_of_a_sequence() -> None:
    with interpreted() as launches:
        reuse(*arguments(sequences=2, candidates=4, seq=7, width=300))
    assert launches == [Launch("_reuse_kernel", (2, 7, 2))]  # tiles of 256, positions, sequences


_REFUSED = {
    "stored on its side": (dict(stored=torch.zeros(7, 8, 300).transpose(0, 1)), r"stored must be .* contiguous; got"),
    "stored of another rank": (
        dict(stored=torch.zeros(56, 300)),
        r"stored must be \[R, S, H\].*got torch.float32 \[56",
    ),
    "stored integers": (dict(stored=torch.zeros(8, 7, 300, dtype=torch.int32)), r"fp32, bf16 or fp16.*got torch.int32"),
    "fp64": (dict(stored=torch.zeros(8, 7, 300).double()), r"fp32, bf16 or fp16.*got torch.float64"),
    "partials in bf16": (
        dict(partials=torch.zeros(4, 56, 300).bfloat16()),
        r"partials must be torch.float32 \[4, 56, 300",
    ),
    "other tokens": (
        dict(partials=torch.zeros(4, 55, 300)),
        r"partials must be .*\[4, 56, 300\].*got .*\[4, 55, 300\]",
    ),
    "partials on their side": (dict(partials=torch.zeros(4, 300, 56).mT), r"partials must be .*with strides"),
    "no partial": (dict(partials=torch.zeros(0, 56, 300)), "there must be at least one"),
    "rows in int32": (dict(rows=torch.zeros(8, dtype=torch.int32)), r"rows must be torch.int64 \[8\]"),
    "too few rows": (dict(rows=torch.zeros(7, dtype=torch.int64)), r"rows must be .*got torch.int64 \[7\]"),
    "roles as a mask": (dict(roles=torch.zeros(8, 7, dtype=torch.bool)), r"roles must be torch.int8 \[8, 7\]"),
    "roles of others": (dict(roles=torch.zeros(7, 8, dtype=torch.int8)), r"roles must be .*got torch.int8 \[7, 8\]"),
    "rows that are no sequences": (dict(candidates=3), "8 rows are not sequences of candidates=3 rows each"),
    "no candidate": (dict(candidates=0), "candidates=0"),
    "rows of another device": (dict(rows=torch.zeros(8, dtype=torch.int64, device="meta")), "rows must be on cpu"),
    "roles of another device": (dict(roles=torch.zeros(8, 7, dtype=torch.int8, device="meta")), "roles must be on cpu"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_bad_arguments_are_refused(case: str) -> None:
    changed, message = _REFUSED[case]
    with interpreted() as launches, pytest.raises(ValueError, match=f"reuse: .*{message}"):
        reuse(*arguments()._replace(**changed))
    assert launches == []


def test_as_an_operator() -> None:
    with interpreted():
        torch.library.opcheck(reuse, arguments(seq=2, width=40))


def test_inside_a_compiled_graph() -> None:
    """What it stores is seen by what reads `stored` later in the graph, and by the caller."""
    args = arguments()
    out, after = expected(args)

    def layer(*args: Tensor | int) -> tuple[Tensor, Tensor]:
        return torch.ops.dmoe.reuse(*args) * 2, args[1].sum(-1)

    with interpreted() as launches:
        doubled, sums = torch.compile(layer, backend="aot_eager", fullgraph=True)(*args)
    assert len(launches) == 1
    assert torch.equal(doubled, out * 2)
    assert torch.equal(sums, after.sum(-1))
    assert torch.equal(args.stored, after)


def compiled(target: str, partials: int, candidates: int, width: int, dtype: str) -> Compiled:
    kind = f"*{dtype}"
    pointers = dict(partials_ptr="*fp32", stored_ptr=kind, rows_ptr="*i64", roles_ptr="*i8", out_ptr=kind)
    lanes, block = _tile(candidates)
    constants = dict(P=partials, H=width, CANDIDATES=candidates, LANES=lanes, BLOCK=block)
    num_warps = 2 if target.startswith("gfx") else 4
    return compile(_reuse_kernel, pointers | dict(seq="i32", tokens="i32"), constants, target, num_warps=num_warps)


# LLaDA2-mini with the partial sums of a decoding step, TEAM's candidates, and a width that no tile divides.
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("partials", "candidates", "width", "dtype"),
    [(4, 1, 2048, "bf16"), (8, 4, 2048, "bf16"), (16, 4, 2880, "fp16"), (4, 4, 2048, "fp32")],
)
def test_compiles_for_every_gpu(partials: int, candidates: int, width: int, dtype: str, target: str) -> None:
    kernel = compiled(target, partials, candidates, width, dtype)
    assert (kernel.stats.spills, kernel.stats.stack, kernel.stats.shared_bytes) == (0, 0, 0)
    # A thread has 8 elements: of what is stored one access of 16 bytes, two in fp32, and two of every partial sum.
    wide = 2 if dtype == "fp32" else 1
    assert (kernel.count(LOAD_128), kernel.count(STORE_128)) == (2 * partials + wide, 2 * wide)
    check_budget(f"reuse P={partials} C={candidates} H={width} {dtype}", kernel)


def test_one_token_compiles() -> None:
    """A count of 1 is a constant to Triton."""
    pointers = dict(partials_ptr="*fp32", stored_ptr="*bf16", rows_ptr="*i64", roles_ptr="*i8", out_ptr="*bf16")
    lanes, block = _tile(1)
    constants = dict(seq=1, tokens=1, P=4, H=2048, CANDIDATES=1, LANES=lanes, BLOCK=block)
    assert compile(_reuse_kernel, pointers, constants, "sm_90", num_warps=4).stats.spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_reads_all_before_it_writes_any(target: str) -> None:
    kernel = compiled(target, 8, 4, 2048, "bf16")
    loads, barriers, stores = (
        [i for i, line in enumerate(kernel.code) if any(name in line for name in names)]
        for names in (
            ("LDG", "global_load", "buffer_load"),
            ("BAR.SYNC", "s_barrier"),
            ("STG", "global_store", "buffer_store"),
        )
    )
    assert len(barriers) == 1
    assert max(loads) < barriers[0] < min(stores)


@pytest.mark.parametrize("width", [2050, 2049])
def test_a_width_that_no_vector_divides_compiles_without_spills(width: int) -> None:
    kernel = compiled("sm_90", 8, 4, width, "bf16")
    assert kernel.stats.spills == 0
    assert not kernel.count(STORE_128)
