"""What a device does at best, for the cost model: measured once, kept on disk beside Inductor's caches."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from dmoe_compile.passes.cost import Machine

_READ_BYTES = 256 * 2**20  # more than any cache holds
_SQUARE = 2048  # of the matrices that are multiplied: 17 GFLOP
_MIN_RUN_S = 0.2


def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Return a device's bandwidth and its peak in `dtype`, from disk if it was measured before."""
    path, key = _path(), _key(device, dtype)
    known = _read(path)
    if key not in known:
        measured = measure(device, dtype)
        known = {**_read(path), key: [measured.gb_per_s, measured.tflop_per_s]}  # another process may have written
        _write(path, known)
    return Machine(*known[key])


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Return the bandwidth of reading a large tensor, and the peak of a square matmul in `dtype`; half a second."""
    return Machine(bandwidth(device), peak(device, dtype))


@torch.no_grad()
def bandwidth(device: torch.device) -> float:
    """Return how fast a large tensor is read, in GB/s."""
    return _READ_BYTES / _best_s("x.sum()", x=torch.ones(_READ_BYTES // 4, device=device)) / 1e9


@torch.no_grad()
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return how fast square matrices are multiplied in `dtype`, in TFLOP/s."""
    a, b = (torch.ones(_SQUARE, _SQUARE, dtype=dtype, device=device) for _ in range(2))
    return 2 * _SQUARE**3 / _best_s("a @ b", a=a, b=b) / 1e12


def _best_s(code: str, **operands: torch.Tensor) -> float:
    from torch.utils.benchmark import Timer

    timer = Timer(code, globals=operands, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=_MIN_RUN_S).times)


def _key(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {dtype}, torch {torch.__version__}"
    return f"{platform.node()}, {device.type}, {torch.get_num_threads()} threads, {dtype}, torch {torch.__version__}"


def _path() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "dmoe" / "machine.json"


def _read(path: Path) -> dict[str, Any]:
    """Return what was measured before; nothing where the file is missing or broken."""
    try:
        known = json.loads(path.read_text())
        return {key: [float(value) for value in pair] for key, pair in known.items() if len(pair) == 2}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(path: Path, known: dict[str, Any]) -> None:
    """Write in one step, so that no other process reads half of it; a folder that can't be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file)
        os.replace(file.name, path)
    except OSError:
        pass
