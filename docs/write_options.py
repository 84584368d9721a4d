"""Write the tables of options.md, read from the dataclasses that check the options: python -P docs/write_options.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from dmoe_compile.passes.policies import pass_names, pass_options

from dmoe_compile import Config

PAGE = Path(__file__).with_name("options.md")
_GATHERED = ("policies", "inductor")  # of Config: keys of their own stand for them


def page() -> str:
    """Return options.md as it should be: what a person wrote, down to the first table, then the tables."""
    return "\n".join([PAGE.read_text().partition("\n## ")[0].rstrip(), "", *lines(), ""])


def lines() -> Iterator[str]:
    """Yield the lines of the tables: one for the backend's own options, and one for each pass."""
    yield from ("## Of every pass", "", *_table(Config, ""))
    for name in pass_names():
        yield from ("", f"## `{name}`", "", *_table(pass_options(name), f"{name}."))


def _table(options: type, prefix: str) -> Iterator[str]:
    yield from ("| option | default | |", "|---|---|---|")
    texts = {each.name: each.description for each in _attributes(options)}
    for field in dataclasses.fields(options):
        if options is Config and field.name in _GATHERED:
            continue
        default = [] if field.default == () else field.default
        text = " ".join(texts[field.name].replace("|", "\\|").split())
        yield f"| `{prefix}{field.name}` | `{default!r}` | {text} |"


def _attributes(options: type) -> list[Any]:
    sections = griffe.Docstring(options.__doc__ or "", parser="google").parse(warnings=False)
    return [
        each for section in sections if section.kind is griffe.DocstringSectionKind.attributes for each in section.value
    ]


if __name__ == "__main__":
    PAGE.write_text(page())
