"""Find every mixture-of-experts site of a graph by dataflow, or say why not.

A site is one routed layer: a router scores E experts for T = B*S tokens, a selection keeps the best k,
the experts run on the selected (token, expert) pairs, and a combine sums them to one row a token.

    logits:  [T, E] = matmul(hidden [T, H], router weight)
    scores:  [T, E] or [B, S, E] = softmax | sigmoid | nothing (logits), + bias, group mask
    ids:     [T, k] = topk | sort()[:, :k] | argmax | max (scores)
    experts: ops that read a parameter [E, ., .] and depend on `ids`
    combine: [T, H] = the first value of T*H elements that every expert's result and every routing
             weight has flowed into, before anything else (residual, shared experts) is mixed in;
             experts may work in another width than their router, between a projection down and one up

Nothing is matched by its text: score function, selection bias, groups and renormalisation are read
from the graph. It may be functional aten or what Inductor's decompositions make of it
(the gradient path), where softmax is exp and div, and masked_fill is where.
Experts that all run on every token and are weighed by the routing afterwards are a site too: what a token
gets follows from its selection. Left alone, with a reason: selections that pick no expert weights (vocabulary,
codebook, sparse attention), mixtures without a selection, experts chosen by more than one selection.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from dmoe_compile.passes.inline import between
from dmoe_compile.passes.nodes import (
    GATHERS,
    MATMULS,
    SOFTMAX,
    VIEWS,
    Sources,
    argument,
    aten,
    forward_nodes,
    is_float,
    packet,
    same,
    shape,
)  # fmt: skip
from dmoe_compile.passes.reach import ExpertFlow, Follower, Reach, misfit
from dmoe_compile.passes.routers import Groups, RouterNodes, has_bias, read_groups, read_router, score_function
from dmoe_compile.passes.selections import Selection, find_selections
from torch import fx


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
    `has_experts`: it may be a layer of experts, and not a selection of something else alone.
    """

    name: str
    reason: str
    is_router: bool = False
    has_experts: bool = True


def find_sites(graph: fx.Graph, sources: Sources) -> tuple[list[Site], list[Refusal]]:
    """Return the sites of `graph`, in its order, and what was refused. The graph is not changed."""
    return _Finder(graph, sources).run()


class _Finder:
    """Finds and judges the sites of one graph."""

    def __init__(self, graph: fx.Graph, sources: Sources) -> None:
        self.graph = graph
        self.sources = sources
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.live = forward_nodes(graph)
        self.selections = {sel.node: sel for sel in find_selections(graph, self.live, self.position)}
        self.misfits: set[str] = set()  # modules of experts whose selection was refused for it
        self.follower = Follower(self.position, self.live, self.selections, sources)

    def run(self) -> tuple[list[Site], list[Refusal]]:
        reached = {sel: self.follower.follow(sel) for sel in self.selections.values()}
        owners: dict[fx.Node, list[Selection]] = {}
        for sel, reach in reached.items():
            for node in (node for bank in reach.banks for node in bank.experts):
                owners.setdefault(node, []).append(sel)
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for sel, reach in reached.items():
            rivals = max((owners[node] for bank in reach.banks for node in bank.experts), key=len, default=[sel])
            if len(rivals) == 1:
                results = self._judge(sel, reach)
                sites += [r for r in results if isinstance(r, Site)]
                refusals += [r for r in results if isinstance(r, Refusal)]
            elif rivals[0] is sel:
                weight = self._router_weight(read_router(sel))
                reason = (
                    f"its experts are chosen by {len(rivals)} separate selections (a sparse mixer), not by one top-k"
                )
                refusals.append(Refusal(self._name(sel, reach.banks[0], weight), reason))
        claimed = {w for reach in reached.values() for bank in reach.banks for w in bank.weights}
        if self._has_more_experts(claimed):
            refusals = [replace(refusal, has_experts=True) for refusal in refusals]
        return sites, self._with_dense(refusals, claimed)

    def _has_more_experts(self, claimed: Collection[fx.Node]) -> bool:
        """Say whether there are products with parameters [E, ., .] that no selection drives."""
        products = [node for node in self.live if node.op == "call_function" and "mm" in str(packet(node))]
        roots = {self.sources.parameter(operand) for node in products for operand in node.all_input_nodes}
        return any(root is not None and root not in claimed and len(shape(root) or ()) >= 3 for root in roots)

    def _judge(self, sel: Selection, reach: Reach) -> list[Site | Refusal]:
        """Return one site for each bank that a selection drives, or one refusal."""
        router = read_router(sel)
        matmul = router.matmuls[0] if len(router.matmuls) == 1 else None
        weight = self._router_weight(router)
        if not reach.banks:
            if self._feeds_selection(sel):
                return []  # it ranks groups for another selection: part of that one
            named = f"{_label(sel.node)} over {sel.num_experts}"
            if packet(sel.node) is not aten.topk:
                return []  # argmax, max and sort have a hundred other uses
            if matmul is None or not self.sources.is_static(_matmul_operands(matmul)[1]):
                return [Refusal(named, "what it ranks does not come from one linear router", has_experts=False)]
            is_router = weight is not None and any(self.graph.output_node() in node.users for node in reach.routing)
            where = _parent(self.sources.module_path(weight)) if weight else ""
            if found := misfit(sel, reach, self.sources):
                self.misfits.add(_parent(self.sources.module_path(found[1])))
                return [Refusal(where or named, found[0])]
            reason = "its indices select no expert weights [E, ., .] in this graph"
            return [Refusal(where or named, reason, is_router, has_experts=False)]
        if matmul is None:
            reason = f"{len(router.matmuls)} matmuls lead to its scores, not one router"
            if not router.matmuls and len(router.others) == 1:
                made = (shape(router.others[0]) or (0,))[-1]
                reason = f"its router makes {made} numbers for {sel.num_experts} experts, not one for each"
            return [Refusal(self._name(sel, reach.banks[0], weight), reason)]
        if turned := next((node for node in router.between if _turns_rows(node)), None):
            reason = f"{_label(turned)} stands between its router and its selection: experts may choose tokens there"
            return [Refusal(self._name(sel, reach.banks[0], weight), reason)]
        return [self._site(sel, reach, bank, router, weight) for bank in reach.banks]

    def _site(
        self, sel: Selection, reach: Reach, bank: ExpertFlow, router: RouterNodes, weight: fx.Node | None
    ) -> Site | Refusal:
        hidden, _ = _matmul_operands(router.matmuls[0])
        name = self._name(sel, bank, weight)
        widths = ((shape(hidden) or (0,))[-1], _width(bank))
        combine = next((found for width in widths if (found := self._combine(sel, bank, width))), None)
        if combine is None:
            return Refusal(name, "its experts' results are not summed to one row [T, H] a token")
        returned = [n for n in reach.routing if self.graph.output_node() in n.users]
        return Site(
            name=name,
            select=sel.node,
            scores=sel.scores,
            ids=sel.ids,
            num_experts=sel.num_experts,
            top_k=sel.top_k,
            score_function=score_function(router),
            bias=has_bias(router, sel.num_experts, self.sources),
            groups=read_groups(router, sel, self.position),
            renormalised=_is_renormalised(reach, sel.top_k),
            logits=router.matmuls[0],
            hidden=hidden,
            experts=tuple(bank.experts),
            expert_weights=tuple(bank.weights),
            form=_form(bank),
            combine=combine,
            weights=self._weights(sel, reach, bank),
            escapes=tuple(
                [f"{_describe(n)} is returned" for n in returned]
                + [f"{_describe(n)} reads the routing" for n in reach.readers]
            ),
        )

    def _combine(self, sel: Selection, bank: ExpertFlow, width: int | torch.SymInt) -> fx.Node | None:
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
    def _weights(sel: Selection, reach: Reach, bank: ExpertFlow) -> fx.Node | None:
        """Walk back from where experts and routing meet to the last weights that lie as [T, k] or [B, S, k]."""
        pairs = prod((shape(sel.scores) or ())[:-1]) * sel.top_k
        starts = [a for node in [*bank.joins, *bank.experts] for a in node.all_input_nodes]
        for node in starts:
            while node in reach.routing and is_float(node):
                dims = shape(node) or (0,)
                # Of one token, k weights in a row are those of its experts in another order, sorted for
                # grouped_mm; one weight has no order.
                if len(dims) > 1 and same(dims[-1], sel.top_k) and same(prod(dims), pairs):
                    return node if same(pairs, 1) or not _is_reordered(sel, reach, node) else None
                sources = [a for a in node.all_input_nodes if a in reach.routing and is_float(a)]
                if len(sources) != 1 or packet(node) not in VIEWS | GATHERS:
                    break
                (node,) = sources
        return None

    def _router_weight(self, router: RouterNodes) -> fx.Node | None:
        return self.sources.parameter(_matmul_operands(router.matmuls[0])[1]) if len(router.matmuls) == 1 else None

    def _feeds_selection(self, sel: Selection) -> bool:
        """Say whether a selection only prepares another one, as the choice of groups does."""
        return any(sel.node in read_router(other).between for other in self.selections.values() if other is not sel)

    def _with_dense(self, refusals: list[Refusal], claimed: set[fx.Node]) -> list[Refusal]:
        """Add the banks that every token runs through: they have a router, but no selection to rewrite."""
        reported = set(self.misfits)
        for node in self.graph.nodes:
            if node not in self.live or packet(node) not in MATMULS:
                continue
            for operand in node.all_input_nodes:
                root = self.sources.parameter(operand)
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
                and packet(node) in SOFTMAX | {aten.sigmoid}
                and same((shape(node) or (0,))[-1], num_experts)
            ):
                matmuls = read_router(Selection(node, node, node, 1, num_experts)).matmuls
                if any(self.sources.is_static(_matmul_operands(mm)[1]) for mm in matmuls):
                    return True
        return False

    def _name(self, sel: Selection, bank: ExpertFlow, router_weight: fx.Node | None) -> str:
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


def _is_reordered(sel: Selection, reach: Reach, weights: fx.Node) -> bool:
    """Say whether weights [T, k] may lie in another order than the ids of the selection: taken from others [T, k]."""
    return any(
        packet(node) in GATHERS
        and (source := node.all_input_nodes[0]) in reach.routing
        and is_float(node)
        and same((shape(source) or (0,))[-1], sel.top_k)
        for node in between(sel.node, weights)
    )


def _is_renormalised(reach: Reach, top_k: int) -> bool:
    """Say whether the k weights of a token are divided by their sum, or softmaxed after the selection."""
    for node in reach.routing:
        if packet(node) in SOFTMAX and same((shape(node) or (0,))[-1], top_k):
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


def _form(bank: ExpertFlow) -> str:
    """Name the way the experts are computed."""
    if bank.dense:
        return "dense"
    names = [str(packet(node)) for node in bank.experts]
    if any("grouped_mm" in name for name in names):
        return "grouped_mm"
    return "batched_mm" if packet(bank.experts[0]) in MATMULS else names[0]


def _width(bank: ExpertFlow) -> int | torch.SymInt:
    """Return how many numbers an expert makes of a token, whose row may lie as [.., H], [.., 1, H] or [.., H, 1]."""
    return next((size for size in reversed(shape(bank.experts[-1]) or ()) if not same(size, 1)), 1)


def _has_rows(node: fx.Node, tokens: int | torch.SymInt, width: int | torch.SymInt) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
        return False
    return same(value.shape[-1], width) and same(value.numel(), tokens * width)


def _turns_rows(node: fx.Node) -> bool:
    """Say whether a node puts another dim of a value last, one of more than 1 element (einsum moves its own about)."""
    op, rank = packet(node), len(dims := shape(node) or ())
    if not dims or same(dims[-1], 1):
        return False
    if op is aten.permute:
        return argument(node, "dims", ())[-1] not in (-1, rank - 1)
    if op is aten.transpose:
        swapped = {argument(node, name, 0) % rank for name in ("dim0", "dim1")}
        return len(swapped) == 2 and rank - 1 in swapped
    return op is aten.t


def _matmul_operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return (activations, weight) of a router's matmul."""
    args = [a for a in node.args if isinstance(a, fx.Node)]
    first, second = args[-2:] if packet(node) in {aten.addmm, aten.baddbmm} else args[:2]
    return first, second


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
