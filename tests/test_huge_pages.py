"""Huge pages: memory really lies on them, nothing else about it changes, and what can't be had is said."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dmoe_compile
import zoo
from dmoe_compile import Config, huge_pages

MIB = 2**20
SMAPS = Path("/proc/self/smaps")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def on_huge_pages(tensor: Tensor) -> int:
    """Bytes on huge pages of the mappings that a tensor lies in, as Linux tells."""
    begin, inside, found = tensor.data_ptr(), False, 0
    for line in SMAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, end = (int(each, 16) for each in span.groups())
            inside = first < begin + tensor.nbytes and begin < end
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found


def collapses() -> bool:
    """Whether this system does it: Linux 6.1, with transparent huge pages built in, and not for all memory anyway."""
    if not SETTING.exists() or "[always]" in SETTING.read_text():
        return False
    held = torch.ones(8 * MIB, dtype=torch.uint8)
    inside = -(-held.data_ptr() // (2 * MIB)) * 2 * MIB
    return SMAPS.exists() and huge_pages._collapse(inside, 2 * MIB) == ""


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    huge_pages._warn.cache_clear()


@pytest.mark.skipif(not collapses(), reason="this system has no MADV_COLLAPSE, or no small pages")
def test_memory_lies_on_huge_pages_with_its_values_and_address() -> None:
    # More than malloc ever keeps: fresh pages, of which no earlier test has asked anything.
    weights = torch.arange(64 * MIB // 4, dtype=torch.int32)
    before, at = weights.clone(), weights.data_ptr()
    assert on_huge_pages(weights) == 0
    used = huge_pages.use([weights])
    assert 60 * MIB <= used <= 64 * MIB  # all but the edges
    assert on_huge_pages(weights) >= used
    assert torch.equal(weights, before)
    assert weights.data_ptr() == at


def test_small_tensors_and_other_devices_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert huge_pages.use([torch.ones(100), torch.ones(8 * MIB, device="meta")]) == 0
    assert not caplog.records


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_what_can_not_be_had_is_said_once(
    system: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr(huge_pages, "_COLLAPSE", 99)  # advice that no kernel knows
    weights = torch.ones(16 * MIB, dtype=torch.uint8)
    for _ in range(2):
        assert huge_pages.use([weights]) == 0
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert ("madvise failed with error 22" if system == "linux" else "darwin has no madvise") in record.message


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize("passes", [(), ("dmoe",), ("team",)], ids=str)
def test_the_option_takes_the_experts_of_a_compiled_model(
    passes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(huge_pages, "use", lambda tensors: given.extend(tensors))
    model = zoo.build("qwen3_moe")
    with torch.no_grad():
        dmoe_compile.compile(model, Config(passes=passes, huge_pages=True))(**zoo.inputs("qwen3_moe"))
        weights = {parameter.data_ptr() for parameter in model.parameters() if parameter.dim() == 3}
        assert {each.data_ptr() for each in given} == weights
        given.clear()
        torch._dynamo.reset()
        dmoe_compile.compile(model, Config(passes=passes))(**zoo.inputs("qwen3_moe"))
    assert not given
