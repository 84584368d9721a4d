"""Routers whose weights are the values of their selection: what it ranks is changed, its weights are the router's own.

T = B*S: tokens; E, k: experts, experts per token; H: model width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dmoe_compile.passes import dmoe
from torch import Tensor

import dmoe_compile
from constrained import E, H, K, L, run
from reference_model import Gate, MoeBlock
from tiny_moe import ATEN, INDUCTOR, TinyMoE

pytestmark = pytest.mark.usefixtures("without_gradients")
TIGHT = {"passes": ["dmoe"], "block_length": L, "dmoe.min_experts": K, "dmoe.top_p": 1e-6}
ALL = {**TIGHT, "dmoe.min_experts": E}


class GreedyGroups(Gate):
    """DeepSeek-V2's group_limited_greedy: softmax scores, 0 outside a token's groups, and their best k values."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), self.weight)
        scores, (count, kept) = logits.softmax(-1), self.groups
        best = scores.view(len(scores), count, -1).amax(-1).topk(kept, dim=-1, sorted=False).indices
        mask = torch.zeros(len(scores), count).scatter(1, best, 1).unsqueeze(-1)
        mask = mask.expand(len(scores), count, self.num_experts // count).reshape(scores.shape)
        weights, ids = self.select(scores.masked_fill(~mask.bool(), 0.0))
        return ids, weights * self.scale, logits

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(self.top_k, dim=-1, sorted=False)


class Greedy(Gate):
    """Without groups."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), self.weight)
        weights, ids = self.select(logits.softmax(-1))
        return ids, weights * self.scale, logits

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(self.top_k, dim=-1)


class Sorted(Greedy):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = scores.sort(-1, descending=True)
        return values[:, : self.top_k], ids[:, : self.top_k]


class Max(Greedy):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = scores.max(-1)
        return values.unsqueeze(-1), ids.unsqueeze(-1)


def block_of(gate: type[Gate], groups: tuple[int, int] = (1, 1), top_k: int = K) -> MoeBlock:
    return MoeBlock(gate(E, H, top_k, groups))


def own_weights(block: MoeBlock, out: dict[str, Tensor]) -> Tensor:
    """Return what the router's scores say of the experts that were chosen."""
    return out["logits"].softmax(-1).gather(-1, out["ids"]) * block.gate.scale


def test_experts_outside_the_groups_weigh_what_their_scores_say() -> None:
    block, hidden = block_of(GreedyGroups, (4, 1)), torch.randn(2, 3 * L, H)
    plain, _ = run(block, hidden, passes=[])
    out, rewriting = run(block, hidden, **TIGHT)
    assert rewriting.outcomes[0].rewritten
    groups = out["ids"] // (E // 4)
    assert (groups != groups[..., :1]).any(), "no token had to leave its group for the coreset"
    assert torch.equal(out["weights"], own_weights(block, out))
    same, rewriting = run(block, hidden, **ALL)
    assert rewriting.outcomes[0].rewritten
    assert all(torch.equal(same[name], plain[name]) for name in plain)


@pytest.mark.parametrize(("gate", "top_k"), [(Greedy, K), (Sorted, K), (Max, 1), (GreedyGroups, K)])
def test_padding_weighs_what_its_scores_say(gate: type[Gate], top_k: int) -> None:
    """It ranks how much the others use the experts, which is no weight: in fp16 it would overflow."""
    block = block_of(gate, (4, 2) if gate is GreedyGroups else (1, 1), top_k)
    hidden = torch.randn(2, 3 * L, H)
    mask = (torch.arange(3 * L) >= torch.tensor([[0], [2 * L]])).long()
    out, rewriting = run(block, hidden, mask, **{**TIGHT, "dmoe.min_experts": top_k})
    assert rewriting.outcomes[0].rewritten
    assert torch.equal(out["weights"], own_weights(block, out))
    assert out["ids"][1, : 2 * L].unique().numel() == top_k  # it is pointed at experts that are read anyway


def test_a_rule_that_fails_at_the_second_layer_leaves_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients the graph is Inductor's own: what was changed in it is changed back."""
    layers = torch.nn.ModuleList(block_of(GreedyGroups, (4, 1)) for _ in range(2))
    with torch.no_grad():
        layers[1].gate.weight.copy_(layers[0].gate.weight)
    rule, calls = dmoe.coreset, []

    def fails_later(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("not this one")
        return rule(*args, **kwargs)

    monkeypatch.setattr(dmoe, "coreset", fails_later)

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        first = layers[0](x)
        second = layers[1](x + first["routed"])
        return first["weights"], second["weights"], second["routed"]

    hidden = torch.randn(2, 3 * L, H)
    with torch.enable_grad():
        ours = torch.compile(model, backend="dmoe", options={**TIGHT, **ATEN}, fullgraph=True)(hidden)
        torch._dynamo.reset()
        stock = torch.compile(model, options=ATEN, fullgraph=True)(hidden)
    assert all(map(torch.equal, ours, stock))
    assert len(calls) == 2


@pytest.mark.parametrize("passes", ["des", "cover", "dmoe"])
def test_a_block_of_cold_tokens_keeps_its_experts(passes: str) -> None:
    """Nobody in it votes, and what the other block's tokens choose may lie outside its coreset."""
    torch.manual_seed(0)
    model, x = TinyMoE(num_experts=24, top_k=4), torch.randn(1, 2 * L, 16)
    options = {"passes": ["team", passes], "block_length": L, **ATEN}
    compiled = torch.compile(model, backend="dmoe", options=options, fullgraph=True)
    with dmoe_compile.denoising() as context:
        context.step(shape=(1, 2 * L))
        compiled(x)
        context.step(cold=(torch.arange(2 * L) >= L).unsqueeze(0))
        out = compiled(x)
    assert out.isfinite().all()
    if passes == "des":  # of which only the lowest experts are left where nobody votes
        wanted = model.gate(x[0, L:]).softmax(-1)[:, :4]
        rows = x[0, L:]
        ids = torch.arange(4).expand(L, 4)
        own = rows + model.experts(rows, wanted / wanted.sum(-1, keepdim=True), ids)
        used = model.gate(x[0, :L]).softmax(-1).topk(4).indices.unique()
        assert not set(range(4)) <= set(used.tolist())
        torch.testing.assert_close(out[0, L:], own, **INDUCTOR)
