"""Small layers of experts that select, weigh and sum in ways of their own, and code that only looks like one.

T: tokens; E, k: experts, experts a token; H: model width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, H, WIDTH, K = 6, 16, 8, 2  # experts, hidden and expert width, experts a token; E is no power of two


class Moe(nn.Module):
    """A router and a bank of experts; subclasses select in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, WIDTH, H))
        self.down = nn.Parameter(torch.randn(E, H, WIDTH))
        self.shared = nn.Linear(H, H)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x: [T, H], ids and weights: [T, k] -> [T, H]."""
        pairs = x.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        chosen = ids.reshape(-1)
        y = torch.bmm(self.down[chosen], F.silu(torch.bmm(self.up[chosen], pairs))).squeeze(-1)
        return (y.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(K, -1)

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        weights, ids = self.select(self.gate(rows).softmax(-1))
        return (rows + self.shared(rows) + self.experts(rows, ids, weights)).view_as(x)


class Sorted(Moe):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        values, order = scores.sort(-1, descending=True)
        return values[:, :K], order[:, :K]


class StablySorted(Moe):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :K]
        return scores.gather(-1, order), order


class Argmax(Moe):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = scores.argmax(-1, keepdim=True)
        return scores.gather(-1, ids), ids


class Max(Moe):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = scores.max(-1, keepdim=True)
        return values, ids


class TopOne(Moe):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(1, -1)


class Rows(Moe):
    """Routes [B, S, E] as it is."""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.gate(x).softmax(-1).topk(K, -1)
        return x + self.experts(x.view(-1, H), ids.view(-1, K), weights.view(-1, K)).view_as(x)


class NoResidual(Moe):
    """Two layers with nothing between them: the second's experts are not the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Moe()

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        for moe in (self, self.second):
            weights, ids = moe.select(moe.gate(rows).softmax(-1))
            rows = moe.experts(rows, ids, weights)
        return rows.view_as(x)


class TwoBanks(Moe):
    """One router for two banks, the second behind a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Moe()

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        weights, ids = self.select(self.gate(rows).softmax(-1))
        rows = rows + self.experts(rows, ids, weights)
        return rows + self.other.experts(rows, ids, weights)


class TwoBanksSummed(TwoBanks):
    """Their sum is what both flow into: one site."""

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        weights, ids = self.select(self.gate(rows).softmax(-1))
        return rows + self.experts(rows, ids, weights) + self.other.experts(rows * 2, ids, weights)


class SharedRouter(TwoBanks):
    """Two selections from the same scores."""

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        scores = self.gate(rows).softmax(-1)
        rows = rows + self.experts(rows, *reversed(scores.topk(K, -1)))
        return rows + self.other.experts(rows, *reversed(scores.topk(K + 1, -1)))


class SideOutputs(Moe):
    """Returns everything that a trainer may ask for."""

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        logits = self.gate(rows)
        probs = logits.softmax(-1)
        weights, ids = self.select(probs)
        load = F.one_hot(ids, E).float().mean((0, 1))
        return rows + self.experts(rows, ids, weights), logits, probs, ids, weights, (load * probs.mean(0)).sum()


class Vocabulary(Moe):
    """Sampling: the best tokens of a vocabulary, and their embeddings."""

    def forward(self, x: Tensor) -> Any:
        return F.linear(x.view(-1, H), self.shared.weight).topk(3, -1)


class Codebook(Moe):
    """Looks rows of a table up: [E, H], no experts."""

    def forward(self, x: Tensor) -> Any:
        values, ids = self.gate(x.view(-1, H)).topk(K, -1)
        return (self.gate.weight[ids] * values.softmax(-1).unsqueeze(-1)).sum(1)


class SparseAttention(Moe):
    """Selects keys, which are activations; the layer after it is routed, and none of this one's business."""

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)[:E]
        values, ids = (rows @ self.shared(rows).t()).topk(K, -1)
        rows = rows + (self.shared(rows)[ids] * values.softmax(-1).unsqueeze(-1)).sum(1)
        weights, ids = self.select(self.gate(rows).softmax(-1))
        return rows + self.experts(rows, ids, weights)


class Soft(Moe):
    """Every expert for every token, weighted by all the scores."""

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        y = torch.einsum("eho,teo->teh", self.down, F.silu(torch.einsum("eoh,th->teo", self.up, rows)))
        return (y * self.weights(self.gate(rows).softmax(-1)).unsqueeze(-1)).sum(1)

    def weights(self, scores: Tensor) -> Tensor:
        return scores


class Masked(Soft):
    """A top-k that only masks results that were computed anyway."""

    def weights(self, scores: Tensor) -> Tensor:
        values, ids = scores.topk(K, -1)
        return torch.zeros_like(scores).scatter(-1, ids, values)


class Summed(Masked):
    """The results are weighed and summed by one product."""

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        y = torch.einsum("eho,teo->teh", self.down, F.silu(torch.einsum("eoh,th->teo", self.up, rows)))
        return torch.einsum("te,teh->th", self.weights(self.gate(rows).softmax(-1)), y)


class ById(Moe):
    """Sorts a token's experts by their number, and their weights with them."""

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(K, -1)
        ids, order = ids.sort(-1)
        return weights.gather(-1, order), ids


class TurnedChoice(Moe):
    """Experts choose among as many tokens as there are experts: scores [E, T] look like [T, E]."""

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        weights, tokens = self.gate(rows).softmax(-1).t().topk(3, dim=-1)  # [E, 3]
        y = torch.bmm(F.silu(torch.bmm(rows[tokens], self.up.transpose(1, 2))), self.down.transpose(1, 2))
        return torch.zeros_like(rows).index_add(0, tokens.reshape(-1), (y * weights.unsqueeze(-1)).reshape(-1, H))


class Sampled(Moe):
    """Returns the best tokens of a vocabulary besides."""

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return out, F.linear(out, self.shared.weight).topk(3, -1)


class ExpertChoice(Moe):
    """Experts choose tokens."""

    def forward(self, x: Tensor) -> Any:
        rows = x.view(-1, H)
        weights, tokens = self.gate(rows).softmax(-1).topk(3, dim=0)  # [3, E]
        y = torch.bmm(F.silu(torch.bmm(rows[tokens.t()], self.up.transpose(1, 2))), self.down.transpose(1, 2))
        weighed = (y * weights.t().unsqueeze(-1)).reshape(-1, H)
        return torch.zeros_like(rows).index_add(0, tokens.t().reshape(-1), weighed)


class Smallest(Moe):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(K, -1, largest=False)


class Broken(Moe):
    """The experts are in another graph."""

    def forward(self, x: Tensor) -> Any:
        return self.select(self.gate(x.view(-1, H)).softmax(-1))
