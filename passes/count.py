"""Count what each site's routed tokens do in one forward: the unique experts they use, which decide the bytes read.

    ids: [T, k]   ->   unique: [] int64 = dmoe.count_experts(ids)
    scores: [T, E]   ->   unsound: [] int64, tokens whose scores are NaN or infinite, which do not vote

Both, and what a policy counts itself, are appended to the outputs as one tensor [sites, COLUMNS].
Left alone: joint graphs, whose outputs are the caller's gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from dmoe_compile.kernels.count_experts import count_experts  # also registers dmoe::count_experts
from dmoe_compile.passes.coreset import are_sound
from dmoe_compile.passes.inline import Tracer
from dmoe_compile.passes.layouts import Kind, Layout, layout_arguments
from dmoe_compile.passes.sites import Site
from torch import Tensor, fx

COLUMNS = ("unique", "unsound", "below_promise")


def count_tokens(
    graph: fx.Graph,
    sites: Sequence[tuple[Site, Layout, fx.Node | None]],
    tracer: Tracer,
    fused: Collection[fx.Node] = (),
) -> int:
    """Append the counts of every site, [sites, COLUMNS] int64, to the outputs; return how many outputs were added.

    Args:
        graph: the graph, rewritten or not.
        sites: each site, where its tokens lie, and its tokens below a promise, [] int64, if it has made one.
        tracer: of this graph.
        fused: selections whose sites the fused routing chose for: their scores are in no tensor.
    """
    if not sites:
        return 0
    output = graph.output_node()
    rows: list[fx.Node] = []
    for site, where, below in sites:
        if site.select in fused:
            assert site.weights is not None
            layout = layout_arguments(graph, site, where) if where.kind.mask else []
            fused_rule = _FusedCounts(site.num_experts, where.kind)
            key = ("fused counts", site.num_experts, where.kind)
            unique, unsound = tracer.insert(graph, output, fused_rule, [site.ids, site.weights, *layout], key)
        else:
            args = [site.ids, site.scores, *layout_arguments(graph, site, where)]
            key = ("counts", site.num_experts, where.kind)
            unique, unsound = tracer.insert(graph, output, _Counts(site.num_experts, site.top_k, where.kind), args, key)
        given = [unique, unsound] if below is None else [unique, unsound, below]
        rows += tracer.insert(graph, output, _row, given, ("row", len(given)))
    (stacked,) = tracer.insert(graph, output, _stack, rows, "stack")
    (outputs,) = output.args
    assert isinstance(outputs, list | tuple), "Dynamo's graphs return a tuple"
    output.args = ((*outputs, stacked),)
    return 1


class _Counts:
    """The rule of one site; an object, so that its numbers are no arguments that would be traced."""

    def __init__(self, num_experts: int, top_k: int, kind: Kind) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.kind = kind

    def __call__(self, ids: Tensor, scores: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
        tokens = self.kind.read(*layout)
        routed = None if tokens.routed is None else tokens.routed.reshape(-1)
        picked = scores.reshape(-1, self.num_experts).float().topk(self.top_k, dim=-1).values
        unsound = ~are_sound(picked)
        unsound = unsound if routed is None else unsound & routed
        return count_experts(ids.reshape(-1, self.top_k), routed, self.num_experts), unsound.sum()


class _FusedCounts:
    """The rule of a site that dmoe::route chose for: ids of E are not routed; unsound scores show in the weights.

    Where the model's own routing is left, padding is routed, and not counted.
    """

    def __init__(self, num_experts: int, kind: Kind) -> None:
        self.num_experts = num_experts
        self.kind = kind

    def __call__(self, ids: Tensor, weights: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
        present = self.kind.read(*layout).present if layout else None
        routed = None if present is None else present.reshape(-1)
        unsound = ~are_sound(weights)
        unsound = unsound if routed is None else unsound & routed
        return count_experts(ids, routed, self.num_experts), unsound.sum()


def _row(unique: Tensor, unsound: Tensor, *below: Tensor) -> Tensor:
    return torch.stack([unique, unsound, *(below or [torch.zeros_like(unique)])])


def _stack(*rows: Tensor) -> Tensor:
    return torch.stack(rows)
