"""The unique experts that are appended to a graph's outputs, against a Python set.

B, S: sequences, tokens per sequence; E, k: experts, experts per token; H: model width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dmoe_compile.passes.count import count_tokens
from dmoe_compile.passes.inline import Tracer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dmoe_compile import routing_stats
from reference_model import Gate, MoeBlock, Rewriting

E, H, K = 16, 8, 3
OPTIONS = {"stats": True, "block_length": 4, "dmoe.top_p": 0.3, "dmoe.min_experts": K}


class _Layers(nn.Module):
    """Two blocks, the second over more experts: two counts, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MoeBlock(Gate(E, H, K)), MoeBlock(Gate(2 * E, H, K, (4, 2)))

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        first = self.first(hidden, attention_mask)
        second = self.second(first["output"], attention_mask)
        return first["ids"], second["ids"], second["output"]


@pytest.fixture
def layers() -> _Layers:
    return _Layers()


def _mask(batch: int, seq: int, padding: int) -> Tensor:
    """The first row is whole, the others have `padding` tokens on the left."""
    mask = torch.ones(batch, seq, dtype=torch.int64)
    mask[1:, :padding] = 0
    return mask


def _unique(out: tuple[Tensor, ...], mask: Tensor | None) -> list[int]:
    counts = []
    for ids in out[:2]:
        routed = torch.ones(ids.shape[:2]) if mask is None else mask[:, -ids.shape[1] :]
        tokens = zip(ids.flatten(0, 1).tolist(), routed.flatten().tolist(), strict=True)
        counts.append(len({e for token, counted in tokens if counted for e in token}))
    return counts


CASES = {
    "no mask": (2, 10, None),
    "one token": (1, 1, None),
    "padding": (3, 10, 6),
    "a row of padding and one token": (2, 10, 9),
    "a mask that covers a cache": (2, 4, 10),
}


@pytest.mark.parametrize("passes", [[], ["dmoe"]], ids=["own routing", "dmoe"])
@pytest.mark.parametrize(("batch", "seq", "padding"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_counts_what_a_set_counts(
    layers: _Layers, batch: int, seq: int, padding: int | None, passes: list[str]
) -> None:
    rewriting = Rewriting(**OPTIONS | {"passes": passes})
    mask = None if padding is None else _mask(batch, max(seq, padding + 2), padding)
    out = torch.compile(layers, backend=rewriting, fullgraph=True)(torch.randn(batch, seq, H), mask)
    assert rewriting.counts is not None
    assert rewriting.counts.dtype == torch.int64
    assert rewriting.counts.tolist() == _unique(out, mask)


@torch.no_grad()
def test_padding_is_not_counted(layers: _Layers) -> None:
    """Under its own routing a model runs its padding too, on experts of its own: those are what must not count."""
    rewriting = Rewriting(**OPTIONS | {"passes": []})
    mask = torch.zeros(1, 30, dtype=torch.int64)
    mask[0, -1] = 1
    out = torch.compile(layers, backend=rewriting, fullgraph=True)(torch.randn(1, 30, H), mask)
    assert rewriting.counts is not None
    assert rewriting.counts.tolist() == [K, K]
    assert min(_unique(out, None)) > K


@torch.no_grad()
def test_tokens_whose_scores_are_no_numbers_are_counted(layers: _Layers) -> None:
    hidden, mask = torch.randn(2, 10, H), _mask(2, 10, 3)
    hidden[0, 4, 2] = hidden[1, 7, 0] = hidden[1, 9] = torch.nan
    hidden[1, 1] = torch.nan  # padding
    rewriting = Rewriting(**OPTIONS)
    torch.compile(layers, backend=rewriting, fullgraph=True)(hidden, mask)
    assert rewriting.unsound is not None
    assert rewriting.unsound.tolist() == [3, 3]


@torch.no_grad()
def test_one_graph_counts_every_length(layers: _Layers) -> None:
    rewriting = Rewriting(**OPTIONS)
    compiled = torch.compile(layers, backend=rewriting, fullgraph=True, dynamic=True)
    for batch, seq in ((2, 9), (3, 14), (2, 30)):
        mask = _mask(batch, seq, 3)
        out = compiled(torch.randn(batch, seq, H), mask)
        assert rewriting.counts is not None
        assert rewriting.counts.tolist() == _unique(out, mask)
    assert len(rewriting.findings) == 1


@torch.no_grad()
def test_counts_come_through_inductor(layers: _Layers) -> None:
    routing_stats(reset=True)
    options: dict[str, Any] = {**OPTIONS, "passes": ["dmoe"]}
    compiled = torch.compile(layers.first, backend="dmoe", options=options, fullgraph=True)
    expected = []
    for seed in range(2):
        hidden = torch.randn(2, 10, H, generator=torch.Generator().manual_seed(seed))
        mask = _mask(2, 10, 4 * seed + 1)
        expected += _unique((compiled(hidden, mask)["ids"],), mask)
    assert list(routing_stats(reset=True).sites.values()) == [expected]


@torch.no_grad()
def test_outputs_are_the_models_own_without_and_with_counts(layers: _Layers) -> None:
    hidden = torch.randn(2, 10, H)
    outs = []
    for stats in (False, True):
        torch._dynamo.reset()
        rewriting = Rewriting(**OPTIONS | {"stats": stats})
        outs.append(torch.compile(layers, backend=rewriting, fullgraph=True)(hidden))
        (findings,) = rewriting.findings
        assert findings.num_outputs == int(stats)
        nodes = [n for n in rewriting.graphs[0].graph.nodes if "count_experts" in str(n.target)]
        assert len(nodes) == 2 * stats
    assert len(outs[0]) == len(outs[1]) == 3
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))


def test_a_graph_without_sites_is_left_alone() -> None:
    with FakeTensorMode() as mode:
        graph = make_fx(torch.sin)(mode.from_tensor(torch.randn(3))).graph
    before = str(graph)
    assert count_tokens(graph, [], Tracer()) == 0
    assert str(graph) == before
