"""Read the nodes of a graph: ops without overloads, shapes, arguments by name, and which inputs are weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
prims = torch.ops.prims

MATMULS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear, aten.matmul}
VIEWS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.t, aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze,
    aten.expand, aten.clone, aten._to_copy, aten.detach, aten.alias, aten.slice, aten.select, aten.contiguous,
    prims.convert_element_type,
}  # fmt: skip
GATHERS = {aten.index, aten.gather, aten.index_select, aten.embedding, aten.index_put, aten.scatter}
FACTORIES = {
    aten.full, aten.full_like, aten.zeros, aten.zeros_like, aten.ones, aten.ones_like, aten.empty, aten.empty_like,
    aten.new_zeros, aten.new_empty, aten.new_full, aten.arange, prims.iota, aten.scalar_tensor,
}  # fmt: skip
_NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)  # sizes
SOFTMAX = {aten._softmax, aten.softmax, aten.exp}  # exp: what is left of softmax after decomposition
_STEP = re.compile(r"\['?([^'\]]+)'?\]|\.([A-Za-z]\w*)")


@dataclass(frozen=True)
class Sources:
    """What is known of a graph's inputs, by placeholder name.

    `paths`: Dynamo's source expressions, such as "L['self']._modules['mlp']._parameters['w']".
    `parameters`: the placeholders that are weights or buffers of a module, not activations.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()

    def module_path(self, node: fx.Node) -> str:
        """Return the dotted path of a weight in its model ("model.layers.0.mlp.gate.weight"), "" if unknown."""
        _, _, inside = self.paths.get(node.name, "").partition("]")
        steps = [name or attr for name, attr in _STEP.findall(inside)]
        return ".".join(step for step in steps if step not in {"_modules", "_parameters", "_buffers", "__dict__"})

    def is_parameter(self, node: fx.Node) -> bool:
        """Say whether a node is a weight or buffer of a module."""
        return node.op == "get_attr" or (node.op == "placeholder" and node.name in self.parameters)

    def parameter(self, node: fx.Node) -> fx.Node | None:
        """Return the parameter that a node is a view or a cast of."""
        while node.op == "call_function" and packet(node) in VIEWS:
            node = node.all_input_nodes[0]
        return node if self.is_parameter(node) else None

    def is_static(self, node: fx.Node, depth: int = 8) -> bool:
        """Say whether a tensor is made of parameters and constants alone."""
        if node.op != "call_function":
            return self.is_parameter(node)
        if packet(node) in FACTORIES:
            return True
        sources = [a for a in node.all_input_nodes if not isinstance(a.meta.get("val"), _NUMBERS)]
        return depth > 0 and all(self.is_static(a, depth - 1) for a in sources)


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """Return the shape of the tensor that a node makes, None where it makes none."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def packet(node: fx.Node) -> Any:
    """Return a node's op without its overload: aten.topk for aten.topk.default."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def argument(node: fx.Node, name: str, default: Any) -> Any:
    """Return an argument by its schema name, whether it was passed by position or by name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [arg.name for arg in node.target._schema.arguments]
    index = names.index(name) if name in names else len(node.args)
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    return statically_known_true(a == b)


def forward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that the forward's outputs and side effects depend on; in a joint graph, not the gradients'."""
    tangents = [n for n in graph.find_nodes(op="placeholder") if n.name.startswith("tangents_")]
    backward, stack = set[fx.Node](), list(tangents)
    while stack:
        for user in stack.pop().users:
            if user not in backward and user.op != "output":
                backward.add(user)
                stack.append(user)
    effects = [n for n in graph.nodes if n.op == "call_function" and packet(n) is aten.copy_]
    roots = [n for n in graph.output_node().all_input_nodes if n not in backward]
    live, stack = set[fx.Node](), roots + effects
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += node.all_input_nodes
    return live
