"""Give the experts of a site to one fused op: kernels/experts.py on GPUs, kernels/experts_cpu.py on CPUs.

    combine: [T, H] = ...(grouped or batched matmuls, activation, weights, sum over k)
        ->  GPU: sum(dmoe.experts(hidden, ids, weights, gate_up, down, ..) [P, T, H] fp32)
            CPU: dmoe.experts_cpu(hidden, ids, weights, gate_up, down, ..) [T, H] in the combine's dtype

There may be more than one reading of which weight is which (readings.py). So what stands there is cut out and run once
on random tokens with the model's own weights, and the reading that computes the same is taken. None does: the site
keeps its own code.
Layers that are alike are checked once.
Left alone: on GPUs, sizes that are symbolic; experts that read more than hidden states, routing and their own weights;
weights of another dtype than hidden states; and what check() of the kernels does not take.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from dmoe_compile.kernels.experts_cpu import Operands, check, reference  # also registers dmoe::experts_cpu
from dmoe_compile.passes.inline import Tracer, between
from dmoe_compile.passes.nodes import FACTORIES, VIEWS, Sources, packet, shape
from dmoe_compile.passes.readings import Bank, readings
from dmoe_compile.passes.region import Region, cut, hints, made_up
from dmoe_compile.passes.sites import Site
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import optimization_hint, statically_known_true

aten = torch.ops.aten
_SHAPE_ONLY = VIEWS - {aten._to_copy, torch.ops.prims.convert_element_type, aten.slice, aten.select}
SYMBOLIC = "its sizes are symbolic, and the fused kernel is chosen by them: compile with dynamic=False"
_MAX_MADE_UP = 2**24  # elements of weights that are made up where the model's own can't be seen
_SPREADS = (1.0, 30.0)  # of random tokens: clamps and soft caps show only in large numbers
_MAX_CHECK_BYTES = 4 * 2**30  # of the largest value in a site's own code: gathered weights of all pairs
# Relative error, root mean square, against fp32: three roundings of half a unit each, and tf32 where it is allowed.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 1.2e-2}


@dataclass
class Reader:
    """Reads the experts of the sites of one graph.

    Attributes:
        sources: what is known of the graph's inputs.
        values: real tensors of its inputs, by name; those that are only known by shape are left out.
        verify: hold what was read against what it computes; else the likeliest reading is taken.
        known: which reading, by what stands there; may be shared by the graphs of one model.
    """

    sources: Sources
    values: Mapping[str, Tensor] = field(default_factory=dict)
    verify: bool = True
    known: dict[str, int | str] = field(default_factory=dict)

    def read(self, site: Site) -> Bank | str:
        """Return what the fused op takes of a site, or why it can't."""
        if site.weights is None:
            return "its routing weights are not one tensor [T, k]"
        symbolic_too = site.combine.meta["val"].device.type == "cpu"
        hidden = _hidden(site, self.sources)
        if isinstance(hidden, str):
            return hidden
        region = cut([hidden, site.ids, site.weights], [site.combine])
        if region.symbolic and (not symbolic_too or _size_of(site, hidden) is None):
            return SYMBOLIC
        others = [leaf for leaf in region.leaves if not self._is_weight(leaf, site) and not _is_number(leaf)]
        if others:
            return f"its experts read {', '.join(map(str, others))} besides hidden states, routing and their weights"
        operands = (hidden, site.ids, site.weights, *region.leaves)
        devices = {node.meta["val"].device for node in operands if not _is_number(node)}
        if len(devices) > 1:
            return f"its hidden states, routing and weights are on {len(devices)} devices: {_listed(devices)}"
        fitting = [bank for bank in readings(region, hidden) if _fits(site, bank)]
        if not fitting:
            return "its experts are no two or three matrices with an activation that the fused kernel knows"
        if not self.verify:
            return fitting[0]
        key = region.key
        if key not in self.known:
            self.known[key] = self._check(site, region, fitting)
        found = self.known[key]
        return found if isinstance(found, str) else fitting[found]

    def _is_weight(self, node: fx.Node, site: Site) -> bool:
        is_parameter = node.op == "get_attr" or node.name in self.sources.parameters
        dims = shape(node) or ()
        return is_parameter and len(dims) in (2, 3) and dims[0] == site.num_experts

    def _check(self, site: Site, region: Region, banks: Sequence[Bank]) -> int | str:
        """Return which reading computes what the region does on random tokens, or why none is taken."""
        largest = max(
            prod(hints(value.shape)) * value.element_size() for node in region.nodes for value in _tensors(node)
        )
        if largest > _MAX_CHECK_BYTES:
            return f"its own code makes a tensor of {largest / 2**30:.3g} GiB, too much to check it by"
        # Biases are always made up: those of a model may be zeros, which tell nothing.
        seen = {leaf: self.values[leaf.name] for leaf in region.leaves if leaf.name in self.values and _is_matrix(leaf)}
        numbers = {leaf: optimization_hint(leaf.meta["val"]) for leaf in region.leaves if _is_number(leaf)}
        unseen = [leaf for leaf in region.leaves if leaf not in seen and leaf not in numbers]
        if sum(leaf.meta["val"].numel() for leaf in unseen) > _MAX_MADE_UP:
            return "its weights can't be seen here, and are too large to be made up"
        device = next((value.device for value in seen.values()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        weights: dict[fx.Node, Any] = {
            **seen, **numbers, **{leaf: made_up(leaf, device, generator) for leaf in unseen}
        }  # fmt: skip
        leaves = [weights[leaf] for leaf in region.leaves]
        wrong, run = dict[int, str](), region.callable(device)
        for spread in _SPREADS:
            few, hidden, ids, routing = _tokens(site, region.inputs[0], spread, device, generator)
            (own,) = run([hidden, few[ids], routing, *leaves])
            own = own.reshape(-1, own.shape[-1]).float()
            if not own.isfinite().all() or not own.any():
                return "its experts make nothing but zeros, or numbers that are not finite, of random tokens"
            rows = hidden.reshape(own.shape), ids.reshape(-1, site.top_k), routing.reshape(-1, site.top_k)
            for i, bank in enumerate(banks):
                if i in wrong:
                    continue
                operands: Any = (None if node is None else weights[node][few] for node in bank.weights)
                computed = reference(Operands(*rows, *operands, *bank.form.arguments))
                off = float((computed - own).norm() / own.norm())
                if not off <= _TOLERANCE[hidden.dtype]:
                    wrong[i] = f"{bank.form.activation} {bank.form.layout}: off by {off:.2g}"
        right = [i for i in range(len(banks)) if i not in wrong]
        if right:
            return right[0]
        return f"its experts compute something else than the fused kernel ({'; '.join(wrong.values())})"


@dataclass(frozen=True)
class Fused:
    """A site with fused experts: `combine` takes the place of the site's own, `partials` [P, T, H] sum up to it."""

    combine: fx.Node
    partials: fx.Node | None = None


def fuse(
    graph: fx.Graph, site: Site, bank: Bank, listed: Sequence[fx.Node], tracer: Tracer, *, autotune: bool = False
) -> Fused:
    """Replace a site's combine by the fused op; the site's own code is left for dead.

    Args:
        graph: the site's.
        site: as the routing passes have left it. Ids outside [0, E) are tokens that are not routed.
        bank: what its experts are.
        listed: the active experts and their count as dmoe::route returns them, where that routed the site.
        tracer: of this graph.
        autotune: on a GPU, time the kernels' tiles at the first call.
    """
    assert site.weights is not None
    operands = [bank.hidden, site.ids, site.weights, *(node for node in bank.weights if node is not None)]
    given = tuple(node is not None for node in bank.weights)
    value = site.combine.meta["val"]
    before = site.combine.next
    if value.device.type == "cpu":
        size = _size_of(site, bank.hidden)
        rule = functools.partial(_on_cpu, given, site.top_k, bank.form.arguments, size, value.dtype)
        (out,) = tracer.insert(graph, before, rule, operands, ("experts", given, bank.form, value.dtype, size))
        partials = None
    else:
        op = functools.partial(_on_gpu, given, site.top_k, (*bank.form.arguments, autotune))
        args = [*operands, *listed]
        (partials,) = tracer.insert(graph, before, op, args, ("experts", given, bank.form, len(listed), autotune))
        total = functools.partial(summed, tuple(value.shape), value.dtype)
        (out,) = tracer.insert(graph, before, total, [partials], ("sum of experts", value.dtype, value.shape))
    site.combine.replace_all_uses_with(out)
    return Fused(out, partials)


def summed(size: Sequence[int], dtype: torch.dtype, partials: Tensor) -> Tensor:
    """Return the experts' result: their fp32 partial sums [P, T, H] added up and rounded once.

    Written as additions: a sum over more than 8 is a reduction to Inductor, which it fuses with no norm that follows.
    """
    first, *others = partials.unbind(0)
    return functools.reduce(torch.add, others, first).to(dtype).reshape(tuple(size))


def _operands(given: Sequence[bool], top_k: int, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return hidden [T, H], ids and weights [T, k], and the bank's weights with None for those it has not."""
    hidden, ids, weights, *bank = tensors
    rest = iter(bank)
    rows = [hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1, top_k), weights.reshape(-1, top_k)]
    return [*rows, *(next(rest) if here else None for here in given)]


def _on_cpu(
    given: Sequence[bool], top_k: int, form: Sequence[Any], size: Any, dtype: torch.dtype, *tensors: Tensor
) -> Tensor:
    out: Tensor = torch.ops.dmoe.experts_cpu(*_operands(given, top_k, tensors), *form, dtype)
    return out if size == "rows" else out.reshape(tensors[0].shape if size == "hidden" else size)


def _size_of(site: Site, hidden: fx.Node) -> tuple[int, ...] | str | None:
    """Return the size of a site's result; where that is symbolic, what it is like, or None where it is like nothing.

    "rows" is [T, H], "hidden" what the hidden states have.
    """
    size, like = site.combine.meta["val"].shape, hidden.meta["val"].shape
    if all(isinstance(each, int) for each in size):
        return tuple(size)
    if len(size) == 2:
        return "rows"
    same = len(size) == len(like) and all(statically_known_true(a == b) for a, b in zip(size, like, strict=True))
    return "hidden" if same else None


def _on_gpu(given: Sequence[bool], top_k: int, form: Sequence[Any], *tensors: Tensor) -> Tensor:
    count = 3 + sum(given)
    listed = tensors[count:] or (None, None)
    out: Tensor = torch.ops.dmoe.experts(*_operands(given, top_k, tensors[:count]), *listed, *form)
    return out


def _hidden(site: Site, sources: Sources) -> fx.Node | str:
    """Return the one activation [T, H] that a site's experts read, before it is expanded or gathered."""
    assert site.weights is not None
    routed = {site.ids, site.weights, *between(site.ids, site.combine), *between(site.weights, site.combine)}
    tokens = site.ids.meta["val"].numel() // site.top_k
    elements = tokens * (shape(site.combine) or (0,))[-1]
    roots: dict[fx.Node, None] = {}
    stack, seen = [site.combine], {site.combine, site.ids, site.weights}
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in seen or _is_number(node) or _is_static(node, sources) or packet(node) in FACTORIES:
                continue
            seen.add(node)
            root = node if node in routed else _root(node, elements)
            value = root.meta.get("val")
            if _is_number(root):
                continue
            if root not in routed and isinstance(value, Tensor) and statically_known_true(value.numel() == elements):
                roots[root] = None
            elif root.op == "call_function":
                stack.append(root)
            elif isinstance(value, Tensor) and value.dim() == 0:
                return f"its experts read {root}, a number of the model's that dynamic=True has made an input"
            else:
                return f"its experts read {root}, which is neither hidden state, routing nor weight"
    if len(roots) != 1:
        return f"its experts read {len(roots)} activations of T*H elements, not one"
    return next(iter(roots))


def _root(node: fx.Node, elements: Any) -> fx.Node:
    """Walk back through views as long as what is viewed holds at least as many elements."""
    while packet(node) in _SHAPE_ONLY:
        parent = node.all_input_nodes[0]
        if not statically_known_true(parent.meta["val"].numel() >= elements):
            break
        node = parent
    return node


def _listed(devices: Iterable[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _is_static(node: fx.Node, sources: Sources, depth: int = 8) -> bool:
    """Say whether a value is made of weights and constants alone, in a few steps."""
    if node.op != "call_function":
        return node.op == "get_attr" or node.name in sources.parameters
    return depth > 0 and all(_is_static(parent, sources, depth - 1) for parent in node.all_input_nodes)


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [each for each in (value if isinstance(value, tuple | list) else [value]) if isinstance(each, Tensor)]


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _is_matrix(node: fx.Node) -> bool:
    return len(shape(node) or ()) == 3


def _fits(site: Site, bank: Bank) -> bool:
    """Say whether the op takes these operands: dtypes, shapes, weights that lie as they must."""
    assert site.weights is not None
    values = [node.meta["val"] for node in (bank.hidden, site.ids, site.weights)]
    hidden, ids, weights = (torch.empty(hints(x.shape), dtype=x.dtype, device="meta") for x in values)
    rows: Any = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1, site.top_k), weights.reshape(-1, site.top_k)
    bank_values: Any = (None if node is None else node.meta["val"].to("meta") for node in bank.weights)
    try:
        check(Operands(*rows, *bank_values, *bank.form.arguments), site.combine.meta["val"].dtype)
    except ValueError:
        return False
    return True


def _tokens(
    site: Site, hidden: fx.Node, spread: float, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a few experts, random hidden states, ids among the few, and weights: each that is hit costs a matmul."""
    assert site.weights is not None
    value, ids = hidden.meta["val"], site.ids.meta["val"]
    tokens = prod(hints(ids.shape)) // site.top_k
    few = torch.randperm(site.num_experts, generator=generator)[: 2 * site.top_k]
    chosen = torch.stack([torch.randperm(len(few), generator=generator)[: site.top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, site.top_k, generator=generator) + 0.5
    states = spread * torch.randn(hints(value.shape), generator=generator)
    return (
        few.to(device, ids.dtype),
        states.to(device, value.dtype),
        chosen.reshape(hints(ids.shape)).to(device, ids.dtype),
        weights.reshape(hints(site.weights.meta["val"].shape)).to(device, site.weights.meta["val"].dtype),
    )


def seen(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of a graph that are real tensors."""
    return {name: x for name, x in values.items() if isinstance(x, Tensor) and not isinstance(x, FakeTensor)}
