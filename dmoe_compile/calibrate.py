"""Ask the cost model, site by site, with what the first inputs of a graph show: `passes="auto"`."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import optimization_hint

from dmoe_compile.config import Config
from dmoe_compile.machine import machine
from dmoe_compile.passes import pipeline
from dmoe_compile.passes.constrain import Settings
from dmoe_compile.passes.cost import Machine, Verdict, judge
from dmoe_compile.passes.nodes import Sources, shape
from dmoe_compile.passes.sites import Site, find_sites


def verdicts(aten: fx.GraphModule, sources: Sources, example_inputs: Sequence[Any], config: Config) -> list[Verdict]:
    """Return for every site of a normalised graph whether the coreset of `config` pays.

    The graph runs twice on its inputs, up to its last router, with the model's own routing and with the coreset, and
    the experts in use are counted; not where `config` gives them.

    Args:
        aten: the graph; it is not changed.
        sources: what is known of its inputs.
        example_inputs: its inputs; with fake ones nothing can be counted, and no coreset pays.
        config: with passes "auto".
    """
    sites, _ = find_sites(aten.graph, sources)
    if config.auto.unique_experts is not None:
        counts = [(config.auto.unique_experts, config.auto.coreset_experts)] * len(sites)
    elif any(isinstance(each, FakeTensor) for each in example_inputs):
        why = "experts can't be counted on fake inputs: give auto.unique_experts and auto.coreset_experts"
        return [Verdict(False, why)] * len(sites)
    else:
        coreset = {name: options for name, options in config.selected.items() if name == "cover"}
        settings = Settings(config.block_length, config.max_block_tokens, config.scope)
        runs = (_unique(aten, sources, example_inputs, passes, settings) for passes in ({}, coreset))
        counts = list(zip(*runs, strict=True))
    return [
        judge(site, _tokens(site), *both, _machine(site, config), config.auto.min_gain)
        for site, both in zip(sites, counts, strict=True)
    ]


def _unique(
    aten: fx.GraphModule, sources: Sources, inputs: Sequence[Any], passes: Mapping[str, Any], settings: Settings
) -> list[int]:
    """Return the unique experts of every site in one forward; nothing that the graph writes to is written."""
    graph = fx.Graph()
    output = graph.graph_copy(aten.graph, {})
    graph.output(output)
    pipeline.run(graph, sources, passes, settings, stats=True, quiet=True)
    if not (rows := graph.output_node().args[0]):
        return []
    graph.output_node().args = ((rows[-1],),)  # type: ignore[index]
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in {"placeholder", "output"}:
            graph.erase_node(node)
    values = [_size(each) if isinstance(each, torch.SymInt) else each for each in inputs]
    with unset_fake_temporarily(), torch.no_grad(), torch._C._DisableAutocast(), torch.random.fork_rng():
        (counts,) = fx.GraphModule(aten, graph)(*values)
    return [row[0] for row in counts.tolist()]


def _tokens(site: Site) -> int:
    return reduce(operator.mul, (_size(dim) for dim in (shape(site.scores) or ())[:-1]), 1)


def _size(dim: int | torch.SymInt) -> int:
    return optimization_hint(dim, fallback=1)


def _machine(site: Site, config: Config) -> Machine:
    """Return what was given of the machine, the rest as measured."""
    given = config.auto.gb_per_s, config.auto.tflop_per_s
    if None not in given:
        return Machine(*given)
    weight: Tensor = site.expert_weights[0].meta["val"]
    with unset_fake_temporarily():
        measured = machine(weight.device, weight.dtype)
    gb_per_s, tflop_per_s = given
    return Machine(gb_per_s or measured.gb_per_s, tflop_per_s or measured.tflop_per_s)
