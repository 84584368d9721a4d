"""C++ kernels: built when first used, by Inductor's own code cache, so that nothing is built at install.

The cache is on disk and locked: several processes may start at once, and the next one loads what is there.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from pathlib import Path

log = logging.getLogger(__name__)

_INCLUDE = re.compile(r'^#include "(\w+\.h)"$', re.MULTILINE)


@functools.cache
def library(name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """Return kernels/<name>.cpp as a loaded library, None (with one warning a name) where it can't be built.

    Args:
        name: of the source.
        flags: of the compiler, behind Inductor's own, which say -march=native. With any, they alone choose the
            instruction set: Inductor's vector flags, which would add to it, are left out.
    """
    from torch._inductor.codecache import CppCodeCache

    try:
        built: ctypes.CDLL = CppCodeCache.load(source(name), extra_flags=flags, needs_vec_isa=not flags)
    except Exception as error:  # no compiler, one that fails, a cache folder that can't be written
        log.debug("why kernels/%s.cpp can't be built", name, exc_info=True)
        _warn(name, type(error).__name__, str(error).strip().partition("\n")[0])
        return None
    return built


@functools.cache  # a source may be built for several kinds of operands; one that can't be, for none of them
def _warn(name: str, error: str, words: str) -> None:
    log.warning(
        "kernels/%s.cpp can't be built (%s: %s); PyTorch's own operations run instead, more slowly. It takes a C++ "
        "compiler (apt install g++, xcode-select --install) or CXX set to one.", name, error, words,
    )  # fmt: skip


def source(name: str) -> str:
    """Return the source of kernels/<name>.cpp with headers of ours in it: the cache goes by the whole of it."""
    included: set[str] = set()

    def read(file: str) -> str:
        if file in included:
            return ""
        included.add(file)
        return _INCLUDE.sub(lambda found: read(found[1]), Path(__file__).with_name(file).read_text())

    return read(f"{name}.cpp")
