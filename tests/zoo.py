"""Tiny random models of real transformers classes, and what the matcher must find in each.

E = routed experts, k = experts per token, B = sequences, S = tokens per sequence.

Random weights at transformers' own scale (std 0.02) route almost uniformly and let the experts move the
logits by next to nothing, so a wrong coreset would go unseen. Here every weight has unit gain and router
logits have a standard deviation of about LOGIT_SPREAD; biases and per-expert scales that transformers
initialises to no-ops are random too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

HIDDEN = 64
WIDTH = 32  # of an expert
CANVAS = 16  # DiffusionGemma's denoising unit
LOGIT_SPREAD = 2.0

Experts = Literal["grouped_mm", "batched_mm"]
EXPERTS: tuple[Experts, ...] = ("grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Expected:
    """What the source of one model's router says; every MoE site of the model is alike.

    bias: added to the scores for selection only. groups: (n_group, topk_group), None where no group is ever
    left out. renormalised: the k weights of a token sum to 1 (before any scale). scale: the routed scaling
    factor. per_expert_scale: weights are multiplied by a learned factor of their expert.
    names: the MoE blocks, in the order of model.named_modules(), which is also the order of execution.
    """

    num_experts: int
    top_k: int
    score_function: Literal["softmax", "sigmoid", "logits"]
    renormalised: bool
    names: tuple[str, ...]
    bias: bool = False
    groups: tuple[int, int] | None = None
    scale: float | None = None
    per_expert_scale: bool = False
    refused: bool = False

    @property
    def experts(self) -> tuple[str, ...]:
        """Module path of the expert bank of each site."""
        return tuple(f"{name}.experts" for name in self.names)


@dataclass(frozen=True)
class _Entry:
    make: Callable[[int], PreTrainedModel]  # from a number of layers
    expected: Expected
    blocks: Callable[[int], tuple[str, ...]]


def build(
    name: str, experts: Experts = "grouped_mm", dtype: torch.dtype = torch.float32, num_layers: int = 2
) -> PreTrainedModel:
    """Return model `name` in eval mode; the same arguments give the same weights."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = _ZOO[name].make(num_layers)
        _spread(model)
    model.set_experts_implementation(experts)
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    model.to(dtype)
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(key in path for key in kept):  # from_pretrained honours this list, .to() does not
            tensor.data = tensor.data.float()
    return model.eval()


def expected(name: str, num_layers: int = 2) -> Expected:
    """What must be found in build(name, num_layers=num_layers)."""
    entry = _ZOO[name]
    return replace(entry.expected, names=entry.blocks(num_layers))


def inputs(name: str, batch: int = 2, seq: int = 40, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one forward over B=batch and S=seq.

    DiffusionGemma encodes a prompt of `seq` tokens and denoises one canvas in the same forward, so its graph
    holds encoder and decoder sites with two values of S. It makes its own cache, whatever use_cache says.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = partial(torch.randint, 3, generator=generator)
    if name == "diffusion_gemma":
        return {
            "input_ids": tokens(high=500, size=(batch, seq)),
            "decoder_input_ids": tokens(high=500, size=(batch, CANVAS)),
        }
    return {"input_ids": tokens(high=128, size=(batch, seq)), "use_cache": False}


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Make routing decisive: router logits far apart, biases and per-expert scales not no-ops."""
    for module in model.modules():
        if type(module).__name__.lower().endswith("router"):
            _spread_router(module)
        for path, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if path == "e_score_correction_bias":
                tensor.uniform_(-0.1, 0.1)  # of the order of the gaps between scores, of both signs
            if path == "per_expert_scale":
                tensor.uniform_(0.5, 1.5)


def _spread_router(router: nn.Module) -> None:
    # Routers read a normalised state of unit variance; DiffusionGemma's divides it by sqrt(HIDDEN) once more.
    proj = getattr(router, "proj", None)
    weight = router.weight if proj is None else proj.weight
    assert isinstance(weight, Tensor)
    weight.normal_(std=LOGIT_SPREAD if proj is not None else LOGIT_SPREAD / HIDDEN**0.5)
    if isinstance(bias := getattr(router, "bias", None), Tensor):
        bias.normal_(std=0.5)  # GptOss: part of the logits, not a selection bias


_BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": HIDDEN**-0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _causal(prefix: str, **options: Any) -> Callable[[int], PreTrainedModel]:
    """A maker of transformers' {prefix}ForCausalLM; "{prefix}Config" takes _BASE and `options`."""

    def make(num_layers: int) -> PreTrainedModel:
        config = getattr(transformers, f"{prefix}Config")(**{**_BASE, "num_hidden_layers": num_layers, **options})
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        assert isinstance(model, PreTrainedModel)
        return model

    return make


def _diffusion_gemma(num_layers: int) -> PreTrainedModel:
    text = {
        **_BASE,
        "vocab_size": 512,
        "num_hidden_layers": num_layers,
        "head_dim": 16,
        "global_head_dim": 16,
        "num_experts": 16,
        "top_k_experts": 4,
        "moe_intermediate_size": WIDTH,
        "sliding_window": 32,
        "layer_types": ["sliding_attention"] * (num_layers - 1) + ["full_attention"],
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=CANVAS, initializer_range=HIDDEN**-0.5
    )
    return transformers.DiffusionGemmaForBlockDiffusion(config)


def _layers(num_layers: int, path: str = "model.layers.{}.mlp", first: int = 0) -> tuple[str, ...]:
    return tuple(path.format(i) for i in range(first, num_layers))


def _both_stacks(num_layers: int) -> tuple[str, ...]:
    """The layer itself is DiffusionGemma's MoE block. Encoder and decoder share every routing and expert weight."""
    stacks = ("model.encoder.language_model.layers.{}", "model.decoder.layers.{}")
    return tuple(name for stack in stacks for name in _layers(num_layers, stack))


_ZOO: dict[str, _Entry] = {
    "diffusion_gemma": _Entry(
        _diffusion_gemma,
        Expected(16, 4, "softmax", renormalised=True, names=(), per_expert_scale=True),
        _both_stacks,
    ),
    "qwen3_moe": _Entry(
        _causal(
            "Qwen3Moe",
            head_dim=16,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=WIDTH,
            norm_topk_prob=True,
        ),
        Expected(16, 4, "softmax", renormalised=True, names=()),
        _layers,
    ),
    "qwen2_moe": _Entry(  # with a gated shared expert
        _causal(
            "Qwen2Moe",
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=WIDTH,
            shared_expert_intermediate_size=WIDTH,
        ),
        Expected(16, 4, "softmax", renormalised=False, names=()),
        _layers,
    ),
    "olmoe": _Entry(
        _causal("Olmoe", intermediate_size=WIDTH, num_experts=12, num_experts_per_tok=3),
        Expected(12, 3, "softmax", renormalised=False, names=()),
        _layers,
    ),
    "mixtral": _Entry(
        _causal("Mixtral", intermediate_size=WIDTH, num_local_experts=16, num_experts_per_tok=2),
        Expected(16, 2, "softmax", renormalised=True, names=()),
        _layers,
    ),
    "deepseek_v3": _Entry(
        _causal(
            "DeepseekV3",
            num_key_value_heads=4,
            moe_intermediate_size=WIDTH,
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        ),
        Expected(16, 4, "sigmoid", renormalised=True, names=(), bias=True, groups=(4, 2), scale=2.5),
        partial(_layers, first=1),
    ),
    "glm4_moe": _Entry(  # runs the group code with one group: nothing is ever left out
        _causal(
            "Glm4Moe",
            head_dim=16,
            moe_intermediate_size=WIDTH,
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            routed_scaling_factor=1.5,
        ),
        Expected(16, 4, "sigmoid", renormalised=True, names=(), bias=True, scale=1.5),
        _layers,
    ),
    "ernie4_5_moe": _Entry(  # divides by clamp(sum, min), and so renormalises
        _causal(
            "Ernie4_5_Moe",
            moe_num_experts=16,
            moe_k=3,
            moe_intermediate_size=WIDTH,
            moe_num_shared_experts=1,
            moe_layer_start_index=0,
        ),
        Expected(16, 3, "softmax", renormalised=True, names=(), bias=True),
        _layers,
    ),
    "gpt_oss": _Entry(  # softmax over the k chosen logits: they sum to 1, and nothing is scored before top-k
        _causal(
            "GptOss",
            head_dim=16,
            intermediate_size=WIDTH,
            num_local_experts=16,
            num_experts_per_tok=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},  # its default, YaRN, warns at 512 positions
        ),
        Expected(16, 4, "logits", renormalised=True, names=()),
        _layers,
    ),
    "minimax_m2": _Entry(
        _causal("MiniMaxM2", head_dim=16, intermediate_size=WIDTH, num_local_experts=20, num_experts_per_tok=4),
        Expected(20, 4, "sigmoid", renormalised=True, names=(), bias=True),
        _layers,
    ),
    "phimoe": _Entry(  # two rounds of masked argmax, each with weights of its own: no single ranking to restrict
        _causal("Phimoe", intermediate_size=WIDTH, num_local_experts=16, num_experts_per_tok=2),
        Expected(16, 2, "logits", renormalised=False, names=(), refused=True),
        _layers,
    ),
}

NAMES: tuple[str, ...] = tuple(_ZOO)
ROUTABLE: tuple[str, ...] = tuple(name for name in NAMES if not _ZOO[name].expected.refused)
EXPECTED: dict[str, Expected] = {name: expected(name) for name in NAMES}  # of build(name), two layers
