"""What the backend costs beside plain Inductor: compile time, guards, time per call.

The model is a qwen3_moe: hidden 256, 64 experts, 8 a token, grouped_mm, one sequence of 64 tokens, fp32.
Providers: plain Inductor, dmoe with no pass, and dmoe with the dMoE rule on every layer.

    start        seconds of torch.compile and the first call, in a fresh process. Cold: with an empty cache folder of
                 its own; warm: a second process on that folder. Providers take turns. Building the model and importing
                 torch and transformers are not counted; what a first compile imports is.
    matcher      milliseconds to find all sites in the normalised graph, over the number of sites.
    guards       leaf guards that Dynamo checks on every call.
    call         microseconds of one call; "outside" is what is not spent in Inductor's generated code: guards,
                 Dynamo's and AOTAutograd's wrappers, ours. Only that part can be compared with the dMoE
                 rule on: then the generated code does more, for it computes votes and coresets. Calls are
                 interleaved, and from several processes that compile the providers in another order each:
                 where code and guards lie in memory costs more than the wrappers do.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

from dmoe_compile.bench import Bar, Row, check_threads, describe, environment, in_fresh_process, use_threads
from dmoe_compile.config import check_int

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor, fx
    from transformers import Qwen3MoeForCausalLM

_T = TypeVar("_T")
PROVIDERS: dict[str, Row | None] = {
    "inductor": None,
    "dmoe, no pass": {"passes": []},
    "dmoe, dmoe pass": {"passes": ["dmoe"]},
}
COLD_GOAL = 1.25  # x plain Inductor
WARM_GOAL = 1.15
MATCHER_GOAL_MS = 5.0  # a site
CALL_GOAL_US = 20.0  # more than plain Inductor
_TOKENS = 64
_WARMUP_CALLS = 20
_MATCHER_RUNS = 5


@dataclass(frozen=True)
class Settings:
    """Layers of the model, fresh processes of each kind, timed calls in all, CPU threads (None: torch's choice)."""

    layers: int = 12
    repeats: int = 3
    calls: int = 1000
    threads: int | None = None

    def __post_init__(self) -> None:
        check_int("layers", self.layers, "layers of the model")
        check_int("repeats", self.repeats, "fresh processes of each kind")
        check_int("calls", self.calls, "timed calls of each provider")
        check_threads(self.threads)


@dataclass(frozen=True)
class Times:
    """Microseconds of each call by provider: whole, and outside of Inductor's generated code."""

    whole: dict[str, list[float]]
    outside: dict[str, list[float]]

    @classmethod
    def of(cls, providers: Iterable[str]) -> Times:
        """Return no times yet."""
        return cls({provider: [] for provider in providers}, {provider: [] for provider in providers})

    def add(self, other: Times) -> None:
        """Append another process's calls."""
        for mine, theirs in ((self.whole, other.whole), (self.outside, other.outside)):
            for provider, each in theirs.items():
                mine.setdefault(provider, []).extend(each)


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Measure everything, each in processes of its own, and return the rows: one for each figure and provider."""
    jobs = []
    for turn in range(settings.repeats):
        for name in _rotated(list(PROVIDERS), turn):
            jobs += [("first call", name, "cold", turn), ("first call", name, "warm", turn)]
        jobs.append(("steady", "all", "", turn))
    bar = Bar(progress, total=len(jobs))
    seconds: dict[tuple[str, str], list[float]] = {}
    steady: list[Row] = []
    times = Times.of(PROVIDERS)
    answer: Row = {}
    with _cache_folders() as folder_of:
        for kind, provider, cache, turn in jobs:
            bar.say(" ".join((kind, provider, cache)).strip())
            job = {"kind": kind, "provider": provider, "turn": turn, **asdict(settings)}
            answer = in_fresh_process(__name__, job, folder_of(provider, cache))
            if kind == "first call":
                seconds.setdefault((provider, cache), []).append(answer["s"])
            else:
                steady = answer["rows"]
                times.add(Times(**answer["times"]))
            bar.advance()
    common = answer["env"] | {"layers": settings.layers, "tokens": _TOKENS}
    return [common | row for row in _first_call_rows(seconds) + steady + _call_rows(times)]


def table(rows: Sequence[Row]) -> Table:
    """Return the rows of run() as one table: a figure a line, a provider a column."""
    from rich.table import Table

    names = list(PROVIDERS)
    title = f"Overhead on a qwen3_moe of {rows[0]['layers']} layers"
    out = Table("", *names, "goal", title=title, caption=describe(rows[0]), caption_justify="left")
    for column in out.columns[1:]:
        column.justify = "right"
    for cache, goal in (("cold", COLD_GOAL), ("warm", WARM_GOAL)):
        found = {row["provider"]: row for row in rows if row["kind"] == "first call" and row["cache"] == cache}
        cells = [f"{found[name]['s_median']:.1f} ({found[name]['ratio']:.2f}x)" for name in names]
        out.add_row(f"{cache} start, s", *cells, f"< {goal}x")
    (matcher,) = [row for row in rows if row["kind"] == "matcher"]
    out.add_row(
        "matcher, ms a site",
        "",
        "",
        f"{matcher['ms_per_site']:.2f}",
        f"< {MATCHER_GOAL_MS:g}",
    )
    guards = {row["provider"]: row["guards"] for row in rows if row["kind"] == "guards"}
    out.add_row("guards", *(str(guards[name]) for name in names), "the same")
    call = {row["provider"]: row for row in rows if row["kind"] == "call"}
    for key, label, goal_text in (
        ("outside_us", "call outside, us", f"<= +{CALL_GOAL_US:g}"),
        ("whole_us", "call whole, us", ""),
    ):
        cells = [f"{call[name][key]:.0f} ({call[name][f'extra_{key}']:+.1f})" for name in names]
        out.add_row(label, *cells, goal_text)
    return out


def _first_call_rows(seconds: dict[tuple[str, str], list[float]]) -> list[Row]:
    rows = []
    for (provider, cache), each in seconds.items():
        ratio = median(each) / median(seconds["inductor", cache])
        figures = {"s": each, "s_median": median(each), "ratio": ratio}
        rows.append({"kind": "first call", "provider": provider, "cache": cache, **figures})
    return rows


@contextmanager
def _cache_folders() -> Iterator[Callable[[str, str], str]]:
    """Give each cold run an empty folder, and the warm run after it the same one."""
    root = tempfile.mkdtemp(prefix="dmoe-bench-")

    def folder_of(provider: str, cache: str) -> str:
        folder = os.path.join(root, provider.replace(", ", "-").replace(" ", "-"))
        if cache != "warm":
            shutil.rmtree(folder, ignore_errors=True)
        return folder

    try:
        yield folder_of
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _child(job: Row) -> Row:
    """Do one job of run() in this process."""
    import torch

    use_threads(job["threads"])
    model, ids = build(job["layers"])
    with torch.no_grad():
        if job["kind"] == "first call":
            return {"s": first_call_s(model, ids, job["provider"]), "env": environment()}
        calls = -(-job["calls"] // job["repeats"])  # those of a process
        rows, times = steady(model, ids, calls, job["turn"])
    return {"rows": rows, "times": asdict(times), "env": environment()}


def build(layers: int) -> tuple[Qwen3MoeForCausalLM, Tensor]:
    """Return the model with random weights and its input, ids [1, 64]."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    return model, torch.randint(config.vocab_size, (1, _TOKENS))


def first_call_s(model: Qwen3MoeForCausalLM, ids: Tensor, provider: str) -> float:
    """Return the seconds of torch.compile and the first call."""
    start = time.perf_counter()
    _compile(_forward(model), provider)(ids)
    return time.perf_counter() - start


def steady(model: Qwen3MoeForCausalLM, ids: Tensor, calls: int, turn: int = 0) -> tuple[list[Row], Times]:
    """Return what one process can measure: the rows of matcher and guards, and the times of calls."""
    forward = _forward(model)
    rows: list[Row] = [_matcher_row(forward, ids)]
    compiled = {}
    for provider in _rotated(list(PROVIDERS), turn):
        compiled[provider] = _compile(forward, provider)
        compiled[provider](ids)
        rows.append({"kind": "guards", "provider": provider, "guards": _newest_guards(forward)})
    return rows, _time_calls(compiled, ids, calls)


def _call_rows(times: Times) -> list[Row]:
    rows: list[Row] = []
    for provider, each in times.whole.items():
        row: Row = {"kind": "call", "provider": provider, "calls": len(each)}
        for key, by_provider in (("whole_us", times.whole), ("outside_us", times.outside)):
            mine, plain = by_provider[provider], by_provider["inductor"]
            row[key] = median(mine)
            row[f"extra_{key}"] = median(a - b for a, b in zip(mine, plain, strict=True))  # call by call: drift cancels
        rows.append(row)
    return rows


def _forward(model: Qwen3MoeForCausalLM) -> Callable[[Tensor], Tensor]:
    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return forward


def _compile(forward: Callable[[Tensor], Tensor], provider: str) -> Callable[[Tensor], Tensor]:
    import torch

    # isolate_recompiles: providers compile the same code object, and must not see each other's cache entries.
    whole = partial(torch.compile, fullgraph=True, isolate_recompiles=True)
    options = PROVIDERS[provider]
    if options is None:
        return whole(forward)
    from dmoe_compile.backend import dmoe

    return whole(forward, backend=dmoe, options=dict(options))


def _matcher_row(forward: Callable[[Tensor], Tensor], ids: Tensor) -> Row:
    """Time the matcher on the normalised graph of a forward."""
    import torch

    from dmoe_compile.normalise import normalise
    from dmoe_compile.passes.sites import find_sites

    row: Row = {}

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        aten, sources = normalise(gm, example_inputs)
        normalise_ms = 1e3 * (time.perf_counter() - start)
        each = []
        for _ in range(_MATCHER_RUNS):
            start = time.perf_counter()
            sites, _ = find_sites(aten.graph, sources)
            each.append(1e3 * (time.perf_counter() - start))
        figures = {"sites": len(sites), "nodes": len(aten.graph.nodes), "ms_per_site": median(each) / len(sites)}
        row.update(kind="matcher", normalise_ms=normalise_ms, **figures)
        return gm.forward

    partial(torch.compile, fullgraph=True, isolate_recompiles=True)(forward, backend=capture)(ids)
    return row


def _newest_guards(forward: Callable[[Tensor], Tensor]) -> int:
    """Count the leaf guards of the code that was compiled last for a function."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    newest = _debug_get_cache_entry_list(forward.__code__)[0]
    return _leaves(newest.guard_manager.root)


def _leaves(manager: Any) -> int:
    children = list(manager.get_child_managers())
    if hasattr(manager, "get_key_value_managers"):
        children += [each for pair in manager.get_key_value_managers().values() for each in pair if each is not None]
    return len(manager.get_leaf_guards()) + sum(_leaves(child) for child in children)


def _time_calls(compiled: dict[str, Callable[[Tensor], Tensor]], ids: Tensor, calls: int) -> Times:
    """Time providers in turns."""
    times = Times.of(compiled)
    with _generated_code_timed() as inside:
        for turn in range(-_WARMUP_CALLS, calls):
            for provider, call in _rotated(list(compiled.items()), turn):
                inside.ns = 0
                start = time.perf_counter_ns()
                call(ids)
                took = time.perf_counter_ns() - start
                assert inside.ns, "Inductor's generated code is not called through CompiledFxGraph"
                if turn >= 0:
                    times.whole[provider].append(took / 1e3)
                    times.outside[provider].append((took - inside.ns) / 1e3)
    return times


def outside_us(call: Callable[[Tensor], Any], x: Tensor) -> float:
    """Return the microseconds of one call that are spent outside of Inductor's generated code."""
    with _generated_code_timed() as inside:
        start = time.perf_counter_ns()
        call(x)
        return (time.perf_counter_ns() - start - inside.ns) / 1e3


@contextmanager
def _generated_code_timed() -> Iterator[SimpleNamespace]:
    """Add up nanoseconds in generated code in `ns` of what is yielded."""
    from torch._inductor.output_code import CompiledFxGraph

    original = CompiledFxGraph.__call__  # what AOTAutograd's wrappers call; no public hook is as close
    inside = SimpleNamespace(ns=0)

    def timed(self: CompiledFxGraph, inputs: Any) -> Any:
        start = time.perf_counter_ns()
        out = original(self, inputs)
        inside.ns += time.perf_counter_ns() - start
        return out

    with patch.object(CompiledFxGraph, "__call__", timed):
        yield inside


def _rotated(items: list[_T], turn: int) -> list[_T]:
    """Start with another item each turn, so that none always follows the same one."""
    first = turn % len(items)
    return items[first:] + items[:first]


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
