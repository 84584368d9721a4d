"""The passes in their order, and the one loop that finds sites, runs them, lints, counts and logs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from dmoe_compile.passes.constrain import Method, Outcome, Settings, constrain
from dmoe_compile.passes.cost import Verdict
from dmoe_compile.passes.count import count_tokens
from dmoe_compile.passes.fuse_experts import Fused
from dmoe_compile.passes.fuse_route import Routed
from dmoe_compile.passes.inline import Decompositions, Tracer
from dmoe_compile.passes.layouts import Layout, find_layouts
from dmoe_compile.passes.lower import Lowering
from dmoe_compile.passes.nodes import Sources
from dmoe_compile.passes.policies import find_policy, policy_names
from dmoe_compile.passes.readings import Bank
from dmoe_compile.passes.sites import Refusal, Site, find_sites
from dmoe_compile.passes.team import Denoised, State, add_step, reuse
from dmoe_compile.passes.top_any import Dropped, drop
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor.pattern_matcher import stable_topological_sort

log = logging.getLogger(__name__)


@dataclass
class Findings:
    """What one run of the pipeline found and did.

    `layouts` go with `outcomes`; `num_outputs` is how many outputs were appended to the graph, `states` what was
    appended to its inputs, after those that say which tokens are decoded and cold. `routed` is what the fused routing
    made of a site, by its selection.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    num_outputs: int = 0
    states: list[State] = field(default_factory=list)
    routed: dict[fx.Node, Routed] = field(default_factory=dict)

    @property
    def fused(self) -> int:
        """Sites whose experts are the fused kernel."""
        return sum(not outcome.own_experts for outcome in self.outcomes)

    @property
    def changed(self) -> bool:
        """Whether the graph is another than it was."""
        return bool(self.rewritten or self.fused or self.num_outputs)

    @property
    def rewritten(self) -> int:
        """Sites whose routing was changed."""
        return sum(outcome.rewritten for outcome in self.outcomes)


def run(
    graph: fx.Graph,
    sources: Sources,
    passes: Mapping[str, Any],
    settings: Settings,
    *,
    stats: bool = False,
    decompositions: Decompositions = None,
    joint: bool = False,
    verdicts: Sequence[Verdict] | None = None,
    step: Denoised | None = None,
    lowering: Lowering | None = None,
    quiet: bool = False,
) -> Findings:
    """Find the sites of `graph`, rewrite them in place, and return what was done; every decision is logged and counted.

    Args:
        graph: functional aten, as normalised for inference or as AOTAutograd's joint graph.
        sources: what is known of its inputs.
        passes: options by the name of the pass, in the order to run.
        settings: what every coreset method shares.
        stats: append the counts of every site (passes/count.py) to the outputs (never in a joint graph).
        decompositions: the table that the graph was made with; what is inlined must match.
        joint: the graph holds gradients too.
        verdicts: whether a coreset pays, for every site in its order; None where it is wanted at all of them.
        step: the rows that a decoding context describes; None in a forward of which it says nothing.
        lowering: puts fused kernels in; None leaves experts and routing to Inductor, as in a joint graph.
        quiet: neither log nor count the decisions.

    Raises:
        Exception: whatever a rule raises while it is traced; a graph without a lowering is then as it was.
        NotFusedError: where experts=True asks for what can't be had.
    """
    sites, refusals = find_sites(graph, sources)
    tracer = Tracer(decompositions, share=not joint)
    findings = Findings(refusals=refusals, layouts=find_layouts(graph, sites, sources))
    before = {node: (node.target, node.args) for node in graph.nodes}
    if lowering is not None:
        lowering.insist(refusals)
    banks = [lowering.bank(site) for site in sites] if lowering is not None else ["no kernel is asked for"] * len(sites)
    try:
        if step is not None:
            findings.layouts = add_step(graph, findings.layouts, step)
        router = _Router(graph, passes, settings, tracer, lowering, findings.routed)
        findings.outcomes = router.route_all(sites, findings.layouts, banks, verdicts)
        if "top_any" in passes:
            findings.outcomes = _drop_all(graph, findings.outcomes, passes["top_any"], tracer, joint)
    except Exception:
        if lowering is None:
            _restore(graph, before)
        raise
    fused: Sequence[Fused | None] = [None] * len(sites)
    if lowering is not None:
        fused = _fuse_all(graph, findings, banks, lowering, tracer, dropped="top_any" in passes)
    if step is not None and step.reuses and passes["team"].cache:
        routed = [outcome.site for outcome in findings.outcomes]
        findings.states = reuse(graph, routed, fused, findings.layouts, tracer)
    if stats and not joint:
        counted = [(outcome.site, outcome.below_promise) for outcome in findings.outcomes]
        to_count = [(site, where, below) for (site, below), where in zip(counted, findings.layouts, strict=True)]
        findings.num_outputs = count_tokens(graph, to_count, tracer, set(findings.routed))
    if findings.fused:
        graph.eliminate_dead_code()  # the experts' own code, which reads all of their weights
    if findings.changed:
        graph.lint()
    if not quiet:
        _count(findings)
    return findings


@dataclass
class _Router:
    """Rewrites the routing of one graph's sites; `routed` takes what the fused routing made of them."""

    graph: fx.Graph
    passes: Mapping[str, Any]
    settings: Settings
    tracer: Tracer
    lowering: Lowering | None
    routed: dict[fx.Node, Routed]

    def route_all(
        self,
        sites: Sequence[Site],
        layouts: Sequence[Layout],
        banks: Sequence[Bank | str],
        verdicts: Sequence[Verdict | None] | None,
    ) -> list[Outcome]:
        """Run the selected coreset method on every site; one router may drive two banks: the first speaks for both."""
        by_selection: dict[fx.Node, Outcome] = {}
        outcomes = []
        shared = [site.select for site in sites]
        asked: Sequence[Verdict | None] = [None] * len(sites) if verdicts is None else verdicts
        for site, where, bank, verdict in zip(sites, layouts, banks, asked, strict=True):
            outcome = by_selection.get(site.select)
            if outcome is None and verdict is not None and not verdict.pays and where.step is None:
                outcome = Outcome(site, False, "a coreset does not pay", notes=(verdict.why,), verdict=verdict)
            elif outcome is None:
                chosen = self.passes if verdict is None or verdict.pays else {}
                alone = isinstance(bank, Bank) and shared.count(site.select) == 1
                outcome = self._route(site, where, chosen, fused=alone)
                notes = (*outcome.notes, verdict.why) if verdict else outcome.notes
                outcome = replace(outcome, verdict=verdict, notes=notes)
            by_selection[site.select] = outcome
            outcomes.append(replace(outcome, site=site, own_experts=bank if isinstance(bank, str) else ""))
        return outcomes

    def _route(self, site: Site, where: Layout, passes: Mapping[str, Any], *, fused: bool) -> Outcome:
        """Run the selected coreset method on one site, in the fused kernel if that takes it."""
        if fused and self.lowering is not None and "top_any" not in self.passes:
            done = self.lowering.route(self.graph, site, where, passes, self.settings, self.tracer)
            if not isinstance(done, str):
                outcome, self.routed[site.select] = done
                return outcome
            log.debug("%s: routed by Inductor: %s", site.name, done)
        outcome = Outcome(site, False, "no pass is selected")
        for name in set(policy_names()).intersection(passes):
            method = _method(name, passes[name])
            outcome = constrain(self.graph, site, where, method, self.settings, self.tracer)
        if where.step is None or outcome.rewritten:
            return outcome
        return constrain(self.graph, site, where, Method(_everything, "everything"), Settings(), self.tracer)


def _fuse_all(
    graph: fx.Graph,
    findings: Findings,
    banks: Sequence[Bank | str],
    lowering: Lowering,
    tracer: Tracer,
    *,
    dropped: bool,
) -> list[Fused | None]:
    """Put the fused experts in at the sites whose bank was read."""
    results: list[Fused | None] = []
    replaced: dict[fx.Node, fx.Node] = {}  # what one site makes may be what the next one reads
    for i, (outcome, where, bank) in enumerate(zip(findings.outcomes, findings.layouts, banks, strict=True)):
        fused = None
        if isinstance(bank, Bank):
            routed = findings.routed.get(outcome.site.select)
            bank = replace(bank, hidden=replaced.get(bank.hidden, bank.hidden))
            site, fused = lowering.fuse(graph, outcome.site, bank, routed, where, tracer, dropped=dropped)
            replaced[outcome.site.combine] = fused.combine
            findings.outcomes[i] = replace(outcome, site=site)
        results.append(fused)
    return results


def _drop_all(graph: fx.Graph, outcomes: Sequence[Outcome], options: Any, tracer: Tracer, joint: bool) -> list[Outcome]:
    """Let every token drop experts, inside the coreset if there is one."""
    by_selection: dict[fx.Node, list[Site]] = {}
    for outcome in outcomes:
        by_selection.setdefault(outcome.site.select, []).append(outcome.site)
    results = {
        select: "no expert is dropped where gradients are required" if joint else drop(graph, sites, options, tracer)
        for select, sites in by_selection.items()
    }
    dropped = [each for each in results.values() if isinstance(each, Dropped)]
    for each in dropped:
        each.apply()
    if dropped:
        stable_topological_sort(graph)
    return [_with_dropped(outcome, results[outcome.site.select]) for outcome in outcomes]


def _with_dropped(outcome: Outcome, result: Dropped | str) -> Outcome:
    if isinstance(result, Dropped):
        return replace(
            outcome, site=replace(outcome.site, ids=result.ids, weights=result.weights), rewritten=True, reason=""
        )
    if outcome.rewritten:
        return replace(outcome, notes=(*outcome.notes, f"top_any leaves it alone: {result}"))
    return replace(outcome, reason=result)


def _restore(graph: fx.Graph, before: Mapping[fx.Node, tuple[Any, Any]]) -> None:
    """Undo what was done to a graph: half of its sites rewritten would be neither routing."""
    for node, (target, args) in before.items():
        node.target, node.args = target, args
    for node in reversed(list(graph.nodes)):
        if node not in before:
            graph.erase_node(node)


def _everything(scores: Tensor, ids: Tensor, voting: Tensor) -> Tensor:
    """The coreset where no method is selected."""
    return torch.ones_like(scores[:, 0], dtype=torch.bool)


def _method(name: str, options: Any) -> Method:
    policy = find_policy(name)
    promise = policy.promise(options) if hasattr(policy, "promise") else None
    rule = functools.partial(policy.coreset, options=options)
    return Method(rule, (name, options), getattr(policy, "needs_weights", False), promise)


def _count(findings: Findings) -> None:
    """Log every decision and add it up in torch._dynamo.utils.counters["dmoe"]."""
    counters["dmoe"]["sites"] += len(findings.outcomes)
    counters["dmoe"]["sites_rewritten"] += findings.rewritten
    counters["dmoe"]["refused"] += len(findings.refusals)
    if findings.fused:
        counters["dmoe"]["experts_fused"] += findings.fused
    for outcome in findings.outcomes:
        site = outcome.site
        what = "rewritten" if outcome.rewritten else f"left alone: {outcome.reason}"
        log.info("%s: %d of %d experts by %s: %s", site.name, site.top_k, site.num_experts, site.score_function, what)
        if outcome.own_experts:
            log.debug("%s: its own experts: %s", site.name, outcome.own_experts)
        else:
            log.info("%s: experts: fused", site.name)
        log.debug("%s: %s", site.name, outcome)
    for refusal in findings.refusals:
        log.info("%s: refused: %s", refusal.name, refusal.reason)
