"""A model small enough to read, with one layer of experts, and options that rewrite it."""

import functools

import torch
import torch.nn.functional as F
from dmoe_compile.passes.coreset import Blocks, choose, penalise, restrict, restrict_groups
from dmoe_compile.passes.dmoe import Options, coreset
from torch import Tensor, nn

BLOCK = 8
POLICY = Options(top_p=0.3, min_experts=3)  # 3 of 8 experts: every block of 8 tokens would use more
DMOE = {"passes": ["dmoe"], "block_length": BLOCK, "dmoe.top_p": 0.3, "dmoe.min_experts": 3}
ALL_EXPERTS = {**DMOE, "dmoe.min_experts": 2**31, "experts": False}
# Inductor then calls ATen and generates no C++: fast where its code is not the point.
ATEN = {"fallback_by_default": True}
QUICK = {**DMOE, **ATEN}

# Inductor sums in another order than eager, over at most 24 terms of size 1 a few matmuls deep. Flipping one
# expert moves an output by 0.1 or more.
INDUCTOR = dict(rtol=1e-4, atol=1e-5)
# Stacked experts and the fused op do so too; bf16 rounds each expert's result once more than eager or once less.
TOLERANCE = {torch.float32: INDUCTOR, torch.bfloat16: dict(rtol=2**-5, atol=2**-5)}
MODEL = dict(rtol=1e-4, atol=1e-4)  # the same through several layers and a head, whose sums carry it on
SUMS = dict(rtol=1e-5, atol=1e-6)  # eager code on both sides: one sum over experts or over a width of at most 64


class TinyMoE(nn.Module):
    """One routed layer with residual. `eager_rule` applies the dMoE rule as the layer's own code would.

    groups: None, softmax scores, whose top-k values are the weights; or (groups, groups a token), sigmoid scores
    with a selection bias, the weights gathered without it, as in DeepSeek-V3.
    T: tokens; H: hidden; F: expert width; E, k: experts, experts a token.
    """

    def __init__(self, hidden=16, width=8, num_experts=8, top_k=2, groups=None):
        super().__init__()
        self.top_k, self.groups = top_k, groups
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.bias = nn.Parameter(torch.randn(num_experts) * 0.1) if groups else None
        self.up = nn.Parameter(torch.randn(num_experts, width, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, width) / width**0.5)
        nn.init.normal_(self.gate.weight, std=0.5)  # logits far enough apart that rounding flips no expert
        self.eager_rule = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(self.gate(rows), x.shape[0], x.shape[1])
        return x + self.experts(rows, weights, ids).reshape(x.shape)

    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        if self.groups:
            scores = logits.sigmoid()
            ids = self._limited(scores + self.bias, batch, seq).topk(self.top_k, dim=-1).indices
            weights = scores.gather(1, ids)
        else:
            weights, ids = self._limited(logits.softmax(-1), batch, seq).topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def experts(self, rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("tkfh,th->tkf", self.up[ids], rows))
        return (torch.einsum("tkhf,tkf->tkh", self.down[ids], hidden) * weights.unsqueeze(-1)).sum(1)

    def _limited(self, scores: Tensor, batch: int, seq: int) -> Tensor:
        """What the top-k ranks: the scores, the router's groups and the eager rule applied."""
        if self.eager_rule is None:
            return self._in_groups(scores) if self.groups else scores
        with torch.no_grad():
            inside = choose(scores, Blocks(batch, seq, BLOCK), self.top_k, self.eager_rule)
        if not self.groups:
            return restrict(scores, inside)
        penalised = penalise(scores, inside)
        return restrict_groups(self._in_groups(penalised), penalised, inside, self.top_k)

    def _in_groups(self, scores: Tensor) -> Tensor:
        count, kept = self.groups
        grouped = scores.view(-1, count, scores.shape[-1] // count)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
        mask = torch.zeros_like(best, dtype=scores.dtype).new_zeros(len(scores), count).scatter(1, best, 1)
        return scores.masked_fill(~mask.unsqueeze(-1).expand_as(grouped).reshape_as(scores).bool(), -torch.inf)


class WithSideOutputs(TinyMoE):
    """All that a layer may return besides its result: logits, a z-loss, a shared expert, ids and weights."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(16, 16)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        logits, shared = self.gate(rows), self.shared(rows)
        weights, ids = self.route(logits, x.shape[0], x.shape[1])
        out = (self.experts(rows, weights, ids) + shared).reshape(x.shape) + x
        return out, logits, logits.logsumexp(-1).square().mean(), shared, x * 2, ids, weights


class NoMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x).relu()


def compiled(model, options=None, **kwargs):
    return torch.compile(model, backend="dmoe", options=options, **kwargs)


def eager(model, *args):
    """The model with the rule in its own code."""
    model.eager_rule = functools.partial(coreset, options=POLICY)
    try:
        return model(*args)
    finally:
        model.eager_rule = None
