"""Read a router: what lies between its matmul and the scores that a selection ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dmoe_compile.passes.nodes import MATMULS, SOFTMAX, Sources, aten, is_float, packet, same, shape
from dmoe_compile.passes.selections import Selection
from torch import Tensor, fx

_MAX_ROUTER_NODES = 128  # the longest known, deepseek_v3's in decomposed aten, has 24


@dataclass(frozen=True)
class Groups:
    """Group-limited routing: each token keeps `top_k` of `count` groups. `scores`: [T, E], before any is masked."""

    count: int
    top_k: int
    scores: fx.Node


@dataclass(frozen=True)
class RouterNodes:
    """What lies between the router's matmul and the scores; `others` are matmuls that make no E numbers."""

    matmuls: list[fx.Node]
    between: list[fx.Node]
    others: list[fx.Node] = field(default_factory=list)


def read_router(sel: Selection) -> RouterNodes:
    """Walk back from the scores to the matmul that made them."""
    router = RouterNodes([], [])
    stack, seen = [sel.scores], set[fx.Node]()
    while stack and len(seen) < _MAX_ROUTER_NODES:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op != "call_function":
            continue
        if packet(node) in MATMULS:
            fits = same((shape(node) or (0,))[-1], sel.num_experts)
            (router.matmuls if fits else router.others).append(node)
        else:
            router.between.append(node)
            stack += node.all_input_nodes
    return router


def has_bias(router: RouterNodes, num_experts: int, sources: Sources) -> bool:
    """Say whether a parameter of E elements is added to the scores on their way to the selection."""
    for node in router.between:
        if packet(node) in {aten.add, aten.sub}:
            for operand in node.all_input_nodes:
                value = operand.meta["val"]
                if sources.parameter(operand) and isinstance(value, Tensor) and same(value.numel(), num_experts):
                    return True
    return False


def read_groups(router: RouterNodes, sel: Selection, position: Mapping[fx.Node, int]) -> Groups | None:
    """Read group-limited routing: a top-k over groups inside the router. One that keeps every group limits nothing."""
    choices = [n for n in router.between if packet(n) is aten.topk and any(u.args[1] == 1 for u in n.users)]
    if not choices:
        return None
    choice = max(choices, key=position.__getitem__)
    count, top_k = (shape(choice.all_input_nodes[0]) or (0,))[-1], choice.args[1]
    if not isinstance(count, int) or not isinstance(top_k, int) or count == top_k:
        return None
    grouped = [n for n in router.between if position[n] < position[choice] and _is_grouped(n, count)]
    first, dims = min(grouped, key=position.__getitem__, default=choice), shape(sel.scores)
    rows = [n for n in router.between if shape(n) == dims and is_float(n) and position[n] < position[first]]
    return Groups(count, top_k, max(rows, key=position.__getitem__)) if rows else None


def _is_grouped(node: fx.Node, count: int) -> bool:
    """Say whether a node holds scores as [.., groups, experts of a group]."""
    dims = shape(node) or ()
    return len(dims) >= 3 and same(dims[-2], count)


def score_function(router: RouterNodes) -> str:
    """Return what turns logits into scores: softmax, sigmoid or logits (nothing)."""
    ops = {packet(node) for node in router.between}
    if ops & SOFTMAX:
        return "softmax"
    return "sigmoid" if aten.sigmoid in ops else "logits"
