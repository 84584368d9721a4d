"""Trace a function over tensors on a graph's fake values and inline its body: how rules reach the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

Decompositions = dict[Any, Callable[..., Any]] | None
Argument = fx.Node | int


def trace(rule: Callable[..., Any], args: Sequence[Argument], decompositions: Decompositions = None) -> fx.Graph:
    """Return the graph of `rule`, a pure function of tensors and sizes, on the fake values of `args`.

    Traced without gradients: a rule decides which experts run, and that decision has none.
    """
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    mode = detect_fake_mode(values)
    assert mode is not None, "the graph's values are not fake"
    with mode, enable_python_dispatcher(), torch.no_grad(), torch._C._DisableAutocast():
        values = [_distinct(value) for value in values]
        traced = make_fx(rule, decomposition_table=decompositions, tracing_mode="real")(*values)
    traced.graph.eliminate_dead_code()
    assert not list(traced.graph.find_nodes(op="get_attr")), "a rule must make its constants from its arguments"
    return traced.graph


def _distinct(value: Any) -> Any:
    """Return a fake tensor like another: sites that share a trace share values, which make_fx would take for one."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def inline(graph: fx.Graph, before: fx.Node, body: fx.Graph, args: Sequence[Argument]) -> list[fx.Node]:
    """Copy `body` into `graph` ahead of a node and return the nodes of its results, which must be distinct."""
    env: dict[fx.Node, Any] = dict(zip(body.find_nodes(op="placeholder"), args, strict=True))
    trace_of = before.meta.get("stack_trace")
    for node in body.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            break
        with graph.inserting_before(before):
            copied = graph.node_copy(node, lambda old: env[old])
        copied.meta["stack_trace"] = trace_of
        env[node] = copied
    return [env[node] for node in body.output_node().all_input_nodes]


def size_argument(graph: fx.Graph, before: fx.Node, tensor: fx.Node, dim: int) -> Argument:
    """Return a tensor's size along `dim` as an int, or as a node where it is symbolic."""
    value = tensor.meta["val"].shape[dim]
    if isinstance(value, int):
        return value
    for node in graph.find_nodes(op="placeholder"):
        held = node.meta.get("val")
        if isinstance(held, torch.SymInt) and held.node.expr == value.node.expr:
            return node
    with graph.inserting_before(before):
        node = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
    node.meta["val"] = value
    return node


def between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Return the nodes on the paths from `start` to `end`, `end` included, in the graph's order; [] without."""
    reached, node = {start}, start
    while node is not end:
        node = node.next
        if node.op == "root":
            return []
        if any(parent in reached for parent in node.all_input_nodes):
            reached.add(node)
    order, wanted = [], {end} & reached - {start}
    while node is not start:
        if node in wanted:
            order.append(node)
            wanted.update(parent for parent in node.all_input_nodes if parent in reached)
        node = node.prev
    return order[::-1]


def inserted(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Return the nodes that stand between two others in the graph's order."""
    nodes = []
    node = start.next
    while node is not end:
        nodes.append(node)
        node = node.next
    return nodes


@dataclass
class Tracer:
    """Traces rules for one graph; sites that are alike share a trace unless `share` is off.

    A joint graph must not share: the partitioner reads aliasing off the storage of the fake values.
    """

    decompositions: Decompositions = None
    share: bool = True
    _bodies: dict[Any, fx.Graph] = field(default_factory=dict)

    def insert(
        self, graph: fx.Graph, before: fx.Node, rule: Callable[..., Any], args: Sequence[Argument], key: object
    ) -> list[fx.Node]:
        """Inline `rule` ahead of a node and return its results; `key` is what tells it from other rules."""
        key = (key, *(_signature(arg) for arg in args))
        body = self._bodies.get(key)
        if body is None:
            body = trace(rule, args, self.decompositions)
            if self.share:
                self._bodies[key] = body
        return inline(graph, before, body, args)


def _signature(arg: Argument) -> object:
    """Return what a trace depends on: the type of an argument, not which node it is."""
    value = arg.meta["val"] if isinstance(arg, fx.Node) else arg
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.device
    return str(value)
