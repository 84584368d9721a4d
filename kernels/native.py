"""C++ kernels: built when first used, by Inductor's own code cache, so that nothing is built at install.

The cache is on disk and locked: several processes may start at once, and the next one loads what is there.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

log = logging.getLogger(__name__)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Return kernels/<name>.cpp as a loaded library, None (with one warning) where it can't be built."""
    from torch._inductor.codecache import CppCodeCache

    try:
        built: ctypes.CDLL = CppCodeCache.load(source(name))
    except Exception as error:  # no compiler, one that fails, a cache folder that can't be written
        log.debug("why kernels/%s.cpp can't be built", name, exc_info=True)
        first = str(error).strip().partition("\n")[0]
        log.warning(
            "kernels/%s.cpp can't be built (%s: %s); PyTorch's own operations run instead, more slowly. It takes a C++ "
            "compiler (apt install g++, xcode-select --install) or CXX set to one.", name, type(error).__name__, first,
        )  # fmt: skip
        return None
    return built


def source(name: str) -> str:
    """Return the source of kernels/<name>.cpp."""
    return Path(__file__).with_name(f"{name}.cpp").read_text()
