"""torch.compile(model, backend="dmoe"), from the options to the outputs, on a model small enough to read."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as inductor
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.testing import assert_close

import dmoe_compile
from dmoe_compile import Config, backend
from tiny_moe import ALL_EXPERTS, ATEN, DMOE, INDUCTOR, QUICK, TinyMoE, compiled, eager

LOSSLESS = {"passes": [], "experts": False}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")

pytestmark = pytest.mark.usefixtures("uncached")


@pytest.fixture
def x():
    return torch.randn(2, 24, 16)


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


@torch.no_grad()
def test_more_option_sets_than_dynamo_compiles_of_one_model(x):
    """Else it runs the model itself from there on, and what is measured of the pass is the model."""
    model, before = TinyMoE(), counters["dmoe"]["sites_rewritten"]
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (3, 4, 5):
            dmoe_compile.compile(model, Config.from_options({**QUICK, "dmoe.min_experts": size}))(x)
    assert counters["dmoe"]["sites_rewritten"] - before == 3


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


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_all_experts_equal_stock_inductor(grad, x):
    model = TinyMoE(groups=(4, 2))
    with torch.set_grad_enabled(grad):
        stock, ours = torch.compile(model)(x), compiled(model, ALL_EXPERTS)(x)
    if grad:  # the rule's own nodes make Inductor fuse elsewhere
        assert_close(ours, stock, **INDUCTOR)
    else:
        assert torch.equal(ours, stock)
