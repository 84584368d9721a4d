"""Stacked experts, [E, ., .] weights, whose forward loops over those that were hit: found, and what may replace it.

T = B*S tokens, H = hidden, I = expert width, E = experts, k = experts a token
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode, fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from dmoe_compile.blocks import ROLES
from dmoe_compile.experts import experts_forward
from dmoe_compile.stacking import is_offloaded
from dmoe_compile.verify import at_rest, routed_rows

_ORDERS: tuple[tuple[str, ...], ...] = (ROLES, ("hidden", "weights", "ids"))


def weight_names(module: nn.Module) -> list[str]:
    """Return the names of a module's own weights [E, ., .] of one E, if there are two or more."""
    found = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()}
    return list(found) if len(found) > 1 and len({p.shape[0] for p in found.values()}) == 1 else []


@dataclass(frozen=True)
class Call:
    """How the forward of stacked experts may be called: the order of "hidden", "ids" and "weights", and H."""

    order: tuple[str, ...]
    width: int


def calls(module: nn.Module) -> list[Call]:
    """Return the calls for which the forward of stacked experts needs the values of its arguments; none for others."""
    if not weight_names(module) or len(inspect.signature(module.forward).parameters) != len(ROLES):
        return []
    if is_offloaded(module) or (_is_transformers_own(module) and _implementation_of(module) != "eager"):
        return []
    found = []
    for call in itertools.starmap(Call, itertools.product(_ORDERS, _widths(module))):
        args = inputs(module, call)[0]
        with at_rest(module), _unlogged(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            try:
                module.forward(*map(mode.from_tensor, args))
            except (DynamicOutputShapeException, DataDependentOutputException):
                found.append(call)
            except Exception:  # not these arguments
                continue
            else:
                return []
    return found


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging that a fake operation failed, which here is an answer."""
    log = logging.getLogger(fake_tensor.__name__)
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


def inputs(module: nn.Module, call: Call) -> list[tuple[Tensor, ...]]:
    """Return (hidden, ids, weights), in the order of a call, as the comparisons use."""
    like = getattr(module, weight_names(module)[0])
    rows = routed_rows(like, call.width, like.shape[0])
    return [tuple(dict(zip(ROLES, each, strict=True))[role] for role in call.order) for each in rows]


def _widths(module: nn.Module) -> list[int]:
    """Return what H may be: as the module says, or a size that all of its weights have."""
    named = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    if isinstance(named, int):
        return [named]
    return sorted(set.intersection(*(set(getattr(module, name).shape[1:]) for name in weight_names(module))))


def implementations(module: nn.Module) -> Iterator[Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Yield functions that may compute what a module of stacked experts does."""
    if _is_transformers_own(module):
        yield functools.partial(experts_forward, module)
        return
    names = weight_names(module)
    if len(names) != 2:
        return
    acts: list[Callable[[Tensor], Tensor]] = [each for each in module.children() if not list(each.parameters())]
    acts += [F.silu, F.gelu, functools.partial(F.gelu, approximate="tanh"), F.relu]
    layouts = itertools.product((False, True), ("concatenated", "interleaved", "none"), acts)
    for (up, down), (is_transposed, gating, act) in itertools.product(itertools.permutations(names), layouts):
        yield functools.partial(experts_forward, StackedWeights(module, up, down, is_transposed, gating, act))


class StackedWeights:
    """Experts whose module holds [E, ., .] weights, under the names that transformers' implementations read.

    Args:
        module: it owns the weights, which are read at every call.
        up, down: names of its parameters.
        is_transposed: the weights are [E, in, out].
        gating: how up becomes the input of down: "concatenated" (gate above up), "interleaved" or "none".
        act_fn: the activation.
    """

    has_gate = True  # gate_up_proj, then _apply_gate, then down_proj
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(self, module: nn.Module, up: str, down: str, is_transposed: bool, gating: str, act_fn: Any) -> None:
        self.module, self.up, self.down = module, up, down
        self.is_transposed, self.gating, self.act_fn = is_transposed, gating, act_fn
        self.num_experts = getattr(module, up).shape[0]
        self.has_bias = isinstance(getattr(module, f"{up}_bias", None), nn.Parameter)

    @property
    def gate_up_proj(self) -> Tensor:
        return getattr(self.module, self.up)

    @property
    def down_proj(self) -> Tensor:
        return getattr(self.module, self.down)

    @property
    def gate_up_proj_bias(self) -> Tensor:
        return getattr(self.module, f"{self.up}_bias")

    @property
    def down_proj_bias(self) -> Tensor:
        return getattr(self.module, f"{self.down}_bias")

    def _apply_gate(self, projected: Tensor) -> Tensor:
        """[S, rows of up] -> [S, I]; transformers calls it between the projections."""
        if self.gating == "none":
            return self.act_fn(projected)
        halves = (
            projected.chunk(2, dim=-1) if self.gating == "concatenated" else (projected[..., ::2], projected[..., 1::2])
        )
        return self.act_fn(halves[0]) * halves[1]


def _is_transformers_own(module: nn.Module) -> bool:
    """Say whether a class was made by transformers' use_experts_implementation."""
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_bias", "config"))


def _implementation_of(module: nn.Module) -> str:
    return getattr(module.config, "_experts_implementation", None) or "eager"
