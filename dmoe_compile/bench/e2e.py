"""End to end: stacks of real-width decoder layers decode real blocks with their KV cache, way by way.

The stacks, and what is assumed because their weights are random, are those of stacks.py. One process; the ways take
turns; medians of whole decodings. All are decoded by dmoe_compile's decoder.

    eager            the model as transformers loads it, experts by grouped_mm
    inductor loop    torch.compile, experts by the Python loop that published model files have ("eager" in transformers)
    inductor         torch.compile, experts by grouped_mm: transformers' default and its fastest, so the baseline
    kernel           backend="dmoe" and no pass: the model's own experts by the fused kernel
    dmoe, des, ...   the kernel and passes

Measured: seconds, unique experts, forwards, bytes kept, resident memory. Counted: bytes of weights in use. Ways with
passes count their experts (stats=True) while they are timed.

    MB a step     weights that a denoising forward reads if it reads each expert in use once, and all else once
    of roofline   the least time in which this machine can read those weights or do the multiplications, as measured in
                  the same run, as a share of the time taken; attention's own products are left out
    compile       a first decoding of few forwards, less one that is warm: from empty caches, and from the caches that
                  this left. The expert kernel is built once a process: the first of its ways pays for it
    resident      memory of the process while a way decodes; all ways share the model's weights
    context       what the decoding context itself takes of a forward, and the expert outputs that it keeps
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from dmoe_compile.bench import Bar, Row, check_names, check_threads, describe, environment, narrow_table, use_threads
from dmoe_compile.bench.decoded import Costs, Trial, decode, resident_peak
from dmoe_compile.bench.ways import BASELINE, GOALS, STRATEGIES, WAYS, Way
from dmoe_compile.config import check_int

if TYPE_CHECKING:
    from rich.console import Group
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel

    from dmoe_compile.bench.stacks import Script, Stack


RECORDED = "recorded"
_SHORT = 5  # forwards of a block to compile with: TEAM has one of each kind by then


@dataclass(frozen=True)
class Settings:
    """What is decoded, and how.

    Attributes:
        shapes: names of stacks.STACKS.
        ways: of WAYS and STRATEGIES.
        memory_gib: as many layers are built as fit into it.
        layers: so many instead.
        blocks: of an answer; the stack's own if None.
        prompt: its tokens.
        repeats: timed decodings of each way.
        tokens_per_forward: assumed, without passes; the stack's own if None.
        dtype: auto is bfloat16 where the CPU multiplies it.
        recorded: instead of a stack, the recorded SDAR weights: tests/reference/sdar_tiny_weights.json; routers and
            confidences are its own then.
        threads: of the CPU; torch's own choice if None.
        seed: of weights and script.
    """

    shapes: tuple[str, ...] = ()
    ways: tuple[str, ...] = tuple(WAYS)
    memory_gib: float = 12.0
    layers: int | None = None
    blocks: int | None = None
    prompt: int = 64
    repeats: int = 3
    tokens_per_forward: float | None = None
    dtype: str = "auto"
    recorded: str | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        from dmoe_compile.bench.stacks import STACKS

        for what, names, known in (("shapes", self.shapes, STACKS), ("ways", self.ways, WAYS | STRATEGIES)):
            check_names(what, names, known)
        if not self.ways:
            raise ValueError("ways is empty, but must name one at least")
        if self.layers is not None:
            check_int("layers", self.layers, "layers of a stack; None takes as many as fit")
        check_threads(self.threads)
        if self.blocks is not None:
            check_int("blocks", self.blocks, "blocks of an answer")
        check_int("prompt", self.prompt, "tokens before the answer")
        check_int("repeats", self.repeats, "timed decodings of each way")
        if not self.memory_gib > 0:
            raise ValueError(f"memory_gib is {self.memory_gib}, but must be above 0")
        if self.tokens_per_forward is not None and not self.tokens_per_forward >= 1:
            raise ValueError(f"tokens_per_forward is {self.tokens_per_forward}, but must be at least 1")
        for name in self.shapes or STACKS:
            if (self.tokens_per_forward or 1) > STACKS[name].block_length:
                raise ValueError(
                    f"tokens_per_forward is {self.tokens_per_forward}, but {name} has blocks of "
                    f"{STACKS[name].block_length} tokens, of which a forward can accept no more"
                )
        check_names("dtype", [self.dtype], ["auto", "float32", "bfloat16"])
        if self.recorded is not None and not Path(self.recorded).is_file():
            raise ValueError(
                f"recorded is {self.recorded}, but there is no such file; it is a .json in tests/reference"
            )


@dataclass(frozen=True)
class _Bench:
    """One model, the prompt that all ways go on from, and what they decode: assumed confidences, or the model's own."""

    model: PreTrainedModel
    prompt: Tensor
    mask: int
    blocks: int
    block_length: int
    top_k: int
    script: Script | None = None
    short: Script | None = None  # of few forwards, to compile with

    def compiled(self, way: Way) -> Callable[..., Any]:
        """Return a way's forward."""
        import torch

        if way.compiler == "none":
            return self.model.forward
        # isolate_recompiles: each way has its own cache, though all compile the same code object.
        if way.compiler == "inductor":
            return torch.compile(self.model, isolate_recompiles=True)  # type: ignore[call-overload]
        options = {**way.options, "block_length": self.block_length, "stats": bool(way.options)}
        return torch.compile(self.model, backend="dmoe", fullgraph=True, isolate_recompiles=True, options=options)  # type: ignore[call-overload]

    def decode(self, way: Way, forward: Callable[..., Any], script: Script | None) -> Trial:
        """Decode as a way does with its forward."""
        from dmoe_compile import Config

        self.model.set_experts_implementation(way.experts)
        if script is not None:
            forward = script.around(forward, self.block_length)
            forward.dtype = self.model.dtype  # type: ignore[attr-defined]
        team = Config.from_options(way.options).selected.get("team")
        return decode(forward, self.prompt, self.mask, self.blocks, self.block_length, team)


@dataclass
class _Found:
    """What was found of a way: its forward, seconds to compile it, decodings, memory."""

    forward: Callable[..., Any]
    cold_s: float
    warm_s: float
    trials: list[Trial] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Decode in every way and return a row for each."""
    import torch

    from dmoe_compile.bench.stacks import STACKS

    use_threads(settings.threads)
    shapes = [RECORDED] if settings.recorded else list(settings.shapes or STACKS)
    bar = Bar(progress, total=len(shapes) * (len(settings.ways) + 1) * (settings.repeats + 1))
    rows = []
    for shape in shapes:
        rows += _rows(shape, settings, bar)
        torch._dynamo.reset()  # compiled code keeps weights, and two stacks may not fit
        gc.collect()
    return rows


def _rows(shape: str, settings: Settings, bar: Bar) -> list[Row]:
    import torch

    from dmoe_compile.bench import stacks
    from dmoe_compile.machine import bandwidth, peak

    bar.say(f"{shape}: build the model")
    bench = _bench(shape, settings)
    layers = len(stacks.layers_of(bench.model))
    with stacks.unique_experts(bench.model) as used:
        bench.decode(Way("none"), bench.model.forward, bench.script)
    own = [mean(used[i : i + layers]) for i in range(0, len(used), layers)]
    bar.advance()
    found: dict[str, _Found] = {}
    for name in settings.ways:
        bar.say(f"{shape}: compile {name}")
        found[name] = _compile(bench, (WAYS | STRATEGIES)[name])
        bar.advance()
    speeds, peaks = [], []
    names = list(found)
    for turn in range(settings.repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            bar.say(f"{shape}: decode {turn + 1} of {settings.repeats}: {name}")
            with resident_peak(found[name].resident):
                trial = bench.decode((WAYS | STRATEGIES)[name], found[name].forward, bench.script)
            found[name].trials.append(trial)
            bar.advance()
        speeds.append(bandwidth(torch.device("cpu")))
        peaks.append(peak(torch.device("cpu"), bench.model.dtype))
        bar.advance()
    whole = sum(each.nbytes for each in bench.model.parameters())
    one = stacks.expert_bytes(bench.model)
    other = whole - layers * len(stacks.layers_of(bench.model)[0].mlp.experts.down_proj) * one
    costs = Costs(layers, bench.top_k, one, other, bench.model.dtype.itemsize, median(speeds), median(peaks))
    about = asdict(settings) | environment() | asdict(costs)  # in this order: threads=None becomes what ran
    about |= {
        "shape": shape,
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "assumed": bench.script is not None,
    }
    about |= {"block_length": bench.block_length, "blocks": bench.blocks}
    return [about | _row(name, each, own, costs) for name, each in found.items()]


def _compile(bench: _Bench, way: Way) -> _Found:
    """Compile a way twice, without and with what the first time left in caches."""
    from torch._inductor.utils import clear_caches, fresh_cache

    seconds = []
    with fresh_cache():
        for _ in range(2):
            clear_caches()
            forward = bench.compiled(way)
            seconds.append(bench.decode(way, forward, bench.short).seconds)
        steady = bench.decode(way, forward, bench.short).seconds
    cold, warm = (max(0.0, each - steady) for each in seconds)
    return _Found(forward, cold, warm)


def _bench(shape: str, settings: Settings) -> _Bench:
    import torch

    from dmoe_compile.bench import stacks

    if shape == RECORDED:
        assert settings.recorded is not None
        model, mask = stacks.recorded(Path(settings.recorded))
        prompt = _prompt(settings, mask)
        return _Bench(model, prompt, mask, settings.blocks or 2, 32, model.config.num_experts_per_tok)
    stack = stacks.STACKS[shape]
    fast = torch.cpu._is_avx512_bf16_supported()
    dtype = {"auto": torch.bfloat16 if fast else torch.float32}.get(settings.dtype) or getattr(torch, settings.dtype)
    layers = settings.layers or stacks.layers_that_fit(stack, settings.memory_gib * 2**30, dtype)
    blocks = settings.blocks or stack.blocks
    columns = settings.prompt + (blocks + 1) * stack.block_length
    model = stacks.build(stack, layers, columns, dtype, settings.seed)
    mask = stacks.VOCABULARY - 1
    prompt = _prompt(settings, mask)
    wanted = settings.tokens_per_forward or stack.tokens_per_forward
    script, short = (
        scripted(stack, blocks, prompt, settings.seed, each) for each in (wanted, stack.block_length / _SHORT)
    )
    return _Bench(model, prompt, mask, blocks, stack.block_length, stack.top_k, script, short)


def _prompt(settings: Settings, mask: int) -> Tensor:
    import torch

    return torch.randint(0, mask, (1, settings.prompt), generator=torch.Generator().manual_seed(settings.seed))


def scripted(stack: Stack, blocks: int, prompt: Tensor, seed: int, wanted: float) -> Script:
    """Return the script with which decoding without passes accepts `wanted` tokens a forward."""
    from dmoe_compile.bench import stacks

    length = stack.block_length

    def accepted(script: Script) -> float:
        trial = decode(script.around(None, length), prompt, script.mask, blocks, length, None)
        return trial.tokens / len(trial.denoising)

    return stacks.calibrated(prompt.shape[1] + (blocks + 1) * length, seed, wanted, accepted)


def _row(name: str, found: _Found, own: Sequence[float], costs: Costs) -> Row:
    way = (WAYS | STRATEGIES)[name]
    trial = found.trials[0]
    seconds = median(each.seconds for each in found.trials)
    steps = len(trial.denoising)
    if way.options:
        own = [mean(each.unique_experts.values()) for each in trial.forwards]
    elif len(own) != len(trial.forwards):  # confidences of its own, and rounding made it accept others
        own = [mean(own)] * len(trial.forwards)
    pairs = list(zip(trial.forwards, own, strict=True))
    unique = [each for forward, each in pairs if forward.committed is not None]
    eager = way.compiler == "none"
    return {
        "way": name,
        "team": way.team,
        "tokens": trial.tokens,
        "steps": steps,
        "tokens_per_step": trial.tokens / steps,
        "unique_experts": mean(unique),
        "expert_bytes_per_token": costs.layers * sum(unique) * costs.expert_bytes / trial.tokens,
        "bytes_per_step": mean(costs.nbytes(each) for each in unique),
        "wall_s": [each.seconds for each in found.trials],
        "s_per_step": seconds / steps,
        "s_per_token": seconds / trial.tokens,
        "of_roofline": sum(costs.floor_s(*each) for each in pairs) / seconds,
        "compile_cold_s": None if eager else found.cold_s,
        "compile_warm_s": None if eager else found.warm_s,
        "peak_bytes": max(found.resident, default=None),
        "context_share": median(each.context_s / each.seconds for each in found.trials),
        "context_bytes": max(each.nbytes for each in found.trials),
    }


def table(rows: Sequence[Row]) -> Group:
    """Return the rows of run() as tables, one for each shape."""
    from rich.console import Group

    return Group(*map(_table, _by_shape(rows)))


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what the tables leave out: assumptions, goals, contexts, the machine."""
    for part in _by_shape(rows):
        yield from _remarks(part)


def _by_shape(rows: Sequence[Row]) -> list[list[Row]]:
    return [[row for row in rows if row["shape"] == shape] for shape in dict.fromkeys(row["shape"] for row in rows)]


def _table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    base = next((row for row in rows if row["way"] == BASELINE), first)
    out = narrow_table(
        *("", "ms/step", "", "ms/token", "", "experts", "MB/step", "of\nroofline", "compile\ns"),
        title=(
            f"{first['shape']}: {first['layers']} layers, {first['dtype']}, blocks of {first['block_length']}; times "
            f"faster than {base['way']}"
        ),
    )
    for column in out.columns[1:]:  # where it is narrow, ways take two lines
        column.no_wrap = True
    for row in rows:
        compiled = "" if row["compile_cold_s"] is None else f"{row['compile_cold_s']:.0f}, {row['compile_warm_s']:.0f}"
        out.add_row(
            row["way"], f"{row['s_per_step'] * 1e3:.3g}", f"{base['s_per_step'] / row['s_per_step']:.2f}x",
            f"{row['s_per_token'] * 1e3:.3g}", f"{base['s_per_token'] / row['s_per_token']:.2f}x",
            f"{row['unique_experts']:.1f}", f"{row['bytes_per_step'] / 1e6:.0f}", f"{row['of_roofline']:.0%}", compiled,
        )  # fmt: skip
    return out


def _remarks(rows: Sequence[Row]) -> Iterator[str]:
    ways = {row["way"]: row for row in rows}
    first = rows[0]
    per_step = {row["tokens_per_step"] for row in rows if not row["team"]}
    tokens = ", ".join(f"{each:.2f}" for each in sorted(per_step))
    if per_step:
        yield f"tokens a step: {tokens} without team, {'assumed' if first['assumed'] else 'by its own confidences'}"
    if peaks := [row["peak_bytes"] / 1e9 for row in rows if row["peak_bytes"] is not None]:
        yield f"resident at most: {max(peaks):.1f} GB"
    for row in rows:
        if row["team"]:
            less = next((each for each in rows if each["way"] == BASELINE), first)["expert_bytes_per_token"]
            yield (
                f"{row['way']}: {row['tokens_per_step']:.2f} tokens a step, "
                f"{less / row['expert_bytes_per_token']:.2f}x fewer expert bytes a token; context "
                f"{row['context_share']:.2%} of the time, {row['context_bytes'] / 1e6:.2f} MB"
            )
    if BASELINE in ways:
        for way, what, goal in GOALS:
            if way in ways:
                gain = ways[BASELINE][what] / ways[way][what]
                unit = "a step" if what == "s_per_step" else "an accepted token"
                yield f"goal: {way} {goal:g}x {unit}: {gain:.2f}x, {'reached' if gain >= goal else 'missed'}"
    yield f"{describe(first)}; reads {first['gb_per_s']:.3g} GB/s, multiplies {first['tflop_per_s']:.3g} TFLOP/s"
