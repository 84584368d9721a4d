"""The interpreter of Triton kernels: what it computes, counts and catches, and that nothing of it stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import triton_op, wrap_triton
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter as stock

from dmoe_compile.testing.interpreter import _PATCHED, Launch, OutOfBounds, Traffic, interpreted


@triton.jit
def _copy_kernel(x_ptr, out_ptr, start, numel, stop, BLOCK: tl.constexpr):
    offsets = start + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < numel, other=0)
    tl.store(out_ptr + offsets, x, mask=offsets < stop)


@triton_op("dmoe_tests::copy", mutates_args=())
def copy(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    wrap_triton(_copy_kernel)[(triton.cdiv(x.numel(), 16),)](x, out, 0, x.numel(), x.numel(), BLOCK=16, num_warps=4)
    return out


def test_a_launch_through_an_operator_is_interpreted() -> None:
    x = torch.randn(3, 33)
    with interpreted() as launches:
        assert torch.equal(torch.ops.dmoe_tests.copy(x), x)
    assert launches == [Launch("_copy_kernel", (7, 1, 1))]


def test_traffic_is_counted_by_request_by_sector_and_by_wave() -> None:
    """40 floats in three programs; and 16 again and again, by stride 0, in three programs of which two run at once."""
    x, out = torch.randn(40), torch.empty(40)
    with interpreted(wave=2) as launches:
        wrap_triton(_copy_kernel)[(3,)](x, out, 0, 40, 33, BLOCK=16)
        wrap_triton(_product_kernel)[(3,)](x, out, BLOCK=16)
    copied, multiplied = launches
    assert copied.traffic == {"x_ptr": Traffic(160, 160, 160), "out_ptr": Traffic(33 * 4, 5 * 32, 5 * 32)}
    assert copied.flops == 0
    assert multiplied.traffic == dict.fromkeys(["x_ptr", "out_ptr"], Traffic(3 * 256 * 4, 64, 2 * 64))
    assert multiplied.flops == 3 * 2 * 16**3


def test_traffic_is_not_counted_unless_asked_for() -> None:
    with interpreted() as launches:
        copy(torch.randn(33))
    assert not launches[0].traffic


@pytest.mark.parametrize("wrong", [{"wave": 0}, {"wave": 2, "seed": 1}, {"wave": 2, "check_bounds": False}], ids=str)
def test_traffic_that_cannot_be_counted_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="traffic is counted for waves"), interpreted(**wrong):
        pass


@triton.jit
def _product_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[None, :] + 0 * tl.arange(0, BLOCK)[:, None]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x, input_precision="ieee"))


def test_a_launch_through_wrap_triton_is_interpreted() -> None:
    x, out = torch.randn(33), torch.empty(33)
    with interpreted() as launches:
        wrap_triton(_copy_kernel)[lambda meta: (triton.cdiv(33, meta["BLOCK"]),)](x, out, 0, 33, 33, BLOCK=16)
    assert torch.equal(out, x)
    assert launches == [Launch("_copy_kernel", (3, 1, 1))]


def test_an_operator_inside_a_compiled_graph_is_interpreted() -> None:
    x = torch.randn(33)
    with interpreted() as launches:
        assert torch.equal(torch.compile(lambda x: copy(x) + 1, backend="aot_eager")(x), x + 1)
    assert [launch.name for launch in launches] == ["_copy_kernel"]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(
    ("start", "numel", "stop", "found"),
    [
        (
            0,
            34,
            33,
            r"program \(2, 0, 0\): load of 4 bytes, 4 bytes past the end of x_ptr, 1 of 16 lanes;.*x = tl.load",
        ),
        (0, 33, 35, r"program \(2, 0, 0\): store of 4 bytes, 4 bytes past the end of out_ptr, 2 of 16 lanes"),
        (-2, 33, 33, r"program \(0, 0, 0\): load of 4 bytes, 8 bytes before x_ptr, 2 of 16 lanes"),
    ],
    ids=["load", "store", "before"],
)
def test_an_access_outside_its_tensor_is_found(start: int, numel: int, stop: int, found: str, seed: int | None) -> None:
    # Rows of one tensor: whatever is read or written past one of them is another's, so an address alone tells nothing.
    _, x, out, _ = torch.zeros(4, 33)
    with interpreted(seed=seed), pytest.raises(OutOfBounds, match=found):
        _copy_kernel[(3,)](x, out, start, numel, stop, BLOCK=16)


def test_what_lies_between_the_elements_of_a_view_is_its_own() -> None:
    x = torch.arange(40.0).view(20, 2)[:, 0]  # 20 elements over 39
    out = torch.empty(39)
    with interpreted():
        _copy_kernel[(3,)](x, out, 0, 39, 39, BLOCK=16)
        assert out[38] == 38
        with pytest.raises(OutOfBounds, match="4 bytes past the end of x_ptr"):
            _copy_kernel[(3,)](x, out, 0, 40, 39, BLOCK=16)


def test_an_empty_tensor_has_no_element() -> None:
    with interpreted(), pytest.raises(OutOfBounds, match="past the end of x_ptr"):
        _copy_kernel[(1,)](torch.empty(4, 0), torch.empty(16), 0, 1, 16, BLOCK=16)


def test_unchecked_where_it_is_asked() -> None:
    rows = torch.tensor([[1.0] * 16, [2.0] * 16, [3.0] * 16])
    with interpreted(check_bounds=False):
        _copy_kernel[(2,)](rows[0], rows[1], 0, 32, 17, BLOCK=16)
    assert rows[2, 0] == 1


@triton.jit
def _atomic_kernel(out_ptr, at):
    tl.atomic_add(out_ptr + at, 1)


def test_an_atomic_outside_its_tensor_is_found() -> None:
    counts = torch.zeros(4, dtype=torch.int32)
    with interpreted():
        _atomic_kernel[(5,)](counts, 3)
        assert counts.tolist() == [0, 0, 0, 5]
        with pytest.raises(OutOfBounds, match="atomic of 4 bytes, 4 bytes past the end of out_ptr"):
            _atomic_kernel[(5,)](counts, 4)


@triton.jit
def _mean_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, RACES: tl.constexpr):
    """out = x less what the program before has: right from x, a race from out."""
    program = tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    before = tl.load((out_ptr if RACES else x_ptr) + offsets - BLOCK, mask=offsets >= BLOCK, other=0)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets) - before)


@pytest.mark.parametrize("races", [False, True])
def test_what_depends_on_the_order_of_programs_is_seen(races: bool) -> None:
    x = torch.randn(8 * 16)
    results = []
    for seed in [None, 0, 1, 2]:
        out = torch.zeros_like(x)
        with interpreted(seed=seed):
            _mean_kernel[(8,)](x, out, BLOCK=16, RACES=races)
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:]) != races


def test_an_order_can_be_drawn_again() -> None:
    def orders(seed: int) -> list[Tensor]:
        x, outs = torch.arange(128.0), [torch.zeros(128), torch.zeros(128)]
        with interpreted(seed=seed):
            for out in outs:
                _mean_kernel[(8,)](x, out, BLOCK=16, RACES=True)
        return outs

    assert all(torch.equal(a, b) for a, b in zip(orders(5), orders(5), strict=True))
    assert not torch.equal(*orders(5))  # each launch has an order of its own


# Every kind of bf16 value, and 4096 of its bit patterns: signs, subnormals, both infinities, NaN.
_SPECIAL = [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1]


def _bf16(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 1 << 16, (4096,), generator=generator)
    patterns[:2048] = patterns[:2048] % 0x1000 + 0x3800  # half of them of like size, where sums are rounded
    special = torch.tensor(_SPECIAL)
    patterns[: 14 * 14] = special.repeat_interleave(14) if seed % 2 else special.repeat(14)  # every pair of them
    return patterns.to(torch.int16).view(torch.bfloat16)


def _same(got: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors have the same bits; those of NaN may differ, torch's own vary by code path."""
    if got.dtype != expected.dtype:
        return False
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    nan = expected.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(got.view(bits)[~nan], expected.view(bits)[~nan])


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "lt":
        out = x < y
    elif OP == "not lt":
        out = ~(x < y)
    elif OP == "le":
        out = x <= y
    elif OP == "gt":
        out = x > y
    elif OP == "ge":
        out = x >= y
    elif OP == "eq":
        out = x == y
    elif OP == "ne":
        out = x != y
    elif OP == "fmin":
        out = tl.minimum(x, y)
    elif OP == "fmax":
        out = tl.maximum(x, y)
    elif OP == "minimum":
        out = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        out = tl.clamp(x, -1.0, 2.0)
    elif OP == "clamp or NaN":
        out = tl.clamp(x, -1.0, 2.0, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "where":
        out = tl.where(x > y, x, y)
    elif OP == "neg":
        out = -x * tl.full((BLOCK,), 3, tl.bfloat16)
    elif OP == "abs":
        out = tl.abs(x)
    tl.store(out_ptr + offsets, out)


_BINARY = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "lt", "le", "gt", "ge", "eq", "ne")},
    # Not torch.fmin: of a signalling NaN it makes NaN, a GPU doesn't.
    "fmin": lambda x, y: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y))),
    "fmax": lambda x, y: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y))),
    "minimum": torch.minimum,
    "clamp": lambda x, y: torch.where(x > 2, 2.0, torch.where(x >= -1, x, -1.0)).bfloat16(),
    "clamp or NaN": lambda x, y: x.clamp(-1, 2),
    "not lt": lambda x, y: ~(x < y),
    "where": lambda x, y: torch.where(x > y, x, y),
    "neg": lambda x, y: (0 - x) * 3,  # Triton has no other negation, so -0 stays +0
    "abs": lambda x, y: x.abs(),
}


@pytest.mark.parametrize("op", _BINARY)
def test_bf16_arithmetic_is_torchs(op: str) -> None:
    x, y = _bf16(0), _bf16(1)
    expected = _BINARY[op](x, y)
    out = torch.empty_like(expected)
    with interpreted():
        _binary_kernel[(4,)](x, y, out, OP=op, BLOCK=1024)
    if op in ("fmin", "fmax", "minimum"):  # of two zeros either
        out, expected = out + 0, expected + 0
    assert _same(out, expected)


def test_the_tests_of_bf16_can_fail() -> None:
    """One bit, the sign of zero and a NaN are differences."""
    x = torch.tensor([0.0, 1.0, float("nan")], dtype=torch.bfloat16)
    assert _same(x, x.clone())
    assert not _same(x, torch.tensor([-0.0, 1.0, float("nan")], dtype=torch.bfloat16))
    assert not _same(x, torch.tensor([0.0, 1.0078125, float("nan")], dtype=torch.bfloat16))
    assert not _same(x, torch.tensor([0.0, 1.0, 1.0], dtype=torch.bfloat16))
    assert not _same(x, x.float())


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(out_ptr.dtype.element_ty))


def _near_bf16() -> Tensor:
    """fp32 at, just below and just above the middle between two bf16, where the rounding shows."""
    bits = (_bf16(2).view(torch.int16).to(torch.int32) << 16)[:1024]
    return torch.cat([bits + 0x7FFF, bits + 0x8000, bits + 0x8001, bits]).view(torch.float32)


_CASTS = {
    "to fp32": (lambda: _bf16(0), torch.float32),
    "to fp16": (lambda: _bf16(0), torch.float16),
    "to int32": (lambda: _bf16(0).nan_to_num(0).clamp(-1e9, 1e9), torch.int32),  # beyond, a GPU saturates
    "from fp32": (_near_bf16, torch.bfloat16),
    "from fp16": (lambda: torch.randint(-(2**15), 2**15, (4096,)).to(torch.int16).view(torch.float16), torch.bfloat16),
    "from int32": (lambda: torch.randint(-(2**24), 2**24, (4096,), dtype=torch.int32), torch.bfloat16),
}


@pytest.mark.parametrize("cast", _CASTS)
def test_bf16_casts_are_torchs(cast: str) -> None:
    make, dtype = _CASTS[cast]
    x = make()
    out = torch.empty(x.shape, dtype=dtype)
    with interpreted():
        _cast_kernel[(4,)](x, out, BLOCK=1024)
    assert _same(out, x.to(dtype))


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.fma(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)))


def _rounded(value: Fraction, dtype: torch.dtype) -> float:
    """Return the number of a dtype that is nearest, ties to even, from the definition."""
    guess = torch.tensor(float(value)).to(dtype)
    infinite = torch.tensor(float("inf"), dtype=dtype)
    near = [torch.nextafter(guess, -infinite), guess, torch.nextafter(guess, infinite)]
    bits = torch.int16 if guess.element_size() == 2 else torch.int32
    return min(near, key=lambda x: (abs(Fraction(x.item()) - value), int(x.view(bits)) & 1)).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    x, y, z = (torch.randn(3, 256) * torch.tensor([1.0, 1.0, 2.0**-6]).unsqueeze(1)).to(dtype)
    # Products in the middle between two numbers; a summand decides that in bf16 and fp32 is too small for fp64 to see.
    x[:4], y[:4] = 1 + torch.finfo(dtype).eps, 1.5
    z[:4] = torch.tensor([0.0, 1.0, -1.0, 2.0]) * torch.finfo(dtype).tiny
    out = torch.empty_like(x)
    with interpreted():
        _fma_kernel[(1,)](x, y, z, out, BLOCK=256)
    for a, b, c, got in zip(x.tolist(), y.tolist(), z.tolist(), out.tolist(), strict=True):
        assert got == _rounded(Fraction(a) * Fraction(b) + Fraction(c), dtype)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + rows * SIZE + columns), tl.load(b_ptr + rows * SIZE + columns)
    total = tl.full((SIZE, SIZE), 0.25, tl.float32)
    tl.store(out_ptr + rows * SIZE + columns, tl.dot(a, b.T, total, input_precision=PRECISION))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_torchs(dtype: torch.dtype) -> None:
    # Eighths up to 15: every partial sum is exact in fp32, whatever its order, and none is in bf16 or fp16.
    a, b = torch.randint(-120, 121, (2, 64, 64)).div(8).to(dtype)
    out = torch.empty(64, 64)
    with interpreted():
        _dot_kernel[(1,)](a, b, out, SIZE=64, PRECISION="ieee")
    assert torch.equal(out, a.float() @ b.float().T + 0.25)
    assert dtype == torch.float32 or not torch.equal(out, out.to(dtype).float())


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, 4)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + rows * BLOCK + columns)
    if OP == "sum":
        out = tl.sum(x, 1)
    elif OP == "amax":
        out = x.max(1)
    elif OP == "argmax":
        out = tl.argmax(x, 1)
    elif OP == "argmin":
        out = tl.argmin(x, 1)
    elif OP == "total":
        out = tl.sum(x) + tl.zeros((4,), tl.float32)
    elif OP == "product":
        out = tl.reduce(x, 1, _product)
    elif OP == "last product":
        out = tl.sum(tl.where(columns == BLOCK - 1, tl.cumprod(x, 1), 0), 1)
    elif OP == "third sum":
        out = tl.sum(tl.where(columns == 2, tl.cumsum(x, 1, reverse=True), 0), 1)
    elif OP == "third":
        out = tl.sum(tl.where(columns == 2, tl.sort(x, 1, descending=True), 0), 1)
    tl.store(out_ptr + tl.arange(0, 4), out)


@triton.jit
def _product(a, b):
    return a * b


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1),
    "amax": lambda x: x.amax(1),
    "argmax": lambda x: x.argmax(1).float(),
    "argmin": lambda x: x.argmin(1).float(),
    "total": lambda x: x.sum().expand(4),
    "product": lambda x: x.prod(1),
    "last product": lambda x: x.prod(1),
    "third sum": lambda x: x[:, 2:].sum(1),
    "third": lambda x: x.sort(1, descending=True).values[:, 2],
}


@pytest.mark.parametrize("op", _REDUCTIONS)
def test_reductions_are_torchs(op: str) -> None:
    x = torch.randint(1, 3, (4, 16)).float()  # few values, so many ties, and every sum and product exact
    out = torch.empty(4)
    with interpreted():
        _reduce_kernel[(1,)](x, out, OP=op, BLOCK=16)
    assert torch.equal(out, _REDUCTIONS[op](x))


def test_a_maximum_drops_nan() -> None:
    x = torch.randn(4, 16)
    x[:, 3] = float("nan")
    out = torch.empty(4)
    with interpreted():
        _reduce_kernel[(1,)](x, out, OP="amax", BLOCK=16)
    assert torch.equal(out, x.nan_to_num(-float("inf")).amax(1))


_BF16, _NAN = torch.ones(4, 16, dtype=torch.bfloat16), torch.full((4, 16), float("nan"))
_REFUSED = {
    "a sum in bf16": (lambda: _reduce_kernel[(1,)](_BF16, torch.empty(4), "sum", 16), "take it in fp32"),
    "argmax of NaN": (lambda: _reduce_kernel[(1,)](_NAN, torch.empty(4), "argmax", 16), "replace NaN first"),
    "a dot in tf32": (lambda: _dot_kernel[(1,)](*torch.ones(3, 16, 16), 16, "tf32"), "pass input_precision='ieee'"),
    "fma in fp64": (lambda: _fma_kernel[(1,)](*torch.ones(4, 16).double(), 16), "none that rounds once"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_has_no_defined_result_is_refused(case: str) -> None:
    launch, message = _REFUSED[case]
    with interpreted(), pytest.raises(TypeError, match=message):
        launch()


def test_a_launch_without_data_is_refused() -> None:
    x = torch.empty(16, device="meta")
    with interpreted(), pytest.raises(ValueError, match="x_ptr is a Tensor on meta: only"):
        _copy_kernel[(1,)](x, x, 0, 16, 16, BLOCK=16)
    with FakeTensorMode():
        x = torch.empty(16)
    with interpreted(), pytest.raises(ValueError, match="x_ptr is a FakeTensor on cpu: only"):
        _copy_kernel[(1,)](x, x, 0, 16, 16, BLOCK=16)


@triton.autotune([triton.Config({"BLOCK": 16}, num_warps=2)], key=["numel"])
@triton.jit
def _tuned_kernel(x_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < numel), mask=offsets < numel)


def test_a_kernel_with_one_configuration_is_interpreted() -> None:
    x, out = torch.randn(33), torch.empty(33)
    with interpreted() as launches:
        wrap_triton(_tuned_kernel)[lambda meta: (triton.cdiv(33, meta["BLOCK"]),)](x, out, 33)
    assert torch.equal(out, x)
    assert launches == [Launch("_tuned_kernel", (3, 1, 1))]


def _attributes() -> dict[str, Any]:
    """Return all that may be patched: Triton's language, its functions and its interpreter."""
    spaces: list[Any] = [*_PATCHED, stock, stock.InterpreterBuilder, stock.interpreter_semantic, tl.standard]
    spaces += [stock.ReduceOps, stock.ScanOps]
    found = {f"{space!r}.{name}": value for space in spaces for name, value in vars(space).items()}
    found = {name: value for name, value in found.items() if not name.endswith(".__slotnames__")}  # pickle's cache
    return found | {"interpret": triton.knobs.runtime.interpret, "environment": os.environ.get("TRITON_INTERPRET")}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) is not after.get(name))


_AT_IMPORT = _attributes()  # before any test of this process could leave something behind


def test_nothing_stays_patched() -> None:
    x, out = torch.randn(4, 16), torch.empty(4)
    hashes = [kernel.hash for kernel in (_copy_kernel, _reduce_kernel, tl.sum, tl.sort)]
    with interpreted():
        _reduce_kernel[(1,)](x, out, OP="third", BLOCK=16)
        between_launches = _changed(_AT_IMPORT, _attributes())
        assert between_launches == [f"{triton.JITFunction!r}.run"]
        with pytest.raises(OutOfBounds):
            _copy_kernel[(1,)](x, out, 0, 16, 16, BLOCK=16)
        with pytest.raises(NameError), interpreted():
            _nameless_kernel[(1,)](x)
        _reduce_kernel[(1,)](x, out, OP="sum", BLOCK=16)  # the outer one goes on
    assert _changed(_AT_IMPORT, _attributes()) == []
    assert hashes == [kernel.hash for kernel in (_copy_kernel, _reduce_kernel, tl.sum, tl.sort)]


@triton.jit
def _nameless_kernel(x_ptr):
    tl.store(x_ptr, np.zeros(1))  # noqa: F821 -- no such name here; the stock interpreter would lend its own


def test_a_kernel_compiles_between_its_launches() -> None:
    def compiled() -> str:
        source = triton.compiler.ASTSource(
            _copy_kernel,
            signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "start": "i32", "numel": "i32", "stop": "i32"},
            constexprs={"BLOCK": 16},
        )
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    x, out = torch.randn(2, 16)
    with interpreted():
        _copy_kernel[(1,)](x, out, 0, 16, 16, BLOCK=16)
        assert ".target sm_90" in compiled()
        _copy_kernel[(1,)](x, out, 0, 16, 16, BLOCK=16)
    assert torch.equal(out, x)


def test_a_kernel_may_use_what_its_function_has() -> None:
    """A kernel defined in a function, with a constant and a helper of that function."""
    step: tl.constexpr = tl.constexpr(2)

    @triton.jit
    def twice(x, FACTOR: tl.constexpr = 2):
        return x * FACTOR

    @triton.jit
    def kernel(x_ptr, bias_ptr, out_ptr, count):
        total = 0.0
        for i in tl.range(0, count, step):
            total += twice(tl.load(x_ptr + i))
        if bias_ptr is not None:
            total += tl.load(bias_ptr)
        tl.store(out_ptr, total)

    x, out = torch.arange(8.0), torch.empty(1)
    with interpreted():
        kernel[(1,)](x, None, out, 8)
        assert out == 2 * (0 + 2 + 4 + 6)
        kernel[(1,)](x, x[1:], out, 8)
        assert out == 2 * (0 + 2 + 4 + 6) + 1
