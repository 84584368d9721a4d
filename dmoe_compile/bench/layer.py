"""A whole decoder layer at a published model's widths on this CPU: Inductor against the passes and the expert kernel.

The layer is transformers' own (attention, norms, router, experts), with random weights, on one block of 32 tokens
behind 512 cached ones. Random tokens have nothing in common, so that the model's own routing uses nearly as many
experts as there can be: 112 of 128. Ways are timed in turn; those that choose the model's own experts are held against
Inductor's before.

    inductor         vanilla, transformers' grouped_mm
    inductor + dmoe  the dmoe pass, with experts=False: what the coreset gains by itself
    kernel           no pass; the expert kernel at equal routing
    kernel + dmoe    both
    routing          of that, the part from hidden states to ids and weights, compiled by itself: the second of two
                     calls, as every layer of a model runs the same code, plus the time to read the router's weights
    routing, cold    the first of the two, with nothing of it in the caches
    read             what the experts' weights alone take at the bandwidth measured in this run
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from dmoe_compile.bench import Bar, Row, check_names, check_threads, describe, environment, in_turn, shapes, use_threads
from dmoe_compile.bench.shapes import Shape
from dmoe_compile.config import check_int

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor, fx, nn

TOKENS, CACHED = 32, 512
SHAPES = {name: shapes.SHAPES[name] for name in ("SDAR-30B-A3B", "LLaDA2.0-mini")}
TINY = Shape(64, 32, 16, 4, TOKENS)
WAYS = ("inductor", "inductor + dmoe", "kernel", "kernel + dmoe")
GOAL_KERNEL, GOAL_DMOE, GOAL_ROUTING = 2.0, 4.5, 0.03
_TOLERANCE = 0.03  # root mean square, relative: bf16 rounds each expert's result once more or less


@dataclass(frozen=True)
class Settings:
    """Shapes, smallest coreset of the dmoe pass, timed calls of each way, dtype and threads."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    coreset: int = 15
    calls: int = 20
    dtype: str = "bfloat16"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_names("shapes", self.shapes, [*SHAPES, "tiny"])
        check_int("coreset", self.coreset, "the dmoe pass's smallest coreset")
        check_int("calls", self.calls, "timed calls of each way")
        check_names("dtype", [self.dtype], ["float32", "bfloat16"])
        check_threads(self.threads)


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Return a row for each shape and way, and one for the routing by itself."""
    import torch

    use_threads(settings.threads)
    env = asdict(settings) | environment()  # in this order: threads=None becomes the number that ran
    bar = Bar(progress, total=len(settings.shapes) * (len(WAYS) + 2))
    with torch.no_grad():
        return [env | row for name in settings.shapes for row in _rows(name, settings, bar)]


def _rows(name: str, settings: Settings, bar: Bar) -> list[Row]:
    import torch

    from dmoe_compile.bench.gpu import unique_experts
    from dmoe_compile.machine import bandwidth

    dtype: torch.dtype = getattr(torch, settings.dtype)
    bar.say(f"{name}: build")
    layer, x = build(SHAPES.get(name, TINY), dtype)
    passes = {"passes": ["dmoe"], "dmoe.top_p": 1e-6, "dmoe.min_experts": settings.coreset}
    calls: dict[str, Callable[[], Any]] = {}
    for way in WAYS:
        options = {"experts": way.startswith("kernel"), **(passes if "dmoe" in way else {})}
        how: dict[str, Any] = {} if way == "inductor" else {"backend": "dmoe", "options": options}
        calls[way] = partial(torch.compile(layer, fullgraph=True, dynamic=False, isolate_recompiles=True, **how), x)  # type: ignore[call-overload]
        bar.say(f"{name}: compile {way}")
        calls[way]()
        bar.advance()
    for own, other in (("inductor", "kernel"), ("inductor + dmoe", "kernel + dmoe")):
        wanted, out = calls[own]().float(), calls[other]().float()
        off = float((out - wanted).norm() / wanted.norm())
        if not off < _TOLERANCE:
            raise RuntimeError(f"{other} is off by {off:.2g} on {name}: a wrong kernel has no speed")
    bar.say(f"{name}: compile the routing")
    block, rows = layer.layer.mlp, torch.randn(x.shape, dtype=dtype)
    calls["routing, cold"] = calls["routing"] = routing(block, rows, {**passes, "experts": False})
    bar.advance()
    bar.say(f"{name}: time")
    ms, gb_per_s = _timed(calls, settings.calls, partial(bandwidth, x.device))
    bar.advance()
    ms["routing"] = [each + block.gate.weight.nbytes / gb_per_s / 1e6 for each in ms["routing"]]
    unique = {
        "no pass": unique_experts(layer, x, None),
        "dmoe": unique_experts(layer, x, passes),
    }
    bank = block.experts
    expert_bytes = (bank.gate_up_proj[0].numel() + bank.down_proj[0].numel()) * x.element_size()
    found = []
    for way, times in ms.items():
        used = unique["dmoe" if "dmoe" in way or "routing" in way else "no pass"]
        found.append({
            "shape": name, "way": way, "unique": used, "ms": median(times),
            "spread_ms": [sorted(times)[len(times) // 5], sorted(times)[-1 - len(times) // 5]],
            "faster": median(ms["inductor"]) / median(times), "gb_per_s": gb_per_s,
            "read_ms": used * expert_bytes / gb_per_s / 1e6,
            "share": median(times) / median(ms["kernel + dmoe"]),
        })  # fmt: skip
    return found


def build(shape: Shape, dtype: torch.dtype, tokens: int = TOKENS, batch: int = 1) -> tuple[Any, Tensor]:
    """Return transformers' layer behind cached tokens, and blocks of hidden states [B, T, H]."""
    import torch
    from torch import nn
    from transformers import DynamicCache, Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRotaryEmbedding

    heads = max(1, shape.hidden // 64)
    config = Qwen3MoeConfig(
        **shape.config(), num_attention_heads=heads, num_key_value_heads=max(1, heads // 8), head_dim=128,
        num_hidden_layers=1, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation, config._attn_implementation = "grouped_mm", "sdpa"

    class Layer(nn.Module):
        """One layer as it runs in a denoising step: the block sees itself and what is cached, and changes neither."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = Qwen3MoeDecoderLayer(config, layer_idx=0)
            self.rotary = Qwen3MoeRotaryEmbedding(config)
            self.kept: Tensor
            kept = torch.randn(2, 1, config.num_key_value_heads, CACHED, config.head_dim)
            self.register_buffer("kept", kept)

        def forward(self, x: Tensor) -> Tensor:
            cache = DynamicCache()
            keys, values = self.kept.expand(-1, len(x), -1, -1, -1).unbind(0)
            cache.update(keys, values, 0)
            positions = torch.arange(CACHED, CACHED + x.shape[1]).unsqueeze(0)
            out: Any = self.layer(
                x, attention_mask=None, position_ids=positions, past_key_values=cache,
                position_embeddings=self.rotary(x, positions), is_causal=False,
            )  # fmt: skip
            return out[0] if isinstance(out, tuple) else out

    torch.manual_seed(0)
    layer = Layer().to(dtype).eval()
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer, torch.randn(batch, tokens, shape.hidden).to(dtype)


def routing(block: nn.Module, x: Tensor, options: dict[str, Any]) -> Callable[[], Any]:
    """Return the routing of a block, from hidden states to ids and weights, compiled by Inductor by itself."""
    import torch
    from torch._inductor.compile_fx import compile_fx

    from dmoe_compile import backend
    from dmoe_compile.config import Config
    from dmoe_compile.notices import Notices

    made: list[Callable[[], Any]] = []

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        rewritten = backend.rewrite(gm, example_inputs, Config.from_options(options), Notices())
        assert rewritten is not None
        aten, findings = rewritten
        (outcome,) = findings.outcomes
        assert outcome.site.weights is not None
        aten.graph.output_node().args = ((outcome.site.ids, outcome.site.weights),)
        aten.graph.eliminate_dead_code()
        aten.recompile()
        compiled: Callable[..., Any] = compile_fx(aten, example_inputs)  # type: ignore[assignment]
        held = list(example_inputs)
        made.append(lambda: compiled(*held))
        return gm.forward

    torch.compile(block, backend=capture, fullgraph=True, dynamic=False, isolate_recompiles=True)(x)  # type: ignore[call-overload]
    made[0]()
    return made[0]


def _timed(
    calls: dict[str, Callable[[], Any]], number: int, probe: Callable[[], float]
) -> tuple[dict[str, list[float]], float]:
    """Return ms of every call of each way, in turn, and the median of the bandwidths measured in between."""
    ms: dict[str, list[float]] = {way: [] for way in calls}
    speeds = []
    for i in range(number):
        for way, (once,) in in_turn(calls, 1).items():
            ms[way].append(once)
        if i % 5 == 0:
            speeds.append(probe())
    return ms, median(speeds)


def table(rows: Sequence[Row]) -> Table:
    """Return the rows of run() as a table."""
    from rich.table import Table

    first = rows[0]
    out = Table(
        "shape", "way", "unique", "ms", "faster", "read ms",
        title=f"One decoder layer, {first['dtype']}: {TOKENS} tokens behind {CACHED}; medians of single calls",
        caption=f"{describe(first)}; reads {first['gb_per_s']:.3g} GB/s", caption_justify="left",
    )  # fmt: skip
    for row in rows:
        faster = f"{row['share']:.1%} of kernel + dmoe" if "routing" in row["way"] else f"{row['faster']:.2f}x"
        out.add_row(row["shape"], row["way"], str(row["unique"]), f"{row['ms']:.2f}", faster, f"{row['read_ms']:.2f}")
    return out


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return each shape's figures against the goals."""
    found = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        ways = {row["way"]: row for row in rows if row["shape"] == shape}
        found.append(
            f"{shape}: kernel {ways['kernel']['faster']:.2f}x (goal {GOAL_KERNEL}x), with dmoe "
            f"{ways['kernel + dmoe']['faster']:.2f}x (goal {GOAL_DMOE}x), routing {ways['routing']['share']:.1%} "
            f"of that (goal under {GOAL_ROUTING:.0%})"
        )
    return found
