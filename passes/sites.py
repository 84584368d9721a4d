"""Find every mixture-of-experts site of a graph by dataflow, or say why not.

A site is one routed layer: a router scores E experts for T = B*S tokens, a selection keeps the best k,
the experts run on the selected (token, expert) pairs, and a combine sums them to one row a token.

    logits:  [T, E] = matmul(hidden [T, H], router weight)
    scores:  [T, E] or [B, S, E] = softmax | sigmoid | nothing (logits), + bias, group mask
    ids:     [T, k] = topk | sort()[:, :k] | argmax | max (scores)
    experts: ops that read a parameter [E, ., .] and depend on `ids`
    combine: [T, H] = the first value of T*H elements that every expert's result and every routing
             weight has flowed into, before anything else (residual, shared experts) is mixed in

Nothing is matched by its text: score function, selection bias, groups and renormalisation are read
from the graph. It may be functional aten or what Inductor's decompositions make of it
(the gradient path), where softmax is exp and div, and masked_fill is where.
Experts that all run on every token and are weighed by the routing afterwards are a site too: what a token
gets follows from its selection. Left alone, with a reason: selections that pick no expert weights (vocabulary,
codebook, sparse attention), mixtures without a selection, experts chosen by more than one selection.
"""

from __future__ import annotations

import heapq
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
prims = torch.ops.prims

_SELECTIONS = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default, aten.max.dim)
_MATMULS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear, aten.matmul}
VIEWS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.t, aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze,
    aten.expand, aten.clone, aten._to_copy, aten.detach, aten.alias, aten.slice, aten.select, aten.contiguous,
    prims.convert_element_type,
}  # fmt: skip
_GATHERS = {aten.index, aten.gather, aten.index_select, aten.embedding, aten.index_put, aten.scatter}
FACTORIES = {
    aten.full, aten.full_like, aten.zeros, aten.zeros_like, aten.ones, aten.ones_like, aten.empty, aten.empty_like,
    aten.new_zeros, aten.new_empty, aten.new_full, aten.arange, prims.iota, aten.scalar_tensor,
}  # fmt: skip
_SOFTMAX = {aten._softmax, aten.softmax, aten.exp}  # exp: what is left of softmax after decomposition
_MAX_ROUTER_NODES = 128  # the longest known, deepseek_v3's in decomposed aten, has 24
_STEP = re.compile(r"\['?([^'\]]+)'?\]|\.([A-Za-z]\w*)")


@dataclass(frozen=True)
class Groups:
    """Group-limited routing: each token keeps `top_k` of `count` groups. `scores`: [T, E], before any is masked."""

    count: int
    top_k: int
    scores: fx.Node


@dataclass(frozen=True)
class Site:
    """One routed layer; the legend of this module has the shapes.

    `weights` are the routing weights as they reach the experts or their sum, None where that can't be read.
    `escapes` says what leaves the site besides the combine and changes with the routing (returned ids, weights).
    Two sites share a `select` where one router drives two banks of experts.
    """

    name: str
    select: fx.Node
    scores: fx.Node
    ids: fx.Node
    num_experts: int
    top_k: int
    score_function: str
    bias: bool
    groups: Groups | None
    renormalised: bool
    logits: fx.Node
    hidden: fx.Node
    experts: tuple[fx.Node, ...]
    expert_weights: tuple[fx.Node, ...]
    form: str
    combine: fx.Node
    weights: fx.Node | None
    escapes: tuple[str, ...]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weight matrices."""
        vals = [weight.meta["val"] for weight in self.expert_weights]
        return sum(val.numel() * val.element_size() for val in vals) // self.num_experts


@dataclass(frozen=True)
class Refusal:
    """A selection or a bank of expert weights that is left alone, and the reason.

    `is_router`: it looks like a router whose experts are in another graph, so a graph break is worth a warning.
    """

    name: str
    reason: str
    is_router: bool = False


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


def find_sites(graph: fx.Graph, sources: Sources) -> tuple[list[Site], list[Refusal]]:
    """Return the sites of `graph`, in its order, and what was refused. The graph is not changed."""
    return _Finder(graph, sources).run()


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """Return the shape of the tensor that a node makes, None where it makes none."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def packet(node: fx.Node) -> Any:
    """Return a node's op without its overload: aten.topk for aten.topk.default."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


@dataclass(frozen=True, eq=False)
class _Selection:
    """A node that ranks the last dim of `scores` and keeps the best `top_k`."""

    node: fx.Node
    scores: fx.Node
    ids: fx.Node
    top_k: int
    num_experts: int


@dataclass
class _Bank:
    """Expert ops whose results flow together, everything in that flow, and the weights they read."""

    experts: list[fx.Node] = field(default_factory=list)
    weights: dict[fx.Node, None] = field(default_factory=dict)
    flow: list[fx.Node] = field(default_factory=list)
    joins: list[fx.Node] = field(default_factory=list)  # flow nodes that also read the routing
    dense: bool = False  # every expert runs on every token, and the routing weights come after

    def absorb(self, other: _Bank) -> None:
        self.dense |= other.dense
        self.experts += other.experts
        self.weights |= other.weights
        self.flow += other.flow
        self.joins += other.joins


@dataclass
class _Region:
    """What depends on one selection: the routing data (ids, weights, offsets) and the banks it drives."""

    routing: dict[fx.Node, None] = field(default_factory=dict)
    banks: list[_Bank] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)  # where routing data mixes into something else


@dataclass(frozen=True)
class _Router:
    """What lies between the router's matmul and the scores."""

    matmuls: list[fx.Node]
    between: list[fx.Node]
    parameters: list[fx.Node]


class _Finder:
    """One search over one graph; holds what the searches from every selection share."""

    def __init__(self, graph: fx.Graph, sources: Sources) -> None:
        self.graph = graph
        self.sources = sources
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.live = _forward_nodes(graph)
        nodes = [n for target in _SELECTIONS for n in graph.find_nodes(op="call_function", target=target)]
        found = [
            s
            for n in sorted(nodes, key=self.position.__getitem__)
            if n in self.live and (s := _selection(n, self.live))
        ]
        self.selections = {sel.node: sel for sel in found}

    def run(self) -> tuple[list[Site], list[Refusal]]:
        regions = {sel: self._region(sel) for sel in self.selections.values()}
        owners: dict[fx.Node, list[_Selection]] = {}
        for sel, region in regions.items():
            for node in (node for bank in region.banks for node in bank.experts):
                owners.setdefault(node, []).append(sel)
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for sel, region in regions.items():
            rivals = max((owners[node] for bank in region.banks for node in bank.experts), key=len, default=[sel])
            if len(rivals) == 1:
                results = self._judge(sel, region)
                sites += [r for r in results if isinstance(r, Site)]
                refusals += [r for r in results if isinstance(r, Refusal)]
            elif rivals[0] is sel:
                weight = self._router_weight(self._router(sel))
                reason = (
                    f"its experts are chosen by {len(rivals)} separate selections (a sparse mixer), not by one top-k"
                )
                refusals.append(Refusal(self._name(sel, region.banks[0], weight), reason))
        claimed = {w for region in regions.values() for bank in region.banks for w in bank.weights}
        return sites, self._with_dense(refusals, claimed)

    # From a selection forward.

    def _region(self, sel: _Selection) -> _Region:
        """Walk forward from a selection in graph order; stop where its data mixes into the rest of the model."""
        region = _Region({sel.node: None})
        bank_of: dict[fx.Node, _Bank] = {}
        gathered: dict[fx.Node, list[fx.Node]] = {}  # copies of the selected experts' weights: no results yet
        heap: list[tuple[int, fx.Node]] = []
        queued: set[fx.Node] = set()

        def visit_users(node: fx.Node) -> None:
            for user in node.users:
                if user in self.live and user not in queued and user.op == "call_function":
                    queued.add(user)
                    heapq.heappush(heap, (self.position[user], user))

        visit_users(sel.node)
        while heap:
            _, node = heapq.heappop(heap)
            flows = [bank_of[a] for a in node.all_input_nodes if a in bank_of]
            joins = any(a in region.routing for a in node.all_input_nodes)
            foreign = any(self._is_foreign(a, region.routing, bank_of) for a in node.all_input_nodes)
            weights = self._expert_weights(node, sel.num_experts)
            moved = [w for a in node.all_input_nodes for w in gathered.get(a, ())]
            if (weights and packet(node) in _GATHERS) or (moved and packet(node) in VIEWS):
                gathered[node] = weights or moved
            elif moved or (weights and (joins or not foreign)):
                self._enter(node, flows, region, bank_of).experts.append(node)
                bank_of[node].weights |= dict.fromkeys(weights + moved)
            elif node in self.selections or self._is_linear(node):
                if joins and node not in self.selections:
                    region.readers.append(node)
                continue
            elif flows and foreign:
                continue
            elif flows:
                bank = self._enter(node, flows, region, bank_of)
                if joins:
                    bank.joins.append(node)
            elif foreign and packet(node) not in _GATHERS and _is_float(node):
                dense = self._dense_bank(node, region, sel.num_experts)
                if dense is None:
                    region.readers.append(node)
                    continue
                region.banks.append(dense)
                bank_of.update(dict.fromkeys(dense.flow, dense))
            else:
                region.routing[node] = None
            visit_users(node)
        return region

    def _dense_bank(self, node: fx.Node, region: _Region, num_experts: int) -> _Bank | None:
        """Return the experts that ran on every token if `node` weighs their results [.., E, ..] by the routing."""
        if packet(node) not in _MATMULS | {aten.mul}:
            return None
        bank = _Bank(flow=[node], joins=[node], dense=True)
        stack = [a for a in node.all_input_nodes if a not in region.routing]
        seen = set(stack)
        while stack:
            here = stack.pop()
            weights = self._folded_weights(here, num_experts)
            if here.op != "call_function" or not (
                weights or packet(here) in VIEWS or num_experts in (shape(here) or ())
            ):
                continue
            if weights:
                bank.experts.append(here)
                bank.weights |= dict.fromkeys(weights)
            bank.flow.append(here)
            stack += [a for a in here.all_input_nodes if a not in seen]
            seen.update(here.all_input_nodes)
        of_experts = set(bank.experts)
        for here in sorted(bank.flow, key=self.position.__getitem__):
            if of_experts.intersection(here.all_input_nodes):
                of_experts.add(here)
        bank.flow = [here for here in bank.flow if here in of_experts]
        bank.experts.sort(key=self.position.__getitem__)
        return bank if node in of_experts else None

    @staticmethod
    def _enter(node: fx.Node, flows: list[_Bank], region: _Region, bank_of: dict[fx.Node, _Bank]) -> _Bank:
        """Put a node into the bank its inputs belong to, merging banks that meet in it."""
        bank = flows[0] if flows else _Bank()
        if not flows:
            region.banks.append(bank)
        for other in flows[1:]:
            if other is not bank and other in region.banks:
                bank.absorb(other)
                region.banks.remove(other)
                bank_of.update(dict.fromkeys(other.flow, bank))
        bank.flow.append(node)
        bank_of[node] = bank
        return bank

    def _is_foreign(self, node: fx.Node, routing: Mapping[fx.Node, None], bank_of: Mapping[fx.Node, _Bank]) -> bool:
        """Say whether a tensor is an activation that neither the routing nor the experts made; a scalar is none."""
        if node in routing or node in bank_of or not shape(node):
            return False
        return not self._is_static(node)

    def _is_static(self, node: fx.Node, depth: int = 8) -> bool:
        """Say whether a tensor is made of parameters and constants alone."""
        if node.op != "call_function":
            return self._is_parameter(node)
        if packet(node) in FACTORIES:
            return True
        return depth > 0 and all(self._is_static(a, depth - 1) for a in node.all_input_nodes if shape(a) is not None)

    def _is_parameter(self, node: fx.Node) -> bool:
        return node.op == "get_attr" or (node.op == "placeholder" and node.name in self.sources.parameters)

    def _parameter(self, node: fx.Node) -> fx.Node | None:
        """Return the parameter that a node is a view or a cast of."""
        while node.op == "call_function" and packet(node) in VIEWS:
            node = node.all_input_nodes[0]
        return node if self._is_parameter(node) else None

    def _expert_weights(self, node: fx.Node, num_experts: int) -> list[fx.Node]:
        """Return the parameters [E, ., ...] that an op reads as such; a view that folds E away is no expert weight."""
        if packet(node) in VIEWS:
            return []
        found = []
        for operand in node.all_input_nodes:
            dims = shape(operand)
            if dims is None or len(dims) < 3 or not _is_float(operand) or not _same(dims[0], num_experts):
                continue
            root = self._parameter(operand)
            if root is not None and len(shape(root) or ()) >= 3 and _same((shape(root) or (0,))[0], num_experts):
                found.append(root)
        return found

    def _folded_weights(self, node: fx.Node, num_experts: int) -> list[fx.Node]:
        """Return the parameters [E, ., .] that a matmul reads, also where E is folded into another dim."""
        if packet(node) not in _MATMULS:
            return []
        roots = [root for a in node.all_input_nodes if (root := self._parameter(a)) is not None]
        return [r for r in roots if len(dims := shape(r) or ()) >= 3 and _same(dims[0], num_experts)]

    def _is_linear(self, node: fx.Node) -> bool:
        return packet(node) in _MATMULS and any(self._is_static(a) for a in node.all_input_nodes)

    # Judging what was found.

    def _judge(self, sel: _Selection, region: _Region) -> list[Site | Refusal]:
        """Return one site for each bank that a selection drives, or one refusal."""
        router = self._router(sel)
        matmul = router.matmuls[0] if len(router.matmuls) == 1 else None
        weight = self._router_weight(router)
        if not region.banks:
            if self._feeds_selection(sel):
                return []  # it ranks groups for another selection: part of that one
            named = f"{_label(sel.node)} over {sel.num_experts}"
            if packet(sel.node) is not aten.topk:
                return []  # argmax, max and sort have a hundred other uses
            if matmul is None or not self._is_static(_matmul_operands(matmul)[1]):
                return [Refusal(named, "what it ranks does not come from one linear router")]
            is_router = weight is not None and any(self.graph.output_node() in node.users for node in region.routing)
            where = _parent(self.sources.module_path(weight)) if weight else ""
            return [Refusal(where or named, "its indices select no expert weights [E, ., .] in this graph", is_router)]
        if matmul is None:
            reason = f"{len(router.matmuls)} matmuls lead to its scores, not one router"
            return [Refusal(self._name(sel, region.banks[0], weight), reason)]
        return [self._site(sel, region, bank, router, weight) for bank in region.banks]

    def _site(
        self, sel: _Selection, region: _Region, bank: _Bank, router: _Router, weight: fx.Node | None
    ) -> Site | Refusal:
        hidden, _ = _matmul_operands(router.matmuls[0])
        name = self._name(sel, bank, weight)
        combine = self._combine(sel, bank, (shape(hidden) or (0,))[-1])
        if combine is None:
            return Refusal(name, "its experts' results are not summed to one row [T, H] a token")
        returned = [n for n in region.routing if self.graph.output_node() in n.users]
        return Site(
            name=name,
            select=sel.node,
            scores=sel.scores,
            ids=sel.ids,
            num_experts=sel.num_experts,
            top_k=sel.top_k,
            score_function=_score_function(router),
            bias=self._has_bias(router, sel.num_experts),
            groups=_groups(router, sel, self.position),
            renormalised=_is_renormalised(region, sel.top_k),
            logits=router.matmuls[0],
            hidden=hidden,
            experts=tuple(bank.experts),
            expert_weights=tuple(bank.weights),
            form=_form(bank),
            combine=combine,
            weights=self._weights(sel, region, bank),
            escapes=tuple(
                [f"{_describe(n)} is returned" for n in returned]
                + [f"{_describe(n)} reads the routing" for n in region.readers]
            ),
        )

    def _combine(self, sel: _Selection, bank: _Bank, width: int | torch.SymInt) -> fx.Node | None:
        """Return the first [T, H] value that the whole flow of a bank passes through."""
        flow = sorted(bank.flow, key=self.position.__getitem__)
        first = max(self.position[node] for node in bank.experts + bank.joins)
        tokens = prod((shape(sel.scores) or ())[:-1])
        open_until = 0
        for node in flow:
            here = self.position[node]
            if here >= first and open_until <= here and _has_rows(node, tokens, width):
                return node
            uses = [self.position[user] for user in node.users if user in self.live and user.op != "output"]
            open_until = max([open_until, *uses])
        return None

    @staticmethod
    def _weights(sel: _Selection, region: _Region, bank: _Bank) -> fx.Node | None:
        """Walk back from where experts and routing meet to the last weights that lie as [T, k] or [B, S, k]."""
        pairs = prod((shape(sel.scores) or ())[:-1]) * sel.top_k
        starts = [a for node in [*bank.joins, *bank.experts] for a in node.all_input_nodes]
        for node in starts:
            while node in region.routing and _is_float(node):
                dims = shape(node) or (0,)
                if _same(dims[-1], sel.top_k) and _same(prod(dims), pairs):
                    return node
                sources = [a for a in node.all_input_nodes if a in region.routing and _is_float(a)]
                if len(sources) != 1 or packet(node) not in VIEWS | _GATHERS:
                    break
                (node,) = sources
        return None

    def _router(self, sel: _Selection) -> _Router:
        """Walk back from the scores to the matmul that made them."""
        router = _Router([], [], [])
        stack, seen = [sel.scores], set[fx.Node]()
        while stack and len(seen) < _MAX_ROUTER_NODES:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.op != "call_function":
                router.parameters.append(node)
            elif packet(node) in _MATMULS:
                if _same((shape(node) or (0,))[-1], sel.num_experts):
                    router.matmuls.append(node)
            else:
                router.between.append(node)
                stack += node.all_input_nodes
        return router

    def _router_weight(self, router: _Router) -> fx.Node | None:
        return self._parameter(_matmul_operands(router.matmuls[0])[1]) if len(router.matmuls) == 1 else None

    def _has_bias(self, router: _Router, num_experts: int) -> bool:
        """Say whether a parameter of E elements is added to the scores on their way to the selection."""
        for node in router.between:
            if packet(node) in {aten.add, aten.sub}:
                for operand in node.all_input_nodes:
                    value = operand.meta["val"]
                    if (
                        self._parameter(operand)
                        and isinstance(value, torch.Tensor)
                        and _same(value.numel(), num_experts)
                    ):
                        return True
        return False

    def _feeds_selection(self, sel: _Selection) -> bool:
        """Say whether a selection only prepares another one, as the choice of groups does."""
        return any(sel.node in self._router(other).between for other in self.selections.values() if other is not sel)

    def _with_dense(self, refusals: list[Refusal], claimed: set[fx.Node]) -> list[Refusal]:
        """Add the banks that every token runs through: they have a router, but no selection to rewrite."""
        reported: set[str] = set()
        for node in self.graph.nodes:
            if node not in self.live or packet(node) not in _MATMULS:
                continue
            for operand in node.all_input_nodes:
                root = self._parameter(operand)
                dims = shape(root) if root is not None else None
                if root is None or root in claimed or dims is None or len(dims) < 3 or not isinstance(dims[0], int):
                    continue
                name = _parent(self.sources.module_path(root)) or str(root)
                if name not in reported and self._has_router(dims[0]):
                    reported.add(name)
                    reason = f"all {dims[0]} experts run on every token (dense or soft mixture): none is chosen"
                    refusals.append(Refusal(name, reason))
        return refusals

    def _has_router(self, num_experts: int) -> bool:
        for node in self.graph.nodes:
            if (
                node in self.live
                and packet(node) in _SOFTMAX | {aten.sigmoid}
                and _same((shape(node) or (0,))[-1], num_experts)
            ):
                matmuls = self._router(_Selection(node, node, node, 1, num_experts)).matmuls
                if any(self._is_static(_matmul_operands(mm)[1]) for mm in matmuls):
                    return True
        return False

    def _name(self, sel: _Selection, bank: _Bank, router_weight: fx.Node | None) -> str:
        """Return the module path that a site's router and experts have in common.

        Two modules may share their weights, which then go by the path of the first. So the path is taken
        to the module that made the selection, where Dynamo says which one that was.
        """
        weights = [*bank.weights, router_weight] if router_weight is not None else [*bank.weights]
        paths = [self.sources.module_path(w).split(".")[:-1] for w in weights]
        common = _common_prefix(paths) or paths[-1] or max(paths, key=len)
        selecting = _module_of(sel.node)
        if selecting and selecting[: len(common)] != common:
            router = paths[-1][len(common) :][:1]
            here = [i for i, step in enumerate(selecting) if [step] == router]
            common = selecting[: here[-1]] if here else selecting
        return ".".join(common) or str(bank.experts[0])


def _selection(node: fx.Node, live: set[fx.Node]) -> _Selection | None:
    """Read a topk, sort, argmax or max over the last dim of floating-point scores; None for any other use."""
    scores = node.args[0]
    if not isinstance(scores, fx.Node) or not _is_float(scores) or len(dims := shape(scores) or ()) < 2:
        return None
    num_experts, op = dims[-1], packet(node)
    if not isinstance(num_experts, int) or num_experts < 2 or _dim(node) not in (-1, len(dims) - 1):
        return None
    if op is aten.argmax:
        return _Selection(node, scores, node, 1, num_experts)
    ids = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 1), None)
    if ids is None or not _best_first(node):
        return None
    if op is aten.max:
        return _Selection(node, scores, ids, 1, num_experts)
    if op is aten.sort:
        return _sorted_selection(node, scores, ids, num_experts, live)
    top_k = node.args[1]
    return _Selection(node, scores, ids, top_k, num_experts) if isinstance(top_k, int) else None


def _sorted_selection(
    node: fx.Node, scores: fx.Node, ids: fx.Node, num_experts: int, live: set[fx.Node]
) -> _Selection | None:
    """Read sort(descending)[..., :k]: the one slice that every reader of the indices goes through."""
    rank = len(shape(scores) or ())
    cut = ids
    while len(users := [user for user in cut.users if user in live and shape(user)]) == 1:
        (cut,) = users  # the gradient of sort, which reads all indices, is not live
        if packet(cut) is not aten.slice:
            return None
        dim, start, end = _argument(cut, "dim", 0), _argument(cut, "start", None), _argument(cut, "end", None)
        if start not in (0, None):
            return None
        if dim in (-1, rank - 1):
            return (
                _Selection(node, scores, cut, end, num_experts) if isinstance(end, int) and end < num_experts else None
            )
    return None


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """Return an argument by its schema name, whether it was passed by position or by name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [arg.name for arg in node.target._schema.arguments]
    index = names.index(name) if name in names else len(node.args)
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def _dim(node: fx.Node) -> Any:
    return _argument(node, "dim", -1)


def _best_first(node: fx.Node) -> bool:
    op = packet(node)
    if op is aten.topk:
        return bool(_argument(node, "largest", True))
    return op is aten.max or bool(_argument(node, "descending", False))


def _forward_nodes(graph: fx.Graph) -> set[fx.Node]:
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


def _groups(router: _Router, sel: _Selection, position: Mapping[fx.Node, int]) -> Groups | None:
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
    rows = [n for n in router.between if shape(n) == dims and _is_float(n) and position[n] < position[first]]
    return Groups(count, top_k, max(rows, key=position.__getitem__)) if rows else None


def _is_grouped(node: fx.Node, count: int) -> bool:
    """Say whether a node holds scores as [.., groups, experts of a group]."""
    dims = shape(node) or ()
    return len(dims) >= 3 and _same(dims[-2], count)


def _score_function(router: _Router) -> str:
    """Return what turns logits into scores: softmax, sigmoid or logits (nothing)."""
    ops = {packet(node) for node in router.between}
    if ops & _SOFTMAX:
        return "softmax"
    return "sigmoid" if aten.sigmoid in ops else "logits"


def _is_renormalised(region: _Region, top_k: int) -> bool:
    """Say whether the k weights of a token are divided by their sum, or softmaxed after the selection."""
    for node in region.routing:
        if packet(node) in _SOFTMAX and _same((shape(node) or (0,))[-1], top_k):
            return True
        if packet(node) is aten.div and len(node.all_input_nodes) == 2:
            numerator, divisor = node.all_input_nodes
            if any(packet(a) is aten.sum and numerator in a.all_input_nodes for a in _elementwise_ancestors(divisor)):
                return True
    return False


def _elementwise_ancestors(node: fx.Node, depth: int = 4) -> Iterator[fx.Node]:
    yield node
    if depth and packet(node) in {aten.add, aten.clamp, aten.clamp_min, aten.expand, aten.maximum, aten._to_copy}:
        for parent in node.all_input_nodes:
            yield from _elementwise_ancestors(parent, depth - 1)


def _form(bank: _Bank) -> str:
    """Name the way the experts are computed."""
    if bank.dense:
        return "dense"
    names = [str(packet(node)) for node in bank.experts]
    if any("grouped_mm" in name for name in names):
        return "grouped_mm"
    return "batched_mm" if packet(bank.experts[0]) in _MATMULS else names[0]


def _matmul_operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return (activations, weight) of a router's matmul."""
    args = [a for a in node.args if isinstance(a, fx.Node)]
    first, second = args[-2:] if packet(node) in {aten.addmm, aten.baddbmm} else args[:2]
    return first, second


def _has_rows(node: fx.Node, tokens: int | torch.SymInt, width: int | torch.SymInt) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
        return False
    return _same(value.shape[-1], width) and _same(value.numel(), tokens * width)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    return statically_known_true(a == b)


def _describe(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return node.name
    return f"{node.name} {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def _label(node: fx.Node) -> str:
    return str(packet(node)).removeprefix("aten.")


def _module_of(node: fx.Node) -> list[str]:
    """Return the path of the innermost module that a node was traced in, empty where Dynamo did not say."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"^L\['\w+'\]\.?", "", stack[-1][0]).split(".") if stack else []


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _common_prefix(paths: Iterable[list[str]]) -> list[str]:
    common: list[str] = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return common
