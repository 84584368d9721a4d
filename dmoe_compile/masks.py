"""What a caller says of a forward's tokens, checked: masks and sizes.

B: sequences; S: tokens of a row
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmoe_compile.config import check_int


def size_of(*, shape: Any, **given: Any) -> tuple[int, int]:
    """Return B and S, of which all that was given must speak alike.

    Args:
        shape: (B, S).
        **given: masks by name, [B, S] bool.

    Raises:
        ValueError: for what is neither, or where they differ.
    """
    masks = {name: mask for name, mask in given.items() if mask is not None}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(f"{name} is {_describe(mask)}, but must be bool[B, S]: a token of a sequence each")
    if shape is not None:
        if not isinstance(shape, Sequence) or len(shape) != 2:
            raise ValueError(f"shape={shape!r} must be (B, S): sequences, and tokens of each")
        for number in shape:
            check_int("shape", number, "sequences, and tokens of each")
    sizes = {tuple(mask.shape) for mask in masks.values()} | ({tuple(shape)} if shape is not None else set())
    if len(sizes) != 1:
        raise ValueError(f"{', '.join(given)} and shape must say one (B, S), but say {sorted(sizes)}")
    (size,) = sizes
    return size[0], size[1]


def check_finished(finished: Any, sequences: int) -> None:
    """Raise ValueError unless this is [B] bool."""
    if not isinstance(finished, Tensor) or finished.shape != (sequences,) or finished.dtype != torch.bool:
        raise ValueError(f"finished is {_describe(finished)}, but must be bool[{sequences}], one for each sequence")


def _describe(mask: object) -> str:
    """Return a mask's type and shape, or the type of what is none."""
    if not isinstance(mask, Tensor):
        return f"of type {type(mask).__name__}"
    return f"{str(mask.dtype).removeprefix('torch.')}{list(mask.shape)}"
