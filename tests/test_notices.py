"""What cannot be rewritten is said once, and compiled all the same."""

import logging

import pytest
import torch
from dmoe_compile.passes import dmoe, pipeline
from torch import nn
from torch.testing import assert_close

import zoo
from dmoe_compile.notices import say_how_to_select
from tiny_moe import ATEN, DMOE, INDUCTOR, MODEL, QUICK, NoMoE, TinyMoE, compiled, eager

pytestmark = pytest.mark.usefixtures("uncached")


@pytest.fixture
def x():
    return torch.randn(2, 24, 16)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_a_model_without_experts_warns_once(grad, x, warnings):
    model = NoMoE()
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(model, DMOE)(x), torch.compile(model)(x))
    (warning,) = warnings()
    assert "no mixture-of-experts router" in warning
    assert "Linear (L['self'].linear)" in warning


class _BreaksAtExperts(TinyMoE):
    """Dynamo breaks the graph between the router and its experts, and no loop over experts is the reason."""

    def experts(self, rows, weights, ids):
        torch._dynamo.graph_break()
        return super().experts(rows, weights, ids)


@torch.no_grad()
def test_experts_that_break_the_graph_warn_once_with_module_reason_and_way_out(x, warnings):
    model = _BreaksAtExperts()
    assert_close(compiled(model, QUICK)(x), model(x), **INDUCTOR)
    (warning,) = warnings()
    assert "the experts of gate" in warning  # its module's path as the frame that was compiled knows it
    assert "Dynamo broke the graph" in warning
    assert "dmoe_compile.prepare(model)" in warning


@torch.no_grad()
def test_experts_left_in_a_loop_warn_once_with_module_and_way_out(warnings):
    model = zoo.build("qwen3_moe", num_layers=1)
    model.set_experts_implementation("eager")
    inputs = zoo.inputs("qwen3_moe", seq=8)
    expected = model(**inputs).logits
    options = {**QUICK, "auto_prepare": False}
    assert_close(compiled(model, options)(**inputs).logits, expected, **MODEL)
    (warning,) = warnings()
    assert "the experts of model.layers.0.mlp.experts stay in a Python loop" in warning
    assert "dmoe_compile.prepare(model)" in warning


@torch.no_grad()
def test_layers_whose_routers_have_hooks_are_told_so_and_not_to_drop_the_pass(warnings):
    """transformers collects router logits by forward hooks, which stay; Dynamo breaks the graph of a layer at each."""
    model, inputs = zoo.build("qwen3_moe"), zoo.inputs("qwen3_moe", seq=8)
    model(**inputs, output_router_logits=True)
    for layer in model.model.layers:
        layer.compile(backend="dmoe", options=dict(QUICK))
    model(**inputs)
    (warning,) = warnings()
    assert "the experts of topk over 16 are not in the same graph as their router" in warning
    assert "A forward hook is a usual cause" in warning


class _BreaksElsewhere(nn.Module):
    """The graph breaks, but not between the router and its experts."""

    def __init__(self):
        super().__init__()
        self.moe = TinyMoE()

    def forward(self, x):
        out = self.moe(x)
        torch._dynamo.graph_break()
        return out * 2


@torch.no_grad()
def test_a_graph_break_elsewhere_is_no_reason_to_warn(x, warnings):
    model = _BreaksElsewhere()
    assert_close(compiled(model, QUICK)(x), eager(model.moe, x) * 2, **INDUCTOR)
    assert warnings() == []


@torch.no_grad()
@pytest.mark.parametrize(
    ("experts", "says"), [(True, "Its routing is the model's own."), (False, "Compiled as plain Inductor would.")]
)
def test_a_forward_that_is_left_alone_says_what_runs_instead(experts, says, warnings):
    model, inputs = zoo.build("qwen3_moe", num_layers=1), zoo.inputs("qwen3_moe", seq=8)
    compiled(model, {**QUICK, "max_block_tokens": 7, "experts": experts})(**inputs)
    (warning,) = warnings()
    assert warning.endswith(f"8 tokens a sequence are more than max_block_tokens=7. {says}")


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_a_graph_that_cannot_be_read_compiles_as_plain_inductor(grad, x, warnings, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such node")

    model = TinyMoE()
    monkeypatch.setattr(pipeline, "find_sites", fail)
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(model, QUICK)(x), torch.compile(model, options=ATEN)(x))
    (warning,) = warnings()
    assert "Compiled as plain Inductor would" in warning
    assert "RuntimeError: no such node" in warning


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_a_rule_that_fails_at_a_second_layer_leaves_the_first_as_it_was(grad, x, warnings, monkeypatch):
    own, called = dmoe.coreset, []

    def fail(*args, **kwargs):
        called.append(args)
        if len(called) > 1:
            raise RuntimeError("not this one")
        return own(*args, **kwargs)

    model = nn.Sequential(TinyMoE(top_k=2), TinyMoE(top_k=3))  # of two kinds, so that the rule is traced twice
    monkeypatch.setattr(dmoe, "coreset", fail)
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(model, QUICK)(x), torch.compile(model, options=ATEN)(x))
    assert len(called) == 2
    (warning,) = warnings()
    assert "RuntimeError: not this one" in warning


@torch.no_grad()
def test_the_default_says_once_how_to_select_a_pass(x, caplog):
    caplog.set_level(logging.INFO, "dmoe_compile")
    say_how_to_select.cache_clear()
    compiled(NoMoE())(x)
    torch._dynamo.reset()
    compiled(NoMoE())(x)
    (record,) = [record for record in caplog.records if record.name.startswith("dmoe_compile")]
    assert record.levelno == logging.INFO
    assert 'options={"passes": ["dmoe"]}' in record.getMessage()
