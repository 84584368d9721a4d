"""A decoding context serves nobody but its own decoding: whatever else may be stored is filled with NaN and never seen.

B, S: sequences, tokens of each; H: hidden
"""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dmoe_compile
from dmoe_compile.context import Denoising, current
from test_backend import ATEN, INDUCTOR, TinyMoE

B, S, H = 2, 8, 16
SIZE = (B, S)
SOME = torch.rand(SIZE, generator=torch.Generator().manual_seed(3)) < 0.5
ALL = torch.ones(SIZE, dtype=torch.bool)


def build(seed: int = 0) -> TinyMoE:
    torch.manual_seed(seed)
    return TinyMoE(num_experts=12, top_k=2)


def compiled(model: TinyMoE, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="dmoe", options={"passes": ["team"], **ATEN}, fullgraph=True, **kwargs)


def draw(seed: int, batch: int = B, seq: int = S) -> Tensor:
    return torch.randn(batch, seq, H, generator=torch.Generator().manual_seed(seed))


def poison(context: Denoising) -> None:
    """Fill all that is stored with NaN: what still comes out right did not read it."""
    for stored in context._stored.values():
        stored.buffer.fill_(float("nan"))
    for spare in context._spare.values():
        spare.fill_(float("nan"))


def moe(out: Tensor, x: Tensor) -> Tensor:
    """Return what TinyMoE's experts gave: it adds its input."""
    return out - x


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def expect(ours: Tensor, model: TinyMoE, x: Tensor, before: Tensor | None = None, decoded: Tensor = SOME) -> None:
    """Decoded tokens have the experts' outputs of `before` (an input), the others those of `x`."""
    own = moe(model(x), x)
    if before is not None:
        own = torch.where(decoded.unsqueeze(-1), moe(model(before), before), own)
    assert_close(moe(ours, x), own, **INDUCTOR)


def test_decoded_tokens_are_served_from_the_last_forward() -> None:
    model = build()
    call = compiled(model)
    with dmoe_compile.denoising() as context:
        context.step(shape=SIZE)
        call(draw(0))
        context.step(SOME)
        expect(call(draw(1)), model, draw(1), draw(0))
        context.step(~SOME)  # what the last forward served is stored again
        expect(call(draw(2)), model, draw(2), draw(1), ~SOME)


def test_the_first_forward_computes_whatever_is_marked() -> None:
    model = build()
    with dmoe_compile.denoising() as context:
        context.step(ALL)
        expect(compiled(model)(draw(0)), model, draw(0))


def test_only_the_forward_just_before_counts() -> None:
    """A step whose forward never ran, or a plain forward between, leaves nothing to read."""
    model = build()
    call = compiled(model)
    with dmoe_compile.denoising() as context:
        for skip in (lambda: context.step(shape=SIZE), context.plain):
            context.step(shape=SIZE)
            call(draw(0))
            skip()
            poison(context)
            context.step(ALL)
            expect(call(draw(1)), model, draw(1))


def test_an_exception_in_the_middle_leaves_nothing_to_read() -> None:
    model = build()
    call = compiled(model)
    with dmoe_compile.denoising() as context:
        context.step(shape=SIZE)
        call(draw(0))
        context.step(SOME)
        with pytest.raises(ZeroDivisionError):
            _fail_inside(context, call)
        poison(context)  # as far as it came
        context.step(ALL)
        expect(call(draw(2)), model, draw(2))


def _fail_inside(context: Denoising, call: Callable[[Tensor], Tensor]) -> None:
    """Run a forward that fails after its state was handed out, before it is done."""
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        patch.setattr(context, "done", fail)
        call(draw(1))


def test_another_position_is_not_served() -> None:
    model = build()
    call = compiled(model)
    with dmoe_compile.denoising() as context:
        context.step(shape=SIZE, offset=0)
        call(draw(0))
        poison(context)
        context.step(ALL, offset=S)
        expect(call(draw(1)), model, draw(1))


@pytest.mark.parametrize("dynamic", [None, True])
def test_positions_are_absolute(dynamic: bool | None) -> None:
    """A window that grows, moves and shrinks: what both forwards cover is served, wherever it lies in the row."""
    model = build()
    call = compiled(model, dynamic=dynamic)
    full = draw(9, seq=32)
    with dmoe_compile.denoising() as context:
        last: tuple[int, int] | None = None
        for offset, seq, seed in [(0, 8, 0), (0, 16, 1), (4, 16, 2), (10, 6, 3), (2, 12, 4)]:
            x = draw(seed, seq=32)
            decoded = torch.ones(B, seq, dtype=torch.bool)
            context.step(decoded if last else None, shape=(B, seq), offset=offset)
            ours = moe(call(x[:, offset : offset + seq]), x[:, offset : offset + seq])
            own = moe(model(x), x)
            if last is not None:
                first, end = last
                served = torch.zeros(32, dtype=torch.bool)
                served[max(first, offset) : min(end, offset + seq)] = True
                own = torch.where(served[:, None], full, own)
            assert_close(ours, own[:, offset : offset + seq], **INDUCTOR)
            full[:, offset : offset + seq] = ours
            last = offset, offset + seq


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
        for stored in outer._stored.values():
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
        for stored in context._stored.values():
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


def test_a_forward_that_runs_twice_in_a_step_is_refused() -> None:
    """As with classifier-free guidance in two calls: the second would be served from the first."""
    call = compiled(build())
    with dmoe_compile.denoising() as context:
        context.step(shape=SIZE)
        call(draw(0))
        with pytest.raises(RuntimeError, match="ran twice in one denoising step"):
            call(draw(1))


def test_other_shapes_are_plain() -> None:
    """A prefill inside a step, or an encoder: it is not what the step described."""
    model = build()
    call = compiled(model)
    with dmoe_compile.denoising() as context:
        context.step(ALL)
        x = draw(0, seq=3 * S)
        assert_close(call(x), model(x), **INDUCTOR)
        assert context.stats == []
        assert context.nbytes == 0


def test_graph_breaks_keep_the_state() -> None:
    """Each piece of a broken model serves its own sites, whose names in the pieces may be the same."""
    layers = build(0), build(1)

    def model(x: Tensor) -> Tensor:
        x = layers[0](x)
        torch._dynamo.graph_break()
        return layers[1](x)

    call = torch.compile(model, backend="dmoe", options={"passes": ["team"], **ATEN})
    stored: list[Tensor] = []
    with dmoe_compile.denoising() as context:
        for step in range(3):
            context.step(SOME if step else None, shape=SIZE)
            x = wanted = draw(step)
            for i, layer in enumerate(layers):
                own = moe(layer(wanted), wanted)
                if step:
                    own = torch.where(SOME.unsqueeze(-1), stored[i], own)
                stored[i : i + 1] = [own]
                wanted = wanted + own
            assert_close(call(x), wanted, **INDUCTOR)
        assert len(context.stats) == 3


def test_plain_forwards_count_too_with_stats() -> None:
    model = build()
    call = torch.compile(model, backend="dmoe", options={"passes": ["team"], "stats": True, **ATEN}, fullgraph=True)
    with dmoe_compile.denoising() as context:
        call(draw(0))
        (plain,) = context.counted().values()
        context.step(shape=SIZE)
        assert context.counted() == {}  # of a forward that has not run
        call(draw(0))
        assert list(context.counted().values()) == [plain]
        context.step(ALL)
        call(draw(0))
        assert list(context.counted().values()) < [plain]
        context.plain()
        call(draw(0))
        assert list(context.counted().values()) == [plain]
    assert len(context.stats) == 4


def test_recompiles_and_resets_keep_the_state() -> None:
    model = build()
    with dmoe_compile.denoising() as context:
        context.step(shape=SIZE)
        compiled(model)(draw(0))
        torch._dynamo.reset()
        context.step(SOME)
        expect(compiled(model)(draw(1)), model, draw(1), draw(0))


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


def test_memory_is_bounded_and_freed() -> None:
    """Two buffers a site at most, however often the number of rows changes."""
    model = build()
    call = compiled(model, dynamic=True)
    one = B * S * H * 4
    with dmoe_compile.denoising() as context:
        assert context.nbytes == 0
        sizes = []
        for step in range(6):
            candidates = 4 if step % 2 else 1
            context.step(SOME if step else None, shape=SIZE, candidates=candidates)
            call(draw(step, batch=B * candidates))
            context.accept(torch.zeros(B, dtype=torch.int64))
            sizes.append(context.nbytes)
        assert sizes == [one] + [5 * one] * 5
    assert context.nbytes == 0
    assert len(context.stats) == 6


def test_entered_twice_is_refused() -> None:
    context = dmoe_compile.denoising()
    with context, pytest.raises(RuntimeError, match="is entered already"):
        context.__enter__()


def test_candidates_need_a_choice() -> None:
    context = dmoe_compile.denoising()
    with context:
        context.step(shape=SIZE, candidates=2)
        with pytest.raises(RuntimeError, match="accept\\(\\) must say which one goes on"):
            context.step(SOME, candidates=2)
        for choice in ([0, 2], [-1, 0], [0]):
            with pytest.raises(ValueError, match="must be a candidate in"):
                context.accept(torch.tensor(choice))
        context.accept(torch.tensor([1, 0]))
        context.step(SOME)
        context.plain()
        with pytest.raises(RuntimeError, match="belongs after a forward"):
            context.accept(torch.tensor([0, 0]))


@pytest.mark.parametrize("candidates", [1, 2])
def test_the_accepted_candidate_goes_on(candidates: int) -> None:
    """Each sequence has its own choice; the next step's candidates, as many or fewer, all take its rows."""
    model, choice = build(), torch.tensor([1, 0])
    call = compiled(model)
    before, x = draw(1, batch=2 * B), draw(2, batch=candidates * B)
    with dmoe_compile.denoising() as context:
        context.step(shape=SIZE, candidates=2)
        call(before)
        context.accept(choice)
        context.step(SOME, candidates=candidates)
        accepted = before[torch.arange(B) * 2 + choice].repeat_interleave(candidates, 0)
        expect(call(x), model, x, accepted, SOME.repeat_interleave(candidates, 0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decoded": SOME.int()}, r"decoded is int32\[2, 8\], but must be bool\[B, S\]"),
        ({"cold": SOME[0]}, r"cold is bool\[8\], but must be"),
        ({"decoded": SOME, "cold": SOME[:, :4]}, r"must say one \(B, S\), but say \[\(2, 4\), \(2, 8\)\]"),
        ({}, r"must say one \(B, S\), but say \[\]"),
        ({"shape": SIZE, "candidates": 0}, "candidates=0 must be at least 1"),
        ({"shape": SIZE, "offset": -1}, "offset=-1 at least 0"),
        ({"shape": SIZE, "finished": SOME[0]}, r"finished is bool\[8\], but must be bool\[2\]"),
    ],
)
def test_bad_masks_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dmoe_compile.denoising().step(**kwargs)
