"""The documentation: that it has every option and every page, and that its code is Python."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dmoe_compile.config import known_keys

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in [ROOT / "README.md", *PAGES]
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.fixture(scope="module")
def written() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_options", ROOT / "docs" / "write_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_option_is_on_its_page_with_what_it_means(written: ModuleType) -> None:
    from torch._inductor import list_options

    rows = [line for line in written.lines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [key for key in known_keys() if key not in set(list_options())]
    assert all(len(row.split(" | ")[2]) > 12 for row in rows)
    assert "| `dmoe.top_p` | `0.6` | share of the votes" in "\n".join(rows)


def test_the_page_of_options_is_up_to_date(written: ModuleType) -> None:
    """Otherwise: python -P docs/write_options.py."""
    text = (ROOT / "docs" / "options.md").read_text()
    assert text == written.page()
    assert text.startswith("# Options\n\nKeys of")
    assert text.count("`team.cache`") == 1


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = {page.parent.name for page in (tmp_path / "site").glob("*/index.html")}
    assert built >= {page.stem for page in PAGES if page.stem != "index"}
    assert "dmoe_compile.generate" in (tmp_path / "site" / "api" / "index.html").read_text()


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_are_python(code: str) -> None:
    compile(code, "snippet", "exec")
