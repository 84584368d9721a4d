"""The examples run as a user runs them, and print what they are about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "decode.py": ("no pass: ", "team+cover: ", "Answer: 9", "committed"),
    "any_model.py": ("model.layers.1.mlp", "rewritten"),
    "own_policy.py": ("no pass: ", "first_choices.size", "cover.mass"),
    "diffusers_pipeline.py": ("38 40 43 59 77 99", "forwards; experts of the last"),
}


def test_every_example_is_run() -> None:
    assert {each.name for each in EXAMPLES.glob("*.py")} == SAYS.keys()


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for words in SAYS[name]:
        assert words in done.stdout
