"""C++ kernels: built once and shared, and done without where they can't be built."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dmoe_compile.kernels import cover, native
from torch._inductor import config

SOURCES = sorted(path.stem for path in Path(native.__file__).parent.glob("*.cpp"))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.parametrize("name", SOURCES)
def test_builds_here(name: str) -> None:
    assert native.library(name) is not None
    assert '#include "' not in native.source(name)  # the cache goes by the text: nothing of ours may lie outside


def test_without_a_compiler_pytorch_runs_instead(caplog: pytest.LogCaptureFixture) -> None:
    weights, ids = torch.rand(1, 4, 8).topk(3)
    args = ids, weights, torch.ones(1, 4, dtype=torch.bool), 8, 0.9, 8
    expected = cover.launch(*args)
    native.library.cache_clear()
    with config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        assert torch.equal(cover.launch(*args), expected)
        assert torch.equal(cover.launch(*args), expected)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "kernels/cover.cpp can't be built (InvalidCxxCompiler" in record.message
    assert "apt install g++" in record.message


def test_processes_may_start_at_once(tmp_path: Path) -> None:
    code = "from dmoe_compile.kernels.native import library; assert library('cover') is not None"
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    running = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, cwd=tmp_path) for _ in range(3)]
    results = [(each.communicate()[1].decode(), each.returncode) for each in running]
    assert results == [("", 0)] * 3
