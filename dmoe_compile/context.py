"""The decoding context: what one decoding keeps between the calls of a compiled model.

    with dmoe_compile.denoising() as context:
        compiled(prompt)                                   # plain: nothing is read or stored
        for ...:
            context.step(decoded, cold, offset=start)      # of the next forward
            logits = compiled(block)                       # decoded tokens take their stored expert outputs
            context.accept(choice)                         # with candidates: the rows that the next step goes on from

A context belongs to one stream of forwards: one decoding, or one batch of them. It is found by a ContextVar, so threads
and asyncio tasks each see their own. What is stored (stored.py) is keyed by expert bank, row and absolute position. A
token is served from the store only if its position was stored by the forward just before; whatever else is marked as
decoded is computed.

B: sequences; C: candidate rows a sequence; R = B*C; S: tokens of a row; H: hidden size
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from dmoe_compile.config import check_int
from dmoe_compile.masks import check_finished, size_of
from dmoe_compile.passes.limit import COLD, DECODED, HOT, IDLE
from dmoe_compile.stored import Store, Stored

innermost: contextvars.ContextVar[Denoising | None] = contextvars.ContextVar("dmoe_denoising", default=None)
"""The context that was entered last, which may be left by now: current() knows."""
T = TypeVar("T")
_MAX_RECORDS = 65_536  # steps whose counts are kept


def current(*, strict: bool = True) -> Denoising | None:
    """Return the context of this thread or task, None outside of any.

    Raises:
        RuntimeError: where the innermost context was entered by another thread or task, whose state it holds; None is
            returned instead if not `strict`.
    """
    context = _entered(innermost.get())
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


@dataclass(frozen=True)
class _Step:
    """What was said of the next forward: roles [B, S] int8, the first position, candidates a sequence."""

    number: int
    roles: Tensor
    denoises: bool  # else it is plain, and some tokens are absent
    has_idle: bool  # whether a token may be idle
    offset: int = 0
    candidates: int = 1
    choice: Tensor | None = None  # [B] int64, the candidate of the last step that was accepted
    reads: bool = False  # whether any token is decoded


@dataclass(frozen=True)
class Rows:
    """The rows of a forward that is not simply plain: R, S, C, and what was said of them.

    Attributes:
        denoises: it is a denoising step, of which outputs are stored.
        has_idle: tokens may be idle, so that they neither vote nor are routed.
    """

    rows: int
    seq: int
    candidates: int
    denoises: bool
    has_idle: bool


class Denoising:
    """State of one decoding; see this module's docstring. Not to be entered twice at once, nor copied."""

    def __init__(self) -> None:
        self._store = Store()
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
        self._outer, self._owner, self._is_entered = _entered(innermost.get()), _here(), True
        innermost.set(self)

    def detach(self) -> None:
        """Undo attach()."""
        assert self._is_entered
        self._is_entered, self._outer = False, _entered(self._outer)
        if innermost.get() is self:
            innermost.set(self._outer)

    def close(self) -> None:
        """Free what is stored."""
        self._store.clear()
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
        if self._is_entered and _entered(innermost.get()) is not self:
            raise RuntimeError(
                "another decoding context was entered after this one, and would take the next forward; leave it first, "
                "or let decodings take turns with context.run(model, ...), which enters nothing"
            )
        size = size_of(shape=shape, decoded=decoded, cold=cold)
        check_int("candidates", candidates, "rows of each sequence")
        check_int("offset", offset, "position of the first token of the rows", least=0)
        if finished is not None:
            check_finished(finished, size[0])
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
        self._step = _Step(
            self._number, roles.to(torch.int8), True, finished is not None, offset, candidates, self._choice,
            reads=decoded is not None,
        )  # fmt: skip
        self._choice = None

    def plain(self, absent: Tensor | None = None) -> None:
        """Say that the next forwards are plain: a prefill, or one that stores a finished block's keys and values.

        Args:
            absent: [B, S] bool, tokens of no sequence, such as padding and rows that are finished: they neither vote
                for a coreset nor are they routed.

        Raises:
            ValueError: for a mask of another dtype or shape.
        """
        if absent is not None:
            size_of(shape=None, absent=absent)
        self._number += 1
        self._step = self._choice = None
        if absent is not None:
            roles = torch.where(absent, IDLE, HOT).to(torch.int8)
            self._step = _Step(self._number, roles, False, True)

    def accept(self, choice: Tensor) -> None:
        """Say which candidate of each sequence the next step goes on from.

        Args:
            choice: [B] int64, in [0, C) of the last step.

        Raises:
            RuntimeError: where the last forward was none that step() described.
            ValueError: for a choice of another shape or out of range.
        """
        if self._step is None or not self._step.denoises:
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
        return self._store.nbytes

    @property
    def stats(self) -> list[StepStats]:
        """Unique experts of every forward that counted, oldest first; kept after the context is left.

        Those are the forwards that step() described, and with ``options={"stats": True}`` the plain ones, each after a
        plain() of its own. Where a model falls into several graphs, sites of one name are told apart: mlp, mlp#2.
        """
        by_number: dict[int, list[tuple[Sequence[str], Tensor]]] = {}
        for number, names, counts in self._counts:
            by_number.setdefault(number, []).append((names, counts))
        return [StepStats(number, _merged(pieces)) for number, pieces in sorted(by_number.items())]

    def counted(self) -> dict[str, int]:
        """Return unique experts by site of the forward that was run last; empty where it did not count."""
        last = itertools.takewhile(lambda each: each[0] == self._number, reversed(self._counts))
        return _merged([(names, counts) for _, names, counts in last][::-1])

    # What the backend asks for.

    def rows(self) -> Rows | None:
        """Return what was said of the next forward's rows, None where it is plain and nothing was."""
        step = self._step
        if step is None:
            return None
        sequences, seq = step.roles.shape
        return Rows(sequences * step.candidates, seq, step.candidates, step.denoises, step.has_idle)

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
        stored = [self._store.of(name, experts) for name, experts in sites]
        for (name, _), old in zip(sites, stored, strict=True):
            if old is not None and old.running == step.number:
                raise RuntimeError(
                    f"{name} ran twice in one denoising step: step() describes one forward. Call it before each, "
                    "plain() where nothing is to be reused, and give another stream of forwards its own context"
                )

        def is_last(old: Stored) -> bool:
            return step.reads and old.step == step.number - 1 and old.sequences == sequences

        last = [old if old is not None and is_last(old) else None for old in stored]
        stays = all(old is not None and old.lies(rows, seq, step.offset) for old in last)
        source, valid = torch.arange(rows, device="cpu"), torch.ones(seq, dtype=torch.bool, device="cpu")
        buffers = []
        for (name, experts), like, old in zip(sites, likes, last, strict=True):
            if stays and old is not None:
                new, source = old, old.sources(step.choice, step.candidates)
            else:
                new, moved = self._store.place(name, experts, like, (rows, seq), step.offset), slice(0, 0)
                if old is not None:
                    moved = old.move_to(new, old.sources(step.choice, step.candidates))
                valid[: moved.start] = False
                valid[moved.stop :] = False
            new.running, new.candidates = step.number, step.candidates
            buffers.append(new.buffer)
        roles = torch.where((roles == DECODED) & ~valid.to(roles.device), HOT, roles).to(torch.int8)
        return [roles.repeat_interleave(step.candidates, 0), source.to(roles.device), *buffers]

    def count(self, names: Sequence[str], counts: Tensor) -> None:
        """Keep what a forward counted at the sites `names`, see passes/count.py."""
        self._counts.append((self._number, names, counts.clone()))

    def done(self, sites: Sequence[tuple[str, Tensor]]) -> None:
        """Say that the forward ran to its end."""
        assert self._step is not None
        for name, experts in sites:
            stored = self._store.of(name, experts)
            assert stored is not None
            stored.step = self._step.number


def distinct(names: Iterable[str]) -> list[str]:
    """Return names with a number behind those that came before: of the pieces of a broken model, some are alike."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def _merged(pieces: Sequence[tuple[Sequence[str], Tensor]]) -> dict[str, int]:
    """Return what the graphs of one forward counted, by site."""
    unique = [count for _, counts in pieces for count in counts[:, 0].tolist()]
    return dict(zip(distinct(name for names, _ in pieces for name in names), unique, strict=True))


def _here() -> tuple[int, object]:
    """Return what tells this thread and asyncio task from others."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs
        task = None
    return threading.get_ident(), task
