"""What the rewrite must not change: other outputs, static inputs, what a model writes to, aliases, constants."""

import functools

import pytest
import torch
from dmoe_compile.passes.dmoe import coreset
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as inductor
from torch.testing import assert_close

import dmoe_compile
from dmoe_compile import Config, backend
from dmoe_compile.notices import Notices
from tiny_moe import DMOE, INDUCTOR, POLICY, QUICK, TinyMoE, WithSideOutputs, compiled, eager

pytestmark = pytest.mark.usefixtures("uncached")


@pytest.fixture
def x():
    return torch.randn(2, 24, 16)


@pytest.fixture
def graphs(monkeypatch):
    """What Inductor lowered so far: (graph, backward or not, static inputs)."""
    seen = []
    lower = inductor.fx_codegen_and_compile

    def spy(gm, *args, **kwargs):
        seen.append((gm, kwargs["is_backward"], list(kwargs["static_input_idxs"])))
        return lower(gm, *args, **kwargs)

    monkeypatch.setattr(inductor, "fx_codegen_and_compile", spy)
    return seen


def as_rewritten(config):
    """A backend that runs the rewritten graph without lowering it."""

    def run(gm, example_inputs):
        rewritten, _ = backend.rewrite(gm, example_inputs, config, Notices())
        return rewritten.forward

    return run


@torch.no_grad()
def test_only_what_the_report_lists_changes(x):
    model = WithSideOutputs()
    config = Config.from_options(DMOE)
    out, logits, loss, shared, doubled, ids, weights = torch.compile(model, backend=as_rewritten(config))(x)
    plain = model(x)
    for ours, theirs in zip((logits, loss, shared, doubled), plain[1:5], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip((out, ids, weights), (plain[0], *plain[5:]), strict=True):
        assert not torch.equal(ours, theirs)
    expected = eager(model, x)
    assert torch.equal(ids, expected[5])
    assert_close((out, weights), (expected[0], expected[6]), **INDUCTOR)
    (site,) = dmoe_compile.explain(model, x, config=config).sites
    assert len(site.escapes) == 2
    assert any("int64[48, 2] is returned" in escape for escape in site.escapes)
    assert any("float32[48, 2] is returned" in escape for escape in site.escapes)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_weights_stay_static_inputs(grad, x, graphs):
    model = TinyMoE()
    static = []
    for options in ({"backend": "inductor"}, {"backend": "dmoe", "options": DMOE}):
        graphs.clear()
        with torch.set_grad_enabled(grad):
            torch.compile(model, **options)(x)
        static.append(graphs[0][2])
    assert len(static[0]) == len(static[1]) == len(list(model.parameters()))


class _Cached(nn.Module):
    """A static cache that is written in place, a counter, and an input that is overwritten."""

    def __init__(self):
        super().__init__()
        self.moe = TinyMoE()
        self.register_buffer("cache", torch.zeros(2, 32, 16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, positions):
        self.cache.index_copy_(1, positions, x)
        self.calls.add_(1)
        out = self.moe(self.cache)
        x.zero_()
        return out, self.cache


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_a_model_that_writes_to_its_inputs_and_buffers(grad, x):
    results = []
    for function in (None, compiled):
        torch.manual_seed(3)
        model = _Cached()
        run = function(model, QUICK, fullgraph=True) if function else functools.partial(_eager_cached, model)
        with torch.set_grad_enabled(grad):
            for start in (0, 8):
                given = x.clone()
                out, cache = run(given, torch.arange(start, start + 24))
        assert cache is model.cache
        results.append((out, model.cache, model.calls, given))
    assert_close(results[1], results[0], **INDUCTOR)
    assert results[1][2].item() == 2


def _eager_cached(model, *args):
    model.moe.eager_rule = functools.partial(coreset, options=POLICY)
    try:
        return model(*args)
    finally:
        model.moe.eager_rule = None


class _Tied(nn.Module):
    """Two layers with one router weight between them, fed the same tensor twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = TinyMoE(), TinyMoE()
        self.second.gate.weight = self.first.gate.weight

    def forward(self, x, y):
        return self.first(x) + self.second(y)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_duplicate_inputs_and_tied_weights(grad, x):
    model = _Tied()
    with torch.set_grad_enabled(grad):
        counters.clear()
        actual = compiled(model, QUICK, fullgraph=True)(x, x)
        assert counters["dmoe"]["sites_rewritten"] == 2
        assert_close(actual, eager(model.first, x) + eager(model.second, x), **INDUCTOR)


class _Aliasing(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = TinyMoE()

    def forward(self, x):
        out = self.moe(x)
        return out, out[:, :4], x.view(-1, 16), x


@torch.no_grad()
def test_outputs_that_alias(x):
    model = _Aliasing()
    out, part, view, same = compiled(model, QUICK, fullgraph=True)(x)
    assert_close(out, eager(model.moe, x), **INDUCTOR)
    assert torch.equal(part, out[:, :4])
    assert part.data_ptr() == out.data_ptr()
    assert view.data_ptr() == x.data_ptr()
    assert same is x


class _Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = TinyMoE()

    def forward(self, x):
        return self.moe(x * torch.tensor(0.5) + torch.tensor([1.0, 2.0]).sum()) * torch.tensor([2.0] * 16)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_tensor_constants_in_the_model(grad, x):
    model = _Constants()
    with torch.set_grad_enabled(grad):
        assert_close(compiled(model, QUICK, fullgraph=True)(x), eager(model.moe, x * 0.5 + 3) * 2, **INDUCTOR)
