"""A decoding context serves its own decoding and no other: nested or in turns, of other models, threads and tasks."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dmoe_compile
from dmoe_compile.context import current
from served_tokens import ALL, SIZE, SOME, build, compiled, draw, expect, moe, poison
from tiny_moe import INDUCTOR

pytestmark = pytest.mark.usefixtures("without_gradients")


def test_interleaved_decodings() -> None:
    model = build()
    call = compiled(model)
    first, second = dmoe_compile.denoising(), dmoe_compile.denoising()
    before: dict[int, Tensor] = {}
    for turn in range(3):
        for seed, context in ((0, first), (100, second)):
            x = draw(seed + turn)
            context.step(SOME if turn else None, shape=SIZE)
            out = context.run(call, x)
            own = moe(model(x), x)
            if turn:
                own = torch.where(SOME.unsqueeze(-1), before[seed], own)
            assert_close(moe(out, x), own, **INDUCTOR)
            before[seed] = own
    with pytest.raises(AssertionError):  # the two do differ
        assert_close(before[0], before[100], **INDUCTOR)


def test_generators_that_take_turns_inside_a_with_are_refused() -> None:
    """A generator's context variable stays set while it waits: the second would take the first one's forwards."""
    call = compiled(build())

    def stream(seed: int) -> Iterator[Tensor]:
        with dmoe_compile.denoising() as context:
            for step in range(3):
                context.step(SOME if step else None, shape=SIZE)
                yield call(draw(seed + step))

    one, other = stream(0), stream(50)
    next(one)
    next(other)
    with pytest.raises(RuntimeError, match="another decoding context was entered after this one"):
        next(one)
    other.close()
    assert current() is None  # although `one`, which was left first, had been entered when `other` was


def test_two_forwards_at_once_in_one_context_are_refused() -> None:
    context = dmoe_compile.denoising()
    with pytest.raises(RuntimeError, match="is entered already"):
        context.run(lambda: context.run(lambda: None))
    assert context.run(lambda: 1) == 1


def test_nested_contexts() -> None:
    model = build()
    call = compiled(model)
    with dmoe_compile.denoising() as outer:
        outer.step(shape=SIZE)
        call(draw(0))
        with dmoe_compile.denoising() as inner:
            inner.step(shape=SIZE)
            call(draw(10))
            poison(outer)
            inner.step(SOME)
            expect(call(draw(11)), model, draw(11), draw(10))
        for stored in outer._store.now.values():
            stored.buffer.copy_(moe(model(draw(0)), draw(0)))
        outer.step(SOME)
        expect(call(draw(1)), model, draw(1), draw(0))


def test_a_second_model_in_one_context() -> None:
    """Same class, same names, same shapes: what is stored goes by the experts' own weights."""
    one, other = build(0), build(1)
    calls = compiled(one), compiled(other)
    with dmoe_compile.denoising() as context:
        for seed in (0, 1):
            context.step(SOME if seed else None, shape=SIZE)
            for call, model in zip(calls, (one, other), strict=True):
                expect(call(draw(seed)), model, draw(seed), draw(0) if seed else None)


def test_weights_that_took_the_place_of_others() -> None:
    """An id is reused once its object is gone: the reference in the store says that it is another's."""
    model = build()
    call = compiled(model)
    with dmoe_compile.denoising() as context:
        context.step(shape=SIZE)
        call(draw(0))
        for stored in context._store.now.values():
            stored.experts = _reference_to_nothing()
        poison(context)
        context.step(ALL)
        expect(call(draw(1)), model, draw(1))


def _reference_to_nothing() -> Any:
    import weakref

    gone = torch.zeros(1)
    reference = weakref.ref(gone)
    del gone
    gc.collect()
    assert reference() is None
    return reference


def test_threads_have_their_own() -> None:
    model = build()
    call = compiled(model)
    with dmoe_compile.denoising() as context:
        context.step(shape=SIZE)
        call(draw(0))
    failures: list[BaseException] = []
    turn = threading.Barrier(2)

    def decode(seed: int) -> None:
        try:
            with torch.no_grad(), dmoe_compile.denoising() as context:
                for step in range(4):
                    context.step(SOME if step else None, shape=SIZE)
                    turn.wait()
                    before = torch.where(SOME.unsqueeze(-1), draw(seed), draw(seed + step - 1)) if step else None
                    out = call(draw(seed + step))
                    turn.wait()
                    expect(out, model, draw(seed + step), before)
        except BaseException as error:
            failures.append(error)
            turn.abort()

    threads = [threading.Thread(target=decode, args=(seed,)) for seed in (0, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_asyncio_tasks_have_their_own() -> None:
    model = build()
    call = compiled(model)

    async def decode(seed: int) -> None:
        with dmoe_compile.denoising() as context:
            for step in range(3):
                context.step(SOME if step else None, shape=SIZE)
                await asyncio.sleep(0)
                before = torch.where(SOME.unsqueeze(-1), draw(seed), draw(seed + step - 1)) if step else None
                expect(call(draw(seed + step)), model, draw(seed + step), before)

    async def main() -> None:
        await asyncio.gather(decode(0), decode(50))

    asyncio.run(main())


def test_a_task_does_not_inherit_the_context_of_another() -> None:
    """asyncio copies context variables into new tasks; two tasks in one context would read each other's state."""
    call = compiled(build())

    async def child() -> None:
        call(draw(0))

    async def main() -> None:
        with dmoe_compile.denoising() as context:
            context.step(shape=SIZE)
            with pytest.raises(RuntimeError, match="entered by another thread or asyncio task"):
                await asyncio.create_task(child())

    asyncio.run(main())


def test_copies_are_refused() -> None:
    context = dmoe_compile.denoising()
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied"):
            make(context)


def test_entered_twice_is_refused() -> None:
    context = dmoe_compile.denoising()
    with context, pytest.raises(RuntimeError, match="is entered already"):
        context.__enter__()
