"""The decoding context: what one decoding keeps between the calls of a compiled model.

    with dmoe_compile.denoising() as context:
        compiled(prompt)                                   # plain: nothing is read or stored
        for ...:
            context.step(decoded, cold, offset=start)      # of the next forward
            logits = compiled(block)                       # decoded tokens take their stored expert outputs
            context.accept(choice)                         # with candidates: the rows that the next step goes on from

A context belongs to one stream of forwards: one decoding, or one batch of them. It is found by a ContextVar, so threads
and asyncio tasks each see their own, and what is stored is keyed by expert bank, row and absolute position. A token is
served from the store only if its position was stored by the forward just before; whatever else is marked as decoded is
computed.

B: sequences; C: candidate rows a sequence; R = B*C; S: tokens of a row; H: hidden size
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dmoe_compile.passes.limit import COLD, DECODED, HOT, IDLE

_current: contextvars.ContextVar[Denoising | None] = contextvars.ContextVar("dmoe_denoising", default=None)
T = TypeVar("T")
_MAX_RECORDS = 65_536  # steps whose counts are kept
Key = tuple[str, int]  # a site's name and the id of its experts' weights, which its entry refers to weakly


def current(*, strict: bool = True) -> Denoising | None:
    """Return the context of this thread or task, None outside of any.

    Raises:
        RuntimeError: where the innermost context was entered by another thread or task, whose state it holds; None is
            returned instead if not `strict`.
    """
    context = _entered(_current.get())
    if context is not None and context._owner != _here():
        if not strict:
            return None
        raise RuntimeError(
            "this decoding context was entered by another thread or asyncio task, whose sequences it holds; enter one "
            "of its own, `with dmoe_compile.denoising() as context`, where the model is called"
        )
    return context


def _entered(context: Denoising | None) -> Denoising | None:
    """Return the innermost context from this one outwards that is not left yet: generators may leave in any order."""
    while context is not None and not context._is_entered:
        context = context._outer
    return context


def denoising() -> Denoising:
    """Return a context for one decoding, or one batch of them, to be entered by `with`."""
    return Denoising()


@dataclass(frozen=True)
class StepStats:
    """Unique experts that one forward used, by site: experts that decoded tokens would have used are not counted."""

    step: int
    unique_experts: dict[str, int]


@dataclass
class _Stored:
    """Outputs of one site, [R, S, H]: whose, which step stored them, and from which position on."""

    experts: weakref.ref[Tensor]
    buffer: Tensor
    step: int = -1  # that was run to its end
    running: int = -1  # that was begun
    offset: int = 0
    candidates: int = 1

    def lies(self, rows: int, seq: int, offset: int) -> bool:
        return (*self.buffer.shape[:2], self.offset) == (rows, seq, offset)


@dataclass(frozen=True)
class _Step:
    """What was said of the next forward: roles [B, S] int8, the first position, candidates a sequence."""

    number: int
    roles: Tensor
    offset: int
    candidates: int
    choice: Tensor | None  # [B] int64, the candidate of the last step that was accepted
    reads: bool  # whether any token is decoded


class Denoising:
    """State of one decoding; see this module's docstring. Not to be entered twice at once, nor copied."""

    def __init__(self) -> None:
        self._stored: dict[Key, _Stored] = {}
        self._spare: dict[
            Key, Tensor
        ] = {}  # of another shape: rows change between the first step of a block and others
        self._number = 0
        self._step: _Step | None = None
        self._choice: Tensor | None = None
        self._is_entered = False
        self._outer: Denoising | None = None
        self._counts: deque[tuple[int, Sequence[str], Tensor]] = deque(maxlen=_MAX_RECORDS)
        self._owner: tuple[int, object] | None = None

    def __enter__(self) -> Denoising:
        if self._is_entered:
            raise RuntimeError("this decoding context is entered already; make another one with denoising()")
        self._enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
        self.close()

    def run(self, model: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return model(*args, **kwargs), run in this context, entered or not: for decodings that take turns.

        Raises:
            RuntimeError: while another forward runs in this context, in another thread.
        """
        self.attach()
        try:
            return model(*args, **kwargs)
        finally:
            self.detach()

    def attach(self) -> None:
        """Make this the context of forwards until detach(), which keeps what is stored: what `run` does around one.

        Raises:
            RuntimeError: while it is entered, here or in another thread.
        """
        if self._is_entered:
            raise RuntimeError("this decoding context is entered already: call the model itself")
        self._enter()

    def _enter(self) -> None:
        self._outer, self._owner, self._is_entered = _entered(_current.get()), _here(), True
        _current.set(self)

    def detach(self) -> None:
        """Undo attach()."""
        assert self._is_entered
        self._is_entered, self._outer = False, _entered(self._outer)
        if _current.get() is self:
            _current.set(self._outer)

    def close(self) -> None:
        """Free what is stored."""
        self._stored.clear()
        self._spare.clear()
        self._step = self._choice = None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a decoding context holds the state of one decoding: it can't be copied; make another one")

    def step(
        self,
        decoded: Tensor | None = None,
        cold: Tensor | None = None,
        *,
        finished: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        offset: int = 0,
        candidates: int = 1,
    ) -> None:
        """Say what the next forward denoises; without a call of this, a forward is plain.

        Args:
            decoded: [B, S] bool, tokens that take their stored expert outputs where there are some. The same for all
                candidates of a sequence.
            cold: [B, S] bool, tokens that are limited to the experts of others; where decoded too, they are decoded.
            finished: [B] bool, sequences whose outputs nobody reads: they activate no experts of their own.
            shape: (B, S), where no mask says it.
            offset: absolute position of the first token of the rows.
            candidates: C; the forward has B*C rows, those of a sequence one after the other.

        Raises:
            ValueError: for masks that are not bool or differ in shape, or numbers out of range.
            RuntimeError: where the last step had several candidates and accept() has not said which goes on, or another
                context was entered since.
        """
        if self._is_entered and _entered(_current.get()) is not self:
            raise RuntimeError(
                "another decoding context was entered after this one, and would take the next forward; leave it first, "
                "or let decodings take turns with context.run(model, ...), which enters nothing"
            )
        size = _size(decoded, cold, shape)
        if candidates < 1 or offset < 0:
            raise ValueError(f"candidates={candidates} must be at least 1, and offset={offset} at least 0")
        if finished is not None and (finished.shape != size[:1] or finished.dtype != torch.bool):
            raise ValueError(f"finished is {_describe(finished)}, but must be bool[{size[0]}], one for each sequence")
        if self._step is not None and self._step.candidates > 1 and self._choice is None:
            raise RuntimeError("the last step had several candidates: accept() must say which one goes on")
        device = next((mask.device for mask in (decoded, cold, finished) if mask is not None), None)
        roles = torch.full(size, HOT, dtype=torch.int8, device=device)
        if cold is not None:
            roles = torch.where(cold, COLD, roles)
        if decoded is not None:
            roles = torch.where(decoded, DECODED, roles)
        if finished is not None:
            roles = torch.where(finished.unsqueeze(-1), IDLE, roles)
        self._number += 1
        self._step = _Step(self._number, roles.to(torch.int8), offset, candidates, self._choice, decoded is not None)
        self._choice = None

    def plain(self) -> None:
        """Say that the next forwards are plain: a prefill, or one that stores a finished block's keys and values."""
        self._step = self._choice = None
        self._number += 1

    def accept(self, choice: Tensor) -> None:
        """Say which candidate of each sequence the next step goes on from.

        Args:
            choice: [B] int64, in [0, C) of the last step.
        """
        if self._step is None:
            raise RuntimeError("accept() belongs after a forward that step() described; there was none")
        count, sequences = self._step.candidates, len(self._step.roles)
        if choice.shape != (sequences,) or not bool(((choice >= 0) & (choice < count)).all()):
            raise ValueError(
                f"choice={choice.tolist()} must be a candidate in [0, {count}) for each of {sequences} sequences"
            )
        self._choice = choice

    @property
    def nbytes(self) -> int:
        """Bytes of stored expert outputs."""
        return sum(each.buffer.nbytes for each in self._stored.values()) + sum(
            each.nbytes for each in self._spare.values()
        )

    @property
    def stats(self) -> list[StepStats]:
        """Unique experts of every forward that counted, oldest first; kept after the context is left.

        Those are the forwards that step() described, and with ``options={"stats": True}`` the plain ones, each after a
        plain() of its own.
        """
        found: dict[int, dict[str, int]] = {}
        for number, names, counts in self._counts:
            found.setdefault(number, {}).update(zip(names, counts[:, 0].tolist(), strict=True))
        return [StepStats(number, unique) for number, unique in sorted(found.items())]

    def counted(self) -> dict[str, int]:
        """Return unique experts by site of the forward that was run last; empty where it did not count."""
        last = itertools.takewhile(lambda each: each[0] == self._number, reversed(self._counts))
        pieces = [dict(zip(names, counts[:, 0].tolist(), strict=True)) for _, names, counts in last]
        return {name: count for piece in reversed(pieces) for name, count in piece.items()}

    # What the backend asks for.

    def rows(self) -> tuple[int, int, int] | None:
        """Return R, S and C of the next forward, None where it is plain."""
        if self._step is None:
            return None
        sequences, seq = self._step.roles.shape
        return sequences * self._step.candidates, seq, self._step.candidates

    def roles(self, *, cache: bool, limit: bool) -> Tensor:
        """Return what was said of the next forward's tokens, [B, S] int8, without what is switched off."""
        assert self._step is not None
        roles = self._step.roles
        off = [role for role, on in ((DECODED, cache), (COLD, limit)) if not on]
        for role in off:
            roles = torch.where(roles == role, HOT, roles)
        return roles.to(torch.int8)

    def inputs(self, sites: Sequence[tuple[str, Tensor]], likes: Sequence[Tensor], roles: Tensor) -> list[Tensor]:
        """Return the inputs that the next forward takes more: roles, rows, and the stored outputs of every site.

        Args:
            sites: name and experts' weights of every site.
            likes: a tensor of each one's width, dtype and device; its storage is not looked at.
            roles: [B, S] int8 on the forward's device; decoded tokens of which nothing is stored become hot.

        Raises:
            RuntimeError: where a site runs a second time in one step.
        """
        step = self._step
        assert step is not None
        sequences, seq = step.roles.shape
        rows = sequences * step.candidates
        stored = [self._of(name, experts) for name, experts in sites]
        for (name, _), old in zip(sites, stored, strict=True):
            if old is not None and old.running == step.number:
                raise RuntimeError(
                    f"{name} ran twice in one denoising step: step() describes one forward. Call it before each, "
                    "plain() where nothing is to be reused, and give another stream of forwards its own context"
                )
        last = [old if old is not None and old.step == step.number - 1 and step.reads else None for old in stored]
        stays = all(old is not None and old.lies(rows, seq, step.offset) for old in last)
        valid, buffers = torch.ones(seq, dtype=torch.bool), []
        for (name, experts), like, old in zip(sites, likes, last, strict=True):
            new = self._place(name, experts, like, (rows, seq), keep=stays)
            if not stays:
                valid &= self._move(old, new, step, seq)
            new.running, new.offset, new.candidates = step.number, step.offset, step.candidates
            buffers.append(new.buffer)
        source = _sources(last[0], step) if stays and last and last[0] is not None else torch.arange(rows)
        roles = torch.where((roles == DECODED) & ~valid.to(roles.device), HOT, roles).to(torch.int8)
        return [roles.repeat_interleave(step.candidates, 0), source.to(roles.device), *buffers]

    def count(self, names: Sequence[str], counts: Tensor) -> None:
        """Keep what a forward counted at the sites `names`, see passes/count.py."""
        self._counts.append((self._number, names, counts.clone()))

    def done(self, sites: Sequence[tuple[str, Tensor]]) -> None:
        """Say that the forward ran to its end."""
        assert self._step is not None
        for name, experts in sites:
            stored = self._of(name, experts)
            assert stored is not None
            stored.step = self._step.number

    def _of(self, name: str, experts: Tensor) -> _Stored | None:
        """Return what is stored of a site; nothing where its weights are others that took the place of freed ones."""
        stored = self._stored.get((name, id(experts)))
        return stored if stored is not None and stored.experts() is experts else None

    def _place(self, name: str, experts: Tensor, like: Tensor, size: tuple[int, int], *, keep: bool) -> _Stored:
        """Return where a site's outputs go: where they lay, or a buffer that nothing is read from any more."""
        key, old = (name, id(experts)), self._of(name, experts)
        if keep:
            assert old is not None
            return old
        spare = self._spare.pop(key, None)
        shape = (*size, like.shape[-1])
        if old is not None:
            self._spare[key] = old.buffer
        if spare is None or spare.shape != shape or spare.dtype != like.dtype or spare.device != like.device:
            with unset_fake_temporarily():
                spare = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self._stored[key] = _Stored(weakref.ref(experts), spare)
        return self._stored[key]

    @staticmethod
    def _move(old: _Stored | None, new: _Stored, step: _Step, seq: int) -> Tensor:
        """Copy what the last forward stored of the same positions, row by row; return which there were, [S] bool."""
        valid = torch.zeros(seq, dtype=torch.bool)
        if old is None:
            return valid
        first = max(old.offset, step.offset)
        length = min(old.offset + old.buffer.shape[1], step.offset + seq) - first
        if length > 0:
            kept = old.buffer.narrow(1, first - old.offset, length)
            rows = _sources(old, step).to(kept.device)
            new.buffer.narrow(1, first - step.offset, length).copy_(kept.index_select(0, rows))
            valid[first - step.offset : first - step.offset + length] = True
        return valid


def _sources(old: _Stored, step: _Step) -> Tensor:
    """Return the stored row that each row goes on from, [R] int64: the accepted candidate's of its sequence."""
    sequences = len(step.roles)
    choice = torch.zeros(sequences, dtype=torch.int64) if step.choice is None else step.choice.cpu()
    return (torch.arange(sequences) * old.candidates + choice).repeat_interleave(step.candidates)


def _size(decoded: Tensor | None, cold: Tensor | None, shape: tuple[int, int] | None) -> tuple[int, int]:
    """Return B and S, of which all that was given must speak alike."""
    masks = {name: mask for name, mask in (("decoded", decoded), ("cold", cold)) if mask is not None}
    for name, mask in masks.items():
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(f"{name} is {_describe(mask)}, but must be bool[B, S]: a token of a sequence each")
    sizes = {tuple(mask.shape) for mask in masks.values()} | ({tuple(shape)} if shape is not None else set())
    if len(sizes) != 1:
        raise ValueError(f"decoded, cold and shape must say one (B, S), but say {sorted(sizes)}")
    (size,) = sizes
    return size[0], size[1]


def _describe(mask: Tensor) -> str:
    return f"{str(mask.dtype).removeprefix('torch.')}{list(mask.shape)}"


def _here() -> tuple[int, object]:
    """Return what tells this thread and asyncio task from others."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs
        task = None
    return threading.get_ident(), task
