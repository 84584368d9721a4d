"""Count the unique experts that each site's routed tokens use in one forward: what decides the bytes read.

    ids: [T, k]   ->   unique: [] int64 = dmoe.count_experts(ids), appended to the outputs as one tensor [sites]
Left alone: joint graphs, whose outputs are the caller's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dmoe_compile.kernels.count_experts import count_experts  # also registers dmoe::count_experts
from dmoe_compile.passes.constrain import Layout, Tracer, layout_arguments, voting_tokens
from dmoe_compile.passes.sites import Site
from torch import Tensor, fx


def count_unique(graph: fx.Graph, sites: Sequence[tuple[Site, Layout]], tracer: Tracer) -> int:
    """Append the unique experts of every site, [sites] int64, to the outputs; return how many outputs were added."""
    if not sites:
        return 0
    output = graph.output_node()
    counts: list[fx.Node] = []
    for site, where in sites:
        args = [site.ids, *layout_arguments(graph, site, where)]
        counts += tracer.insert(
            graph, output, _Unique(site.num_experts, site.top_k), args, ("unique", site.num_experts)
        )
    (stacked,) = tracer.insert(graph, output, _stack, counts, "stack")
    (outputs,) = output.args
    assert isinstance(outputs, list | tuple), "Dynamo's graphs return a tuple"
    output.args = ((*outputs, stacked),)
    return 1


class _Unique:
    """The rule of one site; an object, so that its numbers are no arguments that would be traced."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.num_experts = num_experts
        self.top_k = top_k

    def __call__(self, ids: Tensor, batch: int, seq: int, *mask: Tensor) -> Tensor:
        routed = voting_tokens(seq, *mask).reshape(-1) if mask else None
        return count_experts(ids.reshape(-1, self.top_k), routed, self.num_experts)


def _stack(*counts: Tensor) -> Tensor:
    return torch.stack(counts)
