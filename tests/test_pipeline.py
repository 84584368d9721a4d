"""The loop that runs the passes: what it counts, logs and writes for tlparse."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dmoe_compile.passes import pipeline
from dmoe_compile.passes.constrain import Settings
from dmoe_compile.passes.dmoe import Options
from dmoe_compile.passes.nodes import Sources
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

from tiny_moe import TinyMoE

SETTINGS = Settings(block_length=8)
DMOE = {"dmoe": Options(top_p=0.3, min_experts=3)}


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = TinyMoE(), TinyMoE()


def trace(function=lambda layer, x: layer(x), model=None):
    """Return functional aten of a function of (model, x), and what is known of its inputs."""
    model = model or TinyMoE()
    names = list(dict(model.named_parameters()))

    def run(x, *weights):
        with torch.nn.utils.stateless._reparametrize_module(model, dict(zip(names, weights, strict=True))):
            return function(model, x)

    with torch.no_grad():
        gm = make_fx(run, tracing_mode="fake")(torch.randn(2, 24, 16), *model.parameters())
    _, *placeholders = gm.graph.find_nodes(op="placeholder")
    paths = {
        node.name: "L['self']" + "".join(f"._modules['{p}']" for p in name.split(".")[:-1]) + f"._parameters['{leaf}']"
        for node, name in zip(placeholders, names, strict=True)
        for leaf in [name.split(".")[-1]]
    }
    return gm, Sources(paths, frozenset(paths))


def test_counts_logs_and_says_why(caplog):
    caplog.set_level(logging.INFO, "dmoe_compile")
    counters.clear()
    gm, sources = trace(lambda layer, x: (layer(x), (x @ torch.randn(16, 100)).topk(3)))
    findings = pipeline.run(gm.graph, sources, DMOE, SETTINGS)
    gm.graph.lint()
    assert findings.rewritten == 1
    assert counters["dmoe"] == {"sites": 1, "sites_rewritten": 1, "refused": len(findings.refusals)}
    lines = [record.getMessage() for record in caplog.records]
    assert "2 of 8 experts by softmax: rewritten" in lines[0]
    assert len(lines) == 1 + len(findings.refusals)
    assert all("refused: " in line for line in lines[1:])


def test_counters_add_up_over_graphs():
    counters.clear()
    for _ in range(2):
        gm, sources = trace()
        pipeline.run(gm.graph, sources, DMOE, SETTINGS)
    assert counters["dmoe"]["sites_rewritten"] == 2


def test_without_a_pass_the_graph_is_untouched(caplog):
    caplog.set_level(logging.INFO, "dmoe_compile")
    gm, sources = trace()
    before = str(gm.graph)
    findings = pipeline.run(gm.graph, sources, {}, SETTINGS)
    assert str(gm.graph) == before
    (outcome,) = findings.outcomes
    assert (outcome.rewritten, outcome.reason) == (False, "no pass is selected")
    assert "left alone: no pass is selected" in caplog.text


def test_one_router_of_two_banks_is_rewritten_once():
    def two_banks(layers, x):
        rows = x.reshape(-1, 16)
        routing = layers.first.route(layers.first.gate(rows), *x.shape[:2])
        return layers.first.experts(rows, *routing), layers.second.experts(rows, *routing)

    gm, sources = trace(two_banks, TwoLayers())
    num_selections = len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default))
    findings = pipeline.run(gm.graph, sources, DMOE, SETTINGS)
    assert [outcome.rewritten for outcome in findings.outcomes] == [True, True]
    assert findings.outcomes[0].site.select is findings.outcomes[1].site.select
    assert findings.outcomes[0].site != findings.outcomes[1].site
    topks = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)
    assert len(topks) == num_selections + 1  # the rule's own, of what a token would choose


def test_stats_add_one_output_but_never_to_a_joint_graph():
    for joint, added in ((False, 1), (True, 0)):
        gm, sources = trace(lambda layer, x: (layer(x), x))
        findings = pipeline.run(gm.graph, sources, {}, SETTINGS, stats=True, joint=joint)
        assert findings.num_outputs == added
        assert len(gm.graph.output_node().args[0]) == 2 + added


SCRIPT = """
import torch
from tiny_moe import TinyMoE

options = {"passes": ["dmoe"], "fallback_by_default": True}
with torch.no_grad():
    torch.compile(TinyMoE(), backend="dmoe", options=options)(torch.randn(2, 24, 16))
"""


@pytest.fixture(scope="module")
def traced_run(tmp_path_factory):
    """Stderr and the trace of one compile, with torch's own switches for both."""
    folder = tmp_path_factory.mktemp("trace")
    environment = {
        **os.environ,
        "TORCH_LOGS": "+dmoe_compile",
        "TORCH_TRACE": str(folder),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-P", "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (trace_file,) = folder.glob("*.log")
    return done.stderr, trace_file.read_text()


def test_torch_logs_prints_ours(traced_run):
    stderr, _ = traced_run
    assert "2 of 8 experts by softmax: rewritten" in stderr
    assert "Outcome(" in stderr, "the + asks for debug lines"


def test_graphs_before_and_after_are_artifacts_of_the_trace(traced_run):
    _, text = traced_run
    payloads, name = {}, None
    for line in text.splitlines():
        if line.startswith("\t"):
            payloads[name] = payloads.get(name, "") + line + "\n"
        else:
            record = json.loads(line[line.index("{") :])
            name = record.get("artifact", {}).get("name")
    assert "aten.topk" in payloads["dmoe_graph_before"]
    assert "cumsum" not in payloads["dmoe_graph_before"]
    assert "cumsum" in payloads["dmoe_graph_after"]
