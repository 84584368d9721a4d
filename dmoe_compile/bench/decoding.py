"""What TEAM gains in block-diffusion decoding, strategy by strategy: forwards, experts, and time per accepted token.

On a stack of SDAR-30B-A3B's layers at their real width (hidden 2048, 128 experts of 768, 8 a token, 32 query and 4 key
heads of 128; random weights, 1,024 tokens of vocabulary), decoding real blocks with its KV cache through dmoe_compile's
decoder. All ways, the one without a pass too, have the expert kernel, or with `own_experts` transformers' grouped_mm.
One process; the ways take turns; medians of whole decodings.

Measured: seconds, unique experts, forwards, bytes kept. Assumed, because random weights are sure of nothing:

    confidences  The model runs and its logits are thrown away. Each position has a token that is right and a difficulty
                 z ~ N(0, 1.5). Where d is the distance to the nearest known token, the model is sure of its token with
                 probability sigmoid(ease + z - 0.7 (d - 1)), and right where that is above a half. `ease` is such that
                 decoding without passes accepts `tokens_per_forward` tokens a forward at threshold 0.9.
    routers      Their rows have log-normal lengths, so that some experts are popular. The spread is such that blocks
                 of an eighth to seven eighths known tokens use 43% of the experts that even routing would: the share
                 that is published for LLaDA2.0-mini (69.5 unique experts of 256, 8 a token; even routing uses 163).
    masks        In a trained model a mask token's state soon depends on its place; in a random one all mask tokens
                 would choose the same experts. So they get embeddings of their own, and share half of their variance.

With `recorded` the weights are those of tests/reference/sdar_tiny_weights.json, routers and confidences their own.

    experts a token  unique experts of all denoising forwards, mean over layers, by accepted token
    context          what the decoding context itself takes of a forward, and the expert outputs that it keeps
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dmoe_compile.bench import Bar, Row, describe, environment

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel

    from dmoe_compile.decoding import Decoder, Forward

BLOCK = 32
UNIQUE_SHARE = 69.5 / 163  # of what even routing uses: LLaDA2.0-mini, in the dMoE paper (arXiv 2605.30876)
_LEVELS = 4  # of known tokens in a block, for which routers are calibrated
_DIFFICULTY, _DECAY = 1.5, 0.7
_THRESHOLD = 0.9
_VOCABULARY = 1024  # and then a mask token for each position
_SHARED = 0.5  # variance that the embeddings of mask tokens have in common
_CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
}
_OFF = {"team.cache": False, "team.limit": False, "team.speculate": False}
WAYS: dict[str, Row] = {
    "no pass": {},
    "cache": {"passes": ["team"], **_OFF, "team.cache": True},
    "limit": {"passes": ["team"], **_OFF, "team.limit": True},
    "speculate": {"passes": ["team"], **_OFF, "team.speculate": True},
    "team": {"passes": ["team"]},
    "dmoe": {"passes": ["dmoe"]},
    "team, dmoe": {"passes": ["team", "dmoe"]},
    "team, two rows": {"passes": ["team"], "team.candidates": 1},
    "cache, limit, dmoe": {"passes": ["team", "dmoe"], "team.speculate": False},
}
GOAL_BYTES, GOAL_TIME, GOAL_CONTEXT = 1.9, 1.5, 0.01


@dataclass(frozen=True)
class Settings:
    """Layers, blocks of an answer, tokens of the prompt, timed decodings, assumptions, and whose experts."""

    layers: int = 2
    blocks: int = 2
    prompt: int = 64
    repeats: int = 3
    tokens_per_forward: float = 2.0
    top_p: float = 0.8
    dtype: str = "auto"
    recorded: str | None = None
    own_experts: bool = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "blocks", "repeats", "prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not 1 <= self.tokens_per_forward <= BLOCK:
            raise ValueError(f"tokens_per_forward is {self.tokens_per_forward}, but must be in [1, {BLOCK}]")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}, but must be auto, float32 or bfloat16")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, but must be at least 1")
        if self.recorded is not None and not Path(self.recorded).is_file():
            raise ValueError(
                f"recorded is {self.recorded}, but there is no such file; it is a .json in tests/reference"
            )


@dataclass
class Trial:
    """One decoding: seconds of it all and in the context, forwards of it, bytes kept at most, tokens accepted."""

    seconds: float
    context_s: float
    forwards: list[Forward]
    nbytes: int
    tokens: int

    @property
    def denoising(self) -> list[Forward]:
        return [forward for forward in self.forwards if forward.committed is not None]

    @property
    def unique(self) -> float:
        """Unique experts of all denoising forwards, mean over layers."""
        return sum(mean(forward.unique_experts.values()) for forward in self.denoising if forward.unique_experts)


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Decode in every way and return a row for each."""
    import torch

    from dmoe_compile.machine import bandwidth

    if settings.threads:
        torch.set_num_threads(settings.threads)
    bar = Bar(progress, total=len(WAYS) * (settings.repeats + 1) + 3)
    bar.say("build the model")
    model, mask = _recorded(Path(settings.recorded)) if settings.recorded else _stack(settings)
    prompt = torch.randint(0, mask, (1, settings.prompt), generator=torch.Generator().manual_seed(settings.seed))
    script = None if settings.recorded else calibrated(settings, prompt, mask)
    bar.advance()
    env = asdict(settings) | environment() | {"dtype": str(model.dtype).removeprefix("torch.")}
    env["ease"] = None if script is None else script.ease
    decode = partial(_decode, model, prompt, settings, script, mask)
    compiled, counted = {}, {}
    for way, options in WAYS.items():
        bar.say(f"compile and count: {way}")
        options = {"experts": False, **options} if settings.own_experts else dict(options)
        if "dmoe" in options.get("passes", ()):
            options["dmoe.top_p"] = settings.top_p
        team = "team" in options.get("passes", ())
        compiled[way] = _compile(model, options)
        counted[way] = decode(compiled[way] if team else _compile(model, options | {"stats": True}), options)
        if not team:
            decode(compiled[way], options)
        bar.advance()
    trials: dict[str, list[Trial]] = {way: [] for way in WAYS}
    names = list(WAYS)
    for turn in range(settings.repeats):
        for way in names[turn % len(names) :] + names[: turn % len(names)]:
            bar.say(f"decode {turn + 1} of {settings.repeats}: {way}")
            trials[way].append(decode(compiled[way], WAYS[way]))
            bar.advance()
    bar.say("probe")
    env["gb_per_s"] = bandwidth(torch.device("cpu"))
    bar.advance()
    layer = model.model.layers[0].mlp.experts
    expert_bytes = sum(weight.nbytes for weight in layer.parameters()) // model.config.num_experts
    return [env | _row(way, counted[way], trials[way], expert_bytes, len(model.model.layers)) for way in WAYS]


def _row(way: str, counted: Trial, trials: list[Trial], expert_bytes: int, layers: int) -> Row:
    seconds = median(trial.seconds for trial in trials)
    denoising, blocks = len(counted.denoising), sum(forward.kind == "store" for forward in counted.forwards)
    context = median(trial.context_s / trial.seconds for trial in trials)
    return {
        "way": way,
        "team": "team" in WAYS[way].get("passes", ()),
        "tokens": counted.tokens,
        "accepted_per_forward": counted.tokens / denoising,
        "forwards_per_block": denoising / blocks,
        "unique_per_forward": counted.unique / denoising,
        "unique_per_token": counted.unique / counted.tokens,
        "expert_bytes_per_token": counted.unique * layers * expert_bytes / counted.tokens,
        "wall_s": [trial.seconds for trial in trials],
        "s_per_token": seconds / counted.tokens,
        "context_share": context,
        "context_bytes": max(trial.nbytes for trial in trials),
    }


def table(rows: Sequence[Row]) -> Table:
    """Return the rows of run() as a table."""
    from rich.table import Table

    first = rows[0]
    what = first["recorded"] or f"{first['layers']} layers of SDAR-30B-A3B's width"
    what += ", the model's own experts" if first["own_experts"] else ", fused experts"
    goals = f"goals of team: {GOAL_BYTES:g}x fewer bytes, {GOAL_TIME:g}x faster, context under {GOAL_CONTEXT:.0%}"
    assumed = "" if first["recorded"] else f"Assumed: {first['tokens_per_forward']:g} tokens a forward without passes. "
    out = Table(
        "",
        "tokens /forward",
        "forwards /block",
        "experts /forward",
        "experts /token",
        "expert MB /token",
        "ms /token",
        "context",
        title=f"Decoding, {what}, {first['dtype']} ({goals})",
        caption=f"{assumed}{describe(first)}; reads {first['gb_per_s']:.3g} GB/s",
        caption_justify="left",
    )
    for row in rows:
        less = first["expert_bytes_per_token"] / row["expert_bytes_per_token"]
        faster = first["s_per_token"] / row["s_per_token"]
        out.add_row(
            row["way"],
            f"{row['accepted_per_forward']:.2f}",
            f"{row['forwards_per_block']:.1f}",
            f"{row['unique_per_forward']:.1f}",
            f"{row['unique_per_token']:.1f}",
            f"{row['expert_bytes_per_token'] / 1e6:.3g} ({less:.2f}x)",
            f"{row['s_per_token'] * 1e3:.3g} ({faster:.2f}x)",
            f"{row['context_share']:.2%}, {row['context_bytes'] / 1e6:.2f} MB" if row["team"] else "",
        )
    return out


class Script:
    """The assumed confidences; see this module's docstring."""

    def __init__(self, columns: int, vocabulary: int, mask: int, seed: int, ease: float) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed + 1)
        self.mask, self.ease, self.vocabulary = mask, ease, vocabulary
        self.right = torch.randint(0, mask, (columns,), generator=generator)
        self.difficulty = _DIFFICULTY * torch.randn(columns, generator=generator)

    def seen(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return what the model reads: each masked place has a token of its own."""
        return ids.where(ids != self.mask, self.vocabulary + positions)

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return [R, L, V] for rows of one block, whose left neighbour is known."""
        import torch

        length = ids.shape[1]
        places = torch.arange(length)
        known = torch.nn.functional.pad(ids != self.mask, (1, 0), value=True)
        apart = (places.unsqueeze(0) + 1 - torch.arange(length + 1).unsqueeze(1)).abs()  # [L + 1, L]
        distance = torch.where(known.unsqueeze(2), apart, length + 1).amin(1)
        score = self.ease + self.difficulty[positions] - _DECAY * (distance - 1)
        sure = score.sigmoid().clamp(0.02, 1 - 1e-6)
        right = self.right[positions]
        token = torch.where(score > 0, right, (right + 1 + distance) % self.mask)
        logits = torch.zeros(*ids.shape, self.vocabulary)
        height = (sure / (1 - sure) * (self.vocabulary - 1)).log()
        return logits.scatter(2, token.unsqueeze(2), height.unsqueeze(2))


def calibrated(settings: Settings, prompt: Tensor, mask: int) -> Script:
    """Return the script with which decoding without passes accepts `tokens_per_forward` tokens a forward."""
    low, high = -12.0, 12.0
    columns = _columns(settings)
    for _ in range(20):
        script = Script(columns, _VOCABULARY, mask, settings.seed, (low + high) / 2)
        trial = _decode(None, prompt, settings, script, mask, None, {})
        if trial.tokens / len(trial.denoising) < settings.tokens_per_forward:
            low = script.ease
        else:
            high = script.ease
    return script


def _decode(
    model: PreTrainedModel | None,
    prompt: Tensor,
    settings: Settings,
    script: Script | None,
    mask: int,
    compiled: Callable[..., Any] | None,
    options: Row,
) -> Trial:
    """Decode `blocks` blocks; without a model by the script alone."""
    from dmoe_compile import Config
    from dmoe_compile.decoding import Decoder, Sampling

    def forward(**kwargs: Any) -> Any:
        ids, places = kwargs["input_ids"], kwargs["position_ids"]
        seen = ids if script is None else script.seen(ids, places)
        out = None if compiled is None else compiled(**{**kwargs, "input_ids": seen})
        if script is None or ids.shape[1] != BLOCK:
            return out or SimpleNamespace(logits=None)
        return SimpleNamespace(logits=script.logits(ids, places))

    if model is not None:
        forward.dtype = model.dtype  # type: ignore[attr-defined]
    forwards: list[Forward] = []
    kept = 0

    def watch(forward: Forward) -> None:
        nonlocal kept
        kept = max(kept, decoder.context.nbytes)
        forwards.append(forward)

    team = Config.from_options(options).selected.get("team")
    new = settings.blocks * BLOCK - prompt.shape[1] % BLOCK
    decoder = Decoder(
        forward, prompt, [prompt.shape[1]], new, Sampling(mask, BLOCK, threshold=_THRESHOLD), team, None, watch
    )
    with _timed(decoder) as spent:
        start = time.perf_counter()
        for _ in decoder.blocks():
            pass
        seconds = time.perf_counter() - start
    return Trial(seconds, sum(spent), forwards, kept, new)


@contextmanager
def _timed(decoder: Decoder) -> Iterator[list[float]]:
    """Give the seconds that the decoding context takes of a decoding, call by call."""
    spent: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return call

    context = decoder.context
    for name in ("step", "accept", "plain", "rows", "roles", "inputs", "done", "count", "attach", "detach"):
        setattr(context, name, timed(getattr(context, name)))
    yield spent


def _compile(model: PreTrainedModel, options: Row) -> Callable[..., Any]:
    import torch

    # isolate_recompiles: each way has its own cache, though all compile the same code object.
    compiled = partial(torch.compile, backend="dmoe", fullgraph=True, isolate_recompiles=True)
    return compiled(model, options=options or None)


def _stack(settings: Settings) -> tuple[PreTrainedModel, int]:
    """Return layers of SDAR-30B-A3B's width with popular experts, and the mask token."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fast = torch.cpu._is_avx512_bf16_supported()
    dtype = {"auto": torch.bfloat16 if fast else torch.float32}.get(settings.dtype) or getattr(torch, settings.dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(settings.seed)
        config = Qwen3MoeConfig(
            **_CONFIG, vocab_size=_VOCABULARY + _columns(settings), num_hidden_layers=settings.layers
        )
        model = Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    model.set_experts_implementation("grouped_mm")
    masks = model.model.embed_tokens.weight[_VOCABULARY:]
    with torch.no_grad():
        masks.mul_((1 - _SHARED) ** 0.5).add_(masks[0].clone() / (1 - _SHARED) ** 0.5 * _SHARED**0.5)
    _make_popular(model, settings.seed)
    return model, _VOCABULARY - 1


def _columns(settings: Settings) -> int:
    return settings.prompt + (settings.blocks + 1) * BLOCK


def _make_popular(model: PreTrainedModel, seed: int) -> None:
    """Give the rows of the routers log-normal lengths, found by bisection; see UNIQUE_SHARE."""
    import torch

    config = model.config
    k, count = config.num_experts_per_tok, config.num_experts
    wanted = UNIQUE_SHARE * count * (1 - (1 - k / count) ** BLOCK)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(model.model.layers), count, config.hidden_size)
    rows = torch.randn(shape, generator=generator) / config.hidden_size**0.5
    popularity = torch.randn(*shape[:2], 1, generator=generator)
    rows_of_ids = torch.randint(0, _VOCABULARY - 1, (_LEVELS, BLOCK), generator=generator)
    open_places = torch.rand(_LEVELS, BLOCK, generator=generator).argsort(1).argsort(1)
    known = (torch.arange(_LEVELS).unsqueeze(1) + 0.5) / _LEVELS * BLOCK
    ids = torch.where(open_places < known, rows_of_ids, _VOCABULARY + torch.arange(BLOCK))
    used: list[int] = []
    gates = [layer.mlp.gate for layer in model.model.layers]

    def note(_: object, __: object, out: Sequence[Tensor]) -> None:
        used.extend(row.unique().numel() for row in out[2].view(_LEVELS, -1))

    hooks = [gate.register_forward_hook(note) for gate in gates]
    low, high = 0.0, 4.0
    with torch.no_grad():
        for _ in range(8):
            spread = (low + high) / 2
            for gate, row, each in zip(gates, rows, popularity, strict=True):
                gate.weight.copy_(row * (spread * each).exp())
            used.clear()
            model(ids, attention_mask=torch.zeros(_LEVELS, 1, BLOCK, BLOCK, dtype=model.dtype), use_cache=False)
            low, high = (spread, high) if mean(used) > wanted else (low, spread)
    for hook in hooks:
        hook.remove()


def _recorded(path: Path) -> tuple[PreTrainedModel, int]:
    """Return the recorded SDAR model, and its mask token: its weights are named as Qwen3-MoE's."""
    from transformers import Qwen3MoeForCausalLM

    about = json.loads(path.read_text())
    named = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
    with tempfile.TemporaryDirectory(prefix="dmoe-bench-") as folder:
        Path(folder, "config.json").write_text(json.dumps(about["config"] | named))
        Path(folder, "model.safetensors").symlink_to(path.with_name(about["file"]).resolve())
        model = Qwen3MoeForCausalLM.from_pretrained(folder).eval()
    model.set_experts_implementation("grouped_mm")
    return model, about["mask_id"]
