"""What mkdocs fills in: the options of the backend, read from the dataclasses that check them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import griffe
from dmoe_compile.passes.policies import pass_names, pass_options

from dmoe_compile import Config

_MARK = "<!-- options -->"
_GATHERED = ("policies", "inductor")  # of Config: keys of their own stand for them


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the options where a page asks for them; mkdocs calls this for every page."""
    return markdown.replace(_MARK, "\n".join(lines())) if _MARK in markdown else markdown


def lines() -> Iterator[str]:
    """Yield the page's lines: a table for the backend's own options, and one for each pass."""
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
