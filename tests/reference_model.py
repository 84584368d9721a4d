"""LLaDA2's mixture-of-experts block in plain PyTorch, and a backend that shows what the passes made of a graph.

B, S: sequences, tokens per sequence; T = B*S; E, k: experts, experts per token; H, F: width of the model, of an expert.

The released block loops over its experts in Python. Here they are stacked, [E, ., .], and a token's k experts are
gathered, so that router and experts are in one graph. Everything else is as released: sigmoid scores, a bias for the
selection only, groups ranked by the sum of their best two, k weights that sum to `scale`, an unscaled shared expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from dmoe_compile.passes.pipeline import Findings
from torch import Tensor, fx, nn

from dmoe_compile import backend
from dmoe_compile.config import Config
from dmoe_compile.notices import Notices


class Gate(nn.Module):
    """Chooses k of E experts for each token: [B, S, H] -> ids and weights [T, k], logits [T, E]."""

    def __init__(
        self, num_experts: int, hidden: int, top_k: int, groups: tuple[int, int] = (1, 1), scale: float = 2.5
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.groups, self.scale = num_experts, top_k, groups, scale
        self.weight = nn.Parameter(torch.randn(num_experts, hidden) / hidden**0.5)
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        logits = F.linear(hidden.float(), self.weight.float())
        scores = logits.sigmoid()
        ids = self.group_mask(scores + self.expert_bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * self.scale, logits

    def group_mask(self, scores: Tensor) -> Tensor:
        """Return scores [T, E] with -inf outside each token's groups."""
        count, kept = self.groups
        grouped = scores.view(len(scores), count, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1, sorted=False).indices
        mask = torch.zeros_like(grouped[..., 0]).scatter(1, best, 1)
        mask = mask.unsqueeze(-1).expand_as(grouped).reshape(scores.shape)
        return scores.masked_fill(~mask.bool(), -torch.inf)


class Experts(nn.Module):
    """E gated MLPs; each token runs through the k that were chosen for it, [T, H] -> [T, H]."""

    def __init__(self, num_experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.randn(num_experts, width, hidden) / hidden**0.5)
        self.up_proj = nn.Parameter(torch.randn(num_experts, width, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden, width) / width**0.5)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = hidden.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        chosen = ids.reshape(-1)
        inner = F.silu(torch.bmm(self.gate_proj[chosen], rows)) * torch.bmm(self.up_proj[chosen], rows)
        out = torch.bmm(self.down_proj[chosen], inner).squeeze(-1)
        return (out.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


class SharedExpert(nn.Module):
    """One gated MLP that every token runs through."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class MoeBlock(nn.Module):
    """The block: routed experts, and the same plus the shared expert, both [B, S, H]; ids and weights; logits."""

    def __init__(self, gate: Gate, width: int = 2) -> None:
        super().__init__()
        hidden = gate.weight.shape[1]
        self.gate = gate
        self.experts = Experts(gate.num_experts, hidden, width)
        self.shared_experts = SharedExpert(hidden, width)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        ids, weights, logits = self.gate(hidden)
        routed = self.experts(hidden.reshape(-1, hidden.shape[-1]), ids, weights).view(hidden.shape)
        if attention_mask is not None:  # as attention would: what is read must be an input of the graph
            routed = routed * attention_mask[:, -hidden.shape[1] :, None]
        rows = hidden.shape[:-1]
        return {
            "ids": ids.view(*rows, -1),
            "weights": weights.view(*rows, -1),
            "logits": logits.view(*rows, -1),
            "routed": routed,
            "output": routed + self.shared_experts(hidden),
        }


@torch.no_grad()
def load_block(block: MoeBlock, weights: Mapping[str, Tensor]) -> MoeBlock:
    """Load the released block's state dict, whose experts are one module each."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        experts = [weights[f"experts.{e}.{name}.weight"] for e in range(block.gate.num_experts)]
        getattr(block.experts, name).copy_(torch.stack(experts))
    others = {name: tensor for name, tensor in weights.items() if not name.startswith("experts.")}
    block.load_state_dict(others, strict=False)
    return block


class Rewriting:
    """A torch.compile backend: the rewritten graph run as it is, without Inductor, and by default with its own experts.

    Attributes:
        findings: what the passes found, one for each graph.
        graphs: the rewritten graphs.
        ranked: after a call, what each site's selection ranked: -inf outside the coreset.
        counts: after a call with stats, unique experts of each site.
        unsound: likewise, tokens whose scores are NaN or infinite.
        below: likewise, tokens below a promise.
    """

    def __init__(self, **options: Any) -> None:
        self.config = Config.from_options({"passes": ["dmoe"], "experts": False, **options})
        self.findings: list[Findings] = []
        self.graphs: list[fx.GraphModule] = []
        self.ranked: list[Tensor] = []
        self.counts: Tensor | None = None
        self.unsound: Tensor | None = None
        self.below: Tensor | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        rewritten = backend.rewrite(gm, example_inputs, self.config, Notices())
        assert rewritten is not None, "the graph can't be read; the log says why"
        aten, findings = rewritten
        self.findings.append(findings)
        self.graphs.append(aten)
        watched = [outcome.site.select.args[0] for outcome in findings.outcomes]
        output = aten.graph.output_node()
        (results,) = output.args
        assert isinstance(results, list | tuple)
        output.args = ((*results, *watched),)
        aten.recompile()

        def call(*inputs: Any) -> Any:
            outputs = list(aten(*inputs))
            self.ranked = outputs[len(results) :]
            if findings.num_outputs:
                self.counts, self.unsound, self.below = outputs[len(results) - 1].unbind(1)
            return outputs[: len(results) - findings.num_outputs]

        return call

    @property
    def outcomes(self) -> list[Any]:
        """The outcomes of every graph so far."""
        return [outcome for findings in self.findings for outcome in findings.outcomes]
