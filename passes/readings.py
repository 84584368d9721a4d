"""What the weights of a site's experts may be, likeliest reading first: by their order of use, shapes and operations.

Which weight is which, how gate and up lie, which activation it is: that leaves more than one reading of some banks
(H = 2I is square).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dmoe_compile.passes.nodes import VIEWS, aten, packet, shape
from dmoe_compile.passes.region import Region, scalars
from torch import fx

_CLAMPS = {aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum}


@dataclass(frozen=True)
class Form:
    """How experts are computed; see kernels/experts_cpu.py, whose last arguments these are."""

    layout: str
    transposed: bool
    down_transposed: bool
    activation: str
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.layout, self.transposed, self.down_transposed, self.activation, self.alpha, self.limit


@dataclass(frozen=True)
class Bank:
    """The operands of a site's experts: graph nodes, weights in the order of the op's arguments, and their form."""

    hidden: fx.Node
    weights: tuple[fx.Node | None, ...]  # gate_up, up, down, gate_up_bias, up_bias, down_bias
    form: Form


def readings(region: Region, hidden: fx.Node) -> Iterator[Bank]:
    """Yield what the weights of a region may be, likeliest first: by their order of use, shapes and operations."""
    width = _size(hidden, -1)
    order = _by_use(region)
    matrices = [leaf for leaf in order if len(shape(leaf) or ()) == 3]
    biases = [leaf for leaf in order if len(shape(leaf) or ()) == 2]
    if len(matrices) not in (2, 3) or len(biases) > 3:
        return
    *first, down = matrices
    sliced = any(packet(node) is aten.slice and node.args[4:] and node.args[4] != 1 for node in region.nodes)
    layouts = ["interleaved", "concatenated"] if sliced else ["concatenated", "interleaved"]
    for transposed, down_transposed in itertools.product(_orders(first[0], region), _orders(down, region)):
        rows = _size(first[0], 1 if not transposed else 2)
        inner = _size(down, 2 if not down_transposed else 1)
        if (
            _size(first[0], 2 if not transposed else 1) != width
            or _size(down, 1 if not down_transposed else 2) != width
        ):
            continue
        if len(first) == 2:
            fitting = ["separate"] if rows == inner else []
        else:
            fitting = layouts if rows == 2 * inner else ["plain"] if rows == inner else []
        for layout, activation in itertools.product(fitting, _activations(region)):
            form = Form(layout, transposed, down_transposed, *activation)
            pairs = [(first[0], None)] if len(first) == 1 else [(first[0], first[1]), (first[1], first[0])]
            for (gate_up, up), of_biases in itertools.product(pairs, _bias_orders(biases, rows, inner, width, layout)):
                of_gate, of_up, of_down = of_biases
                if gate_up is not first[0]:
                    of_gate, of_up = of_up, of_gate
                yield Bank(hidden, (gate_up, up, down, of_gate, of_up, of_down), form)


def _by_use(region: Region) -> list[fx.Node]:
    """Return the weights of a region in the order in which they are first used for more than being moved."""
    position = {node: i for i, node in enumerate(region.nodes)}

    def first_use(leaf: fx.Node) -> int:
        stack, found = [leaf], [len(position)]
        while stack:
            for user in stack.pop().users:
                if user not in position:
                    continue
                if packet(user) in VIEWS or packet(user) in (aten.index, aten.index_select, aten.gather):
                    stack.append(user)
                else:
                    found.append(position[user])
        return min(found)

    return sorted(region.leaves, key=first_use)


def _orders(weight: fx.Node, region: Region) -> list[bool]:
    """Return whether a weight may lie transposed, likelier first.

    linear(x, W) and W @ x read W as [out, in], x @ W as [in, out]; a transpose on the way turns that round.
    """
    inside, node, swapped = set(region.nodes), weight, False
    while True:
        users = [user for user in node.users if user in inside]
        if not users:
            return [False, True]
        (user, *_) = users
        swapped ^= packet(user) in (aten.t, aten.transpose, aten.permute)
        if packet(user) in VIEWS or packet(user) in (aten.index, aten.index_select):
            node = user
            continue
        is_first = bool(user.all_input_nodes) and user.all_input_nodes[0] is node and packet(user) is aten.bmm
        likely = not swapped and not is_first and packet(user) is not aten.linear
        return [likely, not likely]


def _activations(region: Region) -> Iterator[tuple[Any, ...]]:
    """Yield (name, alpha, limit) of the activations that a region's operations may be."""
    ops = {packet(node) for node in region.nodes}
    if ops & _CLAMPS and not (aten.sigmoid in ops and aten.silu not in ops):
        return  # of the fused kernel's activations, gpt-oss's alone is clamped
    if aten.silu in ops:
        yield ("silu",)
    for node in region.nodes:
        if packet(node) is aten.gelu:
            yield ("gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu",)
    if aten.relu in ops:
        yield ("relu2",) if aten.pow in ops or aten.square in ops else ("relu",)
        yield ("relu2",)
    if aten.sigmoid in ops:
        limits = scalars(region.nodes, aten.clamp) + scalars(region.nodes, aten.clamp_max)
        for limit, alpha in itertools.product(limits, scalars(region.nodes, aten.mul)):
            if limit > 0:
                yield "swigluoai", alpha, limit
        if not ops & _CLAMPS:
            yield ("silu",)


def _bias_orders(
    biases: Sequence[fx.Node], rows: int, inner: int, width: int, layout: str
) -> Iterator[tuple[fx.Node | None, ...]]:
    """Yield (gate_up_bias, up_bias, down_bias) that fit, biases in their order of use."""
    sizes = (rows, inner, width)
    for slots in itertools.combinations(range(3), len(biases)):
        chosen: list[fx.Node | None] = [None, None, None]
        for slot, bias in zip(slots, biases, strict=True):
            chosen[slot] = bias
        fits = all(bias is None or _size(bias, 1) == size for bias, size in zip(chosen, sizes, strict=True))
        if fits and (chosen[1] is None or layout == "separate"):
            yield tuple(chosen)


def _size(node: fx.Node, dim: int) -> int:
    size: int = node.meta["val"].shape[dim]
    return size
