"""Stacks of real-width decoder layers to decode with, and what is assumed because their weights are random.

A stack is a transformers model of few layers, each as wide as those of a published diffusion language model: its own
class where transformers has it, otherwise one whose blocks are the same (router, groups, shared experts, attention).

    confidences  The model runs and its logits are thrown away. Each position has a token that is right and a difficulty
                 z ~ N(0, 1.5). Where d is the distance to the nearest known token, the model is sure of its token with
                 probability sigmoid(ease + z - 0.7 (d - 1)), and right where that is above a half. `ease` is such that
                 decoding without passes accepts a given number of tokens a forward at threshold 0.9.
    routers      Tokens of a trained model have much in common, so that a block prefers some experts. Here all (large)
                 embeddings share a part of their variance, such that blocks of 32 tokens behind 64 others, an eighth to
                 seven eighths of them known, use 43% of the experts that even routing would: the share published for
                 LLaDA2.0-mini (69.5 unique experts of 256, 8 a token; even routing uses 163). Longer blocks use more.
                 Router logits have a standard deviation of 0.8, as in coresets.py.
    masks        In a trained model a mask token's state soon depends on its place; in a random one all mask tokens
                 would choose the same experts. So each place has one of its own.

E: experts of a layer; k: experts a token; L: block length
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmoe_compile.bench.shapes import SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 1024  # the last of it is the mask token as a decoder sees it; then comes one for each position
UNIQUE_SHARE = 69.5 / 163  # of what even routing uses: LLaDA2.0-mini, in the dMoE paper (arXiv 2605.30876)
THRESHOLD = 0.9
_CALIBRATED = 32  # tokens, for which routers are calibrated,
_BEFORE = 64  # behind so many others,
_LEVELS = 4  # with so many numbers of known ones
_DIFFICULTY, _DECAY = 1.5, 0.7
_LOGIT_STD = 0.8  # of routers
_EMBEDDING_STD = 8.0  # what layers of random weights add to all tokens alike would drown the usual 0.02 in a few layers


@dataclass(frozen=True)
class Stack:
    """A published model's layers.

    Attributes:
        architecture: name of the transformers class.
        config: of it.
        layers: of the published model.
        block_length: L.
        tokens_per_forward: that decoding without passes accepts; assumed.
        blocks: of an answer.
    """

    architecture: str
    config: Mapping[str, Any]
    layers: int
    block_length: int = 32
    tokens_per_forward: float = 2.0
    blocks: int = 2

    @property
    def top_k(self) -> int:
        return int(self.config["num_experts_per_tok"])


STACKS = {
    "SDAR-30B-A3B": Stack(
        "Qwen3MoeForCausalLM",
        SHAPES["SDAR-30B-A3B"].config()
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True},
        layers=48,
    ),
    # Bailing's block: sigmoid, bias and groups, one shared expert; its only dense layer is left out.
    "LLaDA2.0-mini": Stack(
        "Glm4MoeForCausalLM",
        SHAPES["LLaDA2.0-mini"].config(num_experts="n_routed_experts")
        | {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
        | {"n_group": 8, "topk_group": 4, "n_shared_experts": 1, "first_k_dense_replace": 0, "norm_topk_prob": True}
        | {"routed_scaling_factor": 2.5, "use_qk_norm": True},
        layers=20,
    ),
    "LLaDA-MoE-7B-A1B": Stack(
        "OlmoeForCausalLM",
        SHAPES["LLaDA-MoE-7B-A1B"].config(width="intermediate_size")
        | {"num_attention_heads": 16, "num_key_value_heads": 16},
        layers=16,
    ),
    # Widths and canvas only: `dmoe bench diffusion-gemma` has the real class, which its own generate() decodes.
    "DiffusionGemma-26B-A4B": Stack(
        "Qwen3MoeForCausalLM",
        SHAPES["DiffusionGemma-26B-A4B"].config()
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "norm_topk_prob": True}
        | {"hidden_act": "gelu_pytorch_tanh"},
        layers=30,
        block_length=256,
        tokens_per_forward=8.0,
        blocks=1,
    ),
}


def layers_that_fit(stack: Stack, nbytes: float, dtype: torch.dtype) -> int:
    """Return how many layers of a stack take no more than `nbytes`; at least 1, at most what the model has."""
    with torch.device("meta"):
        model = _model(stack, 1, 0)
    each = sum(parameter.numel() for parameter in layers_of(model)[0].parameters()) * dtype.itemsize
    return max(1, min(stack.layers, int(nbytes // each)))


def build(stack: Stack, layers: int, columns: int, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Return a model with popular experts and a mask token for every position up to `columns`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(seed)
        model = _model(stack, layers, columns).eval()
    finally:
        torch.set_default_dtype(default)
    _calibrate(model, stack.top_k, seed)
    return model


def _model(stack: Stack, layers: int, columns: int) -> PreTrainedModel:
    import transformers

    made = getattr(transformers, stack.architecture)
    config = made.config_class(
        **stack.config, vocab_size=VOCABULARY + max(columns, _BEFORE + _CALIBRATED), num_hidden_layers=layers,
        tie_word_embeddings=True, max_position_embeddings=max(columns, 4096), pad_token_id=None,
    )  # fmt: skip
    model: PreTrainedModel = made(config)
    return model


def layers_of(model: PreTrainedModel) -> list[Any]:
    """Return a model's decoder layers."""
    return list(model.model.layers)


def expert_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of one expert's weights."""
    bank = layers_of(model)[0].mlp.experts
    return sum(weight.nbytes for weight in bank.parameters()) // len(bank.down_proj)


def recorded(path: Path) -> tuple[PreTrainedModel, int]:
    """Return the recorded SDAR model, and its mask token: its weights are named as Qwen3-MoE's."""
    from transformers import Qwen3MoeForCausalLM

    about = json.loads(path.read_text())
    named = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
    with tempfile.TemporaryDirectory(prefix="dmoe-bench-") as folder:
        Path(folder, "config.json").write_text(json.dumps(about["config"] | named))
        Path(folder, "model.safetensors").symlink_to(path.with_name(about["file"]).resolve())
        model = Qwen3MoeForCausalLM.from_pretrained(folder).eval()
    return model, about["mask_id"]


@contextmanager
def unique_experts(model: PreTrainedModel, last: int = 0) -> Iterator[list[int]]:
    """Collect how many experts each sequence of each forward uses in each layer, in the order of calls.

    Args:
        model: its layers' experts are watched.
        last: only so many tokens of each sequence count; 0: all.
    """
    used: list[int] = []
    rows = 1

    def begin(_: object, __: object, arguments: Mapping[str, Any]) -> None:
        nonlocal rows
        rows = len(arguments["input_ids"])

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (ids,) = (each for each in arguments if not each.is_floating_point())
        used.extend(row[-last:].unique().numel() for row in ids.view(rows, -1, ids.shape[-1]))

    hooks = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [layer.mlp.experts.register_forward_pre_hook(note) for layer in layers_of(model)]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


def published_unique(count: int, top_k: int) -> float:
    """Return the unique experts of a block of 32 tokens at the published share, of `count` experts; see above."""
    return UNIQUE_SHARE * count * (1 - (1 - top_k / count) ** _CALIBRATED)


def unique_of_blocks(model: PreTrainedModel, generator: torch.Generator) -> float:
    """Return the unique experts of blocks of 32 tokens, an eighth to seven eighths of them known: mean over layers."""
    length = _BEFORE + _CALIBRATED
    known = (torch.arange(_LEVELS).unsqueeze(1) + 0.5) / _LEVELS * _CALIBRATED
    tokens = torch.randint(0, VOCABULARY - 1, (_LEVELS, length), generator=generator)
    places = torch.rand(_LEVELS, length, generator=generator)
    places[:, :_BEFORE] = -1.0  # known, all of them
    ids = torch.where(places.argsort(1).argsort(1) < _BEFORE + known, tokens, VOCABULARY + torch.arange(length))
    blocks = torch.arange(length) // _CALIBRATED
    hidden = blocks.unsqueeze(0) > blocks.unsqueeze(1)
    mask = torch.zeros(length, length, dtype=model.dtype).masked_fill_(hidden, torch.finfo(model.dtype).min)
    mask = mask.expand(_LEVELS, 1, -1, -1)
    with torch.no_grad(), unique_experts(model, last=_CALIBRATED) as used:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return mean(used)


@torch.no_grad()
def _calibrate(model: PreTrainedModel, top_k: int, seed: int) -> None:
    """Give all embeddings as much in common, found by bisection, as the published share of experts takes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model):
        gate = layer.mlp.gate.weight
        gate.copy_(torch.randn(gate.shape, generator=generator) * _LOGIT_STD / gate.shape[1] ** 0.5)
    embeddings = model.get_input_embeddings().weight
    own = embeddings * (_EMBEDDING_STD / embeddings.std())
    common = own.std() * torch.randn(own.shape[1], generator=generator)
    wanted = published_unique(len(layers_of(model)[0].mlp.gate.weight), top_k)
    low, high = 0.0, 1.0
    for _ in range(10):
        shared = (low + high) / 2
        embeddings.copy_((1 - shared) ** 0.5 * own + shared**0.5 * common)
        found = unique_of_blocks(model, torch.Generator().manual_seed(seed))
        low, high = (shared, high) if found > wanted else (low, shared)


class Script:
    """The assumed confidences; see this module's docstring."""

    def __init__(self, columns: int, mask: int, seed: int, ease: float) -> None:
        generator = torch.Generator().manual_seed(seed + 1)
        self.mask, self.ease = mask, ease
        self.right = torch.randint(0, mask, (columns,), generator=generator)
        self.difficulty = _DIFFICULTY * torch.randn(columns, generator=generator)

    def around(self, model: Callable[..., Any] | None, length: int) -> Callable[..., Any]:
        """Return a forward that runs `model`, if there is one, and answers for blocks of `length` by the script."""

        def forward(**kwargs: Any) -> Any:
            ids, places = kwargs["input_ids"], kwargs["position_ids"]
            if model is not None:
                model(**kwargs | {"input_ids": ids.where(ids != self.mask, VOCABULARY + places)})
            return SimpleNamespace(logits=self.logits(ids, places) if ids.shape[1] == length else None)

        return forward

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return [R, L, V] for rows of one block, whose left neighbour is known."""
        length = ids.shape[1]
        places = torch.arange(length)
        known = nn.functional.pad(ids != self.mask, (1, 0), value=True)
        apart = (places.unsqueeze(0) + 1 - torch.arange(length + 1).unsqueeze(1)).abs()  # [L + 1, L]
        distance = torch.where(known.unsqueeze(2), apart, length + 1).amin(1)
        score = self.ease + self.difficulty[positions] - _DECAY * (distance - 1)
        sure = score.sigmoid().clamp(0.02, 1 - 1e-6)
        right = self.right[positions]
        token = torch.where(score > 0, right, (right + 1 + distance) % self.mask)
        logits = torch.zeros(*ids.shape, VOCABULARY)
        height = (sure / (1 - sure) * (VOCABULARY - 1)).log()
        return logits.scatter(2, token.unsqueeze(2), height.unsqueeze(2))


def calibrated(columns: int, seed: int, wanted: float, accepted: Callable[[Script], float]) -> Script:
    """Return the script with which decoding without passes accepts `wanted` tokens a forward, or a few more.

    Args:
        columns: positions that it answers for.
        seed: of what is right and how hard it is.
        wanted: tokens a forward.
        accepted: decodes by a script alone, and returns the tokens a forward.
    """

    def script(ease: float) -> Script:
        return Script(columns, VOCABULARY - 1, seed, ease)

    low, high = -12.0, 12.0 + _DECAY * columns  # from no token that is sure of itself to all of them at once
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted(script(middle)) < wanted else (low, middle)
    return script(high)
