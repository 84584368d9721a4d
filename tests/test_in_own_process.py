"""The tests that make torch believe in a GPU, each file in a process of its own.

What Inductor decides once in a process, and keeps, it decides by the devices that it sees then: after such a test,
others compiled other code.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "in_own_process").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_a_process_of_its_own(file: Path, pytestconfig: pytest.Config) -> None:
    """It ends with 0 only if tests were collected and all passed."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "--tb=short", "-p", "no:cacheprovider", str(file)]
    command += ["--nightly"] if pytestconfig.getoption("--nightly") else []
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_there_are_some() -> None:
    assert len(FILES) == 3
