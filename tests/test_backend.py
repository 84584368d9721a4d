"""torch.compile(model, backend="dmoe"), from the options to the outputs, on a model small enough to read.

B, S: sequences and tokens a sequence; T = B*S; H: hidden; F: expert width; E, k: experts and experts a token
"""

import functools
import logging
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from dmoe_compile.passes import pipeline
from dmoe_compile.passes.coreset import Blocks, choose, penalise, restrict, restrict_groups
from dmoe_compile.passes.dmoe import Options, coreset
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as inductor
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.testing import assert_close

import dmoe_compile
from dmoe_compile import Config, backend, joint
from dmoe_compile.joint import JointPass
from dmoe_compile.notices import Notices, say_how_to_select

BLOCK = 8
POLICY = Options(top_p=0.3, min_experts=3)  # 3 of 8 experts: every block of 8 tokens would use more
DMOE = {"passes": ["dmoe"], "block_length": BLOCK, "dmoe.top_p": 0.3, "dmoe.min_experts": 3}
ALL_EXPERTS = {**DMOE, "dmoe.min_experts": 2**31, "experts": False}
ATEN = {
    "fallback_by_default": True
}  # Inductor then calls ATen and generates no C++: fast where its code is not the point
QUICK = {**DMOE, **ATEN}
LOSSLESS = {"passes": [], "experts": False}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")

# Inductor sums in another order than eager, over at most 24 terms of size 1 a few matmuls deep. Flipping one
# expert moves an output by 0.1 or more.
INDUCTOR = dict(rtol=1e-4, atol=1e-5)


class TinyMoE(nn.Module):
    """One routed layer with residual. `eager_rule` applies the dMoE rule as the layer's own code would.

    groups: None, softmax scores, whose top-k values are the weights; or (groups, groups a token), sigmoid scores
    with a selection bias, the weights gathered without it, as in DeepSeek-V3.
    """

    def __init__(self, hidden=16, width=8, num_experts=8, top_k=2, groups=None):
        super().__init__()
        self.top_k, self.groups = top_k, groups
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.bias = nn.Parameter(torch.randn(num_experts) * 0.1) if groups else None
        self.up = nn.Parameter(torch.randn(num_experts, width, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, width) / width**0.5)
        nn.init.normal_(self.gate.weight, std=0.5)  # logits far enough apart that rounding flips no expert
        self.eager_rule = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(self.gate(rows), x.shape[0], x.shape[1])
        return x + self.experts(rows, weights, ids).reshape(x.shape)

    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        if self.groups:
            scores = logits.sigmoid()
            ids = self._limited(scores + self.bias, batch, seq).topk(self.top_k, dim=-1).indices
            weights = scores.gather(1, ids)
        else:
            weights, ids = self._limited(logits.softmax(-1), batch, seq).topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def experts(self, rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("tkfh,th->tkf", self.up[ids], rows))
        return (torch.einsum("tkhf,tkf->tkh", self.down[ids], hidden) * weights.unsqueeze(-1)).sum(1)

    def _limited(self, scores: Tensor, batch: int, seq: int) -> Tensor:
        """What the top-k ranks: the scores, the router's groups and the eager rule applied."""
        if self.eager_rule is None:
            return self._in_groups(scores) if self.groups else scores
        with torch.no_grad():
            inside = choose(scores, Blocks(batch, seq, BLOCK), self.top_k, self.eager_rule)
        if not self.groups:
            return restrict(scores, inside)
        penalised = penalise(scores, inside)
        return restrict_groups(self._in_groups(penalised), penalised, inside, self.top_k)

    def _in_groups(self, scores: Tensor) -> Tensor:
        count, kept = self.groups
        grouped = scores.view(-1, count, scores.shape[-1] // count)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
        mask = torch.zeros_like(best, dtype=scores.dtype).new_zeros(len(scores), count).scatter(1, best, 1)
        return scores.masked_fill(~mask.unsqueeze(-1).expand_as(grouped).reshape_as(scores).bool(), -torch.inf)


class WithSideOutputs(TinyMoE):
    """All that a layer may return besides its result: logits, a z-loss, a shared expert, ids and weights."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(16, 16)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        logits, shared = self.gate(rows), self.shared(rows)
        weights, ids = self.route(logits, x.shape[0], x.shape[1])
        out = (self.experts(rows, weights, ids) + shared).reshape(x.shape) + x
        return out, logits, logits.logsumexp(-1).square().mean(), shared, x * 2, ids, weights


@dataclass(frozen=True)
class _Source:
    """What Dynamo says of an input."""

    name: str


class NoMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x).relu()


@pytest.fixture(autouse=True)
def _nothing_from_a_cache():
    """What a pass or a hook saw is under test: a cached result would show nothing."""
    with inductor_config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@pytest.fixture
def x():
    return torch.randn(2, 24, 16)


@pytest.fixture
def warnings(caplog):
    """What the package warned of so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "dmoe" in r.name]


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


@pytest.fixture
def handed(monkeypatch):
    """What was handed to compile_fx so far: (graph, config patches)."""
    seen = []
    compile_fx = inductor.compile_fx

    def spy(gm, example_inputs, *args, config_patches=None, **kwargs):
        if config_patches is not None:  # None: it calls itself under the patches
            seen.append((gm, config_patches))
        return compile_fx(gm, example_inputs, *args, config_patches=config_patches, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    return seen


def compiled(model, options=None, **kwargs):
    return torch.compile(model, backend="dmoe", options=options, **kwargs)


def eager(model, *args):
    """The model with the rule in its own code."""
    model.eager_rule = functools.partial(coreset, options=POLICY)
    try:
        return model(*args)
    finally:
        model.eager_rule = None


def as_rewritten(config):
    """A backend that runs the rewritten graph without lowering it."""

    def run(gm, example_inputs):
        rewritten, _ = backend.rewrite(gm, example_inputs, config, Notices())
        return rewritten.forward

    return run


# The rule reaches the compiled model, in every setting.


def test_the_rule_changes_this_model_and_the_reference_knows_how(x):
    model = TinyMoE()
    with torch.no_grad():
        assert (eager(model, x) - model(x)).abs().max() > 0.1


@pytest.mark.parametrize("groups", [None, (4, 2)], ids=["softmax", "groups"])
@torch.no_grad()
def test_compiled_routing_is_the_rule(x, groups):
    model = TinyMoE(groups=groups)
    assert_close(compiled(model, DMOE, fullgraph=True)(x), eager(model, x), **INDUCTOR)
    assert (eager(model, x) - model(x)).abs().max() > 0.1


@pytest.mark.parametrize("dynamic", [True, False, None])
@torch.no_grad()
def test_static_and_dynamic_shapes(dynamic):
    model = TinyMoE()
    shapes = [(2, 24), (2, 20), (2, 40)]  # whole blocks, a ragged last one, more blocks

    def num_graphs(function):
        torch._dynamo.reset()
        counters.clear()
        outputs = [function(torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))) for shape in shapes]
        return outputs, counters["stats"]["unique_graphs"]

    ours, count = num_graphs(compiled(model, QUICK, dynamic=dynamic, fullgraph=True))
    _, stock_count = num_graphs(torch.compile(model, backend="eager", dynamic=dynamic, fullgraph=True))
    expected, _ = num_graphs(functools.partial(eager, model))
    assert_close(ours, expected, **INDUCTOR)
    assert count == stock_count == {True: 1, False: 3, None: 2}[dynamic]


def _no_grad(model):
    return torch.no_grad()


def _inference_mode(model):
    return torch.inference_mode()


def _grad_but_nothing_requires_it(model):
    model.requires_grad_(False)
    return torch.enable_grad()


def _grad(model):
    return torch.enable_grad()


@pytest.mark.parametrize("setting", [_no_grad, _inference_mode, _grad_but_nothing_requires_it, _grad])
def test_every_grad_mode(setting, x):
    model = TinyMoE()
    with setting(model):
        expected = eager(model, x)
        counters.clear()
        actual = compiled(model, QUICK, fullgraph=True)(x)
    assert_close(actual, expected, **INDUCTOR)
    assert actual.requires_grad == (setting is _grad)
    assert counters["dmoe"]["sites_rewritten"] == 1


class _Fp32Router(TinyMoE):
    """Keeps its router out of autocast, as real models do."""

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast("cpu", enabled=False):
            weights, ids = self.route(self.gate(rows), x.shape[0], x.shape[1])
        return x + self.experts(rows, weights, ids).reshape(x.shape)


@torch.no_grad()
def test_autocast(x):
    model = _Fp32Router()
    with torch.autocast("cpu", torch.bfloat16):
        stock = torch.compile(model)(x)
        assert torch.equal(compiled(model, ALL_EXPERTS)(x), stock)
        assert not torch.equal(compiled(model, DMOE)(x), stock)
    assert not torch.equal(compiled(model, ALL_EXPERTS)(x), stock)  # outside of it, fp32 again


@torch.no_grad()
def test_dynamo_reset(x):
    model = TinyMoE()
    function = compiled(model, QUICK)
    before = function(x)
    torch._dynamo.reset()
    assert torch.equal(function(x), before)


@torch.no_grad()
def test_two_option_sets_of_one_model_live_side_by_side(x):
    model = TinyMoE()
    ours, all_experts = (compiled(model, {**options, **ATEN}) for options in (DMOE, ALL_EXPERTS))
    first, second = ours(x), all_experts(x)
    assert not torch.equal(first, second)
    assert torch.equal(ours(x), first)
    assert torch.equal(all_experts(x), second)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_every_mode(mode, x, handed):
    """In options and as an argument: the same patches as stock Inductor's, and the rule's routing."""
    model = TinyMoE()
    expected = eager(model, x)
    assert_close(compiled(model, {**DMOE, "mode": mode})(x), expected, **INDUCTOR)
    assert handed.pop(0)[1] == torch._inductor.list_mode_options(mode)
    torch._dynamo.reset()
    function = dmoe_compile.compile(model, Config.from_options(DMOE), mode=mode, options=ATEN)
    assert_close(function(x), expected, **INDUCTOR)
    assert handed.pop(0)[1] == torch._inductor.list_mode_options(mode) | ATEN


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_with_gradients(mode, x):
    model = TinyMoE()
    options = DMOE if mode == "default" else {**QUICK, "mode": mode}
    assert_close(compiled(model, options)(x), eager(model, x), **INDUCTOR)


@torch.no_grad()
def test_torch_compile_mode_argument(x, handed):
    """torch forbids mode= beside options=, so here there is no pass to select."""
    torch.compile(TinyMoE(), backend="dmoe", mode="max-autotune-no-cudagraphs")(x)
    assert handed.pop(0)[1] == torch._inductor.list_mode_options("max-autotune-no-cudagraphs")


@torch.no_grad()
def test_inductor_options_reach_inductor_and_win_over_the_mode(x, handed):
    options = {**DMOE, "mode": "max-autotune-no-cudagraphs", "max_autotune": False, "epilogue_fusion": False}
    compiled(TinyMoE(), options)(x)
    patches = handed.pop(0)[1]
    assert patches == {"max_autotune": False, "coordinate_descent_tuning": True, "epilogue_fusion": False}


class _Seen(CustomGraphPass):
    """A user's pass that changes nothing and remembers the graphs it saw."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph):
        self.graphs.append(str(graph))

    def uuid(self):
        return "seen"


@pytest.mark.parametrize("everywhere", [False, True], ids=["in options", "in torch's config"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_user_passes_run_after_ours(everywhere, grad, x):
    model, joint, post = TinyMoE(), _Seen(), _Seen()
    theirs = {"joint_custom_pre_pass": joint, "post_grad_custom_pre_pass": post}
    with torch.set_grad_enabled(grad), inductor_config.patch(theirs if everywhere else {}):
        actual = compiled(model, QUICK if everywhere else {**QUICK, **theirs})(x)
        assert_close(actual, eager(model, x), **INDUCTOR)
        if grad:
            actual.sum().backward()
    assert len(joint.graphs) == 1
    assert "cumsum" in joint.graphs[0]  # the rule is in what they see
    assert len(post.graphs) == 1 + grad


def test_user_passes_may_be_several_plain_functions(x):
    seen = []
    theirs = {"joint_custom_pre_pass": [lambda graph: seen.append(1), lambda graph: seen.append(2)]}
    compiled(TinyMoE(), {**QUICK, **theirs})(x)
    assert seen == [1, 2]


# Lossless unless asked.


@pytest.mark.parametrize(
    ("options", "grad"),
    [(LOSSLESS, False), (LOSSLESS, True), (None, True)],
    ids=["experts=False", "experts=False and gradients", "no options and gradients"],
)
def test_without_passes_and_kernels_it_is_plain_inductor(options, grad, x, handed):
    model, own = TinyMoE(), []

    def spy(gm, example_inputs):
        own.append(gm)
        return backend.dmoe(gm, example_inputs, options=options)

    with torch.set_grad_enabled(grad):
        assert torch.equal(torch.compile(model, backend=spy)(x), torch.compile(model)(x))
    assert handed[0][0] is own[0]


@torch.no_grad()
def test_without_options_experts_are_fused_and_routed_as_ever(x, handed):
    """Sums of fp32 in another order are all that differs."""
    model = TinyMoE()
    assert_close(torch.compile(model, backend="dmoe")(x), model(x), **INDUCTOR)
    assert "dmoe.experts_cpu" in handed[0][0].code


@torch.no_grad()
def test_a_site_left_alone_is_plain_inductor(x, handed, warnings):
    model, own = TinyMoE(), []

    def spy(gm, example_inputs):
        own.append(gm)
        return backend.dmoe(gm, example_inputs, options={**DMOE, "max_block_tokens": 16, "experts": False})

    assert torch.equal(torch.compile(model, backend=spy)(x), torch.compile(model)(x))
    assert handed[0][0] is own[0]
    (warning,) = warnings()
    assert "24 tokens a sequence are more than max_block_tokens=16" in warning


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


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_all_experts_equal_stock_inductor(grad, x):
    model = TinyMoE(groups=(4, 2))
    with torch.set_grad_enabled(grad):
        stock, ours = torch.compile(model)(x), compiled(model, ALL_EXPERTS)(x)
    if grad:  # the rule's own nodes make Inductor fuse elsewhere
        assert_close(ours, stock, **INDUCTOR)
    else:
        assert torch.equal(ours, stock)


# What the rewrite must not change.


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


# What cannot be rewritten is said once, and compiled all the same.


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
    import zoo  # transformers takes seconds to import, and other tests run this file's model in fresh processes

    model = zoo.build("qwen3_moe", num_layers=1)
    model.set_experts_implementation("eager")
    inputs = zoo.inputs("qwen3_moe", seq=8)
    expected = model(**inputs).logits
    options = {**QUICK, "auto_prepare": False}
    assert_close(compiled(model, options)(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    (warning,) = warnings()
    assert "the experts of model.layers.0.mlp.experts stay in a Python loop" in warning
    assert "dmoe_compile.prepare(model)" in warning


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


# Gradients.


@pytest.mark.parametrize("groups", [None, (4, 2)], ids=["softmax", "groups"])
def test_gradients_are_the_eager_rules(x, groups):
    model = TinyMoE(groups=groups)
    upstream = torch.randn_like(x)
    gradients = []
    for function in (functools.partial(eager, model), compiled(model, DMOE, fullgraph=True)):
        given = x.clone().requires_grad_()
        trained = dict(model.named_parameters())
        wanted = [given, *(weight for name, weight in trained.items() if name != "bias")]  # a bias only selects
        out = function(given)
        gradients.append((out, *torch.autograd.grad(out, wanted, upstream)))
    # Sums over 48 tokens in another order; a token sent to another expert moves a gradient by 0.1 or more.
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    unrestricted = torch.autograd.grad(model(x), model.up, upstream)[0]
    assert (unrestricted - gradients[0][2]).abs().max() > 0.1


def test_uuid_says_all_that_the_joint_graph_depends_on(monkeypatch):
    def uuid(options=DMOE, path="L['x']"):
        graph = torch.fx.Graph()
        graph.placeholder("x")._dynamo_source = _Source(path)
        graph.output(())
        return JointPass(Config.from_options(options), torch.fx.GraphModule({}, graph), Notices()).uuid()

    one = uuid()
    assert uuid() == one
    others = [
        uuid({**DMOE, "dmoe.top_p": 0.31}),
        uuid({**DMOE, "dmoe.min_experts": 4}),
        uuid({**DMOE, "block_length": 9}),
        uuid({**DMOE, "max_block_tokens": 64}),
        uuid({**DMOE, "scope": "batch"}),
        uuid(path="L['y']"),
        uuid(path="L['self']._parameters['x']"),
    ]
    monkeypatch.setattr(joint, "_source_hash", lambda _: "other sources")
    others.append(uuid())
    assert len({one, *others}) == 1 + len(others)


def test_source_hash_follows_a_changed_rule(monkeypatch, tmp_path):
    here = tmp_path / "pipeline.py"
    here.write_text("rule = 1")
    monkeypatch.setattr(pipeline, "__file__", str(here))
    before = joint._source_hash.__wrapped__()
    here.write_text("rule = 2")
    assert joint._source_hash.__wrapped__() != before
