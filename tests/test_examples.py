"""The examples run and print what they are about: nightly as a user runs them, else without generated C++."""

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


ATEN = "import runpy, sys, torch._inductor.config as c; c.fallback_by_default = True; runpy.run_path(sys.argv[1])"


@pytest.mark.parametrize("how", [("-c", ATEN), pytest.param((), marks=pytest.mark.nightly)], ids=["quick", "as it is"])
@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, how: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-P", *how, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for words in SAYS[name]:
        assert words in done.stdout
