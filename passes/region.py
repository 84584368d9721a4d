"""Cut a piece out of a graph and run it by itself: what was read of a layer is held against what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dmoe_compile.passes.nodes import FACTORIES, packet, shape
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import optimization_hint


@dataclass(frozen=True)
class Region:
    """A piece of a graph: what leads from `inputs`, and `leaves` besides, to its outputs.

    `nodes` are in the graph's order. `leaves` are the graph's own inputs that it reads; of `likes` it reads no values,
    only shape and dtype, as in zeros_like(x), or they are sizes, as in arange(n).
    """

    inputs: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    likes: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def symbolic(self) -> bool:
        """Whether a size is not known before the model is called."""
        values = [node.meta.get("val") for node in (*self.inputs, *self.leaves, *self.nodes)]
        return any(
            isinstance(x, torch.SymInt | torch.SymFloat)
            or (isinstance(x, Tensor) and any(isinstance(size, torch.SymInt) for size in x.shape))
            for x in values
        )

    @property
    def key(self) -> str:
        """What tells this piece from others that compute something else: names do not."""
        given = (*self.inputs, *self.leaves, *self.likes)
        names = {node: f"%{i}" for i, node in enumerate((*given, *self.nodes))}
        lines = [f"{names[node]}: {_type(node)}" for node in given]
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
            lines.append(f"{names[node]} = {node.target}({args}, {kwargs})")
        return "\n".join([*lines, *(names[node] for node in self.outputs)])

    def callable(self, device: torch.device) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """Return what makes the outputs of values of `inputs` and `leaves`, in that order, all of them on `device`."""
        graph, env = fx.Graph(), dict[fx.Node, Any]()
        for i, node in enumerate((*self.inputs, *self.leaves)):
            env[node] = graph.placeholder(f"x{i}")
        for node in self.likes:
            value = node.meta["val"]
            if not isinstance(value, Tensor):  # a size
                env[node] = optimization_hint(value)
                continue
            how: dict[str, Any] = {"dtype": value.dtype, "device": device}
            env[node] = graph.call_function(torch.empty_strided, (hints(value.shape), hints(value.stride())), how)
        for node in self.nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
            if "device" in node.kwargs:
                env[node].kwargs = {**env[node].kwargs, "device": device}
        graph.output([env[node] for node in self.outputs])
        interpreter = fx.Interpreter(fx.GraphModule(torch.nn.Module(), graph))

        def run(values: Sequence[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                results: list[Tensor] = interpreter.run(*values)
            return results

        return run


def cut(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Region:
    """Return what leads from `inputs` to `outputs`; nothing before an input is part of it."""
    needed, leaves, likes = set[fx.Node](), dict[fx.Node, None](), dict[fx.Node, None]()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in needed or node in inputs or node in leaves:
            continue
        if node.op != "call_function":
            leaves[node] = None
            continue
        needed.add(node)
        if packet(node) in FACTORIES:
            likes.update(dict.fromkeys(node.all_input_nodes))
        else:
            stack += node.all_input_nodes
    order = [node for node in outputs[0].graph.nodes if node in needed]
    shapes = tuple(node for node in likes if node not in needed and node not in inputs and node not in leaves)
    return Region(tuple(inputs), tuple(sorted(leaves)), shapes, tuple(order), tuple(outputs))


def hints(sizes: Sequence[Any]) -> tuple[int, ...]:
    """Return sizes as numbers, of symbols those that they have in the first forward."""
    return tuple(optimization_hint(size) for size in sizes)


def made_up(node: fx.Node, device: torch.device, generator: torch.Generator) -> Tensor:
    """Return random values of a weight's shape, of unit gain over its last dim."""
    value = node.meta["val"]
    spread = max(1, value.shape[-1] if value.dim() > 1 else 1) ** -0.5
    return (torch.randn(value.shape, generator=generator) * spread).to(device, value.dtype)


def scalars(nodes: Sequence[fx.Node], op: Any) -> list[float]:
    """Return the Python numbers that `op` is applied with in a piece of a graph, as in mul(x, 2.5)."""
    found = [arg for node in nodes if packet(node) is op for arg in node.args[1:]]
    return [float(arg) for arg in found if isinstance(arg, int | float) and not isinstance(arg, bool)]


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype}{list(shape(node) or ())} {value.stride()}" if isinstance(value, Tensor) else str(value)
