"""Rewrite the score operand of a site's selection so that every block stays inside its coreset.

    ids = topk(scores, k)        ->   ids = topk(restrict(scores, coreset(scores)), k)

One operand changes; logits, auxiliary losses, shared experts and residual keep their nodes. In a
group-limited router the nodes between its scores and its selection are copied, and the copy sees
penalised scores: whoever else reads the originals still does.
Left alone: forwards of more than `max_block_tokens` tokens a sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from dmoe_compile.passes.coreset import (
    Blocks,
    Rule,
    choose,
    count_below,
    penalise,
    restrict,
    restrict_groups,
    unroute,
)
from dmoe_compile.passes.cost import Verdict
from dmoe_compile.passes.inline import Argument, Tracer, between
from dmoe_compile.passes.layouts import Kind, Layout, Size, Tokens, layout_arguments
from dmoe_compile.passes.limit import COLD, HOT, allowed
from dmoe_compile.passes.nodes import aten, prims
from dmoe_compile.passes.routers import Groups
from dmoe_compile.passes.sites import Site
from torch import Tensor, fx


@dataclass(frozen=True)
class Settings:
    """What every coreset method shares.

    `block_length` is in tokens of one sequence, as is `max_block_tokens`, the longest forward that is
    rewritten (None: every one). `scope` is "block", or "batch" where all tokens of a forward share one coreset.
    """

    block_length: int = 32
    max_block_tokens: int | None = None
    scope: str = "block"

    def too_long(self, seq: Size) -> str:
        """Return why a forward of this many tokens a sequence is left alone, "" where it is not."""
        if self.max_block_tokens is None or seq <= self.max_block_tokens:
            return ""
        return f"{seq} tokens a sequence are more than max_block_tokens={self.max_block_tokens}"


@dataclass(frozen=True)
class Method:
    """A coreset method with its options.

    `rule` chooses; `needs_weights` says whether it wants what the model itself would choose and how that is weighed;
    `promise` is the share of its routing weight that every token is to keep, None where nothing is promised; `key`
    tells the method from others.
    """

    rule: Rule
    key: object
    needs_weights: bool = False
    promise: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one site.

    `reason` says why it was left alone ("" where it was rewritten); `tokens_per_block` is what the block
    length comes to in this forward; `notes` say what was assumed for want of knowledge. `below_promise` counts the
    tokens, [] int64, for which a policy could not keep what it promises; None where it promises nothing. `verdict` is
    what the cost model said, where it was asked. `own_experts` says why the experts are the model's own code and not
    the fused kernel, "" where they are that.
    """

    site: Site
    rewritten: bool
    reason: str
    tokens_per_block: int | None = None
    notes: tuple[str, ...] = ()
    below_promise: fx.Node | None = None
    verdict: Verdict | None = None
    own_experts: str = "it was not asked for"


def constrain(
    graph: fx.Graph, site: Site, where: Layout, method: Method, settings: Settings, tracer: Tracer
) -> Outcome:
    """Restrict a site's selection to the coresets that a method chooses."""
    if reason := settings.too_long(where.seq):
        return Outcome(site, False, reason)
    if method.needs_weights and site.weights is None:
        return Outcome(site, False, "the weights that its router gives the chosen experts can't be read")
    own = _own_choice(graph, site) if method.needs_weights else []
    routing = _Routing(site.top_k, settings, method, where.kind)
    layout = layout_arguments(graph, site, where)
    key = (method.key, site.top_k, settings, where.kind)
    if site.groups is None:
        results = tracer.insert(graph, site.select, routing.ranked, [site.scores, *own, *layout], ("ranked", key))
    else:
        results = _constrain_groups(graph, site, site.groups, own, layout, routing, key, tracer)
    site.select.replace_input_with(site.scores, results[0])
    if site.groups is not None or where.kind.mask or where.kind.step:
        _keep_values(graph, site)
    below = results[1] if method.promise is not None else None
    return describe(Outcome(site, True, "", below_promise=below), where, settings)


def describe(outcome: Outcome, where: Layout, settings: Settings) -> Outcome:
    """Add to an outcome what its blocks come to in this forward, and what was assumed of them."""
    return replace(outcome, tokens_per_block=_tokens_per_block(where, settings), notes=_notes(where, settings))


@dataclass(frozen=True)
class _Routing:
    """The rules that are inlined at one site.

    Their arguments end in `own`, the ids and weights [T, k] of the model's own choice where the method needs them,
    and `layout`: B, S, and the masks of `kind`.
    """

    top_k: int
    settings: Settings
    method: Method
    kind: Kind

    def ranked(self, scores: Tensor, *own_and_layout: Any) -> tuple[Tensor, ...]:
        """Return what the selection of a router without groups ranks: scores [T, E] or [B, S, E], restricted."""
        own, tokens = self._read(own_and_layout)
        rows = scores.reshape(-1, scores.shape[-1])
        inside = choose(rows, self._blocks(tokens), self.top_k, self.method.rule, own)
        ranked = restrict(rows, inside)
        if tokens.roles is not None:
            ranked = restrict(rows, self._limited(ranked, inside, tokens))
        return (self._unrouted(ranked, inside, tokens).reshape(scores.shape), *self._below(inside, own, tokens))

    def penalised(self, scores: Tensor, *own_and_layout: Any) -> tuple[Tensor, ...]:
        """Return what a group-limited router ranks groups by, and which experts are inside the coresets."""
        own, tokens = self._read(own_and_layout)
        rows = scores.reshape(-1, scores.shape[-1])
        inside = choose(rows, self._blocks(tokens), self.top_k, self.method.rule, own)
        lowered = penalise(rows, inside).reshape(scores.shape)
        return (lowered, inside.reshape(scores.shape), *self._below(inside, own, tokens))

    def grouped(self, masked: Tensor, penalised: Tensor, inside: Tensor, *layout: Any) -> Tensor:
        """Return what its selection ranks, from what its group mask made of the penalised scores."""
        tokens, shape = self.kind.read(*layout), masked.shape
        masked, penalised, inside = (each.reshape(-1, shape[-1]) for each in (masked, penalised, inside))
        ranked = restrict_groups(masked, penalised, inside, self.top_k)
        if tokens.roles is not None:
            ranked = restrict_groups(masked, penalised, self._limited(ranked, inside, tokens), self.top_k)
        return self._unrouted(ranked, inside, tokens).reshape(shape)

    def _limited(self, ranked: Tensor, inside: Tensor, tokens: Tokens) -> Tensor:
        """Return the coresets, [T, E] bool, with those of cold tokens limited to what the others choose."""
        assert tokens.heard is not None
        assert tokens.roles is not None
        return allowed(ranked, inside, tokens.heard, tokens.roles == COLD, self.kind.candidates, self.top_k)

    def _unrouted(self, scores: Tensor, inside: Tensor, tokens: Tokens) -> Tensor:
        """Unroute padding and decoded tokens; padding alone only where a coreset restricts anything at all."""
        if tokens.routed is None:
            return scores
        routed = tokens.routed.reshape(-1)
        unrouted = unroute(scores, routed, self.top_k)
        if self.kind.step:
            return unrouted
        unrestricted = (inside | ~routed.unsqueeze(-1)).all()
        return torch.where(unrestricted, scores, unrouted)

    def _below(self, inside: Tensor, own: tuple[Tensor, Tensor] | None, tokens: Tokens) -> tuple[Tensor, ...]:
        """Count the tokens that a promise is not kept to, if one is made; none is made to those that don't vote."""
        if self.method.promise is None or own is None:
            return ()
        heard = None if tokens.heard is None else tokens.heard.reshape(-1)
        return (count_below(inside, *own, heard, self.method.promise),)

    def _read(self, args: tuple[Any, ...]) -> tuple[tuple[Tensor, Tensor] | None, Tokens]:
        if not self.method.needs_weights:
            return None, self.kind.read(*args)
        ids, weights, *layout = args
        return (ids.reshape(-1, self.top_k), weights.reshape(-1, self.top_k)), self.kind.read(*layout)

    def _blocks(self, tokens: Tokens) -> Blocks:
        silent = None if tokens.roles is None else tokens.roles != HOT
        length, whole = self.settings.block_length, self.settings.scope == "batch"
        return Blocks(tokens.batch, tokens.seq, length, tokens.present, whole, silent, self.kind.candidates)


def _keep_values(graph: fx.Graph, site: Site) -> None:
    """Let those who read a selection's values read the scores of what it chose: what it ranks may be something else.

    In a router with groups experts outside a token's groups are ranked behind the others, and tokens that are not
    routed rank how much experts are used. Routing weights may be a selection's values.
    """
    values, ids = (
        next((user for user in site.select.users if user.target is operator.getitem and user.args[1] == i), None)
        for i in (0, 1)
    )
    if values is None or ids is None or not values.users:
        return
    value, source = values.meta["val"], site.scores if site.groups is None else site.groups.scores
    is_flat = value.dim() < source.meta["val"].dim()  # aten.max, which drops the dim
    values.prepend(ids)
    with graph.inserting_before(values):
        if source.meta["val"].dtype != value.dtype:
            scores, source = source, graph.call_function(prims.convert_element_type.default, (source, value.dtype))
            source.meta["val"] = scores.meta["val"].to(value.dtype)
        if is_flat:
            index = graph.call_function(aten.unsqueeze.default, (ids, -1))
            index.meta["val"] = ids.meta["val"].unsqueeze(-1)
            gathered = graph.call_function(aten.gather.default, (source, -1, index))
            gathered.meta["val"] = torch.empty_like(index.meta["val"], dtype=value.dtype)
    # The node stays: it may be what the site calls its weights.
    values.target, values.args = (
        (aten.squeeze.dim, (gathered, -1)) if is_flat else (aten.gather.default, (source, -1, ids))
    )


def _own_choice(graph: fx.Graph, site: Site) -> list[fx.Node]:
    """Copy what leads from a site's scores to the ids and weights of its own choice ahead of its selection."""
    assert site.weights is not None
    position = {node: i for i, node in enumerate(graph.nodes)}
    copies: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies and position[node] < position[site.select]:
            copies[node] = node
        elif node not in copies:
            for parent in node.all_input_nodes:
                copied(parent)
            with graph.inserting_before(site.select):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    return [copied(site.ids), copied(site.weights)]


def _constrain_groups(
    graph: fx.Graph,
    site: Site,
    groups: Groups,
    own: Sequence[fx.Node],
    layout: Sequence[Argument],
    routing: _Routing,
    key: object,
    tracer: Tracer,
) -> list[fx.Node]:
    """Rewrite a group-limited router: penalised scores into a copy of its group mask, then the last word on order.

    A method that promises something about the model's own choice leaves that in its own groups.
    """
    args = [groups.scores, *own, *layout]
    penalised, inside, *below = tracer.insert(graph, site.select, routing.penalised, args, ("penalised", key))
    copies = {groups.scores: groups.scores if own else penalised}
    for node in [] if own else between(groups.scores, site.scores):
        with graph.inserting_before(site.select):
            copies[node] = graph.node_copy(node, lambda old: copies.get(old, old))
    args = [copies.get(site.scores, site.scores), copies[groups.scores], inside, *layout]
    return [*tracer.insert(graph, site.select, routing.grouped, args, ("grouped", key)), *below]


def _tokens_per_block(where: Layout, settings: Settings) -> int | None:
    """Return how many tokens share a coreset, None where that is symbolic."""
    if settings.scope == "batch":
        return where.batch * where.seq if isinstance(where.batch, int) and isinstance(where.seq, int) else None
    return min(settings.block_length, where.seq) if isinstance(where.seq, int) else settings.block_length


def _notes(where: Layout, settings: Settings) -> tuple[str, ...]:
    blocks = settings.scope == "block"
    if where.rows is None:
        return ("no [B, S] behind the router's tokens: blocks run over all of them as one row",) if blocks else ()
    if where.mask is None:
        return (f"no 2D attention_mask input: every token votes{' and blocks start at position 0' * blocks}",)
    return ()
