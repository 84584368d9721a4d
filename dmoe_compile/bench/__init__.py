"""Figures: each module measures one, prints a table, and gives JSON lines that say where they were taken."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

Row = dict[str, Any]


def environment() -> Row:
    """Return what every row carries: device, vector extension, cores, threads and versions."""
    import torch

    return {
        "device": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": release("transformers"),
        "python": platform.python_version(),
    }


def require_compiler() -> None:
    """Raise ValueError where Inductor will find no C++ compiler; its own error comes after minutes, from inside."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        way_out = "install one (Debian and Ubuntu: apt install g++), or name one in the environment variable CXX"
        raise ValueError(f"Inductor needs a C++ compiler and finds none; {way_out}") from error


def describe(env: Mapping[str, Any]) -> str:
    """Return an environment as one line under a table."""
    where = f"{env['device']} ({env['isa']}), {env['threads']} of {env['cores']} cores"
    return f"{where}, torch {env['torch']}, transformers {env['transformers']}, Python {env['python']}"


def narrow_table(*columns: str, title: str) -> Table:
    """Return an empty table without lines between its columns: many of them fit a terminal of 80."""
    from rich import box
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def write_rows(rows: Iterable[Mapping[str, Any]], destination: str) -> None:
    """Write one JSON object a line to a file, or to standard output for "-"."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if destination == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        Path(destination).write_text(text)


def check_file(option: str, path: Path) -> None:
    """Raise ValueError where a file can't be written: said now, not after minutes. None is left behind."""
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it")
    is_new = not path.exists()
    if is_new or path.is_file():  # whoever reads a pipe would see its end
        with naming(option, path), path.open("a"):
            pass
    if is_new:
        path.unlink()


@contextmanager
def naming(option: str, path: Path | str) -> Iterator[None]:
    """Say of which option's file an OSError is, as a ValueError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}; name another file") from error


def require_packages(extra: str, *names: str) -> None:
    """Raise ValueError where a package of an extra is not installed: said now, not after an hour."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is not installed, which this needs: pip install 'dmoe-compile[{extra}]'")


def in_fresh_process(module: str, job: Row, cache_folder: str, timeout_s: float | None = None) -> Row:
    """Run `python -m module` with a job in a new interpreter, and return the last line that it prints.

    Args:
        module: its main prints one JSON object.
        job: its argument.
        cache_folder: of Inductor.
        timeout_s: seconds until the process is stopped.

    Raises:
        RuntimeError: with what it wrote, if it fails.
        subprocess.TimeoutExpired: if it takes longer than `timeout_s`.
    """
    command = [sys.executable, "-P", "-m", module, json.dumps(job)]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache_folder}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    answer: Row = json.loads(done.stdout.splitlines()[-1])
    return answer


def wall_ms(call: Callable[[], Any]) -> float:
    """Return the milliseconds of a call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def in_turn(
    calls: Mapping[str, Callable[[], Any]], number: int, ms: Callable[[Callable[[], Any]], float] = wall_ms
) -> dict[str, list[float]]:
    """Return the milliseconds of every call, `number` times in turn: a machine that slows down slows all of them."""
    found: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(number):
        for way, call in calls.items():
            found[way].append(ms(call))
    return found


class Bar:
    """A progress bar of `total` steps, or nothing where none is wanted."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=total) if progress else None

    def say(self, text: str) -> None:
        if self.progress and self.task is not None:
            self.progress.update(self.task, description=text)

    def advance(self) -> None:
        if self.progress and self.task is not None:
            self.progress.advance(self.task)


def use_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads from now on; None leaves it its own choice.

    Raises:
        ValueError: for less than one.
    """
    import torch

    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def check_threads(threads: int | None) -> None:
    """Raise ValueError for what use_threads() can't take."""
    from dmoe_compile.config import check_int

    if threads is not None:
        check_int("threads", threads, "CPU threads")


def check_seed(seed: int) -> None:
    """Raise ValueError for what torch can't take as a seed."""
    from dmoe_compile.config import check_number

    check_number("seed", seed, "in [-2**63, 2**64), which torch takes", lambda x: -(2**63) <= x < 2**64)


def check_names(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError where a value is given that is not known."""
    for value in given:
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of: {', '.join(known)}")


def release(package: str) -> str | None:
    """Return the release of a package that is installed, None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
