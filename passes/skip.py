"""Cached tokens cost no arithmetic where experts are grouped matmuls: their rows lie behind the last group.

    sort(ids: [T*k]) -> histc -> cumsum -> grouped matmul      ->      sort(where(decoded, E, ids)) -> ...

A grouped matmul computes the rows up to its last offset. Ids of E sort behind all others and are counted by nobody, so
the rows of a decoded token are read and written by no matmul; what stands there instead is replaced by what was
stored (passes/team.py). The ids that the model itself returns or weighs by are not touched.
Left alone: experts that do more with the sorted ids than count them (biases are looked up by them), that mix rows or
hand them out, and every other form; there a decoded token stays pointed at an expert that is read anyway, with its rows
multiplied for nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from dmoe_compile.passes.inline import Tracer, between
from dmoe_compile.passes.limit import DECODED
from dmoe_compile.passes.nodes import packet, shape
from dmoe_compile.passes.sites import Site
from torch import Tensor, fx

aten = torch.ops.aten
# What keeps the order of a tensor's elements.
_IN_ORDER = {
    aten.view, aten._unsafe_view, aten.reshape, aten.clone, aten._to_copy, aten.detach, aten.alias, aten.contiguous,
    torch.ops.prims.convert_element_type,
}  # fmt: skip
# What takes each row for itself, or moves whole rows; and matmuls that stop at their last offset.
_ROW_BY_ROW = _IN_ORDER | {
    aten.index, aten.index_select, aten.gather, aten.index_put, aten.unsqueeze, aten.squeeze, aten.slice,
    aten.split, aten.split_with_sizes, aten.sort, aten.histc, aten.cumsum, aten.arange, aten.empty_like, aten.glu,
    aten.floor_divide,
}  # fmt: skip


def skip(graph: fx.Graph, site: Site, roles: fx.Node, tracer: Tracer) -> bool:
    """Let the grouped matmuls of a site leave decoded tokens out; return whether it has such.

    Args:
        graph: a denoising step's.
        site: one of its sites, after its routing was rewritten.
        roles: [R, S] int8, see passes/limit.py.
        tracer: of this graph.
    """
    sorts = list(_sorts(site))
    for sort in sorts:
        (behind,) = tracer.insert(
            graph,
            sort,
            _Behind(site.num_experts, site.top_k),
            [*sort.all_input_nodes, roles],
            ("skip", site.num_experts),
        )
        sort.update_arg(0, behind)
    return bool(sorts)


class _Behind:
    """ids [T*k] int64, roles [R, S] int8 -> ids with E for those of decoded tokens."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k

    def __call__(self, ids: Tensor, roles: Tensor) -> Tensor:
        decoded = (roles == DECODED).unsqueeze(-1).expand(*roles.shape, self.top_k)
        return torch.where(decoded.reshape(ids.shape), self.num_experts, ids)


def _sorts(site: Site) -> Iterator[fx.Node]:
    """Find where a site's flat ids are sorted to be counted by expert, and nothing else."""
    for node in between(site.ids, site.combine):
        if node.target not in (aten.sort.default, aten.sort.stable):
            continue
        ids = node.all_input_nodes[0]
        if len(shape(ids) or ()) != 1:
            continue
        while ids is not site.ids and packet(ids) in _IN_ORDER:
            ids = ids.all_input_nodes[0]
        values = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        counted = values and all(_only_counts(value, site.num_experts) for value in values)
        if ids is site.ids and counted and _stays_in_rows(node, site.combine):
            yield node


def _stays_in_rows(sort: fx.Node, combine: fx.Node) -> bool:
    """Say whether what is made of sorted tokens reaches the combine alone, and no row another token's."""
    flow = between(sort, combine)
    inside = set(flow)
    return all(inside.issuperset(node.users) for node in [sort, *flow] if node is not combine) and all(
        map(_is_row_by_row, flow)
    )


def _is_row_by_row(node: fx.Node) -> bool:
    if node.target is operator.getitem or packet(node) in _ROW_BY_ROW or "grouped_mm" in str(node.target):
        return True
    if node.target is aten.sum.dim_IntList:  # of a token's k rows
        return len(shape(node.all_input_nodes[0]) or ()) == 3 and node.args[1] in ([1], [-2])
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _only_counts(values: fx.Node, num_experts: int) -> bool:
    """Say whether sorted ids go into a histogram over the experts alone, whose sums say where groups end."""
    users = list(values.users)
    while len(users) == 1 and packet(users[0]) in _IN_ORDER:
        users = list(users[0].users)
    if len(users) != 1 or users[0].target is not aten.histc.default:
        return False
    (counts,) = users
    ends = all(user.target is aten.cumsum.default for user in counts.users)
    return ends and tuple(counts.args[1:]) == (num_experts, 0, num_experts - 1)
