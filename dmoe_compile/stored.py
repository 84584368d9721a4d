"""What a decoding keeps of expert outputs: a buffer for each site, found by the site's name and its experts' weights.

B: sequences; C: candidate rows a sequence; R = B*C; S: tokens of a row; H: hidden size
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

Key = tuple[str, int]  # a site's name and the id of its experts' weights, which its entry refers to weakly


@dataclass
class Stored:
    """Outputs of one site, [R, S, H]: whose, which step stored them, and from which position on."""

    experts: weakref.ref[Tensor]
    buffer: Tensor
    step: int = -1  # that was run to its end
    running: int = -1  # that was begun
    offset: int = 0
    candidates: int = 1

    @property
    def sequences(self) -> int:
        """B of the rows."""
        return len(self.buffer) // self.candidates

    def lies(self, rows: int, seq: int, offset: int) -> bool:
        """Say whether these are the outputs of so many rows and tokens, from this position on."""
        return (*self.buffer.shape[:2], self.offset) == (rows, seq, offset)

    def sources(self, choice: Tensor | None, candidates: int) -> Tensor:
        """Return the row of the buffer that each row of the next forward goes on from.

        Args:
            choice: [B] int64, the accepted candidate of each sequence; None is the first.
            candidates: C of the next forward.

        Returns:
            [B*C] int64, on the CPU.
        """
        first = torch.arange(self.sequences, device="cpu") * self.candidates
        return (first if choice is None else first + choice.cpu()).repeat_interleave(candidates)

    def move_to(self, new: Stored, rows: Tensor) -> slice:
        """Copy the outputs of positions that both cover, row by row; return where they lie in `new`, [start, end)."""
        first = max(self.offset, new.offset)
        length = min(self.offset + self.buffer.shape[1], new.offset + new.buffer.shape[1]) - first
        if length <= 0:
            return slice(0, 0)
        kept = self.buffer.narrow(1, first - self.offset, length).index_select(0, rows.to(self.buffer.device))
        new.buffer.narrow(1, first - new.offset, length).copy_(kept)
        return slice(first - new.offset, first - new.offset + length)


class Store:
    """The buffers of one decoding, two a site at most."""

    def __init__(self) -> None:
        self.now: dict[Key, Stored] = {}
        # Of another shape: rows change between the first step of a block and others.
        self.spare: dict[Key, Tensor] = {}

    def of(self, name: str, experts: Tensor) -> Stored | None:
        """Return what is stored of a site; nothing where its weights are others that took the place of freed ones."""
        stored = self.now.get((name, id(experts)))
        return stored if stored is not None and stored.experts() is experts else None

    def place(self, name: str, experts: Tensor, like: Tensor, size: tuple[int, int], offset: int) -> Stored:
        """Return a new place for a site's outputs, in a buffer that nothing is read from any more.

        Args:
            name, experts: the site's.
            like: a tensor of H, dtype and device; its storage is not looked at.
            size: (R, S).
            offset: position of the first token.
        """
        key, old = (name, id(experts)), self.of(name, experts)
        buffer = self.spare.pop(key, None)
        shape = (*size, like.shape[-1])
        if old is not None:
            self.spare[key] = old.buffer
        if buffer is None or buffer.shape != shape or buffer.dtype != like.dtype or buffer.device != like.device:
            with unset_fake_temporarily():
                buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.now[key] = Stored(weakref.ref(experts), buffer, offset=offset)
        return self.now[key]

    def clear(self) -> None:
        """Free all buffers."""
        self.now.clear()
        self.spare.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(each.buffer.nbytes for each in self.now.values()) + sum(each.nbytes for each in self.spare.values())
