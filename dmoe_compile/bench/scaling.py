"""How a decoder layer's time grows: with the experts in use, with tokens, with sequences: `dmoe bench scaling`.

One layer of bench/layer.py (transformers' own, random weights, 512 cached tokens before each block), three sweeps:

    experts   one block of 32 tokens, held to 8, 16, ... of the E experts by the dmoe pass
    tokens    one block of 1 to 512 tokens, the model's own experts
    batch     1 to 16 sequences of 32 tokens; beside the model's own experts coresets of 16, one for each block
              (scope="block") or one for all (scope="batch")

Ways are timed in turn, medians of single calls. The roofline is the least time in which this machine, as measured in
the same run, can read the weights in use once or do the multiplications; attention's own products are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dmoe_compile.bench import (
    Bar,
    Row,
    check_names,
    check_threads,
    describe,
    environment,
    in_turn,
    narrow_table,
    use_threads,
)
from dmoe_compile.bench.layer import SHAPES, TINY, TOKENS
from dmoe_compile.bench.shapes import Shape
from dmoe_compile.config import check_int

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor

INDUCTOR, KERNEL = "inductor", "dmoe"
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCHES = (1, 2, 4, 8, 16)
_CORESET = 16


@dataclass(frozen=True)
class Settings:
    """Whose widths (a key of layer.SHAPES, or tiny), which sweeps, timed calls, dtype and CPU threads."""

    shape: str = "LLaDA2.0-mini"
    sweeps: tuple[str, ...] = ("experts", "tokens", "batch")
    calls: int = 10
    dtype: str = "bfloat16"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_names("shape", [self.shape], [*SHAPES, "tiny"])
        check_names("sweeps", self.sweeps, _SWEEPS)
        check_int("calls", self.calls, "timed calls of each way")
        check_names("dtype", [self.dtype], ["float32", "bfloat16"])
        check_threads(self.threads)


@dataclass(frozen=True)
class _Point:
    """Where on a sweep: its value, tokens and sequences of a forward, our backend's options by way; None: Inductor."""

    value: int
    tokens: int
    batch: int
    ways: Mapping[str, dict[str, Any] | None]


def _coreset(size: int, **more: Any) -> dict[str, Any]:
    return {"passes": ["dmoe"], "dmoe.top_p": 1e-6, "dmoe.min_experts": size, **more}


def _experts(num_experts: int, top_k: int) -> Iterator[_Point]:
    size = top_k
    while size <= num_experts:
        ways = {INDUCTOR: _coreset(size, experts=False), KERNEL: _coreset(size)}
        yield _Point(size, TOKENS, 1, ways)
        size *= 2


def _lengths(num_experts: int, top_k: int) -> Iterator[_Point]:
    yield from (_Point(tokens, tokens, 1, {INDUCTOR: None, KERNEL: {}}) for tokens in LENGTHS)


def _batches(num_experts: int, top_k: int) -> Iterator[_Point]:
    size = min(_CORESET, num_experts)
    ways = {INDUCTOR: None, KERNEL: {}, "dmoe, block": _coreset(size), "dmoe, batch": _coreset(size, scope="batch")}
    yield from (_Point(batch, TOKENS, batch, ways) for batch in BATCHES)


_SWEEPS: dict[str, Callable[[int, int], Iterator[_Point]]] = {
    "experts": _experts, "tokens": _lengths, "batch": _batches,
}  # fmt: skip
_AXES = {
    "experts": "unique experts", "tokens": "tokens of a block", "batch": f"sequences of {TOKENS} tokens",
}  # fmt: skip


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Return a row for every sweep, value and way."""
    import torch

    from dmoe_compile.machine import bandwidth, peak

    use_threads(settings.threads)
    shape = SHAPES.get(settings.shape, TINY)
    points = [(sweep, point) for sweep in settings.sweeps for point in _SWEEPS[sweep](shape.num_experts, shape.top_k)]
    bar = Bar(progress, total=len(points))
    dtype: torch.dtype = getattr(torch, settings.dtype)
    device = torch.device("cpu")
    speeds, peaks, rows = [], [], []
    with torch.no_grad():
        for sweep, point in points:
            bar.say(f"{sweep}: {point.value}")
            rows += [{"sweep": sweep, "value": point.value, **row} for row in _measured(point, shape, dtype, settings)]
            speeds.append(bandwidth(device))
            peaks.append(peak(device, dtype))
            torch._dynamo.reset()
            bar.advance()
    env = asdict(settings) | environment() | {"gb_per_s": median(speeds), "tflop_per_s": median(peaks)}
    return [env | row | {"floor_ms": _floor_ms(row, env)} for row in rows]


def _measured(point: _Point, shape: Shape, dtype: torch.dtype, settings: Settings) -> Iterator[Row]:
    """Yield the row of each way at a point."""
    from dmoe_compile.bench.gpu import unique_experts
    from dmoe_compile.bench.layer import build

    layer, x = build(shape, dtype, point.tokens, point.batch)
    calls = {way: partial(_compiled(layer, options), x) for way, options in point.ways.items()}
    for call in calls.values():
        call()
    times = in_turn(calls, settings.calls)
    bank = layer.layer.mlp.experts
    one = (bank.gate_up_proj[0].numel() + bank.down_proj[0].numel()) * x.element_size()
    whole = sum(weight.nbytes for weight in layer.parameters())
    for way, ms in times.items():
        options = point.ways[way]
        yield {
            "way": way, "unique": unique_experts(layer, x, options), "ms": median(ms),
            "tokens": point.tokens * point.batch, "top_k": shape.top_k, "expert_bytes": one,
            "other_bytes": whole - shape.num_experts * one, "itemsize": x.element_size(),
        }  # fmt: skip


def _compiled(layer: Any, options: dict[str, Any] | None) -> Callable[[Tensor], Any]:
    import torch

    how: dict[str, Any] = {} if options is None else {"backend": "dmoe", "options": options or None}
    return torch.compile(layer, fullgraph=True, dynamic=False, isolate_recompiles=True, **how)  # type: ignore[call-overload]


def _floor_ms(row: Mapping[str, Any], env: Mapping[str, Any]) -> float:
    read = row["unique"] * row["expert_bytes"] + row["other_bytes"]
    flop = 2 * row["tokens"] * (row["top_k"] * row["expert_bytes"] + row["other_bytes"]) / row["itemsize"]
    floor: float = max(read / env["gb_per_s"] / 1e6, flop / env["tflop_per_s"] / 1e9)
    return floor


def table(rows: Sequence[Row]) -> Table:
    """Return the rows of run() as a table."""
    first = rows[0]
    out = narrow_table(
        *("sweep", "", "way", "unique experts", "ms", "roofline ms"),
        title=f"One decoder layer of {first['shape']}'s widths, {first['dtype']}; medians of single calls",
    )
    for row in rows:
        out.add_row(
            row["sweep"],
            str(row["value"]),
            row["way"],
            str(row["unique"]),
            f"{row['ms']:.2f}",
            f"{row['floor_ms']:.2f}",
        )
    return out


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what the machine is."""
    first = rows[0]
    yield f"{describe(first)}; reads {first['gb_per_s']:.3g} GB/s, multiplies {first['tflop_per_s']:.3g} TFLOP/s"


def draw(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draw every sweep beside its rooflines as PNG and SVG, and return both files; `path` is without its suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = Figure(figsize=(5 * len(sweeps), 4), layout="constrained")
    figure.suptitle(f"One decoder layer of {rows[0]['shape']}'s widths, {rows[0]['dtype']}, {rows[0]['device']}")
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        for way in dict.fromkeys(row["way"] for row in rows if row["sweep"] == sweep):
            chosen = [row for row in rows if row["sweep"] == sweep and row["way"] == way]
            x = [row["unique" if sweep == "experts" else "value"] for row in chosen]
            (line,) = axes.plot(x, [row["ms"] for row in chosen], marker="o", label=way)
            if way != INDUCTOR:  # whose own roofline is that of the same experts
                axes.plot(x, [row["floor_ms"] for row in chosen], linestyle=":", color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 32, not 2 to the power of 5
        axes.set_xlabel(_AXES[sweep])
        axes.set_ylabel("ms a layer; dotted: roofline")
        axes.legend(fontsize=8)
    files = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    FigureCanvasAgg(figure).print_png(files[0])
    FigureCanvasSVG(figure).print_svg(files[1])
    return files
