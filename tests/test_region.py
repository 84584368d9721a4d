"""A piece cut out of a graph computes what it does in the graph, and nothing before its inputs."""

from __future__ import annotations

import pytest
import torch
from dmoe_compile.passes.region import cut, made_up, scalars
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

CPU = torch.device("cpu")
aten = torch.ops.aten


def node(graph: fx.Graph, op: object) -> fx.Node:
    (found,) = (each for each in graph.nodes if each.op == "call_function" and each.target.overloadpacket is op)
    return found


@pytest.fixture
def graph() -> fx.Graph:
    def f(x: Tensor, weight: Tensor, far: Tensor) -> Tensor:
        hidden = (x + far).relu()
        like = torch.zeros_like(torch.sigmoid(far))
        return (hidden @ weight).mul(2.5) + like + torch.ones(2)

    return make_fx(f)(torch.randn(3, 2), torch.randn(2, 2), torch.randn(3, 2)).graph


def test_it_ends_at_its_inputs_and_lists_what_else_it_reads(graph: fx.Graph) -> None:
    (output,) = graph.output_node().all_input_nodes
    region = cut([node(graph, aten.relu)], [output])
    assert [leaf.name for leaf in region.leaves] == ["weight_1"]
    assert [like.target for like in region.likes] == [aten.sigmoid.default]  # only its shape is read
    assert aten.add.Tensor not in [each.target for each in region.nodes if each.args[0] is region.inputs[0]]
    assert not region.symbolic


def test_it_runs_by_itself(graph: fx.Graph) -> None:
    (output,) = graph.output_node().all_input_nodes
    region = cut([node(graph, aten.relu)], [output])
    hidden, weight = torch.randn(3, 2), torch.randn(2, 2)
    (out,) = region.callable(CPU)([hidden, weight])
    assert torch.allclose(out, (hidden @ weight) * 2.5 + 1)


def test_its_key_tells_mathematics_not_names(graph: fx.Graph) -> None:
    (output,) = graph.output_node().all_input_nodes
    relu = node(graph, aten.relu)
    key = cut([relu], [output]).key
    for each in graph.nodes:
        each._rename(f"other_{each.name}")
    assert cut([relu], [output]).key == key
    node(graph, aten.mul).update_arg(1, 2.0)
    assert cut([relu], [output]).key != key


def test_numbers_of_an_operation(graph: fx.Graph) -> None:
    assert scalars(list(graph.nodes), aten.mul) == [2.5]
    assert scalars(list(graph.nodes), aten.div) == []


def test_made_up_weights_have_unit_gain(graph: fx.Graph) -> None:
    (weight,) = (each for each in graph.nodes if each.name == "weight_1")
    weight.meta["val"] = torch.empty(64, 256, dtype=torch.bfloat16)
    made = made_up(weight, CPU, torch.Generator().manual_seed(0))
    assert made.dtype == torch.bfloat16
    assert made.float().std().item() == pytest.approx(256**-0.5, rel=0.05)
