"""The interpreter of Triton kernels: what it runs, counts and catches, and that nothing of it stays."""

from __future__ import annotations

import os
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
from reductions import reduce_kernel


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
    hashes = [kernel.hash for kernel in (_copy_kernel, reduce_kernel, tl.sum, tl.sort)]
    with interpreted():
        reduce_kernel[(1,)](x, out, OP="third", BLOCK=16)
        between_launches = _changed(_AT_IMPORT, _attributes())
        assert between_launches == [f"{triton.JITFunction!r}.run"]
        with pytest.raises(OutOfBounds):
            _copy_kernel[(1,)](x, out, 0, 16, 16, BLOCK=16)
        with pytest.raises(NameError), interpreted():
            _nameless_kernel[(1,)](x)
        reduce_kernel[(1,)](x, out, OP="sum", BLOCK=16)  # the outer one goes on
    assert _changed(_AT_IMPORT, _attributes()) == []
    assert hashes == [kernel.hash for kernel in (_copy_kernel, reduce_kernel, tl.sum, tl.sort)]


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
