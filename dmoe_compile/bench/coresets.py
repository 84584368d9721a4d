"""How many experts each coreset method reads, and how much routing weight it keeps, on synthetic router scores.

Scores are those of a trained router as far as its published figures say: E = 256, k = 8, blocks of 32 tokens, and 65 to
72 unique experts a block. Logits are sums of normal values: what a block's tokens have in common (one draw a block) and
what each has of its own, of variances `common` and 1 - `common`, times `spread`; selection scores are their softmax.
`common` is found by bisection, so that the model's own routing uses UNIQUE experts a block. `spread` is 0.8 because
dMoE at 0.8 then uses 27 experts, and 27 to 28 are published; larger ones make every method look better.

    unique    experts that a block's tokens use, mean over blocks
    kept      share of its own routing weight that a token's experts in the coreset hold: mean, and the worst token
    rule      what choosing for one block takes more than the plain top-k, both through Inductor: median of calls
    of layer  that beside the least time in which this machine reads `unique` experts (LLaDA2.0-mini's, in bf16): the
              largest share of a layer that the rule can have, however fast the experts are
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from dmoe_compile.bench import Bar, Row, describe, environment
from dmoe_compile.bench.shapes import SHAPES
from dmoe_compile.config import check_int

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor

_SHAPE = SHAPES["LLaDA2.0-mini"]
NUM_EXPERTS, TOP_K, BLOCK = _SHAPE.num_experts, _SHAPE.top_k, _SHAPE.tokens
EXPERT_BYTES = 3 * _SHAPE.hidden * _SHAPE.width * 2  # gate, up and down projection, bf16
UNIQUE = 69.5  # LLaDA2.0-mini, in the dMoE paper (arXiv 2605.30876)
PUBLISHED = (65.0, 72.0)
# Unique experts that papers report on LLaDA2.0-mini: DES-S and DES-V at near-base accuracy, dMoE.
MARKED = {("des", "seq", 4): 41.0, ("des", "vote", 36): 37.0, ("dmoe", 0.6): 14.6, ("dmoe", 0.8): 27.5}
_STEPS = 20  # of the bisection: `common` to a millionth


@dataclass(frozen=True)
class Settings:
    """Blocks to draw, the standard deviation of logits, and timed calls of every rule."""

    blocks: int = 256
    spread: float = 0.8
    calls: int = 200

    def __post_init__(self) -> None:
        check_int("blocks", self.blocks, "blocks that are drawn")
        check_int("calls", self.calls, "timed calls of every rule")
        if not self.spread > 0:
            raise ValueError(f"spread is {self.spread}, but must be positive")


def run(settings: Settings, progress: Progress | None = None) -> list[Row]:
    """Return a row for each method and setting, the model's own routing first."""
    import torch

    from dmoe_compile.machine import bandwidth

    common, scores = calibrated(settings)
    env = environment() | asdict(settings) | {"common": common}
    methods = list(_methods())
    bar = Bar(progress, total=len(methods) + 1)
    rows, routings = [], []
    for name, key, options in methods:
        bar.say(name)
        paper = MARKED.get(key) if key is not None else UNIQUE
        rows.append(env | {"method": name, "paper": paper} | measure(scores, key, options))
        routings.append(_compiled(scores[0], key, options))
        bar.advance()
    bar.say("time")
    gb_per_s = bandwidth(torch.device("cpu"))
    for row, rule_ms in zip(rows, _extra_ms(routings, scores[0], settings.calls), strict=True):
        floor_ms = row["unique"] * EXPERT_BYTES / gb_per_s / 1e6
        row |= {"rule_ms": rule_ms, "gb_per_s": gb_per_s, "floor_ms": floor_ms, "of_layer": rule_ms / floor_ms}
    bar.advance()
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return the rows of run() as a table."""
    from rich.table import Table

    first = rows[0]
    made = f"spread {first['spread']:g}, common {first['common']:.3f}, {first['blocks']} blocks"
    title = f"Coresets of {NUM_EXPERTS} experts, {TOP_K} a token, {BLOCK} tokens a block ({made})"
    columns = ("method", "unique", "paper", "coreset", "kept, mean", "kept, worst", "rule", "of layer")
    out = Table(
        *columns, title=title, caption=f"{describe(first)}; reads {first['gb_per_s']:.3g} GB/s", caption_justify="left"
    )
    for row in rows:
        paper = "" if row["paper"] is None else f"{row['paper']:g}"
        kept = f"{row['kept']:.1%}", f"{row['kept_worst']:.1%}"
        rule = (f"{row['rule_ms']:.2f} ms", f"{row['of_layer']:.1%}") if row is not first else ("", "")
        out.add_row(row["method"], f"{row['unique']:.1f}", paper, f"{row['coreset']:.1f}", *kept, *rule)
    return out


def calibrated(settings: Settings) -> tuple[float, Tensor]:
    """Return `common` and scores [blocks, L, E] for which the model's own routing uses UNIQUE experts a block."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        common = (low + high) / 2
        scores = draw(settings, common)
        if _unique(scores.topk(TOP_K).indices) > UNIQUE:
            low = common
        else:
            high = common
    return common, scores


def draw(settings: Settings, common: float) -> Tensor:
    """Return selection scores [blocks, L, E], the same ones every time but for `common`."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(settings.blocks, 1, NUM_EXPERTS, generator=generator)
    own = torch.randn(settings.blocks, BLOCK, NUM_EXPERTS, generator=generator)
    return (settings.spread * (common**0.5 * shared + (1 - common) ** 0.5 * own)).softmax(-1)


def measure(scores: Tensor, key: tuple[Any, ...] | None, options: Any) -> Row:
    """Return what one method does with scores [N, L, E]; `key` None stands for the model's own routing."""
    import torch

    weights, ids = scores.topk(TOP_K)
    used, here = route(scores, key, options)
    kept = torch.where(here.gather(-1, ids), weights, 0).sum(-1) / weights.sum(-1)
    return {
        "unique": _unique(used),
        "coreset": here[:, 0].sum(-1).float().mean().item(),
        "kept": kept.mean().item(),
        "kept_worst": kept.min().item(),
    }


def route(scores: Tensor, key: tuple[Any, ...] | None, options: Any) -> tuple[Tensor, Tensor]:
    """Return the experts that tokens use, ids [N, L, k], and those they may use, [N, L, E] bool."""
    import torch

    from dmoe_compile.passes.coreset import restrict
    from dmoe_compile.passes.policies import find_policy

    weights, ids = scores.topk(TOP_K)
    if key is None:
        return ids, torch.ones_like(scores, dtype=torch.bool)
    policy = find_policy(key[0])
    given = {"weights": weights} if getattr(policy, "needs_weights", False) else {}
    inside = policy.coreset(scores, ids, torch.ones_like(ids[..., 0], dtype=torch.bool), options, **given)
    here = inside.unsqueeze(1).expand_as(scores)
    return restrict(scores, here).topk(TOP_K).indices, here


def _compiled(block: Tensor, key: tuple[Any, ...] | None, options: Any) -> Callable[[Tensor], Any]:
    """Return route() for one block [L, E], its ids alone, through Inductor."""
    import torch

    def ids(scores: Tensor) -> Tensor:
        return route(scores, key, options)[0]

    # One function with 21 rules: Dynamo would take them for variants of one compile and give up at the ninth.
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, isolate_recompiles=True)(ids)
    compiled(block.unsqueeze(0))
    return compiled


def _extra_ms(routings: Sequence[Callable[[Tensor], Any]], block: Tensor, calls: int) -> list[float]:
    """Return what each routing takes more than the first, call by call, in ms."""
    seconds: list[list[float]] = [[] for _ in routings]
    for _ in range(calls):
        for each, routing in zip(seconds, routings, strict=True):
            start = time.perf_counter()
            routing(block.unsqueeze(0))
            each.append(time.perf_counter() - start)
    return [1e3 * median(a - b for a, b in zip(each, seconds[0], strict=True)) for each in seconds]


def _methods() -> Iterator[tuple[str, tuple[Any, ...] | None, Any]]:
    """Yield a name, a key for MARKED whose first part is the policy, and its options."""
    from dmoe_compile.passes import cover, des, dmoe

    yield "the model's own", None, None
    for top_p in (0.4, 0.5, 0.6, 0.7, 0.8):
        yield f"dmoe, top_p {top_p}", ("dmoe", top_p), dmoe.Options(top_p, min_experts=TOP_K)
    for keep in (1, 2, 3, 4):
        yield f"des seq, keep {keep}", ("des", "seq", keep), des.Options("seq", keep=keep)
    for size in (13, 24, 36, 48, 64):
        yield f"des vote, {size}", ("des", "vote", size), des.Options("vote", coreset_size=size)
    for mass in (0.7, 0.8, 0.9, 0.95, 0.99):
        yield f"cover, mass {mass}", ("cover", mass), cover.Options(mass)


def _unique(ids: Tensor) -> float:
    """Return the mean number of distinct experts in blocks of ids [N, L, k]."""
    import torch

    hit = torch.zeros(len(ids), NUM_EXPERTS).scatter(-1, ids.flatten(1), 1.0)
    return hit.sum(-1).mean().item()
