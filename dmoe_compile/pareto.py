"""Accuracy against unique experts, every method as a curve: `dmoe pareto`.

    runs = sweep(folder, Settings(problems=500), Path("pareto"))
    draw(runs, Path("pareto/pareto"))      pareto.png and pareto.svg

Every point is a run of evaluation.py on the same problems, kept in a file of its own: what was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoe_compile import evaluation, loading
from dmoe_compile.bench import narrow_table
from dmoe_compile.config import Config
from dmoe_compile.evaluation import Run, Settings, Summary

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

VANILLA = "vanilla"
_CLOSE = 0.99  # of vanilla's accuracy: what counts as kept


@dataclass(frozen=True)
class Point:
    """A setting of a method: its curve, its name on it, and options of the backend."""

    curve: str
    name: str
    options: Mapping[str, Any] = field(hash=False)
    tuned: bool = False


def grid(top_k: int, least: int) -> list[Point]:
    """Return the settings that are swept.

    Args:
        top_k: experts a token, k.
        least: smallest coreset of dmoe, in experts; a row with the published 16 stands beside it.
    """
    points = [Point(VANILLA, VANILLA, {})]
    for tuned in (False, True):
        name = "dmoe, tuned" if tuned else "dmoe"
        for p in (0.4, 0.5, 0.6, 0.7, 0.8):
            options = {"passes": ["dmoe"], "dmoe.top_p": p, "dmoe.min_experts": least}
            points.append(Point(name, f"p={p}", options, tuned))
        points.append(Point(name, "p=0.6, at least 16", {"passes": ["dmoe"]}, tuned))
    points.append(Point("vanilla, tuned", "vanilla, tuned", {}, tuned=True))
    for keep in range(1, top_k // 2 + 1):
        points.append(Point("des, seq", f"keep={keep}", {"passes": ["des"], "des.keep": keep}))
    for size in (top_k, top_k * 3 // 2, 2 * top_k, 3 * top_k):
        options = {"passes": ["des"], "des.variant": "vote", "des.coreset_size": size}
        points.append(Point("des, vote", f"size={size}", options))
    for mass in (0.5, 0.6, 0.7, 0.8, 0.9):
        points.append(Point("cover", f"mass={mass}", {"passes": ["cover"], "cover.mass": mass}))
    for ratio in (0.25, 0.5):
        points.append(Point("top_any", f"ratio={ratio}", {"passes": ["top_any"], "top_any.ratio": ratio}))
    strategies = ("cache", "limit", "speculate")
    for some in (*((each,) for each in strategies), strategies):
        options = {"passes": ["team"], **{f"team.{each}": each in some for each in strategies}}
        points.append(Point("team", " + ".join(some), options))
    both = {"passes": ["team", "dmoe"], "dmoe.top_p": 0.8, "dmoe.min_experts": least}
    points.append(Point("team + dmoe", "p=0.8", both))
    points.append(Point("team + dmoe, tuned", "p=0.6", {**both, "dmoe.top_p": 0.6}, tuned=True))
    for mass in (0.7, 0.8, 0.9):
        points.append(Point("team + cover", f"mass={mass}", {"passes": ["team", "cover"], "cover.mass": mass}))
    return points


def sweep(
    model: str,
    settings: Settings,
    folder: Path,
    tuned: str | None = None,
    least: int | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> dict[Point, Run]:
    """Run every point of the grid, or go on with it, and return its run.

    Args:
        model: a checkpoint folder with a tokenizer.
        settings: which problems.
        folder: takes a file of lines for each point.
        tuned: the folder of the model that was tuned with dmoe; without it its points are left out.
        least: smallest coreset of dmoe; the model's k if None.
        progress: shows a bar for each point.
        threads: CPU threads; torch's own choice if None.
    """
    from transformers import AutoConfig

    top_k = AutoConfig.from_pretrained(loading.folder_of(model)).num_experts_per_tok
    folder.mkdir(parents=True, exist_ok=True)
    runs = {}
    for point in grid(top_k, top_k if least is None else least):
        if point.tuned and tuned is None:
            continue
        source = tuned if point.tuned and tuned is not None else model
        name = f"{point.curve} {point.name}".replace(", ", "_").replace(" ", "_")
        config = Config.from_options(point.options)
        runs[point] = evaluation.evaluate(source, config, settings, folder / f"{name}.jsonl", progress, threads)
    return runs


def table(runs: Mapping[Point, Run]) -> Table:
    """Return every point beside vanilla: accuracy, experts, bytes, and if answers differ more than by chance."""
    vanilla = next(run for point, run in runs.items() if point.curve == VANILLA)
    base = evaluation.summary(vanilla)
    out = narrow_table(
        *("method", "setting", "right", "95%", "experts", "fewer", "MB/token", "fewer", "ms/token", "McNemar p"),
        title=f"{base.problems} problems; experts of a layer in a denoising forward",
    )
    for point, run in runs.items():
        found = evaluation.summary(run)
        low, high = found.interval()
        _, _, chance = evaluation.compare(vanilla, run)
        out.add_row(
            point.curve, point.name, f"{found.accuracy:.1%}", f"{low:.1%}-{high:.1%}",
            f"{found.unique_mean:.1f}", f"{1 - found.unique_mean / base.unique_mean:.0%}",
            f"{found.expert_bytes_per_token / 1e6:.3g}",
            f"{base.expert_bytes_per_token / found.expert_bytes_per_token:.2f}x",
            f"{found.seconds / found.tokens * 1e3:.2f}", "" if point.curve == VANILLA else f"{chance:.2g}",
        )  # fmt: skip
    return out


def draw(runs: Mapping[Point, Run], path: Path) -> list[Path]:
    """Draw accuracy against unique experts as PNG and SVG, and return both files; `path` is without its suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, list[Summary]] = {}
    for point, run in runs.items():
        curves.setdefault(point.curve, []).append(evaluation.summary(run))
    for name, each in curves.items():
        each.sort(key=lambda found: found.unique_mean)
        x, y = [found.unique_mean for found in each], [100 * found.accuracy for found in each]
        intervals = [found.interval() for found in each]
        below = [100 * (found.accuracy - low) for found, (low, _) in zip(each, intervals, strict=True)]
        above = [100 * (high - found.accuracy) for found, (_, high) in zip(each, intervals, strict=True)]
        look: Any = (
            {"marker": "*", "markersize": 14, "color": "black", "zorder": 3} if name == VANILLA else {"marker": "o"}
        )
        axes.errorbar(x, y, [below, above], label=name, elinewidth=0.6, capsize=2, **look)
    kept = 100 * _CLOSE * curves[VANILLA][0].accuracy
    axes.axhline(kept, color="grey", linestyle=":", label=f"{_CLOSE:.0%} of vanilla")
    axes.set_xlabel("unique experts of a layer in a denoising forward, mean")
    axes.set_ylabel("problems with the right answer, % (95% intervals)")
    axes.legend(fontsize=8)
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    FigureCanvasAgg(figure).print_png(files[0])
    FigureCanvasSVG(figure).print_svg(files[1])
    return files
