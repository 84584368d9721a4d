"""Follow a selection forward: the routing data that depends on it, and the banks of experts that it drives."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from dmoe_compile.passes.nodes import GATHERS, MATMULS, VIEWS, Sources, aten, is_float, packet, same, shape
from dmoe_compile.passes.selections import Selection
from torch import fx


@dataclass
class ExpertFlow:
    """Expert ops whose results flow together, everything in that flow, and the weights they read."""

    experts: list[fx.Node] = field(default_factory=list)
    weights: dict[fx.Node, None] = field(default_factory=dict)
    flow: list[fx.Node] = field(default_factory=list)
    joins: list[fx.Node] = field(default_factory=list)  # flow nodes that also read the routing
    dense: bool = False  # every expert runs on every token, and the routing weights come after

    def absorb(self, other: ExpertFlow) -> None:
        self.dense |= other.dense
        self.experts += other.experts
        self.weights |= other.weights
        self.flow += other.flow
        self.joins += other.joins


@dataclass
class Reach:
    """What depends on one selection: the routing data (ids, weights, offsets) and the banks it drives."""

    routing: dict[fx.Node, None] = field(default_factory=dict)
    banks: list[ExpertFlow] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)  # where routing data mixes into something else


def misfit(sel: Selection, reach: Reach, sources: Sources) -> tuple[str, fx.Node] | None:
    """Return why the experts behind a selection are no bank of it, and a weight of theirs; None where there are none.

    Args:
        sel: a selection that drives no bank.
        reach: what depends on it.
        sources: what is known of the graph's inputs.
    """
    weighed = {user for node in reach.readers for user in _through_views(node)}
    for node in [*reach.routing, *reach.readers, *weighed]:
        if packet(node) not in GATHERS and "mm" not in str(packet(node)):
            continue
        for root in map(sources.parameter, node.all_input_nodes):
            dims = shape(root) if root is not None else None
            if root is None or dims is None or len(dims) != 3:
                continue
            if not same(dims[0], sel.num_experts):
                count = f"its router scores {sel.num_experts}, its experts are {dims[0]}"
                return f"{count}: some scores stand for no expert", root
            if node in weighed:
                return "its routing weights are applied before its experts, all of which run on every token", root
    return None


def _through_views(node: fx.Node) -> list[fx.Node]:
    """Return what reads a value, or a view of it."""
    found, stack = list[fx.Node](), list(node.users)
    while stack:
        user = stack.pop()
        if packet(user) in VIEWS:
            stack += user.users
        else:
            found.append(user)
    return found


class Follower:
    """Walks forward from selections of one graph.

    Args:
        position: of every node in the graph.
        live: nodes of the forward.
        selections: all of the graph.
        sources: what is known of the graph's inputs.
    """

    def __init__(
        self, position: Mapping[fx.Node, int], live: Collection[fx.Node], selections: Collection[fx.Node],
        sources: Sources,
    ) -> None:  # fmt: skip
        self.position, self.live, self.selections, self.sources = position, live, selections, sources

    def follow(self, sel: Selection) -> Reach:
        """Walk forward from a selection in graph order; stop where its data mixes into the rest of the model."""
        reach = Reach({sel.node: None})
        bank_of: dict[fx.Node, ExpertFlow] = {}
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
            joins = any(a in reach.routing for a in node.all_input_nodes)
            foreign = any(self._is_foreign(a, reach.routing, bank_of) for a in node.all_input_nodes)
            weights = self._expert_weights(node, sel.num_experts)
            moved = [w for a in node.all_input_nodes for w in gathered.get(a, ())]
            if (weights and packet(node) in GATHERS) or (moved and packet(node) in VIEWS):
                gathered[node] = weights or moved
            elif moved or (weights and (joins or not foreign)):
                self._enter(node, flows, reach, bank_of).experts.append(node)
                bank_of[node].weights |= dict.fromkeys(weights + moved)
            elif node in self.selections or self._is_linear(node):
                if joins and node not in self.selections:
                    reach.readers.append(node)
                continue
            elif flows and foreign:
                continue
            elif flows:
                bank = self._enter(node, flows, reach, bank_of)
                if joins:
                    bank.joins.append(node)
            elif foreign and packet(node) not in GATHERS and is_float(node):
                dense = self._dense_bank(node, reach, sel.num_experts)
                if dense is None:
                    reach.readers.append(node)
                    continue
                reach.banks.append(dense)
                bank_of.update(dict.fromkeys(dense.flow, dense))
            else:
                reach.routing[node] = None
            visit_users(node)
        return reach

    def _dense_bank(self, node: fx.Node, reach: Reach, num_experts: int) -> ExpertFlow | None:
        """Return the experts that ran on every token if `node` weighs their results [.., E, ..] by the routing."""
        if packet(node) not in MATMULS | {aten.mul}:
            return None
        bank = ExpertFlow(flow=[node], joins=[node], dense=True)
        stack = [a for a in node.all_input_nodes if a not in reach.routing]
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
    def _enter(node: fx.Node, flows: list[ExpertFlow], reach: Reach, bank_of: dict[fx.Node, ExpertFlow]) -> ExpertFlow:
        """Put a node into the bank its inputs belong to, merging banks that meet in it."""
        bank = flows[0] if flows else ExpertFlow()
        if not flows:
            reach.banks.append(bank)
        for other in flows[1:]:
            if other is not bank and other in reach.banks:
                bank.absorb(other)
                reach.banks.remove(other)
                bank_of.update(dict.fromkeys(other.flow, bank))
        bank.flow.append(node)
        bank_of[node] = bank
        return bank

    def _is_foreign(
        self, node: fx.Node, routing: Mapping[fx.Node, None], bank_of: Mapping[fx.Node, ExpertFlow]
    ) -> bool:
        """Say whether a tensor is an activation that neither the routing nor the experts made; a scalar is none."""
        if node in routing or node in bank_of or not shape(node):
            return False
        return not self.sources.is_static(node)

    def _expert_weights(self, node: fx.Node, num_experts: int) -> list[fx.Node]:
        """Return the parameters [E, ., ...] that an op reads as such; a view that folds E away is no expert weight."""
        if packet(node) in VIEWS:
            return []
        found = []
        for operand in node.all_input_nodes:
            dims = shape(operand)
            if dims is None or len(dims) < 3 or not is_float(operand) or not same(dims[0], num_experts):
                continue
            root = self.sources.parameter(operand)
            if root is not None and len(shape(root) or ()) >= 3 and same((shape(root) or (0,))[0], num_experts):
                found.append(root)
        return found

    def _folded_weights(self, node: fx.Node, num_experts: int) -> list[fx.Node]:
        """Return the parameters [E, ., .] that a matmul reads, also where E is folded into another dim."""
        if packet(node) not in MATMULS:
            return []
        roots = [root for a in node.all_input_nodes if (root := self.sources.parameter(a)) is not None]
        return [r for r in roots if len(dims := shape(r) or ()) >= 3 and same(dims[0], num_experts)]

    def _is_linear(self, node: fx.Node) -> bool:
        return packet(node) in MATMULS and any(self.sources.is_static(a) for a in node.all_input_nodes)
