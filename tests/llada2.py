"""LLaDA2 whole, as published (modeling_llada2_moe.py): packed q, k and v, a norm a head, partial rotation.

Written here from the structure of that file: names, layouts, order of operations. The experts' blocks are those of
bench/published.py. Attention is bidirectional; who sees whom is what the 4D mask says.

    B rows, S tokens of each, H hidden, D head width
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dmoe_compile.bench.published import MLP, Bailing


class Attention(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.rope_dim = int(config.head_dim * config.partial_rotary_factor)
        heads = self.num_heads + 2 * self.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.use_qkv_bias)
        self.query_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.use_bias)
        frequencies = config.rope_theta ** (-torch.arange(0, self.rope_dim, 2) / self.rope_dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, hidden: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache | None) -> Tensor:
        rows, seq, _ = hidden.shape
        packed = self.query_key_value(hidden).view(rows, seq, -1, self.head_dim)
        kinds = [self.num_heads, self.num_key_value_heads, self.num_key_value_heads]
        query, key, value = (each.transpose(1, 2) for each in packed.split(kinds, dim=-2))
        query, key = self.query_layernorm(query), self.key_layernorm(key)
        query, key = self.rotated(query, position_ids), self.rotated(key, position_ids)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return self.dense(out.transpose(1, 2).reshape(rows, seq, -1))

    def rotated(self, x: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids[:, None, :, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        turned, rest = x[..., : self.rope_dim], x[..., self.rope_dim :]
        left, right = turned.chunk(2, dim=-1)
        turned = turned * angles.cos().to(x.dtype) + torch.cat((-right, left), dim=-1) * angles.sin().to(x.dtype)
        return torch.cat((turned, rest), dim=-1)


class DecoderLayer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = MLP(config, config.intermediate_size) if dense else Bailing(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, *args: Any) -> Tensor:
        hidden = hidden + self.attention(self.input_layernorm(hidden), *args)
        out = self.mlp(self.post_attention_layernorm(hidden))
        if isinstance(out, tuple):
            out, _ = out
        return hidden + out


class Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, *args: Any) -> Tensor:
        hidden = self.word_embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, *args)
        return self.norm(hidden)


class LLaDA2(nn.Module):
    """input_ids [B, S], attention_mask [B, 1, S, cached + S] added to scores -> logits [B, S, vocabulary]."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(mlp_bias=False, **config)
        self.model = Model(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutputWithPast:
        cache = past_key_values if use_cache else None
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, attention_mask, position_ids, cache)))


def tiny(**changes: Any) -> LLaDA2:
    """Return one layer of 16 experts, 4 a token from 2 of 4 groups, in eval mode, with random weights."""
    config = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1,
        first_k_dense_replace=0, num_attention_heads=2, num_key_value_heads=1, head_dim=16, use_qkv_bias=False,
        use_bias=False, rms_norm_eps=1e-6, partial_rotary_factor=0.5, rope_theta=1e4, num_experts=16,
        num_experts_per_tok=4, num_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )  # fmt: skip
    return LLaDA2(**{**config, **changes}).eval()
