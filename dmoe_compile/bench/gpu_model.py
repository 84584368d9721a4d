"""What one mixture-of-experts block moves and launches on a GPU, counted in its generated code; a model, not measured.

Inductor generates the code of a published block for a GPU that is not there (dmoe_compile.testing); every Triton kernel
of it is interpreted on the CPU, program by program, and what its loads and stores request is counted. Nobody wrote down
how many bytes a kernel should move.

    bytes   32-byte sectors that a kernel requests, once for each wave of one program a processor: what programs that
            run together share comes from the cache, and what later ones read again comes from memory again. ATen's
            kernels are not interpreted: their arguments, each once, of the experts' weights the active share.
    with L2 of these, what a launch reads in several waves counts once, if all that it so reads is less than half of
            what the second-level cache holds: hidden states, ids and the products between the launches.
    floor   the active experts' weights once, the block's input and its output
    us      for each launch the longer of bytes and dot products, at a share of the vendor's bandwidth and peak,
            and a fixed time a launch

Left out: attention and norms, latency inside of a kernel, and whether one program a processor is enough.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dmoe_compile.bench import Bar, Row, check_names, environment, narrow_table
from dmoe_compile.bench.gpu import TINY, build, hold, output, unique_experts
from dmoe_compile.bench.shapes import SHAPES as SHAPES
from dmoe_compile.bench.shapes import Shape
from dmoe_compile.passes.cost import GPUS, Machine

if TYPE_CHECKING:
    from rich.console import Group
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor

    from dmoe_compile.testing.generated import Generated
    from dmoe_compile.testing.generated_code import Graph
    from dmoe_compile.testing.generated_code import Launch as Step
    from dmoe_compile.testing.interpreter import Traffic

_ITEMSIZE = 2  # of bf16
# The vendors' figures, as in passes/cost.py; an H200 is an H100 with faster memory.
MACHINES = {
    "H100": GPUS["sm_90"].machine(_ITEMSIZE),
    "H200": Machine(4800, GPUS["sm_90"].half),
    "B200": GPUS["sm_100"].machine(_ITEMSIZE),
    "MI300X": GPUS["gfx942"].machine(_ITEMSIZE),
}
_PROCESSORS = 132  # of the GPU whose code is generated, an H100
_CACHE_BYTES = 25e6  # half of that GPU's second-level cache: weights that stream through take their part of it


@dataclass(frozen=True)
class Settings:
    """Which shapes and coresets, and what is assumed of a GPU.

    Attributes:
        shapes: names in bench.shapes.SHAPES, or "tiny".
        coresets: smallest coresets of the dmoe pass; 0 is the model's own routing.
        bandwidth_share: of the vendor's bandwidth, and of its peak, that a kernel reaches.
        launch_us: from one kernel's end to the next one's start, in a CUDA graph.
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    coresets: tuple[int, ...] = (0, 30, 15)
    bandwidth_share: float = 0.8
    launch_us: float = 1.5

    def __post_init__(self) -> None:
        check_names("shapes", self.shapes, [*SHAPES, "tiny"])
        for size in self.coresets:
            if size < 0:
                raise ValueError(f"coresets has {size}, but a coreset has 1 or more experts, or 0 for all")
        if not 0 < self.bandwidth_share <= 1:
            raise ValueError(f"bandwidth_share is {self.bandwidth_share}, but must be in (0, 1]")
        if self.launch_us < 0:
            raise ValueError(f"launch_us is {self.launch_us}, but must be 0 or more microseconds")
        if find_spec("triton") is None:
            raise ValueError("Triton is not installed, which the kernels are written in: pip install triton")


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Return a row for each shape, Inductor and every coreset."""
    env = environment() | asdict(settings)
    bar = Bar(progress, total=len(settings.shapes) * (len(settings.coresets) + 1))
    return [env | row for name in settings.shapes for row in _rows(name, settings, bar)]


def _rows(name: str, settings: Settings, bar: Bar) -> Iterator[Row]:
    import torch

    shape = SHAPES.get(name, TINY)
    block, x = build(shape, torch.device("cpu"), torch.bfloat16)
    for way, options in _ways(settings, shape).items():
        bar.say(f"{name}: {way}")
        with torch.no_grad():
            found = _generated(block, x, options)
            own, out = output(block(x)), output(found.run(x, wave=_PROCESSORS))
            unique = unique_experts(block, x, options)
        if not (options or {}).get("passes"):
            hold(out, own, f"{way} on {name}")
        yield {"shape": name, **asdict(shape), "way": way, "unique": unique} | _counted(found, shape, unique, settings)
        bar.advance()


def _ways(settings: Settings, shape: Shape) -> dict[str, dict[str, Any] | None]:
    """Return the options of backend="dmoe" by the way's name; None is Inductor."""
    ways: dict[str, dict[str, Any] | None] = {"inductor": None}
    # Weights on a GPU that is not there can't be checked against; what comes out is.
    fused = {"experts": True, "verify_experts": False}
    for size in settings.coresets:
        passes = {"passes": ["dmoe"], "dmoe.top_p": 1e-6, "dmoe.min_experts": size, "block_length": shape.tokens}
        ways[f"dmoe, {size} experts" if size else "dmoe, no pass"] = {**fused, **(passes if size else {})}
    return ways


def _generated(block: Any, x: Tensor, options: dict[str, Any] | None) -> Generated:
    """Return the code of a block for a GPU that is not there."""
    import torch

    from dmoe_compile.testing.fake_gpu import fake_gpu
    from dmoe_compile.testing.generated import generated

    how: dict[str, Any] = {} if options is None else {"backend": "dmoe", "options": options}
    with fake_gpu():
        return generated(torch.compile(block, fullgraph=True, dynamic=False, **how), x)


def _counted(found: Generated, shape: Shape, unique: int, settings: Settings) -> Row:
    """Return bytes, floor and times of a block whose code was run."""
    (graph,) = found.graphs
    weights = 3 * shape.hidden * shape.width * _ITEMSIZE * unique
    floor = weights + 2 * shape.tokens * shape.hidden * _ITEMSIZE
    steps = list(_steps(graph, found, unique / shape.num_experts))
    total, cached = (sum(step[name] for step in steps) for name in ("bytes", "cached_bytes"))
    return {
        "launches": len(steps),
        "bytes": total,
        "floor_bytes": floor,
        "over_floor": total / floor,
        "cached_bytes": cached,
        "cached_over_floor": cached / floor,
        "kernels": steps,
        "us": {name: sum(_us(step, machine, settings) for step in steps) for name, machine in MACHINES.items()},
        "floor_us": {name: floor / machine.gb_per_s / 1e3 for name, machine in MACHINES.items()},
    }


def _steps(graph: Graph, found: Generated, active: float) -> Iterator[Row]:
    """Yield name, bytes and operations of each launch; `active` is the share of experts that tokens are routed to."""
    ran = iter(found.ran)
    for step in graph.launches:
        if step.kind == "extern":
            size = _argument_bytes(step, graph, active)
            yield {"name": step.name, "bytes": size, "cached_bytes": size, "flops": 0}
            continue
        launch = next(ran)
        moved = sum(traffic.moved for traffic in launch.traffic.values())
        cached = _cached(launch.traffic.values())
        yield {"name": step.name, "bytes": moved, "cached_bytes": cached, "flops": launch.flops}
    if next(ran, None) is not None:
        raise RuntimeError("more kernels ran than the generated code launches")


def _cached(traffic: Collection[Traffic]) -> int:
    """Return the bytes that a launch moves where its cache holds what it reads again, if that is little enough."""
    again = sum(each.touched for each in traffic if each.moved > each.touched)
    return sum(each.touched if again < _CACHE_BYTES else each.moved for each in traffic)


def _argument_bytes(step: Step, graph: Graph, active: float) -> int:
    """Return the bytes of what a kernel of ATen's reads and writes, of a stack of experts the active share."""
    experts = {each.name for each in graph.inputs if each.is_parameter and len(each.shape) == 3}
    shares: Mapping[str, float] = dict.fromkeys(experts, active)
    return round(sum(graph.nbytes.get(name, 0) * shares.get(name, 1) for name in {*step.reads, *step.writes}))


def _us(step: Row, machine: Machine, settings: Settings) -> float:
    reading = step["bytes"] / machine.gb_per_s / 1e3
    multiplying = step["flops"] / machine.tflop_per_s / 1e6
    return float(max(reading, multiplying) / settings.bandwidth_share + settings.launch_us)


def table(rows: Sequence[Row]) -> Group:
    """Return the rows of run() as tables, one for each shape."""
    from rich.console import Group

    tables: dict[str, Table] = {}
    for row in rows:
        shape = row["shape"]
        if shape not in tables:
            tables[shape] = narrow_table(
                *("way", "used", "launches", "MB", "floor", "with L2", *MACHINES),
                title=f"{shape}, bf16, last columns in us: MODEL, NOT MEASURED",
            )
        over = f"{row['over_floor']:.3f}", f"{row['cached_over_floor']:.3f}"
        times = (f"{row['us'][name]:.0f}" for name in MACHINES)
        size = str(row["unique"]), str(row["launches"]), f"{row['bytes'] / 1e6:.1f}"
        tables[shape].add_row(row["way"], *size, *over, *times)
    first = rows[0]
    assumed = (
        "MB are counted in the code generated for an H100, every kernel interpreted. Floor: against the active "
        "experts' weights, input and output once. With L2: the same, where what a launch reads again stays in the "
        f"cache. Times are of MB, and assume that every launch reaches {first['bandwidth_share']:.0%} of the vendor's "
        f"bandwidth or peak and costs {first['launch_us']:g} us."
    )
    return Group(*tables.values(), assumed)
