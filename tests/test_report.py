"""explain(): what it says of a model is so, and the model is as it was."""

import copy
import io
import json

import expecttest
import pytest
import rich.console
import torch
from torch import nn
from torch._dynamo.utils import counters

import forms
import zoo
from dmoe_compile import Config, explain
from tiny_moe import ALL_EXPERTS, ATEN, DMOE, QUICK, NoMoE, TinyMoE, WithSideOutputs

CONFIG = Config.from_options(DMOE)


@pytest.fixture
def x():
    return torch.randn(2, 24, 16)


class Layers(nn.Module):
    """Two routed layers, between which the graph may break."""

    def __init__(self, broken=False):
        super().__init__()
        self.first, self.second, self.broken = TinyMoE(), TinyMoE(groups=(4, 2)), broken

    def forward(self, x):
        x = self.first(x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.second(x)


def test_fields(x):
    report = explain(Layers(), x, config=CONFIG)
    first, second = report.sites
    assert (report.graphs, report.refused, report.warnings, report.verified) == (1, [], [], None)
    assert (first.name, second.name) == ("first", "second")
    assert (first.num_experts, first.top_k) == (8, 2)
    assert (first.score_function, first.bias, first.groups) == ("softmax", False, None)
    assert (second.score_function, second.bias, second.groups) == ("sigmoid", True, (4, 2))
    assert first.renormalised
    assert first.expert_bytes == 2 * 8 * 16 * 4  # up and down, 8 by 16, fp32
    assert (first.tokens, first.tokens_per_block) == (48, 8)
    assert (first.rewritten, first.reason, first.escapes) == (True, "", [])
    assert any("attention_mask" in note for note in first.notes)


@pytest.mark.parametrize("experts", zoo.EXPERTS)
def test_counts_are_what_a_hook_on_the_experts_counts(experts):
    model, inputs = zoo.build("qwen3_moe", experts, num_layers=2), zoo.inputs("qwen3_moe")
    ids = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: ids.append(args[1]))
    report = explain(model, config=Config(passes=("dmoe",), policies=CONFIG.policies), **inputs)
    counted = [chosen.unique().numel() for chosen in ids]  # two layers as they are, then the two rewritten
    assert len(counted) == 4
    assert [site.unique_experts_before for site in report.sites] == counted[:2]
    assert [site.unique_experts_after for site in report.sites] == counted[2:]
    assert counted[2:] != counted[:2]


def test_two_graphs(x):
    whole, broken = explain(Layers(), x, config=CONFIG), explain(Layers(broken=True), x, config=CONFIG)
    assert (whole.graphs, broken.graphs) == (1, 2)
    assert [site.rewritten for site in broken.sites] == [True, True]
    for site in broken.sites:
        assert 2 <= site.unique_experts_after <= site.unique_experts_before <= 8


def test_as_often_as_one_likes(x):
    """Every explain compiles; Dynamo stops compiling a function after the eighth time."""
    model = TinyMoE()
    reports = [explain(model, x, config=CONFIG) for _ in range(6)]
    assert reports == [reports[0]] * 6
    assert len(reports[0].sites) == 1


def test_what_is_left_alone_has_a_reason(x):
    config = Config.from_options({**DMOE, "max_block_tokens": 16})
    report = explain(TinyMoE(), x, config=config)
    (site,) = report.sites
    assert not site.rewritten
    assert site.reason == "24 tokens a sequence are more than max_block_tokens=16"
    assert site.tokens_per_block is None
    assert site.unique_experts_before == site.unique_experts_after
    assert any(site.reason in warning for warning in report.warnings)


def test_no_pass_selected(x):
    (site,) = explain(TinyMoE(), x, config=Config()).sites
    assert (site.rewritten, site.reason) == (False, "no pass is selected")


class _Vocabulary(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(16, 128)

    def forward(self, x):
        return self.lm_head(x).topk(4, dim=-1).indices


def test_refusals_and_warnings_are_in_the_report_and_nowhere_else(x, caplog):
    report = explain(_Vocabulary(), x, config=CONFIG)
    assert report.sites == []
    ((name, reason),) = report.refused
    assert name == "lm_head"
    assert "no expert weights" in reason
    (warning,) = report.warnings
    assert reason in warning
    assert str(report).count(reason) == 2
    nothing = explain(NoMoE(), x, config=CONFIG)
    assert nothing.sites == nothing.refused == []
    assert "no mixture-of-experts router" in nothing.warnings[0]
    assert [r for r in caplog.records if r.name.startswith("dmoe_compile.")] == []


def test_escapes(x):
    (site,) = explain(WithSideOutputs(), x, config=CONFIG).sites
    assert sorted(escape.split()[1] for escape in site.escapes) == ["float32[48,", "int64[48,"]
    assert all(escape.endswith("is returned") for escape in site.escapes)


def test_symbolic_tokens_are_not_a_number(x):
    torch._dynamo.mark_dynamic(x, 1)
    (site,) = explain(TinyMoE(), x, config=CONFIG).sites
    assert site.tokens is None
    assert site.tokens_per_block == 8
    assert site.unique_experts_after < site.unique_experts_before


def test_the_model_is_as_it_was(x):
    model = Layers().train()
    function = torch.compile(model, backend="dmoe", options=QUICK)
    before = function(x)
    state, tensors = copy.deepcopy(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    counters.clear()
    explain(model, x, config=Config.from_options({**DMOE, "dmoe.top_p": 0.9}))
    num_graphs = counters["stats"]["unique_graphs"]
    assert torch.equal(function(x), before)
    assert counters["stats"]["unique_graphs"] == num_graphs, "the user's function was compiled anew"
    assert model.training
    assert torch.is_grad_enabled()
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_function_and_keyword_inputs(x):
    model = TinyMoE()
    (site,) = explain(lambda *, rows: model(rows) * 2, rows=x, config=CONFIG).sites
    assert site.rewritten


def test_all_experts_change_no_count(x):
    (site,) = explain(TinyMoE(), x, config=Config.from_options(ALL_EXPERTS)).sites
    assert site.unique_experts_before == site.unique_experts_after


def test_plain_data_and_table(x):
    report = explain(Layers(), x, config=CONFIG)
    assert json.loads(json.dumps(report.to_dict()))["sites"][1]["groups"] == [4, 2]
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(report.table())
    text = console.file.getvalue()
    for part in ("first", "second", "2 of 8", "sigmoid + bias, 2 of 4 groups", "rewritten"):
        assert part in text


class TestText(expecttest.TestCase):
    def test_readable(self):
        torch._dynamo.reset()
        torch.manual_seed(0)
        report = explain(Layers(), torch.randn(2, 24, 16), config=CONFIG)
        self.assertExpectedInline(
            str(report),
            """\
2 mixture-of-experts sites in 1 graph
  first: rewritten
    2 of 8 experts by softmax, batched_mm, 0.000977 MiB each; block 8; unique experts 8 -> 6
    experts: fused
    note: no 2D attention_mask input: every token votes and blocks start at position 0
  second: rewritten
    2 of 8 experts by sigmoid + bias, 2 of 4 groups, batched_mm, 0.000977 MiB each; block 8; unique experts 8 -> 5
    experts: fused
    note: no 2D attention_mask input: every token votes and blocks start at position 0""",
        )


def test_a_model_with_experts_in_a_loop_is_prepared() -> None:
    block, x = forms.build("hit_loop"), torch.randn(1, 32, forms.CONFIG["hidden_size"])
    report = explain(block, x, config=Config(passes=("dmoe",), inductor=ATEN), verify=True)
    assert [site.name for site in report.sites] == ["gate"]
    assert report.verified
    block = forms.build("hit_loop")
    report = explain(block, x, config=Config(passes=("dmoe",), auto_prepare=False))
    assert report.sites == []
    assert "dmoe_compile.prepare(model)" in str(report)
    assert not hasattr(block, "_dmoe_kind")
