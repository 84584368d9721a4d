"""`dmoe doctor`: what it finds here, and what it says of an installation that lacks something."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dmoe_compile.kernels import experts_cpu
from typer.testing import CliRunner

from dmoe_compile import bench, cli, doctor


def found(name: str) -> doctor.Finding:
    (finding,) = (each for each in doctor.examine() if each.what == name)
    return finding


def test_this_installation_is_whole(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--json", str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 0, result.output
    rows = {row["what"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert rows["torch"]["found"] == torch.__version__
    assert (
        rows["backend"]["verdict"] == rows["C++ compiler"]["verdict"] == rows["expert kernel, CPU"]["verdict"] == "ok"
    )
    assert rows["expert kernel, CPU"]["found"] == f"builds, for {experts_cpu.best_isa()}"
    assert rows["extra eval"]["verdict"] == "ok"
    assert rows["extra eval"]["device"]
    assert all(what.split()[0] in result.output for what in rows)


def test_a_missing_compiler_is_said_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise ValueError("Inductor needs a C++ compiler and finds none; install one")

    monkeypatch.setattr(doctor, "require_compiler", none)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "finds none; install one" in " ".join(result.output.split())
    assert "dmoe: missing: C++ compiler" in result.output


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr(bench, "version", version)
    finding = found("transformers")
    assert (finding.verdict, finding.way_out) == ("missing", "pip install transformers")
    assert found("CPU").verdict == "ok"
    assert all(row["transformers"] is None for row in doctor.rows([finding]))


def test_what_an_extra_lacks_is_said_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "eval", (("matplotlib", "no_such_package"), "dmoe eval"))
    finding = found("extra eval")
    assert finding.verdict == "note"
    assert finding.found == "without no_such_package"
    assert finding.way_out == "for dmoe eval: pip install 'dmoe-compile[eval]'"


def test_a_kernel_that_can_t_be_built_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_cpu, "available", lambda dtype: False)
    assert found("expert kernel, CPU").verdict == "note"


def test_a_full_disk_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "_ROOM_GB", 1e9)
    finding = found("compile cache")
    assert finding.verdict == "note"
    assert str(tmp_path) in finding.found
    assert "TORCHINDUCTOR_CACHE_DIR" in finding.way_out


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that even root can't write")
def test_a_cache_that_can_t_be_written_is_said_with_all_else() -> None:
    """In a process of its own: torch._dynamo fails on import where there is no cache."""
    dmoe = str(Path(sys.executable).with_name("dmoe"))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": "/proc/no/such", "CXX": "no-such-compiler"}  # builds no kernel
    done = subprocess.run([dmoe, "doctor"], capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("dmoe: missing: C++ compiler, compile cache; see above\n")
    words = " ".join(done.stdout.split())
    assert "/proc/no/such can't be written" in words
    assert "torch.compile knows" in words


def test_a_file_that_is_gone_by_now_has_no_size(tmp_path: Path) -> None:
    assert doctor._bytes(str(tmp_path / "gone")) == 0
