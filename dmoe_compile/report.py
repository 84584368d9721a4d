"""explain(): what the passes find in a model, what they do to it, and how many experts it then uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from dmoe_compile import auto_prepare, backend, loading, notices
from dmoe_compile.config import Config, check_config
from dmoe_compile.passes.constrain import Outcome
from dmoe_compile.passes.cost import formula
from dmoe_compile.passes.policies import policy_names
from dmoe_compile.passes.sites import Refusal

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SiteReport:
    """One mixture-of-experts layer, as found in one graph.

    Attributes:
        name: module path.
        num_experts, top_k: E and k.
        score_function: "softmax", "sigmoid" or "logits": what the selection ranks.
        bias: whether a selection bias is added to the scores.
        groups: (groups, groups a token keeps) of a group-limited router, None without.
        renormalised: whether a token's k weights are divided by their sum.
        experts: how the experts are computed ("grouped_mm", "batched_mm", or the op's name).
        fused: whether the fused kernel computes the experts when compiled under torch.no_grad().
        own_experts: why the model's own code computes them, "" where that is the fused kernel.
        expert_bytes: bytes of one expert's weights.
        tokens: tokens of the forward, B*S; None where symbolic.
        tokens_per_block: tokens that share a coreset; None where the site was left alone.
        rewritten, reason: whether the routing was changed, and if not, why not.
        escapes: values that change with the routing and leave the layer besides its result.
        notes: what was assumed for want of knowledge (padding, blocks), and what is wrong with tokens.
        unique_experts_before, unique_experts_after: experts that the given inputs used in one forward
            without and with the passes, counted; None where the site is in no graph of that run.
    """

    name: str
    num_experts: int
    top_k: int
    score_function: str
    bias: bool
    groups: tuple[int, int] | None
    renormalised: bool
    experts: str
    fused: bool
    own_experts: str
    expert_bytes: int
    tokens: int | None
    tokens_per_block: int | None
    rewritten: bool
    reason: str
    escapes: list[str]
    notes: list[str]
    unique_experts_before: int | None = None
    unique_experts_after: int | None = None


@dataclass(frozen=True)
class Report:
    """What explain() found. `str(report)` is readable text, `table()` a rich table of the sites.

    Attributes:
        sites: every routed layer, in the order of execution.
        refused: module or op, and why it is no site or was left alone.
        warnings: what a compile would warn of.
        graphs: Dynamo graphs that the forward fell into; more than one means graph breaks.
        verified: with verify=True, whether a coreset of all experts, without other passes, gave the same bits as no
            pass; None where it was not asked for, or no site was rewritten that could be held against it.
        cost_model: with passes="auto", what decides, as a formula in T, k, U ...; each site has its numbers in
            `notes`.
    """

    sites: list[SiteReport] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    graphs: int = 0
    verified: bool | None = None
    cost_model: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """Return the sites as a rich table."""
        from rich.table import Table

        table = Table(title="mixture-of-experts sites")
        for heading in ("site", "experts", "scores", "block", "unique experts", "expert MiB", "status"):
            table.add_column(heading, overflow="fold")
        for site in self.sites:
            table.add_row(*_cells(site))
        return table

    def __str__(self) -> str:
        lines = [f"{len(self.sites)} mixture-of-experts sites in {self.graphs} graph{'s' * (self.graphs != 1)}"]
        for site in self.sites:
            name, experts, scores, block, unique, mib, status = _cells(site)
            lines.append(f"  {name}: {status}")
            lines.append(
                f"    {experts} experts by {scores}, {site.experts}, {mib} MiB each; "
                f"block {block}; unique experts {unique}"
            )
            lines.append(f"    experts: {'fused' if site.fused else f'their own code: {site.own_experts}'}")
            lines += [f"    changes with the routing: {escape}" for escape in site.escapes]
            lines += [f"    note: {note}" for note in site.notes]
        if self.cost_model:
            lines.append(f"  cost model: {self.cost_model}")
        lines += [f"  refused {name}: {reason}" for name, reason in self.refused]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.verified is not None:
            lines.append(f"  all-experts identity: {'holds, bit for bit' if self.verified else 'BROKEN'}")
        return "\n".join(lines)


def explain(model: Any, *args: Any, config: Config | None = None, verify: bool = False, **kwargs: Any) -> Report:
    """Return what the passes of `config` find in `model` and do to it, on one forward with the given inputs.

    The forward runs twice, eagerly and without gradients, once with the model's own routing and once
    rewritten; unique experts are counted, not estimated. Nothing is lowered to Inductor unless `verify`.
    A model whose experts are in Python loops is prepared first, as compiling it would (see prepare).

    Args:
        model: a module or a function, as torch.compile takes.
        *args: its inputs.
        config: what to explain; the default selects the dmoe pass.
        verify: also compile the model twice and compare a coreset of all experts with no pass, bit for bit.
            A model that changes its inputs (a cache that grows) must get inputs without them.
        **kwargs: its keyword inputs.

    Raises:
        ValueError: for weights on the meta device: what is counted takes values; for what is no model.
    """
    check_config(config)
    loading.check_model(model)
    loading.check_values(model)
    config = config or Config(passes=("dmoe",))
    if config.experts is True:  # what can't be fused is said, no error
        config = replace(config, experts="auto")
    in_loops = auto_prepare.prepare_or_say(model, config) if isinstance(model, torch.nn.Module) else []
    before = _Watch(replace(config, passes=(), stats=True))
    after = _Watch(replace(config, stats=True))
    with _silenced():
        _run(model, before, args, kwargs)
        _run(model, after, args, kwargs)
    sites = [
        _site_report(outcome, before.counts[i] if i < len(before.counts) else None, count)
        for i, (outcome, count) in enumerate(zip(after.outcomes, after.counts, strict=True))
    ]
    refused = [(refusal.name, refusal.reason) for refusal in after.refusals]
    verified = _verify(model, config, args, kwargs) if verify else None
    return Report(
        sites,
        refused,
        [*in_loops, *sorted(after.notices.said)],
        after.graphs,
        verified,
        formula() if config.auto else "",
    )


class _Watch:
    """A backend that runs the rewritten graph as it is and keeps what it was told and what it counted."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.outcomes: list[Outcome] = []
        self.refusals: list[Refusal] = []
        self.counts: list[Sequence[int] | None] = []  # as passes/count.py has them
        self.graphs = 0
        self.notices = notices.Notices()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        rewritten = backend.rewrite(gm, example_inputs, self.config, self.notices)
        if rewritten is None:
            return gm.forward
        aten, findings = rewritten
        first = len(self.outcomes)
        self.outcomes += findings.outcomes
        self.refusals += findings.refusals
        self.counts += [None] * len(findings.outcomes)

        def call(*inputs: Any) -> Any:
            with torch._C._DisableAutocast():
                outputs = aten(*inputs)
            if not findings.num_outputs:
                return outputs
            self.counts[first : first + len(findings.outcomes)] = outputs[-1].tolist()
            return outputs[:-1]

        return call


def _run(model: Any, watch: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    compiled = _compile(model, backend=watch)
    with torch.no_grad():
        return compiled(*args, **kwargs)


def _compile(model: Any, **kwargs: Any) -> Any:
    """Compile beside whatever else was compiled of the model: Dynamo would soon give up on the ninth variant."""
    return torch.compile(model, isolate_recompiles=True, **kwargs)  # type: ignore[call-overload]  # not in the stubs


def _verify(model: Any, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool | None:
    """Compare a coreset of all experts with no pass, both through Inductor in its default mode."""
    # top_any and team are no coreset methods: with nothing to drop or reuse they still add to what Inductor fuses, and
    # so to where it rounds.
    selected = {name: options for name, options in config.selected.items() if name in policy_names()}
    if not selected or not all(hasattr(options, "all_experts") for options in selected.values()):
        return None  # a policy of somebody else's, which need not say
    everything = {name: options.all_experts() for name, options in selected.items()}
    passes = tuple(everything)  # "auto" would see that nothing is gained
    lossless = replace(config, passes=passes, policies=everything, experts=False, stats=False, mode=None)
    results, rewritten = [], counters["dmoe"]["sites_rewritten"]
    for each in (replace(lossless, passes=(), policies={}), lossless):
        compiled = _compile(model, backend="dmoe", options=each.to_options())
        with torch.no_grad():
            results.append([leaf for leaf in tree_leaves(compiled(*args, **kwargs)) if isinstance(leaf, torch.Tensor)])
    if counters["dmoe"]["sites_rewritten"] == rewritten:
        return None
    plain, ours = results
    return len(plain) == len(ours) and all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep the backend from logging what the report says."""
    disabled, notices.log.disabled = notices.log.disabled, True
    try:
        yield
    finally:
        notices.log.disabled = disabled


def _site_report(outcome: Outcome, before: Sequence[int] | None, after: Sequence[int] | None) -> SiteReport:
    site = outcome.site
    _, unsound, below = after or (None, 0, 0)
    notes = list(outcome.notes)
    if unsound:
        notes.append(f"{unsound} tokens have router scores that are NaN or infinite: they vote for no coreset")
    if below:
        notes.append(f"{below} tokens keep less than the policy promises: its largest coreset is too small for them")
    numel = site.ids.meta["val"].numel() if isinstance(site.ids.meta.get("val"), torch.Tensor) else None
    return SiteReport(
        name=site.name,
        num_experts=site.num_experts,
        top_k=site.top_k,
        score_function=site.score_function,
        bias=site.bias,
        groups=(site.groups.count, site.groups.top_k) if site.groups else None,
        renormalised=site.renormalised,
        experts=site.form,
        fused=not outcome.own_experts,
        own_experts=outcome.own_experts,
        expert_bytes=site.expert_bytes,
        tokens=numel // site.top_k if isinstance(numel, int) else None,
        tokens_per_block=outcome.tokens_per_block,
        rewritten=outcome.rewritten,
        reason=outcome.reason,
        escapes=list(site.escapes),
        notes=notes,
        unique_experts_before=before[0] if before else None,
        unique_experts_after=after[0] if after else None,
    )


def _cells(site: SiteReport) -> tuple[str, ...]:
    scores = site.score_function + " + bias" * site.bias
    if site.groups:
        scores += f", {site.groups[1]} of {site.groups[0]} groups"
    unique = f"{_or_dash(site.unique_experts_before)} -> {_or_dash(site.unique_experts_after)}"
    status = "rewritten" if site.rewritten else f"left alone: {site.reason}"
    block = _or_dash(site.tokens_per_block)
    return (
        site.name,
        f"{site.top_k} of {site.num_experts}",
        scores,
        block,
        unique,
        f"{site.expert_bytes / 2**20:.3g}",
        status,
    )


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
