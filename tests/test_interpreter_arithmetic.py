"""The interpreter of Triton kernels computes what torch does, in bf16 too, and refuses what is not defined."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe_compile.testing.interpreter import interpreted
from reductions import reduce_kernel

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
        reduce_kernel[(1,)](x, out, OP=op, BLOCK=16)
    assert torch.equal(out, _REDUCTIONS[op](x))


def test_a_maximum_drops_nan() -> None:
    x = torch.randn(4, 16)
    x[:, 3] = float("nan")
    out = torch.empty(4)
    with interpreted():
        reduce_kernel[(1,)](x, out, OP="amax", BLOCK=16)
    assert torch.equal(out, x.nan_to_num(-float("inf")).amax(1))


_BF16, _NAN = torch.ones(4, 16, dtype=torch.bfloat16), torch.full((4, 16), float("nan"))
_REFUSED = {
    "a sum in bf16": (lambda: reduce_kernel[(1,)](_BF16, torch.empty(4), "sum", 16), "take it in fp32"),
    "argmax of NaN": (lambda: reduce_kernel[(1,)](_NAN, torch.empty(4), "argmax", 16), "replace NaN first"),
    "a dot in tf32": (lambda: _dot_kernel[(1,)](*torch.ones(3, 16, 16), 16, "tf32"), "pass input_precision='ieee'"),
    "fma in fp64": (lambda: _fma_kernel[(1,)](*torch.ones(4, 16).double(), 16), "none that rounds once"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_has_no_defined_result_is_refused(case: str) -> None:
    launch, message = _REFUSED[case]
    with interpreted(), pytest.raises(TypeError, match=message):
        launch()
