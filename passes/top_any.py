"""top_any: a token drops those of its experts whose routing weight is far below its largest.

    weights: [T, k] = renormalise(g)   ->   keep = weights >= ratio * max(weights)
                                            weights = renormalise(g where keep)
    experts(hidden, ids, weights)      ->   experts(hidden, ids where keep, else the token's best, weights)

The model's own code between the gate scores g of the chosen experts and their weights is copied, and the copy sees
nothing (0, or -inf ahead of a softmax) for what is dropped: weights are renormalised and scaled as the model does.
A dropped expert's slot points at the token's best with weight 0, so that no weights are read for it.
Coreset methods have chosen before: what they promise is promised of the coreset, and top_any may drop more.
Left alone: joint graphs, experts that all run on every token, weights that are scattered over all experts or made by
operations that are not known to leave a nothing a nothing.

Source: dropping experts by the ratio of a token's own weights is Lu et al. 2024 (arXiv:2402.14800) for k = 2; MC#
(arXiv:2510.10962) and MoDES do it for any k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from dmoe_compile.passes.inline import Tracer, between, inserted
from dmoe_compile.passes.nodes import packet
from dmoe_compile.passes.sites import Site
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

_SQUASHING = {aten._softmax, aten.softmax, aten.sigmoid}  # of scores after the selection: only -inf becomes nothing
_HARMLESS = _SQUASHING | {
    aten.div, aten.mul, aten.sum, aten._to_copy, aten.view, aten._unsafe_view, aten.reshape, aten.expand,
    aten.unsqueeze, aten.squeeze, aten.clone, aten.slice, aten.index, aten.gather, aten.embedding, aten.index_select,
}  # fmt: skip
_RAISING = {aten.add, aten.clamp, aten.clamp_min, aten.maximum}  # harmless to a sum, which is no longer [.., k]


@dataclass(frozen=True)
class Options:
    """Options of the `top_any` pass.

    Attributes:
        ratio: experts with less than this share of the token's largest routing weight are dropped, in [0, 1]; with 0
            nothing changes, with 1 only the best is left (and what weighs as much).
    """

    ratio: float = 0.25

    def __post_init__(self) -> None:
        ratio = None if isinstance(self.ratio, bool) else self.ratio
        if not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise ValueError(
                f"top_any.ratio={self.ratio!r} must be a number in [0, 1]: a share of the token's largest routing "
                "weight; 0.25 is moderate"
            )


@dataclass(frozen=True)
class Dropped:
    """What takes the place of a site's choice once apply() is called.

    `ids` [T, k] are the experts that then run, `weights` [T, k] how they are weighed. `swaps` are values, what comes
    instead, and the readers that stay.
    """

    ids: fx.Node
    weights: fx.Node
    swaps: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    stay: set[fx.Node] = field(default_factory=set)

    def apply(self) -> None:
        """Make the graph read what was kept; its nodes may then have to be sorted."""
        for old, new in self.swaps:
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.stay)


def drop(graph: fx.Graph, sites: Sequence[Site], options: Options, tracer: Tracer) -> Dropped | str:
    """Add to the graph what `sites`, all of one router, read once apply() is called; or say why they are left alone."""
    site = sites[0]
    if reason := _refusal(sites):
        return reason
    assert site.weights is not None
    path = between(site.select, site.weights)
    entries = _entries(site, path)
    after = [node for entry in entries for node in between(entry, site.weights)]
    if not entries:
        return "where its routing weights come from can't be read"
    if strange := [node for node in after if not _is_harmless(site, node)]:
        return f"its routing weights are made by {packet(strange[0])}"
    squashed = any(packet(node) in _SQUASHING for node in after)
    rule = _Rule(float(options.ratio), -torch.inf if squashed else 0.0)
    before = site.weights.next
    ids, *masked = tracer.insert(graph, before, rule, [site.ids, site.weights, *entries], ("top_any", rule))
    weights = dict(zip(entries, masked, strict=True))
    experts = {site.ids: ids}
    for node in path:
        copies = weights if node in after else experts
        if node not in copies and any(parent in copies for parent in node.all_input_nodes):
            _copy(graph, before, node, copies)
    own = weights.get(site.weights, experts.get(site.weights, site.weights))
    return Dropped(ids, own, [*weights.items(), *experts.items()], {*path, *inserted(site.weights, before)})


def _copy(graph: fx.Graph, before: fx.Node, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
    """Add a copy of `node` that reads the copies so far."""
    with graph.inserting_before(before):
        copies[node] = graph.node_copy(node, lambda old: copies.get(old, old))


@dataclass(frozen=True)
class _Rule:
    ratio: float
    nothing: float

    def __call__(self, ids: Tensor, weights: Tensor, *scores: Tensor) -> tuple[Tensor, ...]:
        """Return the experts that run, [T, k], and each of `scores`, [T, k] or [B, S, k], with nothing for the rest.

        A token with a weight that is NaN keeps all.
        """
        size = weights.reshape(ids.shape).float().abs()
        small = size < self.ratio * size.amax(-1, keepdim=True)
        best = ids.gather(-1, size.argmax(-1, keepdim=True))
        masked = (torch.where(small.reshape(each.shape), self.nothing, each) for each in scores)
        return torch.where(small, best, ids), *masked


def _refusal(sites: Sequence[Site]) -> str:
    """Say why a router's sites are left alone, "" where nothing speaks against dropping."""
    site = sites[0]
    if site.top_k == 1:
        return "a token has one expert"
    if any(each.form == "dense" for each in sites):
        return "its experts all run on every token"
    if any(each.weights is None for each in sites):
        return "the weights that its router gives the chosen experts can't be read"
    if len({each.weights for each in sites}) > 1:
        return "its banks of experts weigh the same choice in different ways"
    if any(_overwrites(user) for user in _readers(site.ids)):
        return "its routing weights are scattered over all experts"
    return ""


def _entries(site: Site, path: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the first values [.., k] on the way to the weights that come from the router's scores."""
    pairs = [node for node in path if _is_pairs(site, node)]
    first = [node for node in pairs if not any(parent in pairs for parent in node.all_input_nodes)]
    return [node for node in first if _is_scored(site, node.args[0])]


def _is_harmless(site: Site, node: fx.Node) -> bool:
    """Say whether an operation on the way to the weights leaves nothing where an expert has nothing."""
    return packet(node) in _HARMLESS or (packet(node) in _RAISING and not _is_pairs(site, node))


def _is_scored(site: Site, source: Any) -> bool:
    """Say whether values come from the router's scores, and not from a parameter, such as a scale of each expert."""
    return source is site.logits or bool(between(site.logits, source))


def _is_pairs(site: Site, node: fx.Node) -> bool:
    """Say whether a node holds a number for each token and chosen expert."""
    value, pairs = node.meta.get("val"), site.ids.meta["val"].numel()
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return statically_known_true(value.shape[-1] == site.top_k) and statically_known_true(prod(value.shape) == pairs)


def _readers(ids: fx.Node) -> list[fx.Node]:
    """Return what reads a site's ids, also through a view or a cast."""
    found, stack = dict.fromkeys(ids.users), list(ids.users)
    while stack:
        node = stack.pop()
        if packet(node) in {aten.view, aten.reshape, aten._to_copy, aten.unsqueeze, aten.expand, aten.clone}:
            stack += [user for user in node.users if user not in found]
            found.update(dict.fromkeys(node.users))
    return list(found)


def _overwrites(node: fx.Node) -> bool:
    """Say whether a node writes values of a tensor to where its index says: a repeated index overwrites one."""
    if packet(node) is aten.scatter:
        return isinstance(node.args[3], fx.Node)
    return packet(node) is aten.index_put and not (len(node.args) > 3 and node.args[3])
