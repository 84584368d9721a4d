"""Give the routing of a site to one fused op, kernels/route.py, on GPUs: from router logits to ids and weights.

    logits: [T, E] -> scores -> bias, groups -> topk -> weights, renormalised, scaled
        ->  ids: [T, k], weights: [T, k], active: [N, E], counts: [N] = dmoe.route(logits, bias, ...)

What a router does is read from its operations and held against what it computes, on random logits. The coreset method
is run by the same launch, so this takes the place of what passes/constrain.py does to the graph; a method says by an
attribute `kernel` that it is among those the op knows.
Left alone, and routed by Inductor's code as passes/constrain.py has it: methods that the op does not know, padding that
a mask tells of, scores that are rounded before they are ranked, routers whose choice is read by more than experts, and
what unsupported() of the kernel says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dmoe_compile.kernels.limits import DENSE_TOKENS, LISTED_TOKENS
from dmoe_compile.passes.constrain import Settings
from dmoe_compile.passes.fuse_experts import SYMBOLIC, Reader
from dmoe_compile.passes.inline import Tracer, between
from dmoe_compile.passes.layouts import Layout
from dmoe_compile.passes.policies import find_policy, policy_names
from dmoe_compile.passes.region import Region, cut, made_up, scalars
from dmoe_compile.passes.sites import Site
from torch import Tensor, fx

aten = torch.ops.aten
_CHECKED_TOKENS = 256  # at least
_WEIGHT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 8e-3}  # two roundings of each


@dataclass(frozen=True)
class Router:
    """What a router does with its logits; the arguments of dmoe::route of these names."""

    bias: fx.Node | None
    expert_scale: fx.Node | None
    score: str
    groups: int
    top_groups: int
    group_score: str
    weighting: str
    scale: float


@dataclass(frozen=True)
class Routed:
    """What dmoe::route made of a site: see kernels/route.py."""

    ids: fx.Node
    weights: fx.Node
    active: fx.Node
    counts: fx.Node
    listed: bool  # whether `active` is one list of all tokens' experts, which the experts' kernel can run over


def read(site: Site, reader: Reader) -> Router | str:
    """Return what a site's router does, or why the op does not do that."""
    if site.weights is None:
        return "its routing weights are not one tensor [T, k]"
    if site.scores.meta["val"].dtype != torch.float32 and site.score_function != "logits":
        return "its scores are rounded before they are ranked"
    if _is_read_elsewhere(site):
        return "more than its experts reads what its selection returns"
    region = cut([site.logits], [site.ids, site.weights])
    before = cut([site.logits], [site.scores]).leaves
    after = tuple(leaf for leaf in region.leaves if leaf not in before)
    if region.symbolic:
        return SYMBOLIC
    sizes = {leaf.meta["val"].numel() for leaf in region.leaves}  # of ERNIE's bias, [1, E]
    if sizes - {site.num_experts} or max(len(before), len(after)) > 1:
        return "its router reads more than logits, one bias and one scale for each expert"
    key = f"router\n{region.key}"
    readings = list(_readings(site, region, next(iter(before), None), next(iter(after), None)))
    if key not in reader.known:
        reader.known[key] = _check(site, region, readings, reader.values)
    found = reader.known[key]
    return found if isinstance(found, str) else readings[found]


def method_of(passes: Mapping[str, Any], where: Layout, settings: Settings, top_k: int) -> tuple[str, float, int] | str:
    """Return the arguments method, p and size of dmoe::route for what is selected, or why it is none that it knows."""
    names = [name for name in policy_names() if name in passes]
    if not names or settings.too_long(where.seq):
        return "own", 0.0, 0
    policy = find_policy(names[0])
    if not hasattr(policy, "kernel"):
        return f"{names[0]} is no method that the fused kernel knows"
    arguments: tuple[str, float, int] = policy.kernel(passes[names[0]], top_k)
    return arguments


def route(
    graph: fx.Graph,
    site: Site,
    router: Router,
    where: Layout,
    method: tuple[str, float, int],
    settings: Settings,
    tracer: Tracer,
) -> Routed | str:
    """Replace a site's ids and weights by the op's, or say why it does not take them; the graph is as it was then."""
    from dmoe_compile.kernels.route_arguments import unsupported

    batch, seq = where.batch, where.seq
    if where.mask is not None and (method[0] != "own" or where.step is not None):
        return "an attention mask says which tokens are padding"
    if where.step is not None and site.escapes:
        return "what it chooses leaves the layer, where an id must be an expert's"
    if not isinstance(batch, int) or not isinstance(seq, int):
        return SYMBOLIC
    # Without a coreset blocks are nothing but programs: one, where it makes the list of all tokens' experts.
    if method[0] == "own" and where.step is None:
        whole = batch * seq <= DENSE_TOKENS
    else:
        whole = settings.scope == "batch"
    candidates = where.step.candidates if where.step else 1
    form = (
        site.top_k, router.score, router.groups, router.top_groups, router.group_score, router.weighting, router.scale,
        *method, batch, seq, settings.block_length, whole, candidates,
    )  # fmt: skip
    operands = [router.bias, router.expert_scale, where.step.roles if where.step else None]
    bias, scale, roles = (None if node is None else node.meta["val"].reshape(-1) for node in operands)
    logits = site.logits.meta["val"].reshape(-1, site.num_experts)
    reason: str | None = unsupported(logits, bias, scale, roles, *form)
    if reason is not None:
        return reason
    given = [node is not None for node in operands]
    args = [site.logits, *(node for node in operands if node is not None)]
    rule = _Route(given, form)
    ids, weights, active, counts = tracer.insert(graph, site.select, rule, args, ("route", tuple(given), form))
    assert site.weights is not None
    for old, new in ((site.ids, ids), (site.weights, weights)):
        old.replace_all_uses_with(_like(graph, new, old))
    blocks = 1 if whole else batch // candidates * -(-seq // settings.block_length)
    few = LISTED_TOKENS if method[0] != "own" else DENSE_TOKENS  # many tokens' own choices are most of the experts
    return Routed(ids, weights, active, counts, listed=blocks == 1 and batch * seq <= few)


class _Route:
    """The op as a rule; an object, so that its numbers are no arguments that would be traced."""

    def __init__(self, given: Sequence[bool], form: Sequence[Any]) -> None:
        self.given, self.form = given, form

    def __call__(self, logits: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        rest = iter(operands)
        flat = [next(rest).reshape(-1) if here else None for here in self.given]
        results: tuple[Tensor, ...] = torch.ops.dmoe.route(logits.reshape(-1, logits.shape[-1]), *flat, *self.form)
        return results


def _like(graph: fx.Graph, new: fx.Node, old: fx.Node) -> fx.Node:
    """Return the op's ids or weights in the dtype and shape of the site's own, for those that read them so."""
    value = old.meta["val"]
    if value.dtype == new.meta["val"].dtype and value.shape == new.meta["val"].shape:
        return new
    with graph.inserting_after(old):
        cast = graph.call_function(aten._to_copy.default, (new,), {"dtype": value.dtype})
    cast.meta["val"] = new.meta["val"].to(value.dtype)
    with graph.inserting_after(cast):
        view = graph.call_function(aten.view.default, (cast, list(value.shape)))
    view.meta["val"] = cast.meta["val"].view(value.shape)
    return view


def _is_read_elsewhere(site: Site) -> bool:
    """Say whether the selection feeds more than the site's ids and weights: it would not follow the op's choice."""
    assert site.weights is not None
    way = set(between(site.select, site.weights)) | {site.select, site.ids}
    readers = [user for node in way - {site.ids, site.weights} for user in node.users if user not in way]
    return any(reader.users or reader.op == "output" for reader in readers)  # else nobody reads it


def _readings(site: Site, region: Region, bias: fx.Node | None, scale: fx.Node | None) -> Iterator[Router]:
    """Yield what a router may do, likeliest first."""
    assert site.weights is not None
    factors = [1.0, *scalars(between(site.select, site.weights), aten.mul)]
    weightings = ["renormalised", "scores", "softmax"]
    group_scores = ["max", "top2"] if site.groups else ["max"]
    groups = (site.groups.count, site.groups.top_k) if site.groups else (1, 1)
    for group_score, weighting, factor in itertools.product(group_scores, weightings, dict.fromkeys(factors)):
        yield Router(bias, scale, site.score_function, *groups, group_score, weighting, factor)


def _check(site: Site, region: Region, readings: Sequence[Router], values: Mapping[str, Tensor]) -> int | str:
    """Return which reading chooses and weighs as the region does on random logits, or why none is taken."""
    assert site.weights is not None
    device = next((x.device for x in values.values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    # Made up, all of them: a model's own biases may be zeros and its scales ones, which tell nothing.
    leaves = {leaf: made_up(leaf, device, generator) for leaf in region.leaves}
    value = site.logits.meta["val"]
    tokens = value.numel() // site.num_experts
    left, run = list(range(len(readings))), region.callable(device)
    # Large logits show soft caps, but make equal sigmoids; a few tokens show too few groups.
    for spread in (1.0,) if site.score_function == "sigmoid" else (1.0, 8.0):
        for _ in range(-(-_CHECKED_TOKENS // tokens)):
            logits = (spread * _distinct_logits(value.shape, generator)).to(device, value.dtype)
            ids, weights = (x.reshape(-1, site.top_k) for x in run([logits, *leaves.values()]))
            left = [i for i in left if _agrees(site, readings[i], logits, leaves, ids, weights)]
    return left[0] if left else "its router chooses or weighs otherwise than the fused kernel does"


def _agrees(
    site: Site, router: Router, logits: Tensor, leaves: Mapping[fx.Node, Tensor], ids: Tensor, weights: Tensor
) -> bool:
    """Say whether a reading chooses and weighs as was found; the order of a token's experts is no matter."""
    assert site.weights is not None
    bias, scale = (None if node is None else leaves[node] for node in (router.bias, router.expert_scale))
    chosen, given = routed(logits.reshape(-1, site.num_experts), bias, scale, site.top_k, router)
    (chosen, ours), (ids, theirs) = chosen.sort(-1), ids.sort(-1)
    if not torch.equal(chosen, ids):
        return False
    weights = weights.gather(-1, theirs).float()
    error = (given.gather(-1, ours) - weights).abs().amax() / weights.abs().amax()
    return bool(error <= _WEIGHT_TOLERANCE.get(site.weights.meta["val"].dtype, 0))


def routed(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, top_k: int, router: Router
) -> tuple[Tensor, Tensor]:
    """Return ids [T, k] and weights [T, k] fp32 of a router's own choice, in PyTorch."""
    gates = logits.float()
    if router.score != "logits":
        gates = gates.softmax(-1) if router.score == "softmax" else gates.sigmoid()
    scores = gates if bias is None else gates + bias.float()
    if router.groups > 1:
        grouped = scores.reshape(len(scores), router.groups, -1)
        best = grouped.topk(2 if router.group_score == "top2" else 1, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best).scatter(-1, best.topk(router.top_groups, dim=-1).indices, 1) > 0
        scores = torch.where(kept.unsqueeze(-1), grouped, -torch.inf).reshape(scores.shape)
    ids = scores.topk(top_k, dim=-1).indices
    weights = gates.gather(-1, ids)
    if router.weighting == "softmax":
        weights = weights.softmax(-1)
    elif router.weighting == "renormalised":
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * router.scale
    return ids, weights if expert_scale is None else weights * expert_scale.float().reshape(-1)[ids]


def _distinct_logits(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return logits of which no two of a token are equal, in bf16 neither: ties may be broken otherwise."""
    num_experts = size[-1]
    magnitudes = (0x3F80 + torch.arange(num_experts) // 2).to(torch.int16).view(torch.bfloat16)  # from 1.0 upwards
    signed = torch.where(torch.arange(num_experts) % 2 == 0, magnitudes, -magnitudes).float()
    order = torch.rand(tuple(size), generator=generator).argsort(-1)
    return signed[order]
