"""Stacked experts that loop over those that were hit: which modules are that, and what they may be replaced by."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import forms
import zoo
from dmoe_compile import prepare
from dmoe_compile.blocks import ROLES
from dmoe_compile.stacked_loops import Call, calls, inputs, weight_names
from reference_model import Experts
from tiny_moe import INDUCTOR

E, H, WIDTH = 6, 16, 8


class Hit(nn.Module):
    """down(act(gate, up)) of the experts that were hit, with [E, ., .] weights that lie in one way or another."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 2 * WIDTH, transposed: bool = False) -> None:
        super().__init__()
        shapes = [(E, width, H), (E, H, WIDTH)]
        shapes = [(e, b, a) for e, a, b in shapes] if transposed else shapes
        self.up, self.down = (nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5) for shape in shapes)
        self.between, self.transposed = between, transposed

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in ids.unique():
            tokens, places = torch.where(ids == e)
            up, down = (w[e].T if self.transposed else w[e] for w in (self.up, self.down))
            out.index_add_(0, tokens, self.between(hidden[tokens] @ up.T) @ down.T * weights[tokens, places, None])
        return out


class WeightsFirst(Hit):
    def forward(self, hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().forward(hidden, ids, weights)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved(x: Tensor) -> Tensor:
    return F.gelu(x[..., ::2], approximate="tanh") * x[..., 1::2]


def clamped(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)


KNOWN = {
    "gate above up": lambda: Hit(swiglu),
    "transposed": lambda: Hit(swiglu, transposed=True),
    "interleaved": lambda: Hit(interleaved),
    "no gate": lambda: Hit(F.relu, width=WIDTH),
    "weights before ids": lambda: WeightsFirst(swiglu),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_layouts_are_replaced(name: str) -> None:
    torch.manual_seed(0)
    module = KNOWN[name]().eval()
    order = ("hidden", "weights", "ids") if name == "weights before ids" else ROLES
    assert Call(order, H) in calls(module)  # fake tensors can't always tell
    args = inputs(module, Call(order, H))[0]
    with torch.no_grad():
        own = module(*args)
        (entry,) = prepare(module).blocks
        assert not entry.reason
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert_close(compiled(*args), own, **INDUCTOR)


def test_a_clamp_is_seen() -> None:
    (entry,) = prepare(Hit(clamped).eval()).blocks
    assert "of no known form" in entry.reason


def test_modules_that_trace_as_they_are_are_left_alone() -> None:
    model = zoo.build("qwen3_moe", num_layers=1)  # with transformers' grouped_mm
    assert prepare(model).blocks == ()


def test_trying_a_module_out_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """torch logs an error, with a traceback, for every fake operation that does not fit."""
    assert calls(Experts(E, H, WIDTH)) == []
    assert not caplog.records
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


def test_transformers_own_loops_are_found() -> None:
    model = zoo.build("qwen3_moe", "eager", num_layers=1)
    (entry,) = prepare(model).blocks
    assert entry.how == "Qwen3MoeExperts.forward()"


class Counting(Hit):
    load: Tensor

    def __init__(self) -> None:
        super().__init__(swiglu)
        self.register_buffer("load", torch.zeros(E))

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.load = self.load + F.one_hot(ids.flatten(), E).sum(0)
        return super().forward(hidden, ids, weights)


def test_looking_at_a_module_leaves_nothing_in_it() -> None:
    module = Counting().eval()
    load = module.load
    assert calls(module)
    assert module.load is load
    (entry,) = prepare(module).blocks
    assert "it changes load" in entry.reason
    assert module.load is load
    assert not load.any()


def test_one_that_can_not_be_run_is_refused_and_the_rest_prepared() -> None:
    class Particular(Hit):
        def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            assert ids.shape[-1] == 3
            return super().forward(hidden, ids, weights)

    class Late(Hit):
        def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out = super().forward(hidden, ids, weights)
            raise LookupError("not on this machine")
            return out

    models = nn.ModuleList([forms.build("softmax_loop"), Particular(swiglu), Late(swiglu), forms.build("hit_loop")])
    found = {entry.name: entry.reason for entry in prepare(models.eval()).blocks}
    assert found.pop("2").endswith("(LookupError: not on this machine)")
    assert found == {"0": "", "3": ""}


def test_what_is_not_a_bank_of_experts() -> None:
    assert weight_names(nn.Linear(2, 2)) == []
    assert calls(nn.Linear(2, 2)) == []
    assert calls(nn.MultiheadAttention(4, 2)) == []
