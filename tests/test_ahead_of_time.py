"""The compiler of tests/ahead_of_time.py sees what a kernel needs, and its budgets hold."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl

import ahead_of_time
from ahead_of_time import (
    ASYNC_COPY_128,
    LOAD_128,
    SHARED_LIMIT,
    STORE_128,
    TARGETS,
    TENSOR_CORE,
    Compiled,
    check_budget,
    compile,
)

_WARP = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64}  # threads


@triton.jit
def _scale_kernel(x_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < numel) * 2, mask=offsets < numel)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[:, None], tl.arange(0, BK)[None, :]
    total = tl.zeros((M, N), tl.float32)
    for k in tl.range(0, K, BK):
        total = tl.dot(tl.load(a_ptr + rows * K + k + inner), tl.load(b_ptr + columns * K + k + inner).T, total)
    tl.store(out_ptr + rows * N + tl.arange(0, N)[None, :], total)


def scale(target: str, block: int = 1024, num_warps: int = 4, **options: object) -> Compiled:
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "numel": "i32"}
    options = {"divisible": ["x_ptr", "out_ptr", "numel"]} | options
    return compile(_scale_kernel, signature, {"BLOCK": block}, target, num_warps=num_warps, **options)


def dot(target: str, tile: int = 64, num_stages: int = 2) -> Compiled:
    signature = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*bf16")
    constants = dict(M=tile, N=tile, BK=64, K=1024)
    return compile(_dot_kernel, signature, constants, target, num_warps=4, num_stages=num_stages)


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_that_spills_is_seen_to_spill(target: str) -> None:
    # 512 floats a thread, with their masks and addresses; a thread has 255 registers on NVIDIA and 512 on AMD.
    spilling = scale(target, block=512 * _WARP[target], num_warps=1)
    assert spilling.stats.spills > 100
    assert spilling.stats.stack > 1000
    fitting = scale(target)
    assert (fitting.stats.spills, fitting.stats.stack) == (0, 0)
    assert 4 < fitting.stats.registers < 64
    assert fitting.stats.instructions < spilling.stats.instructions


@pytest.mark.parametrize("target", TARGETS)
def test_tensor_cores_are_seen(target: str) -> None:
    assert dot(target).count(TENSOR_CORE[target])
    assert not scale(target).count(TENSOR_CORE[target])
    for other in {*TENSOR_CORE.values()} - {TENSOR_CORE[target]}:
        assert not dot(target).count(other)


@pytest.mark.parametrize("target", TARGETS)
def test_wide_accesses_are_seen(target: str) -> None:
    wide, narrow = scale(target), scale(target, divisible=[])
    expected = 1024 // (4 * 4 * _WARP[target])  # 4 warps, 4 floats at a time
    assert (wide.count(LOAD_128), wide.count(STORE_128)) == (expected, expected)
    assert (narrow.count(LOAD_128), narrow.count(STORE_128)) == (0, 0)
    assert not wide.count(ASYNC_COPY_128)
    # What a dot reads goes past the registers on NVIDIA, through them on AMD.
    assert bool(dot(target).count(ASYNC_COPY_128)) == target.startswith("sm_")
    assert bool(dot(target).count(LOAD_128)) != target.startswith("sm_")


@pytest.mark.parametrize("target", TARGETS)
def test_too_much_shared_memory_is_refused(target: str) -> None:
    held = dot(target).stats.shared_bytes
    assert 64 * 64 * 2 <= held <= SHARED_LIMIT[target]
    for _ in range(2):  # nor is it in the cache of what was compiled
        with pytest.raises(
            ValueError, match=rf"bytes of shared memory, {target} has {SHARED_LIMIT[target]}: take smaller"
        ):
            dot(target, num_stages=16)


def test_too_much_tensor_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"columns of tensor memory, sm_100 has 512: take a smaller accumulator"):
        ahead_of_time._refuse("kernel", "sm_100", scale("sm_100").stats, 1024)


def test_a_kernel_is_compiled_once() -> None:
    assert scale("sm_90") is scale("sm_90")
    others = scale("sm_80"), scale("sm_90", block=2048), scale("sm_90", num_warps=8), scale("sm_90", divisible=[])
    assert len({id(each) for each in (scale("sm_90"), *others)}) == 5


@pytest.mark.parametrize(
    ("signature", "constants", "target", "message"),
    [
        ({"x_ptr": "*fp32", "numel": "i32"}, {"BLOCK": 16}, "sm_90", "takes x_ptr, out_ptr, numel, BLOCK; signature"),
        ({"x_ptr": "*fp32", "out_ptr": "*fp32", "numel": "i32"}, {"BLOCK": 16, "numel": 3}, "sm_90", "takes x_ptr"),
        ({}, {}, "sm_70", "target 'sm_70' is not one of sm_80, sm_90, sm_100, gfx942"),
    ],
    ids=["one missing", "one twice", "unknown target"],
)
def test_wrong_arguments_are_refused(signature: dict, constants: dict, target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile(_scale_kernel, signature, constants, target)


@pytest.fixture
def budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of budgets that has recorded `scale` on all targets."""
    monkeypatch.setattr(ahead_of_time, "BUDGETS", tmp_path / "budgets.json")
    monkeypatch.setenv("DMOE_RECORD_BUDGETS", "1")
    for target in TARGETS:
        check_budget("scale", scale(target))
    monkeypatch.delenv("DMOE_RECORD_BUDGETS")
    return ahead_of_time.BUDGETS


@pytest.mark.parametrize("target", TARGETS)
def test_a_budget_that_was_recorded_holds(budgets: Path, target: str) -> None:
    check_budget("scale", scale(target))
    with pytest.raises(AssertionError, match=rf"other has no budget for {target}: .*DMOE_RECORD_BUDGETS=1"):
        check_budget("other", scale(target))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("field", ["registers", "shared_bytes", "instructions"])
def test_a_kernel_that_has_grown_is_seen(budgets: Path, target: str, field: str) -> None:
    compiled = scale(target)
    needs = getattr(compiled.stats, field)
    halved = json.loads(budgets.read_text())
    halved["scale"][target][field] = needs // 2 if needs else -1
    budgets.write_text(json.dumps(halved))
    with pytest.raises(
        AssertionError, match=rf"scale on {target} has grown: {field} -?\d+ -> {needs}\. If it is worth"
    ):
        check_budget("scale", compiled)


def test_a_tenth_is_no_growth(budgets: Path) -> None:
    compiled = scale("sm_90")
    for factor, grows in [(1.09, False), (1.2, True), (0.5, False)]:
        stats = replace(compiled.stats, instructions=int(compiled.stats.instructions * factor))
        if grows:
            with pytest.raises(AssertionError, match="has grown: instructions"):
                check_budget("scale", replace(compiled, stats=stats))
        else:
            check_budget("scale", replace(compiled, stats=stats))


def test_recording_keeps_what_others_recorded(budgets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(budgets.read_text())
    monkeypatch.setenv("DMOE_RECORD_BUDGETS", "1")
    check_budget("other", scale("sm_80"))
    after = json.loads(budgets.read_text())
    assert after == before | {"other": {"sm_80": before["scale"]["sm_80"]}}


def test_two_processes_can_record(budgets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads and writes while the other waits: no entry is lost."""
    monkeypatch.setenv("DMOE_RECORD_BUDGETS", "1")
    compiled = scale("sm_80")
    with ThreadPoolExecutor() as pool:  # the lock is of the open file, so it holds between threads as well
        list(pool.map(lambda i: check_budget(f"kernel {i}", compiled), range(50)))
    assert len(json.loads(budgets.read_text())) == 51
