"""Read selections: the nodes that rank the scores of E experts and keep the best k."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dmoe_compile.passes.nodes import argument, aten, is_float, packet, shape
from torch import fx

_SELECTIONS = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default, aten.max.dim)


@dataclass(frozen=True, eq=False)
class Selection:
    """A node that ranks the last dim of `scores` and keeps the best `top_k`."""

    node: fx.Node
    scores: fx.Node
    ids: fx.Node
    top_k: int
    num_experts: int


def find_selections(graph: fx.Graph, live: Collection[fx.Node], position: Mapping[fx.Node, int]) -> list[Selection]:
    """Return the selections among the live nodes of a graph, in its order."""
    nodes = [n for target in _SELECTIONS for n in graph.find_nodes(op="call_function", target=target) if n in live]
    return [found for n in sorted(nodes, key=position.__getitem__) if (found := _selection(n, live))]


def _selection(node: fx.Node, live: Collection[fx.Node]) -> Selection | None:
    """Read a topk, sort, argmax or max over the last dim of floating-point scores; None for any other use."""
    scores = node.args[0]
    if not isinstance(scores, fx.Node) or not is_float(scores) or len(dims := shape(scores) or ()) < 2:
        return None
    num_experts, op = dims[-1], packet(node)
    if not isinstance(num_experts, int) or num_experts < 2 or _dim(node) not in (-1, len(dims) - 1):
        return None
    if op is aten.argmax:
        return Selection(node, scores, node, 1, num_experts)
    ids = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 1), None)
    if ids is None or not _best_first(node):
        return None
    if op is aten.max:
        return Selection(node, scores, ids, 1, num_experts)
    if op is aten.sort:
        return _sorted_selection(node, scores, ids, num_experts, live)
    top_k = node.args[1]
    return Selection(node, scores, ids, top_k, num_experts) if isinstance(top_k, int) else None


def _sorted_selection(
    node: fx.Node, scores: fx.Node, ids: fx.Node, num_experts: int, live: Collection[fx.Node]
) -> Selection | None:
    """Read sort(descending)[..., :k]: the one slice that every reader of the indices goes through."""
    rank = len(shape(scores) or ())
    cut = ids
    while len(users := [user for user in cut.users if user in live and shape(user)]) == 1:
        (cut,) = users  # the gradient of sort, which reads all indices, is not live
        if packet(cut) is not aten.slice:
            return None
        dim, start, end = argument(cut, "dim", 0), argument(cut, "start", None), argument(cut, "end", None)
        if start not in (0, None):
            return None
        if dim in (-1, rank - 1):
            return (
                Selection(node, scores, cut, end, num_experts) if isinstance(end, int) and end < num_experts else None
            )
    return None


def _dim(node: fx.Node) -> Any:
    return argument(node, "dim", -1)


def _best_first(node: fx.Node) -> bool:
    op = packet(node)
    if op is aten.topk:
        return bool(argument(node, "largest", True))
    return op is aten.max or bool(argument(node, "descending", False))
