"""Choose what replaces a loop over experts: of what may, that whose results are nearest the module's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmoe_compile.replacement import Cut, install, settings_of, uninstall
from dmoe_compile.verify import State, distance, is_telling, tolerance

_MAX_WAYS = 4  # that agree on the first input and are tried on all
Way = tuple[nn.Module, Cut, str]  # the module that it is installed in, what is, and words for it


@dataclass(frozen=True)
class Prepared:
    """What became of one mixture-of-experts block.

    Attributes:
        name: the module's path in the model.
        num_experts: E.
        how: what was replaced, "" where nothing was.
        reason: why it was left as it is, "" where something was replaced.
        error: largest difference from the original, relative to its norm, over all that was compared.
    """

    name: str
    num_experts: int
    how: str = ""
    reason: str = ""
    error: float = 0.0


def choose(
    module: nn.Module,
    ways: Callable[[], Iterator[Way]],
    inputs: Sequence[tuple[Tensor, ...]],
    report: Prepared,
    state: State,
) -> tuple[Prepared, Way | None]:
    """Return the way that agrees best of those that agree on the first input, or say that none agrees on all."""
    expected = [_result(module, state, args) for args in inputs]
    if not is_telling(expected[0][0]):
        return replace(report, reason="on random weights it gives zeros, infinities or NaN: nothing to compare"), None
    allowed = tolerance(next(module.parameters()).dtype)
    tried = [(_error(module, way, state, inputs[:1], expected[:1]), way) for way in ways()]
    near = sorted((each for each in tried if each[0] <= allowed), key=lambda each: each[0])[:_MAX_WAYS]
    full = [(_error(module, way, state, inputs, expected), way) for _, way in near]
    error, way = min(full, key=lambda each: each[0], default=(float("inf"), None))
    if way is not None and error <= allowed:
        owner, cut, how = way
        changing = {path.rpartition(".")[2] for _, changed in expected for path in changed}
        cut.settings = {name: value for name, value in settings_of(owner).items() if name not in changing}
        return replace(report, how=how, error=error), way
    nearest = min((each[0] for each in full or tried), default=float("inf"))
    off = f"; the nearest is off by {nearest:.1e}" if nearest < float("inf") else ""
    changes = ", ".join({path: None for _, changed in expected for path in changed})
    return replace(
        report, reason=f"its forward is of no known form{off}" + (f"; it changes {changes}" if changes else "")
    ), None


def confirm(
    module: nn.Module, done: Prepared, way: Way | None, args: tuple[Tensor, ...], state: State
) -> tuple[Prepared, Way | None]:
    """Compare once more, on the module's own weights, where these give anything to compare."""
    if way is None or not is_telling((expected := _result(module, state, args))[0]):
        return done, way
    error = _error(module, way, state, [args], [expected])
    if error > tolerance(next(module.parameters()).dtype):
        return replace(done, how="", error=0.0, reason=f"{done.how} is off by {error:.1e} on its own weights"), None
    return replace(done, error=max(done.error, error)), way


def _result(module: nn.Module, state: State, args: tuple[Tensor, ...]) -> tuple[Any, dict[str, Any]]:
    """Return what a module returns and what it changes."""
    state.restore()
    torch.manual_seed(0)  # a router that draws random numbers draws the same ones for every way
    output = module.forward(*args)
    return output, state.changed()


def _error(
    module: nn.Module,
    way: Way,
    state: State,
    inputs: Sequence[tuple[Tensor, ...]],
    expected: Sequence[tuple[Any, dict[str, Any]]],
) -> float:
    """Return how far a module's results are from those it had before, with a replacement installed."""
    owner, cut, _ = way
    calls: list[int] = []

    def run(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        calls.append(len(hidden))
        return cut.run(hidden, ids, weights)

    worst = 0.0
    for args, wanted in zip(inputs, expected, strict=True):
        state.restore()
        calls.clear()
        install(owner, replace(cut, run=run))
        try:
            torch.manual_seed(0)
            result = module.forward(*args), state.changed()
        except Exception:  # a replacement that does not fit: it was a guess
            return float("inf")
        finally:
            uninstall(owner)
        if not calls:  # the module's own code ran
            return float("inf")
        worst = max(worst, distance(result, wanted))
    return worst
