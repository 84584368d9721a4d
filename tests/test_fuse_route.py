"""Routers are read right: what dmoe::route is told computes what the model's own router does, or it is left alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmoe_compile.passes import des, dmoe
from dmoe_compile.passes.constrain import Settings
from dmoe_compile.passes.fuse_experts import Reader
from dmoe_compile.passes.fuse_route import Router, method_of, read, route, routed
from dmoe_compile.passes.layouts import Layout, Step
from dmoe_compile.passes.sites import find_sites
from torch import Tensor, fx, nn

import forms
import zoo
from dmoe_compile import prepare
from dmoe_compile.normalise import normalise

S = 8


def routers(model: nn.Module, *args: Any, **kwargs: Any) -> list[Router | str]:
    """Return what is read of every router of a model."""
    found: list[Router | str] = []

    def backend(gm: Any, example_inputs: Any) -> Callable[..., Any]:
        aten, sources = normalise(gm, example_inputs)
        names = [node.name for node in aten.graph.find_nodes(op="placeholder")]
        reader = Reader(sources, dict(zip(names, example_inputs, strict=True)))
        found.extend(read(site, reader) for site in find_sites(aten.graph, sources)[0])
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    return found


@pytest.mark.parametrize("name", zoo.ROUTABLE)
def test_every_router_of_transformers(name: str) -> None:
    layers = 2 if name == "deepseek_v3" else 1  # whose first has no router
    wanted = zoo.expected(name, layers)
    found = routers(zoo.build(name, num_layers=layers), **zoo.inputs(name, batch=1, seq=S))
    assert len(found) == len(wanted.names)
    for router in found:
        assert isinstance(router, Router), router
        assert router.score == wanted.score_function
        assert (router.bias is not None) == wanted.bias
        assert (router.expert_scale is not None) == wanted.per_expert_scale
        assert (router.groups, router.top_groups) == (wanted.groups or (1, 1))
        weighting = "softmax" if wanted.score_function == "logits" else "renormalised"
        assert router.weighting == (weighting if wanted.renormalised else "scores")
        assert router.scale == (wanted.scale or 1)


@pytest.mark.parametrize("name", ["softmax_loop", "bailing", "deepseek", "hit_loop"])
def test_prepared_forms(name: str) -> None:
    block = forms.build(name)
    prepare(block)
    (router,) = routers(block, torch.randn(2, S, forms.CONFIG["hidden_size"]))
    assert isinstance(router, Router), router
    form = forms.FORMS[name]
    assert (router.score, router.bias is not None) == (form.score_function, form.bias)
    assert router.scale == (2.5 if name in ("bailing", "deepseek") else 1)


class Gate(nn.Module):
    """Experts in two matrices behind a router of which one thing is unusual."""

    def __init__(self, score: Callable[[Tensor], Tensor], after: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.router = nn.Linear(16, 8, bias=False)
        self.up = nn.Parameter(torch.randn(8, 16, 16) / 4)
        self.score, self.after = score, after

    def forward(self, x: Tensor) -> Any:
        top, ids = self.score(self.router(x.reshape(-1, 16))).topk(2, dim=-1)
        weights, *more = self.after(top, ids) if self.after else (top,)
        out = torch.bmm(self.up[ids.reshape(-1)], x.reshape(-1, 1, 16).expand(-1, 2, -1).reshape(-1, 16, 1))
        result = (out.view(-1, 2, 16) * weights.unsqueeze(-1)).sum(1).view(x.shape)
        return (result, *more) if more else result


REFUSED = {
    "rounded scores": (lambda logits: logits.softmax(-1).bfloat16(), None, "rounded before they are ranked"),
    "values returned": (lambda logits: logits.softmax(-1), lambda top, ids: (top * 2, top), "more than its experts"),
    "soft cap": (lambda logits: (30 * (logits / 30).tanh()).softmax(-1), None, "chooses or weighs otherwise"),
    "squared weights": (lambda logits: logits.softmax(-1), lambda top, ids: (top**2,), "chooses or weighs otherwise"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_routers_are_left_alone(name: str) -> None:
    score, after, reason = REFUSED[name]
    torch.manual_seed(0)
    (router,) = routers(Gate(score, after), torch.randn(2, S, 16))
    assert isinstance(router, str)
    assert reason in router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_soft_cap_shows_in_any_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    capped = Gate(lambda logits: (30 * (logits.float() / 30).tanh()).softmax(-1), lambda top, ids: (top.to(dtype),))
    (router,) = routers(capped.to(dtype), torch.randn(2, S, 16, dtype=dtype))
    assert isinstance(router, str)
    assert "chooses or weighs otherwise" in router


def test_groups_are_read_right_from_two_tokens() -> None:
    """What they choose is often the same whether groups are ranked by their best or by their best two."""
    (router,) = routers(zoo.build("deepseek_v3", num_layers=2), **zoo.inputs("deepseek_v3", batch=1, seq=2))
    assert isinstance(router, Router), router
    assert router.group_score == "top2"


def test_a_bias_that_also_weighs_is_no_selection_bias() -> None:
    torch.manual_seed(0)
    gate = Gate(lambda logits: logits.sigmoid() + gate.bias, None)
    gate.bias = nn.Parameter(torch.zeros(8))  # zeros tell nothing
    (router,) = routers(gate, torch.randn(2, S, 16))
    assert isinstance(router, str)


def test_methods_as_the_kernel_is_told() -> None:
    where = Layout(None, 1, 32, None)
    tell = lambda passes, **how: method_of(passes, where, Settings(**how), top_k=8)  # noqa: E731
    assert tell({}) == ("own", 0.0, 0)
    assert tell({"dmoe": dmoe.Options(0.7, 20)}) == ("dmoe", 0.7, 20)
    assert tell({"des": des.Options("vote")}) == ("des_vote", 0.0, 36)
    assert tell({"des": des.Options("seq")}) == ("des_seq", 0.0, 4)
    assert tell({"dmoe": dmoe.Options()}, max_block_tokens=16) == ("own", 0.0, 0)
    assert "cover is no method" in tell({"cover": None})


PLAIN = Router(None, None, "softmax", 1, 1, "max", "scores", 1.0)
NODE = fx.Graph().placeholder("roles")


@pytest.mark.parametrize(
    ("mask", "step", "method", "escapes", "reason"),
    [
        (NODE, None, ("dmoe", 0.6, 16), (), "an attention mask says which tokens are padding"),
        (NODE, Step(NODE, NODE, 1), ("own", 0.0, 0), (), "an attention mask says which tokens are padding"),
        (None, Step(NODE, NODE, 1), ("own", 0.0, 0), ("ids are returned",), "what it chooses leaves the layer"),
    ],
    ids=["padding votes", "padding is denoised", "ids leave"],
)
def test_what_the_kernel_does_not_know_of_is_inductors(
    mask: Any, step: Any, method: Any, escapes: tuple[str, ...], reason: str
) -> None:
    pytest.importorskip("triton")
    site: Any = SimpleNamespace(escapes=escapes)
    tracer: Any = None
    graph, where = fx.Graph(), Layout(NODE, 1, S, mask, step)
    found = route(graph, site, PLAIN, where, method, Settings(), tracer)
    assert isinstance(found, str)
    assert reason in found
    assert not graph.nodes


def test_rounded_logits_that_are_ranked_as_they_are_need_no_scores() -> None:
    """gpt-oss in bf16: its scores are its logits."""
    model, inputs = zoo.build("gpt_oss", dtype=torch.bfloat16), zoo.inputs("gpt_oss", batch=1, seq=S)
    assert all(isinstance(router, Router) for router in routers(model, **inputs))


READINGS = [
    (score, *groups, weighting, biased)
    for score, groups, weighting, biased in itertools.product(
        ("softmax", "sigmoid", "logits"), ((1, 1, "max"), (4, 2, "max"), (4, 2, "top2")),
        ("scores", "renormalised", "softmax"), (False, True),
    )
]  # fmt: skip


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_a_reading_says_what_the_kernel_does(reading: tuple[Any, ...]) -> None:
    """A router is held against routed(): that must be what the kernel does when it is told the same."""
    pytest.importorskip("triton")
    from dmoe_compile.kernels import route as kernel

    from dmoe_compile.testing.interpreter import interpreted

    score, groups, top_groups, group_score, weighting, biased = reading
    generator = torch.Generator().manual_seed(0)
    logits, bias, scale = (torch.randn(size, generator=generator) for size in ((9, 16), (16,), (16,)))
    if score == "logits" and weighting == "renormalised":
        logits = logits.abs()  # a sum of weights of both signs may be near 0
    given = bias if biased else None
    router = Router(given, scale, score, groups, top_groups, group_score, weighting, 2.5)  # type: ignore[arg-type]
    with interpreted():
        ids, weights, _, _ = kernel.route(
            logits, given, scale, None, 4, score, groups, top_groups, group_score, weighting, 2.5, "own", 0.0, 0, 1, 9,
            32, True, 1,
        )  # fmt: skip
    wanted_ids, wanted = routed(logits, given, scale, 4, router)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-6)  # exp and sums of fp32 differ in the last bits
