"""routing_stats(): unique experts per site and forward, where asked for, and at no cost where not."""

import logging
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dmoe_compile
from dmoe_compile import Config, backend, runtime
from dmoe_compile.notices import Notices
from dmoe_compile.runtime import Recorder, RoutingStats
from tiny_moe import ATEN, DMOE, INDUCTOR, QUICK, TinyMoE, WithSideOutputs, eager


@pytest.fixture(autouse=True)
def _nothing_recorded_before():
    dmoe_compile.routing_stats(reset=True)


class TwoSites(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = TinyMoE(), TinyMoE(num_experts=6)

    def forward(self, x):
        return self.second(self.first(x))


def inputs(num=3):
    return [torch.randn(2, 8, 16) for _ in range(num)]


@torch.no_grad()
def test_counts_are_the_unique_experts_of_every_forward():
    """Counted here from the ids that the model returns."""
    model = WithSideOutputs()
    for options in (QUICK, ATEN):
        function = torch.compile(model, backend="dmoe", options={**options, "stats": True}, fullgraph=True)
        expected = [function(x)[5].unique().numel() for x in inputs()]
        stats = dmoe_compile.routing_stats(reset=True)
        (counts,) = stats.sites.values()
        assert counts == expected
        assert stats.forwards == 3
        assert stats.mean() == sum(expected) / 3


@torch.no_grad()
def test_every_site_by_its_name():
    model = TwoSites()
    function = torch.compile(model, backend="dmoe", options={**QUICK, "stats": True}, fullgraph=True)
    for x in inputs():
        function(x)
    stats = dmoe_compile.routing_stats()
    assert {name: len(counts) for name, counts in stats.sites.items()} == {"first": 3, "second": 3}
    assert max(stats.sites["second"]) <= 6


@torch.no_grad()
def test_stats_work_in_inductors_own_code_and_change_no_result():
    model, (x,) = TinyMoE(), inputs(1)
    counted = torch.compile(model, backend="dmoe", options={**DMOE, "stats": True}, fullgraph=True)(x)
    assert_close(counted, eager(model, x), **INDUCTOR)
    assert dmoe_compile.routing_stats().forwards == 1


@torch.no_grad()
def test_off_means_nothing_recorded_and_no_output_more():
    model, (x,), seen = TinyMoE(), inputs(1), {}
    for stats in (False, True):

        def run(gm, example_inputs, stats=stats):
            aten, findings = backend.rewrite(
                gm, example_inputs, Config.from_options({**QUICK, "stats": stats}), Notices()
            )
            extra = len(aten.graph.output_node().args[0]) - len(gm.graph.output_node().args[0])
            seen[stats] = (extra, findings.num_outputs, "count_experts" in aten.code)
            return gm.forward

        torch.compile(model, backend=run)(x)
    assert seen == {False: (0, 0, False), True: (1, 1, True)}
    torch.compile(model, backend="dmoe", options=QUICK)(x)
    assert dmoe_compile.routing_stats() == RoutingStats({})


def test_with_gradients_it_warns_and_records_nothing(caplog):
    model, (x,) = TinyMoE(), inputs(1)
    actual = torch.compile(model, backend="dmoe", options={**QUICK, "stats": True})(x)
    assert_close(actual, eager(model, x), **INDUCTOR)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "dmoe" in r.name]
    assert "records nothing where gradients are required" in warning
    assert "torch.no_grad()" in warning
    assert dmoe_compile.routing_stats().forwards == 0


@torch.no_grad()
def test_a_graph_without_sites_records_nothing():
    function = torch.compile(nn.Linear(16, 16), backend="dmoe", options={"stats": True, **ATEN})
    assert function(torch.randn(2, 16)).shape == (2, 16)
    assert dmoe_compile.routing_stats().sites == {}


def test_reset_forgets_and_reading_does_not():
    recorder = Recorder()
    recorder.add(["a"], torch.tensor([[3, 0, 0]]))
    assert recorder.read(reset=False).sites == {"a": [3]}
    assert recorder.read(reset=True).sites == {"a": [3]}
    assert recorder.read(reset=False) == RoutingStats({})
    assert math.isnan(RoutingStats({}).mean())


def test_counts_are_copied_because_a_cuda_graph_writes_over_them():
    recorder, counts = Recorder(), torch.tensor([[3, 0, 0]])
    recorder.add(["a"], counts)
    counts[0, 0] = 5  # what the next replay does to the output of this one
    recorder.add(["a"], counts)
    assert recorder.read(reset=False).sites == {"a": [3, 5]}


def test_each_count_by_its_name():
    recorder = Recorder()
    recorder.add(["a", "b"], torch.tensor([[3, 1, 0], [4, 0, 2]]))
    stats = recorder.read(reset=False)
    assert stats.sites == {"a": [3], "b": [4]}
    assert stats.unsound == {"a": [1], "b": [0]}
    assert stats.below_promise == {"a": [0], "b": [2]}


def test_memory_is_bounded_and_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(runtime, "_MAX_RECORDS", 2)
    recorder = Recorder()
    for count in (1, 2, 3):
        recorder.add(["a"], torch.tensor([[count, 0, 0]]))
    assert recorder.read(reset=False).sites == {"a": [2, 3]}
