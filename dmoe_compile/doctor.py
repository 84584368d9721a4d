"""What this installation is made of, what would be used, and what is missing: `dmoe doctor`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Literal

from dmoe_compile.bench import Row, environment, narrow_table, release, require_compiler

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["ok", "note", "missing"]
_EXTRAS = {  # what each brings, and what it is for
    "eval": (("matplotlib", "scipy"), "dmoe eval, dmoe pareto"),
    "lm-eval": (("lm_eval", "tqdm"), "dmoe_compile.harness"),
    "train": (("accelerate", "tokenizers"), "dmoe_compile.training, dmoe_compile.tuning"),
}
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_ROOM_GB = 1.0  # free space for caches: compiled code of a large model takes some hundred MB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        verdict: "missing" is what compiling can't do without, "note" what something else would like.
        found: what is there.
        way_out: how to change it, "" where nothing needs to.
    """

    what: str
    verdict: Verdict
    found: str
    way_out: str = ""


def examine() -> list[Finding]:
    """Look at everything; build the expert kernel if it was not built before, which takes some seconds."""
    no_cache = _no_cache()
    with _other_cache() if no_cache else nullcontext():  # torch._dynamo needs one to be imported
        cache = no_cache or _cache()
        return [*_versions(), _backend(), _compiler(), *_devices(), _kernel(), _triton(), cache, *_extras()]


def rows(findings: list[Finding]) -> list[Row]:
    """Return findings as JSON-able rows, each with its environment."""
    return [environment() | asdict(each) for each in findings]


def table(findings: list[Finding]) -> Table:
    """Return findings as a table."""
    out = narrow_table("", "", "found", title="dmoe doctor")
    for each in findings:
        out.add_row(each.what, each.verdict, each.found + (f"; {each.way_out}" if each.way_out else ""))
    return out


def _versions() -> Iterator[Finding]:
    for name in ("dmoe-compile", "torch", "transformers", "diffusers"):
        found = release(name)
        yield Finding(name, "ok", found) if found else Finding(name, "missing", "not installed", f"pip install {name}")
    yield Finding("Python", "ok", f"{sys.version.split()[0]}, {sys.executable}")


def _backend() -> Finding:
    import torch

    if "dmoe" in torch._dynamo.list_backends(exclude_tags=()):
        return Finding("backend", "ok", 'torch.compile knows backend="dmoe"')
    way_out = "install the package (pip install .): its entry point is read from its metadata"
    return Finding("backend", "missing", 'torch.compile does not know backend="dmoe"', way_out)


def _compiler() -> Finding:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        require_compiler()
    except ValueError as error:
        return Finding("C++ compiler", "missing", str(error))
    return Finding("C++ compiler", "ok", get_cpp_compiler())


def _devices() -> Iterator[Finding]:
    import torch

    env = environment()
    bf16 = "multiplies bf16" if torch.cpu._is_avx512_bf16_supported() else "bf16 through fp32"
    yield Finding("CPU", "ok", f"{env['device']}, {env['isa']}, {bf16}, {env['threads']} of {env['cores']} cores")
    if torch.cuda.is_available():
        yield Finding("GPU", "ok", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    else:
        yield Finding("GPU", "note", "none that PyTorch can use: models run on the CPU")


def _kernel() -> Finding:
    import torch

    from dmoe_compile.kernels import experts_cpu

    isa = experts_cpu.best_isa()
    if experts_cpu.available(torch.bfloat16):
        return Finding("expert kernel, CPU", "ok", f"builds, for {isa}")
    return Finding("expert kernel, CPU", "note", "can't be built: transformers' own experts run", "see C++ compiler")


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding(
            "expert kernel, GPU", "note", "triton is not installed", "CUDA and ROCm builds of torch bring it"
        )
    import triton  # whose distribution has other names for ROCm and on Windows

    return Finding("expert kernel, GPU", "ok", f"triton {triton.__version__}")


def _no_cache() -> Finding | None:
    """Say that the folder which the environment names for Inductor's cache can't be written, if that is so."""
    folder = os.environ.get(_CACHE)
    if not folder:
        return None
    try:
        os.makedirs(folder, exist_ok=True)
        with TemporaryFile(dir=folder):
            return None
    except OSError as error:
        found = f"{folder} can't be written: {error.strerror}"
        return Finding("compile cache", "missing", found, f"set {_CACHE} to a folder that can be written")


def _cache() -> Finding:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = cache_dir()
    size = sum(_bytes(os.path.join(path, name)) for path, _, names in os.walk(folder) for name in names)
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {size / 1e6:.0f} MB, {free / 1e9:.0f} GB free"
    if free < _ROOM_GB * 1e9:
        return Finding("compile cache", "note", found, f"make room, or set {_CACHE} to another disk")
    return Finding("compile cache", "ok", found)


def _bytes(file: str) -> int:
    """Return the size of a file, 0 where it is gone by now: others may be compiling."""
    try:
        return os.stat(file).st_size
    except OSError:
        return 0


@contextmanager
def _other_cache() -> Iterator[None]:
    """Let Inductor keep its cache in a folder of its own for a while."""
    own = os.environ[_CACHE]
    with TemporaryDirectory() as folder:
        os.environ[_CACHE] = folder
        try:
            yield
        finally:
            os.environ[_CACHE] = own


def _extras() -> Iterator[Finding]:
    for extra, (names, use) in _EXTRAS.items():
        if gone := [name for name in names if importlib.util.find_spec(name) is None]:
            way_out = f"for {use}: pip install 'dmoe-compile[{extra}]'"
            yield Finding(f"extra {extra}", "note", f"without {', '.join(gone)}", way_out)
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(f"{name} {release(name)}" for name in names))
