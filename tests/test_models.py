"""Whole diffusion LMs with the published Python-loop blocks, decoded block by block with a KV cache.

Embeddings, attention, norms, cache and LM head are transformers' Qwen3-MoE; the MoE blocks are the published forms.
A block of L tokens sees the finished blocks and all of itself. The most confident masked tokens are committed step by
step; a last forward stores the block's keys and values.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import forms
from dmoe_compile import prepare
from rewriting import EagerRule
from tiny_moe import ATEN, INDUCTOR

REFERENCE = Path(__file__).parent / "reference"
B, L, PROMPT, BLOCKS, PER_STEP, MASK = 2, 8, 8, 2, 4, 1
OPTIONS = {"passes": ["dmoe"], "block_length": L}
IN_CODE = ("SDAR-30B-A3B", "LLaDA2")  # a softmax; sigmoid, bias and groups: the others are as the first
RULE = {"dmoe.min_experts": 3, "dmoe.top_p": 0.05}  # the strictest: all tokens of a block run on the same 3 experts


@dataclass(frozen=True)
class Family:
    """A published model: the form of its blocks, their options, and its first layers without experts."""

    form: str
    changes: dict[str, Any]
    dense_layers: int = 0


FAMILIES = {
    "SDAR-30B-A3B": Family("softmax_loop", {"norm_topk_prob": True}),
    "LLaDA-MoE": Family("softmax_loop", {"norm_topk_prob": False}),
    "LLaDA2": Family("bailing", {}, dense_layers=1),
    "RND1": Family("hit_loop", {}),
}


class FirstResult(nn.Module):
    """A block that also returns its logits, as a decoder layer that wants its output alone calls it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


@functools.cache
def _build(name: str) -> Qwen3MoeForCausalLM:
    family = FAMILIES[name]
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=forms.CONFIG["hidden_size"],
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2 + family.dense_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=12,
        num_experts_per_tok=3,
        mlp_only_layers=list(range(family.dense_layers)),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        model.lm_head.weight.mul_(8)  # confident, as a trained model is: no near ties
        model.lm_head.weight[MASK] = 0
        for layer in model.model.layers[family.dense_layers :]:
            layer.mlp = FirstResult(forms.build(family.form, **family.changes))
    return model


def build(name: str, dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
    return copy.deepcopy(_build(name)).to(dtype)


@torch.no_grad()
def decode(model: Qwen3MoeForCausalLM, forward: Callable[..., Any] | None = None) -> Tensor:
    """Return the prompt and BLOCKS decoded blocks, [B, tokens]; `forward` denoises, the model fills the cache."""
    forward = model if forward is None else forward
    tokens = torch.randint(2, 64, (B, PROMPT), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache()
    model(input_ids=tokens, past_key_values=cache, attention_mask=_sees_all(cache, PROMPT))
    for _ in range(BLOCKS):
        block = torch.full((B, L), MASK)
        while (masked := block == MASK).any():
            logits = forward(input_ids=block, past_key_values=cache, attention_mask=_sees_all(cache, L)).logits
            cache.crop(-L)
            for layer in cache.layers:  # what is cropped is a view, which has other strides: one more graph
                layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
            confidence, choice = logits.float().softmax(-1).max(-1)
            best = confidence.masked_fill(~masked, -1).topk(PER_STEP).indices
            block = block.scatter(1, best, choice.gather(1, best))
        model(input_ids=block, past_key_values=cache, attention_mask=_sees_all(cache, L))
        tokens = torch.cat([tokens, block], 1)
    return tokens


def _sees_all(cache: DynamicCache, length: int) -> Tensor:
    """Return the 4D mask of a forward whose tokens see the cache and each other."""
    return torch.ones(B, 1, length, cache.get_seq_length() + length, dtype=torch.bool)


def compiled(model: nn.Module, backend: str = "dmoe", **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend=backend, options=options or None, fullgraph=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_experts_decode_as_eager(name: str) -> None:
    model = build(name)
    own = decode(model)
    tokens = decode(model, compiled(model, **OPTIONS, **{"dmoe.min_experts": 12}, **ATEN))
    assert torch.equal(tokens, own)
    check_counters()


@pytest.mark.parametrize("name", FAMILIES)
def test_all_experts_decode_as_inductor_in_bf16(name: str) -> None:
    model, code = build(name, torch.bfloat16), {} if name in IN_CODE else ATEN
    assert len(prepare(model).prepared) == 2  # which plain Inductor can't compile: it would break the graph
    stock = decode(model, compiled(model, "inductor", **code))
    ours = compiled(model, **OPTIONS, **{"dmoe.min_experts": 12}, experts=False, **code)
    assert torch.equal(decode(model, ours), stock)
    check_counters(fused=False)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].form != "bailing"])
def test_rule_decodes_as_in_eager(name: str) -> None:
    """In groups the rule is more than a mask on one top-k; test_bailing compares that with the released block."""
    model, published = build(name), build(name)

    def with_rule(**kwargs: Any) -> Any:
        with EagerRule(12, len(kwargs["input_ids"]), {**OPTIONS, **RULE}):
            return published(**kwargs)

    wanted = decode(published, with_rule)
    assert torch.equal(decode(model, compiled(model, **OPTIONS, **RULE, **ATEN)), wanted)
    assert not torch.equal(wanted, decode(published))
    check_counters()


def check_counters(*, fused: bool = True) -> None:
    """Two layers with experts, rewritten in every graph: one cache length, then any."""
    wanted = {"sites": 4, "sites_rewritten": 4, "refused": 0}
    assert counters["dmoe"] == (wanted | {"experts_fused": 4} if fused else wanted)
    assert not counters["graph_break"]


def test_an_sdar_checkpoint_loads_into_transformers_own_class(tmp_path: Path) -> None:
    """Its weights are named as Qwen3-MoE's, an expert and a projection each; README says what its config.json needs."""
    weights = load_file(REFERENCE / "sdar_tiny_weights.safetensors")
    config = json.loads((REFERENCE / "sdar_tiny_weights.json").read_text())["config"]
    named = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | named))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = Qwen3MoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    # Its first block, as published, is the block that was loaded.
    block = forms.build("softmax_loop", hidden_size=64, moe_intermediate_size=32, num_experts=16, num_experts_per_tok=4)
    prefix = "model.layers.0.mlp."
    block.load_state_dict({name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)})
    x = torch.randn(1, 8, 64)
    loaded = model.model.layers[0].mlp
    with torch.no_grad():
        assert_close(loaded(x), block(x)[0], **INDUCTOR)
        model.set_experts_implementation("dmoe")
        assert_close(loaded(x), block(x)[0], **INDUCTOR)
