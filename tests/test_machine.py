"""What the machine does at best: measured once, and kept where a broken file is no error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dmoe_compile.passes.cost import Machine

from dmoe_compile import machine as module
from dmoe_compile.machine import machine, measure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "dmoe"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    calls: list[torch.dtype] = []

    def count(_: torch.device, dtype: torch.dtype) -> Machine:
        calls.append(dtype)
        return Machine(10.0 * len(calls), 0.5)

    monkeypatch.setattr(module, "measure", count)
    return calls


def test_measures_what_no_computer_exceeds() -> None:
    """Between a tenth of a slow laptop and ten times the fastest server of 2026."""
    found = measure(CPU, torch.float32)
    assert 0.3 < found.gb_per_s < 10_000
    assert 0.001 < found.tflop_per_s < 1_000


def test_is_measured_once_for_each_dtype(measured: list[torch.dtype]) -> None:
    first = machine(CPU, torch.bfloat16)
    assert machine(CPU, torch.bfloat16) == first == Machine(10.0, 0.5)
    assert machine(CPU, torch.float32) == Machine(20.0, 0.5)
    assert measured == [torch.bfloat16, torch.float32]


def test_other_threads_are_another_machine(measured: list[torch.dtype]) -> None:
    before = torch.get_num_threads()
    machine(CPU, torch.float32)
    try:
        torch.set_num_threads(before + 1)
        machine(CPU, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert len(measured) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}', '{"x": ["fast", 1]}', "\x00"])
def test_a_broken_file_is_replaced(text: str, folder: Path, measured: list[torch.dtype]) -> None:
    folder.mkdir()
    (folder / "machine.json").write_text(text)
    assert machine(CPU, torch.float32) == Machine(10.0, 0.5)
    assert machine(CPU, torch.float32) == Machine(10.0, 0.5)
    assert len(measured) == 1
    assert [path.name for path in folder.iterdir()] == ["machine.json"]


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path, measured: list[torch.dtype]) -> None:
    folder.write_text("a file stands where the folder should be")
    assert machine(CPU, torch.float32) == Machine(10.0, 0.5)
    assert machine(CPU, torch.float32) == Machine(20.0, 0.5)
