"""What it costs to prepare and compile models as they are published: real numbers of experts and layers, small width.

Models: layers of one published block (dmoe_compile.bench.published) with a norm and a residual each; hidden 64,
experts of width 32, one sequence of 32 tokens, fp32. Each provider has a fresh process and an empty cache.

    prepare      seconds of prepare(): stacking, and comparing every block with its original.
    first call   seconds of torch.compile and the first call.
    graphs       graphs that Dynamo made; breaks: where it broke them.
    guards       milliseconds that Dynamo's guards take, each time after a whole call (which empties the caches of
                 the processor), median of 100; not for a model in several graphs.
    outside      milliseconds of a call that are not spent in generated code, guards among them, median of 100.
    call         milliseconds of a whole call, median of 100.

Plain Inductor gets the same model unprepared, and as much time as is given.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dmoe_compile.bench import Bar, Row, check_threads, describe, environment, in_fresh_process, use_threads
from dmoe_compile.bench.shapes import SHAPES

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor, nn

_HIDDEN, _WIDTH, _TOKENS = 64, 32, 32
_CALLS = 100
GOAL_S = 120.0  # prepare and first call
GUARDS_GOAL_MS = 2.0
MODELS: dict[str, Row] = {
    "SDAR-30B-A3B": {"block": "SoftmaxLoop", "experts": SHAPES["SDAR-30B-A3B"].num_experts, "layers": 48},
    "LLaDA2.0-mini": {"block": "Bailing", "experts": SHAPES["LLaDA2.0-mini"].num_experts, "layers": 20},
}
PROVIDERS = ("dmoe", "inductor")


@dataclass(frozen=True)
class Settings:
    """Share of each model's layers, seconds for plain Inductor, CPU threads (None: torch's choice)."""

    layers: float = 1.0
    timeout_s: float = 300.0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.layers <= 1:
            raise ValueError(f"layers is {self.layers}, but must be a share in (0, 1]")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}, but must be above 0 seconds")
        check_threads(self.threads)


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Measure every model with every provider and return a row for each."""
    rows: list[Row] = []
    bar = Bar(progress, total=len(MODELS) * len(PROVIDERS))
    for name in MODELS:
        for provider in PROVIDERS:
            bar.say(f"{name} {provider}")
            job = {"model": name, "provider": provider, **asdict(settings)}
            timeout_s = settings.timeout_s if provider == "inductor" else None
            with tempfile.TemporaryDirectory(prefix="dmoe-bench-") as folder:
                try:
                    rows.append(job | in_fresh_process(__name__, job, folder, timeout_s))
                except subprocess.TimeoutExpired:
                    rows.append(job | {"first_call_s": None, "stopped_after_s": settings.timeout_s})
            bar.advance()
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return the rows of run() as a table."""
    from rich.table import Table

    caption = describe(rows[0]) if "device" in rows[0] else None
    columns = (
        "",
        "backend",
        "prepare, s",
        "first call, s",
        "graphs",
        "breaks",
        "guards, ms",
        "outside, ms",
        "call, ms",
    )
    goals = f"goals: under {GOAL_S:g} s in all, 1 graph, 0 breaks, guards under {GUARDS_GOAL_MS:g} ms"
    title = f"Published models, experts x layers ({goals})"
    out = Table(*columns, title=title, caption=caption, caption_justify="left")
    for row in rows:
        model = MODELS[row["model"]]
        name = f"{row['model']}: {model['experts']} x {row.get('layers_made', model['layers'])}"
        if row["first_call_s"] is None:
            out.add_row(name, row["provider"], "", f"stopped after {row['stopped_after_s']:.0f}", *[""] * 5)
            continue
        prepare = f"{row['prepare_s']:.1f}" if row["prepare_s"] else ""
        guards = "" if row["guards_ms"] is None else f"{row['guards_ms']:.2f}"
        calls = (guards, f"{row['outside_ms']:.2f}", f"{row['call_ms']:.1f}")
        out.add_row(
            name, row["provider"], prepare, f"{row['first_call_s']:.1f}", str(row["graphs"]), str(row["breaks"]), *calls
        )
    return out


def _child(job: Row) -> Row:
    """Do one job of run() in this process."""
    import torch
    from torch._dynamo.utils import counters

    import dmoe_compile
    from dmoe_compile.bench.overhead import outside_us

    use_threads(job["threads"])
    model = build(job["model"], job["layers"])
    x = torch.randn(1, _TOKENS, _HIDDEN)
    prepare_s = 0.0
    with torch.no_grad():
        if job["provider"] == "dmoe":
            start = time.perf_counter()
            report = dmoe_compile.prepare(model)
            prepare_s = time.perf_counter() - start
            assert not report.refused, report
            compiled = dmoe_compile.compile(model, dmoe_compile.Config(passes=("dmoe",)))
        else:
            compiled = torch.compile(model)
        first_call_s = _seconds(compiled, x)
        guards_ms = _guards_ms(model, compiled, x) if counters["stats"]["unique_graphs"] == 1 else None
        outside_ms = median(outside_us(compiled, x) for _ in range(_CALLS)) / 1e3
        call_ms = median(_seconds(compiled, x) for _ in range(_CALLS)) * 1e3
    return environment() | {
        "layers_made": len(list(model.get_submodule("layers").children())),
        "prepare_s": prepare_s,
        "first_call_s": first_call_s,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "sites": counters["dmoe"]["sites_rewritten"],
        "guards_ms": guards_ms,
        "outside_ms": outside_ms,
        "call_ms": call_ms,
    }


def build(name: str, share: float = 1.0) -> nn.Module:
    """Return `share` of a model's layers with random weights."""
    import torch
    from torch import nn

    from dmoe_compile.bench import published

    class Model(nn.Module):
        def __init__(self, layers: list[Layer]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    class Layer(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(_HIDDEN)
            self.mlp = block

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))[0]

    spec = MODELS[name]
    config = SimpleNamespace(
        hidden_size=_HIDDEN,
        moe_intermediate_size=_WIDTH,
        num_experts=spec["experts"],
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_shared_experts=1,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        mlp_bias=False,
    )
    torch.manual_seed(0)
    count = max(1, round(spec["layers"] * share))
    return Model([Layer(getattr(published, spec["block"])(config)) for _ in range(count)]).eval()


def _seconds(call: Callable[[Tensor], Any], x: Tensor) -> float:
    start = time.perf_counter()
    call(x)
    return time.perf_counter() - start


def _guards_ms(model: nn.Module, compiled: Callable[[Tensor], Any], x: Tensor) -> float:
    """Return the median time of the guards on a model that fell into one graph."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    (entry,) = _debug_get_cache_entry_list(type(model).forward.__code__)
    frame, times_ms = {"self": model, "x": x}, []
    for _ in range(_CALLS):
        compiled(x)
        start = time.perf_counter()
        passed = entry.guard_manager.check(frame)
        times_ms.append((time.perf_counter() - start) * 1e3)
        assert passed
    return median(times_ms)


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
