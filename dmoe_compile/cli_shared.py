"""What the commands of the command line share: options that several have, errors in one line, tables and JSON lines."""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoe_compile.bench import check_file, naming, write_rows

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

    from dmoe_compile.bench import Row

Json = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Also write JSON lines to a file; - is stdout.")
]
Options = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="A backend option, such as dmoe.top_p=0.8; repeatable.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model code that lies in the folder.")
]
BlockLength = Annotated[
    int | None, typer.Option(show_default="32", help="Tokens that are denoised together: the model's own unit.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if left out.")]


def names(text: str | None) -> tuple[str, ...]:
    """Return the names in a list that is separated by commas, none where it was not given."""
    return () if text is None else tuple(name.strip() for name in text.split(","))


def backend_options(passes: str, pairs: list[str], block_length: int | None = None) -> dict[str, Any]:
    """Return backend options from `--passes a,b`, `--option key=value` and `--block-length`."""
    options: dict[str, Any] = {"passes": [name.strip() for name in passes.split(",") if name.strip()]}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--option {pair!r} is not KEY=VALUE, such as dmoe.top_p=0.8")
        if key == "passes":
            raise ValueError(f"--option {pair!r}: passes have an option of their own, --passes {value}")
        options[key] = _literal(value)
    if block_length is not None:
        if "block_length" in options:
            other = options["block_length"]
            raise ValueError(f"--block-length {block_length} and --option block_length={other}: give one of them")
        options["block_length"] = block_length
    return options


def _literal(text: str) -> Any:
    """Return the value that an option's text stands for: a number, true, false, none, a list, or else the text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # all that it is said to raise
        return text


@contextmanager
def usage_errors(json: str | None) -> Iterator[None]:
    """Turn a ValueError, which says what the caller did, or a file's OSError into one line and exit code 2."""
    with _one_line(ValueError, OSError):
        if json not in (None, "-"):
            check_file("--json", Path(json))
        yield


@contextmanager
def _one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of some kinds into one line and exit code 2.

    Whoever closes a pipe has read enough: typer, and rich in a table, end with exit code 1 and without a word.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        inner = getattr(error, "inner_exception", error)  # of the backend, which Dynamo wraps
        if not isinstance(inner, kinds):
            raise
        typer.echo(f"dmoe: {str(inner).strip().splitlines()[0]}{_way_out(inner)}", err=True)
        raise typer.Exit(2) from error


def _way_out(error: Exception) -> str:
    """Say what to do where Inductor's cache can't be written, of which torch fails on import; else nothing."""
    cache, file = os.environ.get("TORCHINDUCTOR_CACHE_DIR"), getattr(error, "filename", None)
    if not cache or not isinstance(file, str):
        return ""
    is_its = Path(file).is_relative_to(cache) or Path(cache).is_relative_to(file)
    return "; set TORCHINDUCTOR_CACHE_DIR to a folder that can be written" if is_its else ""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a progress bar on standard error, so that standard output can be piped."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with (
        quiet(),
        Progress(console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal) as progress,
    ):
        yield progress


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out Dynamo's warning that transformers' experts ask a cached function for the version of torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        yield


def show(table: RenderableType, rows: list[Row], json: str | None, remarks: Iterable[str] = ()) -> None:
    """Print a table and remarks, and write rows where they were asked for."""
    from rich.console import Console

    console = Console(stderr=json == "-")
    console.print(table)
    for remark in remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    write_json(rows, json)


def write_json(rows: list[Row], json: str | None) -> None:
    """Write rows where `--json` asked for them, if it did; a full disk is one line and exit code 2."""
    if json is not None:
        with _one_line(ValueError), naming("--json", json):
            write_rows(rows, json)


def fail(message: str) -> None:
    typer.echo(f"dmoe: {message}", err=True)
    raise typer.Exit(1)
