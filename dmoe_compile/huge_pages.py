"""Put tensors on pages of 2 MiB, where Linux has them: fewer look-ups of addresses while weights are read.

The kernel copies what lies on small pages, in place of them: pointers, values and views stay, and no memory is taken
for good. Nothing here needs a privilege, or the system's setting for transparent huge pages to be on.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import time
from collections.abc import Iterable

from torch import Tensor

log = logging.getLogger(__name__)
_PAGE = 2 << 20  # bytes
_ADVISE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE of <sys/mman.h>


def use(tensors: Iterable[Tensor]) -> int:
    """Put the memory of CPU tensors on huge pages, and return the bytes that are there now.

    Only whole pages inside of a tensor are taken, so one of less than 4 MiB may have none. What can't be had (another
    system than Linux, one older than 6.1, memory that is a mapped file, no free huge page) is left as it is, and one
    warning says so.
    """
    start, wanted, done, why = time.perf_counter(), 0, 0, ""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        storage = tensor.untyped_storage()
        first = -(-storage.data_ptr() // _PAGE) * _PAGE
        size = (storage.data_ptr() + storage.nbytes()) // _PAGE * _PAGE - first
        if size <= 0:
            continue
        wanted += size
        reason = _collapse(first, size)
        why = reason or why
        done += 0 if reason else size
    if done < wanted:
        _warn(f"{(wanted - done) / 1e6:.0f} MB of expert weights stay on small pages: {why}")
    if done:
        log.info("%.0f MB of expert weights are on huge pages, %.2f s", done / 1e6, time.perf_counter() - start)
    return done


def _collapse(address: int, size: int) -> str:
    """Return why a range can't be put on huge pages, "" where it was."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no madvise for it"
    advise = _libc().madvise
    if advise(address, size, _ADVISE) or advise(address, size, _COLLAPSE):
        error = ctypes.get_errno()
        return f"madvise failed with error {error}; it takes Linux 6.1, memory of the process's own, and free pages"
    return ""


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


@functools.cache
def _warn(message: str) -> None:
    log.warning("%s", message)
