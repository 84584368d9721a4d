"""Write a layer's output to where a decoding context keeps it, as an operation that Inductor fuses with nothing.

As an aten.copy_ to a graph's input it is fused with what read the old values, and Inductor's C++ backend (2.13) then
fails on loops that it fuses by their outer level: it asks for the index by which the copy reads a buffer that it only
waits for (KeyError in LoopBody.get_read_expr).
"""

from __future__ import annotations

import torch
from torch import Tensor


def launch(stored: Tensor, new: Tensor) -> None:
    """Copy `new` to `stored`, both [R, S, H] of one dtype and device.

    Raises:
        ValueError: where they are not alike: a copy would broadcast or round in silence.
    """
    if (stored.shape, stored.dtype, stored.device) != (new.shape, new.dtype, new.device):
        kinds = " and ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (stored, new))
        raise ValueError(f"store: what is stored and what is new must be alike; got {kinds}")
    stored.copy_(new)


def reference(stored: Tensor, new: Tensor) -> None:
    """What launch does, row by row."""
    for old, each in zip(stored, new, strict=True):
        old.copy_(each)


store = torch.library.custom_op("dmoe::store", launch, mutates_args=("stored",))
store.register_fake(lambda stored, new: None)
