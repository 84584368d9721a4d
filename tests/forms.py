"""Mixture-of-experts blocks as public diffusion LMs write them: their names, layouts and order of operations.

Written here from the structure of the published files, which are named beside each; weights are random.

    T = B*S tokens, H = hidden, I = expert width, E = experts, k = experts a token
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_compile.bench.published import MLP, Bailing, BailingGate, SoftmaxLoop, experts_of

CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "mlp_bias": False,
}


def config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**CONFIG, **changes})


class StackedExperts(nn.Module):
    """transformers' eager experts: weights in one tensor [E, 2I, H], a loop over the experts that were hit."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        num_experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * width, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden, width) * width**-0.5)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        final_hidden_states = torch.zeros_like(hidden_states)
        with torch.no_grad():
            expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
            current_state = hidden_states[token_idx]
            gate, up = F.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
            current_hidden_states = F.linear(self.act_fn(gate) * up, self.down_proj[expert_idx])
            current_hidden_states = current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
            final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(final_hidden_states.dtype))
        return final_hidden_states


class TopKRouter(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits = F.linear(hidden_states, self.weight)
        probabilities = F.softmax(router_logits, dtype=torch.float, dim=-1)
        values, indices = torch.topk(probabilities, self.top_k, dim=-1)
        values = values / values.sum(dim=-1, keepdim=True)
        return router_logits, values.to(router_logits.dtype), indices


class ExpertHit(nn.Module):
    """transformers' Qwen3MoeSparseMoeBlock with eager experts, as files that copy it without its decorator."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.experts = StackedExperts(config)
        self.gate = TopKRouter(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        rows = hidden_states.view(-1, hidden_dim)
        _, routing_weights, selected_experts = self.gate(rows)
        return self.experts(rows, selected_experts, routing_weights).reshape(batch_size, sequence_length, hidden_dim)


class DeepseekGate(nn.Module):
    """Softmax, top-k, scale; returns ids, weights and no auxiliary loss."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        scores = F.linear(hidden_states.type(torch.float32), self.weight.type(torch.float32)).softmax(dim=-1)
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        return topk_idx, topk_weight * self.routed_scaling_factor, None


class Deepseek(nn.Module):
    """DeepSeek-V2 (modeling_deepseek.py): a ModuleList, moe_infer splits sorted tokens by tokens_per_expert."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.ep_size = 1
        self.experts_per_rank = config.num_experts
        self.experts = experts_of(config)
        self.gate = DeepseekGate(config)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        identity = hidden_states
        orig_shape = hidden_states.shape
        topk_idx, topk_weight, _aux_loss = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        y = self.moe_infer(hidden_states, topk_idx, topk_weight).view(*orig_shape)
        return y + self.shared_experts(identity)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        cnts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        cnts.scatter_(1, topk_ids, 1)
        tokens_per_expert = cnts.sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        outputs = [
            self.experts[i](tokens)
            for i, tokens in enumerate(sorted_tokens.split(tokens_per_expert.tolist(), dim=0))
            if tokens.shape[0]
        ]
        outs = torch.cat(outputs, dim=0)
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        return (
            new_x.view(*topk_ids.shape, -1)
            .type(topk_weight.dtype)
            .mul_(topk_weight.unsqueeze(dim=-1))
            .sum(dim=1)
            .type(new_x.dtype)
        )


class DenseExperts(nn.Module):
    """gpt-oss (inference) and older Mixtral ports: every expert on every token, times a routing mask [T, E]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        num_experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = num_experts
        self.hidden_size = hidden
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, hidden, 2 * width) * hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(num_experts, 2 * width) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(num_experts, width, hidden) * width**-0.5)
        self.down_proj_bias = nn.Parameter(torch.randn(num_experts, hidden) * 0.1)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        batch_size = hidden_states.shape[0]
        rows = hidden_states.reshape(-1, self.hidden_size)
        rows = rows.repeat(self.num_experts, 1).view(self.num_experts, -1, self.hidden_size)
        gate_up = torch.bmm(rows, self.gate_up_proj) + self.gate_up_proj_bias[..., None, :]
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate = gate.clamp(min=None, max=7.0)
        up = up.clamp(min=-7.0, max=7.0)
        next_states = torch.bmm((up + 1) * gate * torch.sigmoid(gate * 1.702), self.down_proj)
        next_states = next_states + self.down_proj_bias[..., None, :]
        next_states = next_states.view(self.num_experts, batch_size, -1, self.hidden_size)
        weights = routing_weights.transpose(0, 1).view(self.num_experts, batch_size, -1)[..., None]
        return (next_states * weights).sum(dim=0)


class DenseRouter(nn.Module):
    """Top-k of the logits, softmax over the k, scattered back to [T, E]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.randn(config.num_experts) * 0.1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits = F.linear(rows, self.weight, self.bias)
        top_value, indices = torch.topk(router_logits, self.top_k, dim=-1)
        top_value = F.softmax(top_value, dim=1, dtype=top_value.dtype)
        return torch.zeros_like(router_logits).scatter_(1, indices, top_value), indices


class Dense(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.router = DenseRouter(config)
        self.experts = DenseExperts(config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        router_scores, router_indices = self.router(hidden_states)
        return self.experts(hidden_states, router_indices, router_scores), router_scores


@torch.library.custom_op("dmoe_test::fused_experts", mutates_args=())
def fused_experts(hidden: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """As serving engines call theirs: hidden [T, H], w1 [E, 2I, H], w2 [E, H, I], weights and ids [T, k] -> [T, H]."""
    gate, up = torch.einsum("th,tkih->tki", hidden, w1[topk_ids]).chunk(2, dim=-1)
    out = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, w2[topk_ids])
    return (out * topk_weights.unsqueeze(-1).to(out.dtype)).sum(1)


@fused_experts.register_fake
def _(hidden: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    return torch.empty_like(hidden)


class Fused(nn.Module):
    """RND1 and dInfer with a serving engine's kernel: routing in PyTorch, then one opaque op."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        num_experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(num_experts, 2 * width, hidden) * hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(num_experts, hidden, width) * width**-0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        routing_weights = F.softmax(self.gate(rows), dim=1, dtype=torch.float)
        routing_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)
        routing_weights = routing_weights / routing_weights.sum(dim=-1, keepdim=True)
        out = torch.ops.dmoe_test.fused_experts(rows, self.w1, self.w2, routing_weights, selected_experts)
        return out.view_as(hidden_states)


class HitLoop(SoftmaxLoop):  # with its attributes
    """RND1 (modeling_rnd.py, backend "hf"): a ModuleList indexed by a tensor, weights in fp32, logits [B, S, E]."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        x = hidden_states.view(-1, hidden_dim)
        router_logits = self.gate(x)
        routing_weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        routing_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)
        if self.norm_topk_prob:
            routing_weights = routing_weights / routing_weights.sum(dim=-1, keepdim=True)
        final_hidden_states = torch.zeros_like(x)
        expert_mask = F.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current_hidden_states = expert_layer(x[top_x]) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        out = final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)
        return out, router_logits.view(batch_size, sequence_length, -1)


class MaskedLoop(nn.Module):
    """LLaDA2 as trainers run it (Bailing's training branch): rows repeated k times, a mask for each expert."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.experts = experts_of(config)
        self.gate = BailingGate(config)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        identity = hidden_states
        bsz, seq_len, h = hidden_states.shape
        topk_idx, topk_weight, router_logits = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        flat_topk_idx = topk_idx.view(-1)
        hidden_states = hidden_states.repeat_interleave(self.num_experts_per_tok, dim=0)
        y = torch.empty_like(hidden_states)
        for i, expert in enumerate(self.experts):
            y[flat_topk_idx == i] = expert(hidden_states[flat_topk_idx == i])
        y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)
        y = y.to(hidden_states.dtype).view(bsz, seq_len, h) + self.shared_experts(identity)
        return y, (router_logits.view(bsz, seq_len, -1), topk_idx.view(bsz, seq_len, -1))


@dataclass(frozen=True)
class Form:
    """A block class, and what the matcher must read in it once it is prepared."""

    block: Callable[[Any], nn.Module]
    score_function: str
    bias: bool = False
    groups: tuple[int, int] | None = None
    renormalised: bool = True
    prepared: bool = True  # False: Dynamo traces it as it is


FORMS: dict[str, Form] = {
    "softmax_loop": Form(SoftmaxLoop, "softmax"),
    "expert_hit": Form(ExpertHit, "softmax"),
    "bailing": Form(Bailing, "sigmoid", bias=True, groups=(4, 2)),
    "deepseek": Form(Deepseek, "softmax", renormalised=False),
    "dense": Form(Dense, "logits", prepared=False),
    "fused": Form(Fused, "softmax", prepared=False),
    "hit_loop": Form(HitLoop, "softmax"),
    "masked_loop": Form(MaskedLoop, "sigmoid", bias=True, groups=(4, 2)),
}


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """Return the block `name` in eval mode; the same arguments give the same weights, routing is decisive."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        block = FORMS[name].block(config(**changes))
        with torch.no_grad():
            for path, parameter in block.named_parameters():
                if path in {"gate.weight", "router.weight"}:
                    parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    return block.to(dtype).eval()
