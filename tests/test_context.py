"""A decoding context serves what the last forward stored: whatever else is there is filled with NaN and never seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dmoe_compile
from dmoe_compile.context import Denoising
from served_tokens import ALL, SIZE, SOME, B, H, S, build, compiled, draw, expect, moe, poison
from tiny_moe import ATEN, INDUCTOR

pytestmark = pytest.mark.usefixtures("without_gradients")


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


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_other_sequences_are_not_served(first: int, then: int) -> None:
    """A batch that shrinks or grows between steps: which rows are which, nobody said."""
    model = build()
    call = compiled(model)
    with dmoe_compile.denoising() as context:
        context.step(shape=(first, S))
        call(draw(0, batch=first))
        poison(context)
        context.step(ALL[:then])
        expect(call(draw(1, batch=then)), model, draw(1, batch=then))


VOTING = {"passes": ["dmoe"], "block_length": S, "dmoe.top_p": 0.3, "dmoe.min_experts": 2}


@pytest.mark.parametrize("passes", [["dmoe"], ["team", "dmoe"]])
def test_absent_tokens_do_not_vote(passes: list[str]) -> None:
    """Plain forwards over sequences of which some are padding: the others' coreset is their own, shared or not."""
    model, x = build(), draw(0)
    absent = torch.tensor([[False] * S, [True] * S])
    for scope in ("batch", "block"):
        torch._dynamo.reset()
        options = {**VOTING, "passes": passes, "scope": scope, "stats": True, **ATEN}
        call = torch.compile(model, backend="dmoe", options=options, fullgraph=True)
        with dmoe_compile.denoising() as context:
            context.plain()
            every = call(x)[0]
            context.plain(absent)
            ours = call(x)[0]
            (used,) = context.counted().values()
            with pytest.raises(RuntimeError, match="belongs after a forward that step"):
                context.accept(torch.tensor([0, 0]))
            context.plain()
            alone = call(x[:1])[0]
            (wanted,) = context.counted().values()
            assert context.nbytes == 0
        assert_close(ours, alone, **INDUCTOR)
        assert used == wanted
        assert torch.allclose(ours, every, **INDUCTOR) == (scope == "block")


def test_what_is_absent_is_a_mask() -> None:
    for wrong, message in (
        (SOME.int(), r"absent is int32\[2, 8\]"),
        (SOME[0], r"absent is bool\[8\], but must be"),
        (True, "absent is of type bool"),
    ):
        with pytest.raises(ValueError, match=message):
            dmoe_compile.denoising().plain(wrong)


def test_steps_are_plain_where_nothing_is_reused() -> None:
    """A context around a model without TEAM: a step's masks say nothing to it, finished sequences do."""
    model, x = build(), draw(0)
    call = torch.compile(model, backend="dmoe", options={**VOTING, "scope": "batch", **ATEN}, fullgraph=True)
    with dmoe_compile.denoising() as context:
        context.step(ALL)
        assert torch.equal(call(x), call(x))
        assert context.nbytes == 0
        context.step(ALL, finished=torch.tensor([False, True]))
        assert_close(call(x)[0], call(x[:1])[0], **INDUCTOR)


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
        assert [len(step.unique_experts) for step in context.stats] == [2, 2, 2]


def test_sites_of_one_name_are_told_apart() -> None:
    """Layers that were compiled one by one, each by its own name in itself."""
    layers = [torch.compile(build(i), backend="dmoe", options={"passes": ["team"], **ATEN}) for i in range(2)]
    with dmoe_compile.denoising() as context:
        context.step(shape=SIZE)
        for layer in layers:
            layer(draw(0))
        (name, other), counts = context.counted(), list(context.counted().values())
    assert other == f"{name}#2"
    assert [list(step.unique_experts.values()) for step in context.stats] == [counts]


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
        ({"shape": SIZE, "candidates": 0}, "candidates=0 must be an integer of at least 1"),
        ({"shape": SIZE, "offset": -1}, "offset=-1 must be an integer of at least 0"),
        ({"shape": SIZE, "candidates": "2"}, "candidates='2' must be an integer"),
        ({"shape": SIZE, "offset": None}, "offset=None must be an integer"),
        ({"shape": 5}, r"shape=5 must be \(B, S\)"),
        ({"shape": (1,)}, r"shape=\(1,\) must be \(B, S\)"),
        ({"shape": (1, 0)}, "shape=0 must be an integer of at least 1"),
        ({"shape": (1.5, 4)}, r"shape=1\.5 must be an integer"),
        ({"decoded": [[True]]}, r"decoded is of type list, but must be bool\[B, S\]"),
        ({"shape": SIZE, "finished": True}, r"finished is of type bool, but must be bool\[2\]"),
        ({"shape": SIZE, "finished": SOME[0]}, r"finished is bool\[8\], but must be bool\[2\]"),
    ],
)
def test_bad_masks_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dmoe_compile.denoising().step(**kwargs)
