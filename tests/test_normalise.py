"""Dynamo's graph as functional aten: the recorder writes what make_fx would, and hands on what it can't write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.testing import assert_close
from transformers import JambaConfig, JambaForCausalLM

import capture
import zoo
from dmoe_compile import normalise as module
from dmoe_compile.normalise import NotPlainError, normalise, record


@pytest.mark.parametrize("experts", zoo.EXPERTS)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_recorder_writes_what_make_fx_traces(name: str, experts: zoo.Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    (recorded,), (traced,) = both_ways(zoo.build(name, experts), monkeypatch, **zoo.inputs(name))
    assert recorded.code == traced.code
    for a, b in zip(recorded.graph.nodes, traced.graph.nodes, strict=True):
        assert facts(a.meta.get("val")) == facts(b.meta.get("val")), a


def both_ways(
    model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any
) -> tuple[list[fx.GraphModule], list[fx.GraphModule]]:
    """Return a model's graphs as the recorder writes them, and as make_fx does."""
    recorded, traced = [], []

    def refuse(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
        raise NotPlainError

    def note(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
        recorded.append(record(gm, fakes))
        return recorded[-1]

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with monkeypatch.context() as patched:
            patched.setattr(module, "record", note)
            normalise(gm, example_inputs)
            patched.setattr(module, "record", refuse)
            traced.append(normalise(gm, example_inputs)[0])
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    return recorded, traced


@pytest.mark.parametrize("name", zoo.NAMES)
def test_sizes_stay_symbols(name: str) -> None:
    """A size that the trace fixes would compile the model again for every other one."""
    before, after = [], []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def symbols() -> list[str]:
            sizes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
            return [str(size.node.expr) for size in sizes if isinstance(size, torch.SymInt)]

        before.append(symbols())
        normalise(gm, example_inputs)
        after.append(symbols())
        return gm.forward

    inputs = zoo.inputs(name)
    for each in inputs.values():
        if isinstance(each, Tensor):
            torch._dynamo.maybe_mark_dynamic(each, 0)
            torch._dynamo.maybe_mark_dynamic(each, 1)
    with torch.no_grad():
        torch.compile(zoo.build(name, num_layers=1), backend=backend, fullgraph=True)(**inputs)
    assert before == after
    assert all(not symbol.isdigit() for symbol in before[0])
    assert before[0]


def facts(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return [facts(each) for each in value] if isinstance(value, (tuple, list)) else value


def test_recorder_follows_views_writes_and_several_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor, int, Tensor]:
        values, order = x.sort(-1)
        cache[:, 1:3].add_(x[:, :2])
        rows = x.view(-1)
        rows[0] = 7.0
        return values, order, 3, x

    x, cache = torch.randn(2, 4), torch.zeros(2, 4)
    (recorded,), (traced,) = both_ways(forward, monkeypatch, x, cache)
    assert recorded.code == traced.code
    assert [n.target for n in recorded.graph.nodes].count(torch.ops.aten.copy_.default) == 2
    ours, theirs = (x.clone(), cache.clone()), (x.clone(), cache.clone())
    assert_close(recorded(*ours), forward(*theirs)[:2], rtol=0, atol=0)  # Dynamo returns the rest itself
    assert_close(ours, theirs, rtol=0, atol=0)


def test_recorded_nodes_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gate(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    (recorded,), _ = both_ways(torch.nn.Sequential(Gate()), monkeypatch, torch.ones(2, 4))
    (softmax,) = (n for n in recorded.graph.nodes if "softmax" in str(n.target))
    path, owner = list(softmax.meta["nn_module_stack"].values())[-1]
    assert (path[-1:], owner) == ("0", Gate)
    assert "return x.softmax(-1)" in softmax.meta["stack_trace"]


def test_recorder_writes_constants_as_literals(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(x: Tensor) -> Tensor:
        step = torch.tensor(2.5)
        step += 1
        return x * step + torch.tensor([1, 2, 3])

    x = torch.randn(2, 3)
    (recorded,), (traced,) = both_ways(forward, monkeypatch, x)
    assert recorded.code == traced.code
    assert "torch.tensor(2.5" in recorded.code
    for _ in range(2):  # the first call's += is no part of the second
        assert_close(recorded(x)[0], forward(x), rtol=0, atol=0)


def branch(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


def read_out(x: Tensor) -> Tensor:
    return torch.full((2,), x.sum().item())


@pytest.mark.parametrize(
    ("forward", "dynamic", "what"),
    [
        (branch, False, "higher-order operator"),
        (torch.sin, True, "SymInt"),
        (read_out, False, "Sym"),
    ],
)
def test_what_the_recorder_refuses_is_traced(forward: Callable[[Tensor], Tensor], dynamic: bool, what: str) -> None:
    refused, graphs = [], []

    def note(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
        with pytest.raises(NotPlainError, match=what) as caught:
            record(gm, fakes)
        refused.append(caught.value)
        raise caught.value

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module, "record", note)
            graphs.append(normalise(gm, example_inputs)[0])
        return graphs[-1]

    torch._dynamo.reset()
    x = torch.rand(5, 3)
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        got = torch.compile(forward, backend=backend, fullgraph=True, dynamic=dynamic)(x)
    assert len(refused) == len(graphs) == 1
    assert_close(got if isinstance(got, Tensor) else got[0], forward(x), rtol=0, atol=0)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "vmap": lambda x: torch.vmap(lambda row: row * 2 + row.sum())(x),
    "two": lambda x: torch.vmap(torch.vmap(torch.sin))(x),
    "of a gradient": lambda x: torch.vmap(torch.func.grad(lambda row: (row * row).sum()))(x),
    "of a tangent": lambda x: torch.vmap(lambda row: torch.func.jvp(torch.sin, (row,), (row,))[1])(x),
}


@pytest.mark.parametrize("forward", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_torch_func_are_followed(
    forward: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo writes the level of each into its graph, as it is without functionalize."""
    x = torch.randn(3, 4)
    (recorded,), (traced,) = both_ways(forward, monkeypatch, x)
    for graph in (recorded, traced):
        assert_close(graph(x)[0], forward(x))


@pytest.mark.usefixtures("aten", "without_gradients")
def test_a_failure_inside_of_a_transform_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.vmap(torch.sin)(x).topk(2).values

    monkeypatch.setattr(module, "_LEVELS", {})
    x = torch.randn(3, 4)
    got = torch.compile(forward, backend="dmoe", options={"passes": ["dmoe"]})(x)
    assert_close(got, forward(x))
    assert torch._C._functorch.maybe_current_level() is None
    (message,) = warnings()
    assert "can't be read (RuntimeError" in message


@pytest.mark.usefixtures("without_gradients")
def test_jamba_whose_scan_is_a_vmap() -> None:
    config = JambaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        expert_layer_offset=0,
        expert_layer_period=1,
        attn_layer_offset=1,
        attn_layer_period=2,
        mamba_dt_rank=4,
    )
    model, ids = JambaForCausalLM(config).eval(), torch.randint(0, 64, (2, 8))
    (sites, _), _ = capture.inference(model, input_ids=ids, use_cache=False)
    assert [site.num_experts for site in sites] == [8, 8]
