"""The experts of one mixture-of-experts layer on a CPU, at published widths: the kernel against what users have.

A row is one published shape, dtype, number of tokens, and number of distinct experts that they are routed to. Ways are
timed in turn with two probes: a linear read of the same experts by all threads, and multiply-adds in registers.

    roofline   the longer of two times: to read the experts in use at the first probe's speed, and to do the layer's
               floating-point operations at the second's
    fraction   the roofline as a share of the kernel's time
    regime     memory-bound where reading takes twice as long as multiplying or longer, compute-bound the other way
               round, else balanced
    over ...   how many times as long another way takes: transformers' experts by grouped_mm, eager and through
               Inductor, its loop over experts, one matmul after another, and the kernel on a copy of the weights
               that lies on huge pages; making these is not part of that time, but said
"""

from __future__ import annotations

import copy
import ctypes
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import exp, log
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from dmoe_compile.bench import Bar, Row, check_names, describe, environment, in_turn, narrow_table
from dmoe_compile.bench.gpu import TINY
from dmoe_compile.bench.shapes import SHAPES, Shape

if TYPE_CHECKING:
    import torch
    from rich.console import Group
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor, nn

    from dmoe_compile.kernels.experts_cpu import Operands

NAMES = tuple(SHAPES)
TOKENS = (32, 64, 128, 256)
DISTINCT = (0, 70, 40, 15, 8)  # experts; 0: as many as random routing uses
DTYPES = ("bfloat16", "float32")
_GELU_TANH = "DiffusionGemma-26B-A4B"
HUGE = "huge pages"
WAYS = ("grouped_mm", "inductor", "loop", HUGE)
# Geometric means of `fraction` and of `over grouped_mm` that the kernel is written for.
GOALS = {
    ("memory-bound", "bfloat16"): (0.95, 2.5), ("balanced", "bfloat16"): (0.75, 2.2),
    ("compute-bound", "bfloat16"): (0.85, 1.5), ("memory-bound", "float32"): (0.95, 4.0),
    ("balanced", "float32"): (0.75, None), ("compute-bound", "float32"): (0.75, None),
}  # fmt: skip
_TOLERANCE = {"bfloat16": 0.01, "float32": 1e-5}  # root mean square, relative to fp32
_PROBE_STEPS = 1_000_000  # some 7 ms: starting threads takes a tenth of one


@dataclass(frozen=True)
class Settings:
    """What to measure: shapes, tokens, distinct experts (0 for all), dtypes, timed calls, instruction set, ways."""

    shapes: tuple[str, ...] = NAMES
    tokens: tuple[int, ...] = TOKENS
    distinct: tuple[int, ...] = DISTINCT
    dtypes: tuple[str, ...] = DTYPES
    calls: int = 20
    isa: Any = None
    inductor: bool = True
    huge_pages: bool = False

    def __post_init__(self) -> None:
        from typing import get_args

        from dmoe_compile.kernels.experts_cpu import Isa

        check_names("shapes", self.shapes, (*SHAPES, "tiny"))
        check_names("dtypes", self.dtypes, DTYPES)
        check_names("isa", () if self.isa is None else (self.isa,), get_args(Isa))
        if self.calls < 1 or min(self.tokens, default=0) < 1 or min(self.distinct, default=-1) < 0:
            got = f"calls={self.calls}, tokens={self.tokens}, distinct={self.distinct}"
            raise ValueError(f"{got}: there must be at least one call, one token, and no negative number of experts")


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Return a row for each shape, dtype, number of tokens and number of distinct experts."""
    import torch

    from dmoe_compile.kernels.experts_cpu import best_isa

    env = environment() | {"isa": settings.isa or best_isa(), "calls": settings.calls}
    cases = [(name, dtype) for dtype in settings.dtypes for name in settings.shapes]
    bar = Bar(progress, total=sum(len(_sizes(settings, SHAPES.get(name, TINY))) for name, _ in cases))
    with torch.no_grad():
        return [env | row for name, dtype in cases for row in _rows(name, dtype, settings, bar)]


def table(rows: Sequence[Row]) -> Group:
    """Return the rows of run() as tables, one for each shape and dtype."""
    from rich.console import Group

    tables: dict[str, Table] = {}
    for row in rows:
        title = f"{row['shape']}, {row['dtype']}: medians; last columns: how many times as long others take"
        ways = [way for way in WAYS if way in row["over"]]
        columns = "tokens", "experts", "near", "ms", "GB/s", "of roof", *ways
        if title not in tables:
            tables[title] = narrow_table(*columns, title=title)
        over = (f"{row['over'][way]:.2f}x" for way in ways)
        size = str(row["tokens"]), str(row["unique"]), row["regime"].removesuffix("-bound")
        tables[title].add_row(
            *size, f"{row['ms']['dmoe']:.2f}", f"{row['gb_per_s']:.1f}", f"{row['fraction']:.2f}", *over
        )
    return Group(*tables.values(), describe(rows[0]))


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Yield geometric means beside the goals, by regime and dtype."""
    for (regime, dtype), (goal, goal_over) in GOALS.items():
        own = [row for row in rows if (row["regime"], row["dtype"]) == (regime, dtype)]
        if not own:
            continue
        fraction, over = _mean(row["fraction"] for row in own), _mean(row["over"]["grouped_mm"] for row in own)
        beside = "" if goal_over is None else f" (goal {goal_over}x)"
        reached = f"{fraction:.2f} of the roofline (goal {goal}), {over:.2f}x over grouped_mm{beside}"
        yield f"{regime}, {dtype}: {reached}, {len(own)} rows"


def _rows(name: str, dtype: str, settings: Settings, bar: Bar) -> Iterator[Row]:
    import torch

    shape = SHAPES.get(name, TINY)
    bar.say(f"{name}, {dtype}: build")
    experts = build(shape, getattr(torch, dtype), "gelu_pytorch_tanh" if name == _GELU_TANH else "silu")
    copied, huge_s = _on_huge_pages(experts) if settings.huge_pages else (None, None)
    for tokens, distinct in _sizes(settings, shape):
        bar.say(f"{name}, {dtype}: {tokens} tokens")
        hidden, ids, weights = draw(shape, tokens, distinct, getattr(torch, dtype))
        ways = dict(_ways(experts, copied, settings))
        calls = {way: partial(call, hidden, ids, weights) for way, call in ways.items()}
        _verify(calls, experts, (hidden, ids, weights), dtype)
        used = ids.unique().tolist()
        flops_of_probe, probes = _probes(experts, used, dtype, settings)
        ms = {way: median(times) for way, times in in_turn(calls | probes, settings.calls).items()}
        flops = 6 * tokens * shape.top_k * shape.hidden * shape.width
        size = len(used) * 3 * shape.hidden * shape.width * hidden.element_size()
        compute_ms = ms["multiply"] * flops / flops_of_probe
        roofline = max(ms["read"], compute_ms)
        yield {
            "shape": name, **asdict(shape), "dtype": dtype, "tokens": tokens, "distinct": distinct, "unique": len(used),
            "ms": ms, "gb_per_s": size / ms["dmoe"] / 1e6, "read_gb_per_s": size / ms["read"] / 1e6,
            "gflop_per_s": flops / ms["dmoe"] / 1e6, "peak_gflop_per_s": flops_of_probe / ms["multiply"] / 1e6,
            "regime": regime(ms["read"], compute_ms), "roofline_ms": roofline, "fraction": roofline / ms["dmoe"],
            "over": {way: ms[way] / ms["dmoe"] for way in WAYS if way in ms}, "huge_pages_s": huge_s,
        }  # fmt: skip
        bar.advance()


def regime(read_ms: float, compute_ms: float) -> str:
    """Return which of the two limits a layer is near."""
    if read_ms >= 2 * compute_ms:
        return "memory-bound"
    return "compute-bound" if compute_ms >= 2 * read_ms else "balanced"


def build(shape: Shape, dtype: torch.dtype, activation: str) -> nn.Module:
    """Return transformers' experts of a shape, with random weights, in no more memory than they take."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.width, num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k, hidden_act=activation,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts: nn.Module = Qwen3MoeExperts(config).to(dtype)
    experts = experts.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return experts


def draw(shape: Shape, tokens: int, distinct: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, ids and weights of tokens that are routed to no more than `distinct` experts; 0 for any."""
    import torch

    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.randperm(shape.num_experts, generator=generator)[: distinct or shape.num_experts]
    places = torch.rand(tokens, len(chosen), generator=generator).topk(min(shape.top_k, len(chosen))).indices
    weights = torch.rand(places.shape, generator=generator).softmax(-1)
    return torch.randn(tokens, shape.hidden, generator=generator).to(dtype), chosen[places], weights.to(dtype)


def _on_huge_pages(experts: nn.Module) -> tuple[list[Tensor], float]:
    """Return copies of gate_up and down on huge pages, and the seconds that putting them there took."""
    from dmoe_compile import huge_pages

    copies = [bank.detach().clone() for bank in (experts.gate_up_proj, experts.down_proj)]  # type: ignore[operator]
    start = time.perf_counter()
    if not huge_pages.use(copies):
        raise ValueError("huge_pages is True, but there are none to have; the warning above says why")
    return copies, time.perf_counter() - start


def _ways(
    experts: nn.Module, copied: Sequence[Tensor] | None, settings: Settings
) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    import torch

    from dmoe_compile.kernels import experts_cpu

    banks = experts.gate_up_proj, experts.down_proj
    kernel = experts_cpu.built(banks[0].dtype, settings.isa)
    if kernel is None:
        raise ValueError("the kernel can't be built here; the warning above says why")

    def dmoe(gate_up: Tensor, down: Tensor, *routed: Tensor) -> Tensor:
        return experts_cpu.run(kernel, _operands(experts, gate_up, down, *routed), gate_up.dtype)

    yield "dmoe", partial(dmoe, *banks)  # type: ignore[arg-type]
    if copied is not None:
        yield HUGE, partial(dmoe, *copied)
    yield "grouped_mm", experts
    if settings.inductor:
        yield "inductor", torch.compile(experts, fullgraph=True, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]
    loop = copy.copy(experts)  # the same weights
    loop.config = copy.copy(experts.config)
    loop.config._experts_implementation = "eager"  # type: ignore[union-attr]
    yield "loop", loop


def _operands(
    experts: nn.Module, gate_up: Tensor, down: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Operands:
    """Return the kernel's operands for these experts of a module, whose activation they have."""
    from dmoe_compile.kernels.experts_cpu import Operands

    activation = "gelu_tanh" if experts.config.hidden_act == "gelu_pytorch_tanh" else "silu"  # type: ignore[union-attr]
    form = "concatenated", False, False, activation, 0.0, 0.0
    return Operands(hidden, ids, weights, gate_up, None, down, None, None, None, *form)


def _verify(
    calls: Mapping[str, Callable[[], Tensor]], experts: nn.Module, given: tuple[Tensor, ...], dtype: str
) -> None:
    """Hold every way against fp32 on the first tokens: all would take all experts in fp32, which are gigabytes."""
    import torch

    from dmoe_compile.kernels.experts_cpu import reference

    hidden, ids, weights = (x[:4] for x in given)
    used, places = ids.unique(return_inverse=True)
    bank = experts.gate_up_proj[used], experts.down_proj[used]  # type: ignore[index]
    truth = reference(_operands(experts, *bank, hidden, places, weights))
    for way, call in calls.items():
        off = float(torch.norm(call()[:4].float() - truth) / torch.norm(truth))
        if not off < _TOLERANCE[dtype]:
            raise RuntimeError(f"{way} is off by {off:.2g} in {dtype}: a wrong kernel has no speed")


def _probes(experts: nn.Module, used: Sequence[int], dtype: str, settings: Settings) -> tuple[float, dict[str, Any]]:
    """Return what the second probe does, in floating-point operations, and both probes."""
    import torch

    from dmoe_compile.kernels.experts_cpu import FLAGS, best_isa
    from dmoe_compile.kernels.native import library

    isa = settings.isa or best_isa()
    probes = library("probes", (*FLAGS[isa], "-ffp-contract=fast"))
    assert probes is not None  # the kernel has been built
    probes.multiply.restype = ctypes.c_double
    threads = torch.get_num_threads()
    read = [bank[e] for bank in (experts.gate_up_proj, experts.down_proj) for e in used]  # type: ignore[index]
    ranges = (ctypes.c_void_p * len(read))(*(x.data_ptr() for x in read))
    sizes = (ctypes.c_int64 * len(read))(*(x.nbytes for x in read))
    steps = ctypes.c_int64(_PROBE_STEPS), int(dtype == "bfloat16"), threads
    return probes.multiply(*steps), {
        "read": partial(probes.read, ranges, sizes, ctypes.c_int64(len(read)), threads),
        "multiply": partial(probes.multiply, *steps),
    }


def _sizes(settings: Settings, shape: Shape) -> list[tuple[int, int]]:
    """Return tokens and distinct experts, of no less than a shape's own tokens and no more experts than it has."""
    fits = [each for each in settings.distinct if shape.top_k <= each <= shape.num_experts or each == 0]
    return [(tokens, each) for tokens in settings.tokens if tokens >= shape.tokens for each in fits]


def _mean(values: Iterable[float]) -> float:
    return exp(fmean(log(value) for value in values))
