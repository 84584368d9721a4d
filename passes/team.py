"""TEAM inside a graph: decoded tokens take the expert outputs of the last forward, cold ones stay among the hot ones'.

    out: [T, H] = combine(experts(hidden, ids, weights))   ->   where(decoded, stored[rows], out), and is stored
    ids: [T, k] = topk(scores)                             ->   topk(scores inside N, for cold tokens)

`roles`, which says who is decoded or cold, `rows` and `stored` are inputs that a decoding context gives at every call
(dmoe_compile/context.py).
A decoded token does not vote and activates no expert of its own: it is pointed at experts that are read anyway, and
left out of grouped matmuls (passes/skip.py).
N is what hot tokens choose (passes/limit.py).
Left alone: joint graphs, and forwards and sites whose rows are not those that the context denoises.

Source: TEAM, arXiv 2602.08404: delayed caching and limited activation. The third, exploration: candidates.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from dmoe_compile.kernels import store  # noqa: F401  # registers dmoe::store
from dmoe_compile.passes.fuse_experts import Fused
from dmoe_compile.passes.inline import Tracer, inserted
from dmoe_compile.passes.layouts import Layout, Step
from dmoe_compile.passes.limit import DECODED
from dmoe_compile.passes.sites import Site
from dmoe_compile.passes.skip import skip
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true


@dataclass(frozen=True)
class Options:
    """Options of the `team` pass.

    Attributes:
        cache: decoded tokens reuse the expert outputs of the last forward.
        limit: cold tokens choose among the experts that others use.
        speculate: several candidate blocks run in one forward (dmoe_compile.generate).
        distance: a masked token farther than this from every known token, in positions, may be cold.
        confidence: a masked token at least this sure at the last step is not cold.
        candidates: masked tokens that are speculated on, 1 or 2, which makes 2 or 4 candidate blocks.
    """

    cache: bool = True
    limit: bool = True
    speculate: bool = True
    distance: int = 3
    confidence: float = 0.7
    candidates: int = 2

    def __post_init__(self) -> None:
        for name in ("cache", "limit", "speculate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"team.{name}={getattr(self, name)!r} must be True or False")
        distance = None if isinstance(self.distance, bool) else self.distance
        if not isinstance(distance, int) or distance < 0:
            raise ValueError(f"team.distance={self.distance!r} must be an integer of at least 0: positions; 3 is usual")
        confidence = None if isinstance(self.confidence, bool) else self.confidence
        if not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
            raise ValueError(f"team.confidence={self.confidence!r} must be a probability, in [0, 1]; 0.7 is usual")
        if isinstance(self.candidates, bool) or self.candidates not in (1, 2):
            raise ValueError(
                f"team.candidates={self.candidates!r} must be 1 or 2: how more are verified is not defined"
            )


def reused(out: Tensor, stored: Tensor, rows: Tensor, roles: Tensor) -> Tensor:
    """Return expert outputs with those of decoded tokens replaced by what was stored.

    Args:
        out: T*H elements with H last, this forward's.
        stored: [R, S, H], the last forward's, row by row.
        rows: [R] int64, the row of `stored` that each row goes on from.
        roles: [R, S] int8.
    """
    kept = torch.where((roles == DECODED).unsqueeze(-1), stored.index_select(0, rows), out.reshape(stored.shape))
    return kept.reshape(out.shape)


@dataclass(frozen=True)
class Denoised:
    """Which rows a decoding context describes: those of the graph's site number `site`.

    Attributes:
        candidates: rows for each sequence.
        reuses: TEAM stores their expert outputs, and decoded tokens take them; else the context says only who is idle.
    """

    site: int
    candidates: int
    reuses: bool = True


@dataclass(frozen=True)
class State:
    """A site whose outputs are stored, and which input of the graph holds its experts' weights."""

    site: str
    weights: int


def add_step(graph: fx.Graph, layouts: Sequence[Layout], rows: Denoised) -> list[Layout]:
    """Append the inputs roles [R, S] int8 and rows [R] int64, the stored row that each goes on from, to a graph.

    Returns the layouts, those of the described rows with the step in them.
    """
    first = layouts[rows.site]
    assert first.rows is not None
    roles = _input(graph, "dmoe_roles", (first.batch, first.seq), torch.int8, first)
    sources = _input(graph, "dmoe_rows", (first.batch,), torch.int64, first)
    steps = {first.rows.meta["val"].device: Step(roles, sources, rows.candidates)}
    described = []
    for layout in layouts:
        if layout.rows is None or not _alike(layout, first):
            described.append(layout)
            continue
        device = layout.rows.meta["val"].device
        if device not in steps:  # a model over several devices
            moved = [_moved(graph, each, device) for each in (roles, sources)]
            steps[device] = Step(moved[0], moved[1], rows.candidates)
        described.append(replace(layout, step=steps[device]))
    return described


def reuse(
    graph: fx.Graph,
    sites: Sequence[Site],
    fused: Sequence[Fused | None],
    layouts: Sequence[Layout],
    tracer: Tracer,
) -> list[State]:
    """Give the sites of the denoised rows their stored outputs for decoded tokens, and store what then comes out.

    Args:
        graph: a denoising step's.
        sites: its sites, as they were left.
        fused: what stands for their experts; None where that is the model's own code.
        layouts: where their tokens lie.
        tracer: of this graph.
    """
    inputs = graph.find_nodes(op="placeholder")
    states = []
    for i, (site, experts, where) in enumerate(zip(sites, fused, layouts, strict=True)):
        if where.step is None:
            continue
        value = site.combine.meta["val"]
        size = (where.batch, where.seq, value.shape[-1])
        stored = _input(graph, f"dmoe_stored_{i}", size, value.dtype, where)
        # Its address stays, so that CUDA graphs need not copy it; roles and rows are new ones at every call.
        stored.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        args = [site.combine, stored, where.step.rows, where.step.roles]
        if experts is not None and experts.partials is not None:
            _reuse_fused(graph, site, [experts.partials, *args[1:]], where.step.candidates, tracer)
        else:
            if experts is None:
                skip(graph, site, where.step.roles, tracer)
            _reuse_in_graph(graph, site, args, tracer)
        states.append(State(site.name, inputs.index(site.expert_weights[0])))
    return states


def _reuse_in_graph(graph: fx.Graph, site: Site, args: Sequence[fx.Node], tracer: Tracer) -> None:
    """Let Inductor select and store."""
    before = site.combine.next
    (out,) = tracer.insert(graph, before, reused, args, "reused")
    _replace(site.combine, out, inserted(site.combine, before))
    stored = args[1]
    (row_by_row,) = tracer.insert(graph, graph.output_node(), torch.Tensor.reshape_as, [out, stored], "as rows")
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.ops.dmoe.store.default, (stored, row_by_row)).meta["val"] = None


def _reuse_fused(graph: fx.Graph, site: Site, args: Sequence[fx.Node], candidates: int, tracer: Tracer) -> None:
    """Sum partial sums, select and store in one launch (kernels/reuse.py), which takes the place of the combine."""
    value = site.combine.meta["val"]
    before = site.combine.next
    with graph.inserting_before(before):
        out = graph.call_function(torch.ops.dmoe.reuse.default, (*args, candidates))
        out.meta["val"] = torch.empty_like(value).reshape(-1, value.shape[-1])
        view = graph.call_function(torch.ops.aten.view.default, (out, list(value.shape)))
    view.meta["val"] = value
    _replace(site.combine, view, (out, view))


def _replace(old: fx.Node, new: fx.Node, stay: Sequence[fx.Node]) -> None:
    """Let all read `new` instead of `old` but those that stay."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in stay)


def _input(graph: fx.Graph, name: str, size: Sequence[Any], dtype: torch.dtype, like: Layout) -> fx.Node:
    """Append an input that nothing guards."""
    assert like.rows is not None
    value: Tensor = like.rows.meta["val"]
    *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["val"] = _fake(size, dtype, value.device, value)
    node._dynamo_source = None  # as Dynamo's own inputs have one
    return node


def _moved(graph: fx.Graph, node: fx.Node, device: torch.device) -> fx.Node:
    """Return an input on another device."""
    *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        moved = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"device": device})
    value = node.meta["val"]
    moved.meta["val"] = _fake(value.shape, value.dtype, device, value)
    return moved


def _fake(size: Sequence[Any], dtype: torch.dtype, device: torch.device, like: Tensor) -> Tensor:
    """Return a value for a graph's node, fake as `like` is."""
    mode = detect_fake_mode(like)
    assert mode is not None, "the graph's values are not fake"
    with mode:
        return torch.empty(tuple(size), dtype=dtype, device=device)


def _alike(layout: Layout, other: Layout) -> bool:
    return statically_known_true(layout.batch == other.batch) and statically_known_true(layout.seq == other.seq)
