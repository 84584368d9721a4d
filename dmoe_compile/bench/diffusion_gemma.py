"""transformers' DiffusionGemma: its own generate(), through stock Inductor and through dmoe.

E = routed experts in a layer, k = experts a token, L = tokens of a canvas (the block that shares a coreset).

Five decodings of one prompt start from the same seed:

    inductor     torch.compile(model.forward): the baseline
    kernel       the same with backend="dmoe" and no pass: the model's own experts, by the fused kernel
    dmoe         and with the dMoE rule; the three are timed in turn
    counted      as dmoe, and counting unique experts ("after"); not timed, because counting is work
    all experts  as counted, with a coreset of all E experts: must give Inductor's tokens, and so counts "before"

The weights are random, so the text is noise, and an untrained router spreads its choices almost evenly. Its
rows are therefore rescaled to make some experts more popular than others, as in a trained one (_specialise).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmoe_compile.backend import dmoe
from dmoe_compile.bench import Bar, Row, check_names, check_seed, check_threads, describe, environment
from dmoe_compile.config import check_int
from dmoe_compile.loading import VISION
from dmoe_compile.runtime import routing_stats

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table
    from transformers import DiffusionGemmaForBlockDiffusion

TIMED = ("inductor", "kernel", "dmoe")
TOP_P = 0.6
MIN_EXPERTS = 16
_PROMPT_TOKENS = 16
_LOGIT_STD = 1.0
_POPULARITY_SPREAD = 0.3  # with it 64 tokens choose about 105 of 128 experts, as against 124 with even rows
_NEVER = 1e-12  # an untrained model with tied embeddings echoes its canvas, which generate() would take for confidence
_TEXT: dict[str, Any] = {
    "vocab_size": 2048,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_experts": 128,
    "top_k_experts": 8,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Size:
    """One model: text config, canvas_length L in tokens, element type."""

    text: dict[str, Any]
    canvas_length: int
    dtype: torch.dtype


# "large" has the width of google/diffusiongemma-26B-A4B-it, 2 of its 30 layers and a small vocabulary: 3 GB of experts.
SIZES = {
    "small": Size(
        _TEXT
        | {
            "hidden_size": 256,
            "intermediate_size": 512,
            "moe_intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "global_head_dim": 64,
        },
        canvas_length=64,
        dtype=torch.float32,
    ),
    "large": Size(
        _TEXT
        | {
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "moe_intermediate_size": 704,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
        },
        canvas_length=256,
        dtype=torch.bfloat16,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What to run: a key of SIZES, denoising steps, timed decodings of each backend, threads (None: torch's own)."""

    size: str = "small"
    steps: int = 8
    repeats: int = 5
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_names("config", [self.size], SIZES)
        check_int("steps", self.steps, "denoising steps of a canvas")
        check_int("repeats", self.repeats, "timed decodings of each way")
        check_threads(self.threads)
        check_seed(self.seed)


@dataclass(frozen=True)
class Layer:
    """Unique experts of one layer, mean over the forwards of a decoding, and the bytes of one of its experts."""

    name: str
    num_experts: int
    expert_bytes: int
    unique_before: float
    unique_after: float


@dataclass
class Timing:
    """One backend: decoder forwards of a decoding; seconds of each timed decoding, whole and in the decoder."""

    forwards: int = 0
    wall_s: list[float] = field(default_factory=list)
    decoder_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What run() found, timings by way. `tokens_equal`: the all-experts coreset gave Inductor's tokens."""

    settings: Settings
    env: Row
    layers: list[Layer]
    timings: dict[str, Timing]
    tokens_equal: bool

    def bytes_per_forward(self) -> tuple[float, float]:
        """Return predicted bytes of expert weights read by one decoder forward, before and after."""
        before = sum(layer.unique_before * layer.expert_bytes for layer in self.layers)
        return before, sum(layer.unique_after * layer.expert_bytes for layer in self.layers)

    def rows(self) -> list[Row]:
        """Return the result as JSON-able rows, each with its environment."""
        before, after = self.bytes_per_forward()
        common = asdict(self.settings) | self.env  # in this order: threads=None becomes the number that ran
        rows: list[Row] = [{"kind": "layer", **asdict(layer)} for layer in self.layers]
        for provider, timing in self.timings.items():
            num_bytes = after if provider == "dmoe" else before
            medians = {"wall_s_median": median(timing.wall_s), "decoder_s_median": median(timing.decoder_s)}
            predicted = {"predicted_expert_bytes_per_forward": round(num_bytes)}
            rows.append({"kind": "decoding", "provider": provider, **asdict(timing), **medians, **predicted})
        rows.append({"kind": "lossless", "tokens_equal": self.tokens_equal})
        return [common | row for row in rows]

    def table(self) -> Table:
        """Return the one table of the figure."""
        from rich.table import Table

        size = SIZES[self.settings.size]
        shape = (
            f"{len(self.layers)} layers of {self.layers[0].num_experts} experts, canvas of {size.canvas_length} tokens"
        )
        title = f"DiffusionGemma, {self.settings.size}: {shape}"
        table = Table(
            "",
            "stock Inductor",
            "kernel",
            "dmoe",
            "change",
            title=title,
            caption=self._caption(),
            caption_justify="left",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        table.add_row("forwards of the decoder", *(str(self.timings[way].forwards) for way in TIMED))
        for layer in self.layers:
            label = f"unique experts, {layer.name.removeprefix('model.')}"
            table.add_row(label, *_compare((layer.unique_before, layer.unique_before, layer.unique_after), "{:.1f}"))
        before, after = (num_bytes / 1e6 for num_bytes in self.bytes_per_forward())
        table.add_row("expert MB a forward reads (predicted)", *_compare((before, before, after), "{:.1f}"))
        timings = [self.timings[way] for way in TIMED]
        wall = [1e3 * median(timing.wall_s) for timing in timings]
        table.add_row("generate(), ms (measured)", *_compare(wall, "{:.1f}"))
        decoder = [1e3 * median(t.decoder_s) / t.forwards for t in timings]
        table.add_row("one forward, ms (measured)", *_compare(decoder, "{:.2f}"))
        verdict = "yes" if self.tokens_equal else "NO"
        table.add_row("same tokens if coreset = all experts", "", "", verdict)
        return table

    def _caption(self) -> str:
        repeats = f"medians of {self.settings.repeats} decodings each, in turn"
        return (
            f"Measured: forwards, unique experts (mean over forwards), times ({repeats}). Predicted: bytes = unique "
            "experts x bytes of an expert. Random weights; router rows are rescaled so that some experts are more "
            f"popular than others, as in a trained model. dmoe.top_p={TOP_P}, dmoe.min_experts={MIN_EXPERTS}. "
            "kernel: no pass, the same experts by the fused kernel.\n"
            f"{describe(self.env)}"
        )


def run(settings: Settings, progress: Progress | None = None) -> Result:
    """Decode in all five ways, time three of them in turn, and return what was counted and timed."""
    with _threads(settings.threads):
        model = build(SIZES[settings.size], settings.seed)
        decoders = {way: _Decoder(model, settings, options) for way, options in _ways(model).items()}
        bar = Bar(progress, total=settings.steps * (len(decoders) + len(TIMED) * settings.repeats))
        tokens, unique = {}, {}
        for way, decoder in decoders.items():
            bar.say(f"compile and decode: {way}")
            routing_stats(reset=True)
            tokens[way] = decoder.decode(bar.advance)
            unique[way] = routing_stats(reset=True).sites
            decoder.forget_times()
        for turn in range(settings.repeats):
            for way in TIMED[:: -1 if turn % 2 else 1]:
                bar.say(f"decode {turn + 1} of {settings.repeats}: {way}")
                decoders[way].decode(bar.advance)
        return Result(
            settings,
            environment(),
            _layers(model, unique["all experts"], unique["counted"]),
            {way: decoders[way].timing for way in TIMED},
            tokens_equal=torch.equal(tokens["all experts"], tokens["inductor"]),
        )


def build(size: Size, seed: int) -> DiffusionGemmaForBlockDiffusion:
    """Return the model with random weights and specialised routers; the same arguments give the same weights."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    config = DiffusionGemmaConfig(text_config=size.text, vision_config=VISION, canvas_length=size.canvas_length)
    default = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)  # the large model is not to exist in fp32 first
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            model = DiffusionGemmaForBlockDiffusion(config).eval()
            for layer in model.model.decoder.layers:
                _specialise(layer.router.proj)
    finally:
        torch.set_default_dtype(default)
    model.set_experts_implementation("grouped_mm")
    return model


def _ways(model: DiffusionGemmaForBlockDiffusion) -> dict[str, Row | None]:
    """Return the backend options of each decoding; None is stock Inductor."""
    rule = {"passes": ["dmoe"], "block_length": model.config.canvas_length, "dmoe.top_p": TOP_P}
    lossy = rule | {"dmoe.min_experts": MIN_EXPERTS}
    all_experts = rule | {"dmoe.min_experts": model.config.text_config.num_experts, "experts": False, "stats": True}
    counted = lossy | {"stats": True}
    return {"inductor": None, "kernel": {}, "dmoe": lossy, "counted": counted, "all experts": all_experts}


def _prompt(model: DiffusionGemmaForBlockDiffusion, seed: int) -> Tensor:
    """Return random tokens [1, _PROMPT_TOKENS]; below 3 are padding, begin and end of text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.text_config.vocab_size, (1, _PROMPT_TOKENS), generator=generator)


def _specialise(router: nn.Linear) -> None:
    """Give a router's rows log-normal lengths, around logits of standard deviation _LOGIT_STD.

    DiffusionGemma's router reads a state of norm 1, so a row of N(0, s) weights makes logits of deviation s.
    """
    with torch.no_grad():
        popularity = torch.exp(_POPULARITY_SPREAD * torch.randn(router.out_features, 1))
        router.weight.normal_(std=_LOGIT_STD).mul_(popularity)


def _layers(
    model: DiffusionGemmaForBlockDiffusion, before: dict[str, list[int]], after: dict[str, list[int]]
) -> list[Layer]:
    """Average the unique experts that each site counted, forward by forward."""
    assert before, "no layer was counted"
    assert before.keys() == after.keys(), "the two counted decodings found different layers"
    found = []
    for name in before:
        experts = model.get_submodule(f"{name}.experts")
        num_experts = model.config.text_config.num_experts
        num_bytes = sum(weight.nbytes for weight in experts.parameters()) // num_experts
        found.append(Layer(name, num_experts, num_bytes, mean(before[name]), mean(after[name])))
    return found


def _compare(values: Sequence[float], form: str) -> list[str]:
    """Return the cells of values, and of the change from the first to the last."""
    return [*(form.format(value) for value in values), f"{values[-1] / values[0] - 1:+.1%}"]


@contextmanager
def _threads(num_threads: int | None) -> Iterator[None]:
    """Run with this many threads; before compiling, because Inductor writes the number into its code."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Decoder:
    """generate() of one model with its decoder compiled in one way."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion, settings: Settings, options: Row | None) -> None:
        """Compile lazily: with stock Inductor when `options` is None, else with dmoe."""
        # isolate_recompiles: each way has its own cache and recompile limit, though all compile the same code object.
        compiled = partial(torch.compile, fullgraph=True, isolate_recompiles=True)
        self.forward = (
            compiled(model.forward) if options is None else compiled(model.forward, backend=dmoe, options=options)
        )
        self.model = model
        self.settings = settings
        self.timing = Timing()
        self.prompt = _prompt(model, settings.seed)

    def decode(self, tick: Callable[[], None]) -> Tensor:
        """Return the tokens [1, prompt + L] of one decoding; time it, and call `tick` after every decoder forward."""
        seconds: list[float] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = self.forward(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            tick()
            return out

        # generate() looks for this attribute before it compiles the forward itself; model.compile() it ignores.
        self.model._compiled_decoder_forward = forward
        torch.manual_seed(self.settings.seed)
        start = time.perf_counter()
        out = self.model.generate(
            self.prompt,
            max_new_tokens=self.model.config.canvas_length,
            max_denoising_steps=self.settings.steps,
            confidence_threshold=_NEVER,
            cache_implementation="static",
        )
        self.timing.wall_s.append(time.perf_counter() - start)
        self.timing.decoder_s.append(sum(seconds))
        self.timing.forwards = len(seconds)
        return out.sequences

    def forget_times(self) -> None:
        """Forget the times of the first decoding, which compiled."""
        self.timing.wall_s.clear()
        self.timing.decoder_s.clear()
