"""A demonstration: the trained model of this package solves problems, with and without passes: `dmoe demo`.

The same problems are decoded in five ways, which take turns at every problem:

    inductor       stock torch.compile: the baseline
    kernel         backend="dmoe" and no pass: the model's own routing, experts in the fused kernel
    dmoe           the dMoE rule, on the checkpoint that was tuned to it
    team + dmoe    and decoded tokens' experts reused, hopeless tokens limited, candidates tried
    all experts    the dMoE rule with a coreset of all experts, no kernel: must give the baseline's tokens; not timed
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dmoe_compile import evaluation
from dmoe_compile.bench import Bar, Row, check_threads, describe, environment, narrow_table, use_threads
from dmoe_compile.config import Config, check_int
from dmoe_compile.problems import Problem

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

TOP_P, MIN_EXPERTS = 0.6, 8
_EVERY_EXPERT = 1 << 16  # more than a layer has: the coreset is all of them
_SHOWN = ("kernel", "dmoe")  # whose answers stand under a prompt


@dataclass(frozen=True)
class Settings:
    """Which problems, and CPU threads; None is torch's own number of them."""

    problems: int = 20
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_int("problems", self.problems, "how many are decoded")
        check_threads(self.threads)


@dataclass(frozen=True)
class Result:
    """What run() found: a run of evaluation.py for each way that is shown, of the same problems."""

    settings: Settings
    env: Row
    problems: list[Problem]
    runs: dict[str, evaluation.Run]
    tokens_equal: bool

    def rows(self) -> list[Row]:
        """Return the result as JSON-able rows, each with its environment."""
        rows: list[Row] = [
            run[0] | asdict(evaluation.summary(run)) | {"kind": "way", "way": way} for way, run in self.runs.items()
        ]
        for number, problem in enumerate(self.problems):
            answers = {way: run[1 + number]["texts"][0] for way, run in self.runs.items()}
            rows.append({"kind": "problem", "prompt": problem.prompt, "final": problem.final, "answers": answers})
        rows.append({"kind": "lossless", "tokens_equal": self.tokens_equal})
        return [self.env | row for row in rows]

    def table(self) -> Table:
        """Return every way: answers, experts, bytes and time."""
        experts = self.runs["kernel"][0]["num_experts"]
        out = narrow_table(
            *("", "right", "unique experts", "tokens/forward", "expert MB/token", "ms/token"),
            title=f"{len(self.problems)} problems; experts: of {experts}, a layer's in a denoising forward, mean",
        )
        for way, run in self.runs.items():
            found = evaluation.summary(run)
            counted = found.unique_mean > 0
            out.add_row(
                way, f"{found.right} of {found.problems}", f"{found.unique_mean:.1f}" if counted else "as kernel",
                f"{found.tokens_per_forward:.2f}",
                f"{found.expert_bytes_per_token / 1e6:.2f}" if counted else "as kernel",
                f"{found.seconds / found.tokens * 1e3:.2f}",
            )  # fmt: skip
        return out

    def remarks(self) -> Iterator[str]:
        """Yield the first problem of each skill with its answers, and what the table leaves out."""
        seen = set()
        for number, problem in enumerate(self.problems):
            if problem.skill in seen:
                continue
            seen.add(problem.skill)
            yield f"{problem.skill}: {problem.prompt}"
            for way in _SHOWN:
                line = self.runs[way][1 + number]
                name = "vanilla" if way == "kernel" else way
                yield f"  {name:<9}{line['texts'][0]}  [{'right' if line['right'][0] else 'wrong'}]"
        yield f"tokens are stock Inductor's if the coreset is all experts: {'yes' if self.tokens_equal else 'NO'}"
        yield (
            f"dmoe: top_p={TOP_P}, min_experts={MIN_EXPERTS}, the tuned checkpoint. Measured but for the bytes, which "
            "are experts counted in the denoising forwards x bytes of one. Compiling is not in the times, counting is."
        )
        yield describe(self.env)


def run(settings: Settings, progress: Progress | None = None) -> Result:
    """Decode every problem in all ways, and return what was counted and timed."""
    use_threads(settings.threads)
    how = evaluation.Settings(settings.problems, settings.seed)
    coreset: dict[str, Any] = {"dmoe.top_p": TOP_P, "dmoe.min_experts": MIN_EXPERTS}
    ways: dict[str, tuple[str, dict[str, Any] | None]] = {
        "inductor": ("demo", None),
        "kernel": ("demo", {}),
        "dmoe": ("demo-tuned", {"passes": ["dmoe"], **coreset}),
        "team + dmoe": ("demo-tuned", {"passes": ["team", "dmoe"], **coreset}),
        "all experts": ("demo", {"passes": ["dmoe"], "dmoe.min_experts": _EVERY_EXPERT, "experts": False}),
    }
    with _no_loading_bars():
        decoders = {
            way: evaluation.Decoder(model, None if options is None else Config.from_options(options), how)
            for way, (model, options) in ways.items()
        }
    runs = {way: [decoder.header | environment()] for way, decoder in decoders.items()}
    groups = how.groups()
    bar = Bar(progress, total=len(groups) * len(ways))
    for number, group in enumerate(groups):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            bar.say(f"compile and decode: {way}" if number == 0 else f"problem {number + 1} of {len(groups)}")
            runs[way].append(decoders[way].decode(group))
            bar.advance()
    exact = runs.pop("all experts")
    same = [line["answers"] for line in exact[1:]] == [line["answers"] for line in runs["inductor"][1:]]
    return Result(settings, environment(), [problem for group in groups for problem in group], runs, same)


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Leave out transformers' bar for each of five small checkpoints."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
