"""One mixture-of-experts block on a GPU at published widths: what users have against the fused kernels.

A row is one way to run a block (router, experts, combine) of a published shape in bf16, on random tokens of one block
of denoised tokens. Tokens have much in common, as those of a trained model have; the column `unique` says how
many experts they use. Ways are timed in turn, by CUDA events around single calls; those that choose the
model's own experts are held against the eager block before they are timed.

    fraction   the least time in which the experts that were used can be read, at the bandwidth measured in this run,
               as a share of the time taken
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any

from dmoe_compile.bench import Bar, Row, check_names, environment, in_turn, wall_ms
from dmoe_compile.bench.shapes import SHAPES as SHAPES
from dmoe_compile.bench.shapes import Shape
from dmoe_compile.config import check_int

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor, nn


TINY = Shape(64, 32, 64, 4, 16)
# The options of backend="dmoe" by the way's name; None is Inductor, which every other way is held against.
WAYS: dict[str, dict[str, Any] | None] = {
    "inductor": None,
    "dmoe, no pass": {"experts": True},
    "dmoe 0.6": {"experts": True, "passes": ["dmoe"], "dmoe.top_p": 0.6},
    "dmoe 0.8": {"experts": True, "passes": ["dmoe"], "dmoe.top_p": 0.8},
    "des vote": {"experts": True, "passes": ["des"], "des.variant": "vote"},
}
_COMMON = 0.6  # share of the variance that a block's tokens have in common
_SPREAD = 2.0
_TOLERANCE = 0.03  # root mean square, relative: bf16 rounds each expert's result once more or less


@dataclass(frozen=True)
class Settings:
    """Which shapes, timed calls of each way, and where; "cpu" with the shape "tiny" shows that the figure works."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    calls: int = 100
    device: str = "cuda"

    def __post_init__(self) -> None:
        import torch

        check_int("calls", self.calls, "timed calls of each way")
        check_names("shapes", self.shapes, [*SHAPES, "tiny"])
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "device is cuda, but this torch sees no GPU; install a CUDA or ROCm build on a machine with one. What "
                "was shown without is in docs/gpu.md"
            )


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Return a row for each shape and way."""
    import torch

    from dmoe_compile.machine import bandwidth

    device = torch.device(settings.device)
    env = environment() | asdict(settings) | {"gpu": _name(device), "gb_per_s": bandwidth(device)}
    bar = Bar(progress, total=len(settings.shapes) * (len(WAYS) + 3))
    return [env | row for name in settings.shapes for row in _rows(name, settings, device, env["gb_per_s"], bar)]


def _rows(name: str, settings: Settings, device: torch.device, gb_per_s: float, bar: Bar) -> Iterator[Row]:
    import torch

    shape = SHAPES.get(name, TINY)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bar.say(f"{name}: build")
    block, x = build(shape, device, dtype)
    calls = dict(_ways(block, x))
    if device.type == "cuda" and find_spec("vllm") is not None:
        calls["vLLM fused_moe"] = _vllm(block, x, shape)
    bar.advance()
    with torch.no_grad():
        own, unique = output(block(x)), {}
        for way, call in calls.items():
            bar.say(f"{name}: compile {way}")
            out = output(call())
            if not WAYS.get(way) or not WAYS[way].get("passes"):  # type: ignore[union-attr]
                hold(out, own, f"{way} on {name}")
            unique[way] = unique_experts(block, x, WAYS.get(way))
            bar.advance()
        bar.say(f"{name}: time")
        for call in calls.values():
            call()
        ms = in_turn(calls, settings.calls, wall_ms if device.type == "cpu" else _ms)
    bar.advance()
    expert_bytes = 3 * shape.hidden * shape.width * x.element_size()
    for way in calls:
        floor_ms = unique[way] * expert_bytes / gb_per_s / 1e6
        yield {
            "shape": name, **asdict(shape), "way": way, "unique": unique[way], "ms": median(ms[way]),
            "spread_ms": [sorted(ms[way])[len(ms[way]) // 5], sorted(ms[way])[-1 - len(ms[way]) // 5]],
            "faster": median(ms["inductor"]) / median(ms[way]), "fraction": floor_ms / median(ms[way]),
        }  # fmt: skip


def hold(out: Tensor, own: Tensor, what: str) -> None:
    """Raise RuntimeError unless tokens agree, [T, H]: all but an eighth of them, in bf16.

    Logits in bf16 tie, or nearly: another rounding, or another order of ties, gives some tokens another last expert.
    """
    off = (out.float() - own.float()).norm(dim=-1) / own.float().norm(dim=-1)
    worst = float(off.sort().values[-1 - len(off) // 8])  # NaN sorts last, and more than an eighth of them are seen
    if not worst < _TOLERANCE:
        raise RuntimeError(f"{what} is off by {worst:.2g}: what is wrong has no speed, and its bytes count for nothing")


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Return transformers' own block of a shape, and tokens [1, T, H] that its router treats as a trained one would."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        torch.manual_seed(0)
        block = Qwen3MoeSparseMoeBlock(config).to(dtype).eval()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        x = _COMMON**0.5 * torch.randn(1, 1, shape.hidden) + (1 - _COMMON) ** 0.5 * torch.randn(
            1, shape.tokens, shape.hidden
        )
        block.gate.weight.data.mul_(_SPREAD)
    return block, x.to(dtype)


def table(rows: Sequence[Row]) -> Table:
    """Return the rows of run() as a table."""
    from rich.table import Table

    first = rows[0]
    out = Table(
        "shape", "way", "unique", "ms", "faster", "fraction",
        title="One mixture-of-experts block, bf16: medians of single calls",
        caption=f"{first['gpu']}, reads {first['gb_per_s']:.4g} GB/s; torch {first['torch']}", caption_justify="left",
    )  # fmt: skip
    for row in rows:
        figures = f"{row['unique']}", f"{row['ms']:.3f}", f"{row['faster']:.2f}x", f"{row['fraction']:.0%}"
        out.add_row(row["shape"], row["way"], *figures)
    return out


def _ways(block: nn.Module, x: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch

    for way, options in WAYS.items():
        how: dict[str, Any] = {} if options is None else {"backend": "dmoe", "options": options}
        compiled = torch.compile(block, fullgraph=True, dynamic=False, isolate_recompiles=True, **how)  # type: ignore[call-overload]
        yield way, partial(compiled, x)
    yield "eager, grouped_mm", partial(block, x)


def _vllm(block: Any, x: Tensor, shape: Shape) -> Callable[[], Any]:
    """Return vLLM's fused kernel on the same weights, with the routing in eager PyTorch as vLLM has it."""
    from vllm.model_executor.layers.fused_moe import fused_experts  # type: ignore[import-not-found]

    rows = x.reshape(-1, shape.hidden)

    def call() -> Any:
        weights, ids = block.gate(rows)[1:]
        return fused_experts(rows, block.experts.gate_up_proj, block.experts.down_proj, weights, ids)

    return call


def unique_experts(block: nn.Module, x: Tensor, options: dict[str, Any] | None) -> int:
    """Return the experts that a way uses, counted by the same passes without the fused kernels."""
    import torch

    import dmoe_compile

    counted = {**(options or {}), "stats": True, "experts": False}

    dmoe_compile.routing_stats(reset=True)
    torch.compile(block, backend="dmoe", options=counted, dynamic=False, isolate_recompiles=True)(x)  # type: ignore[call-overload]
    ((count,),) = dmoe_compile.routing_stats(reset=True).sites.values()
    return int(count)


def _ms(call: Callable[[], Any]) -> float:
    """Return the milliseconds of a call on a GPU."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"


def output(result: Any) -> Tensor:
    """Return what a block makes of tokens, [T, H]; some blocks return their router's logits too."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out.reshape(-1, out.shape[-1])
