"""How often a model is right with some passes, and what it reads for that: `dmoe eval`.

    run = evaluate(folder, Config(passes=("dmoe",)), Settings(problems=500), Path("dmoe.jsonl"))
    print(summary(run).accuracy, compare(run, other))

The problems are problems.py's, which ones depends on seed and number alone: two runs of equal settings are paired.
Every batch is one line of a JSON Lines file, behind a header; a run that was stopped goes on behind its last whole
line.

The 95% interval of an accuracy is Wilson's. Two runs are compared by McNemar's exact test, on the problems that one of
them has right and the other wrong.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dmoe_compile import backend, bench, loading, problems
from dmoe_compile.bench import Bar, Row, narrow_table
from dmoe_compile.config import Config, check_config, check_int
from dmoe_compile.context import distinct
from dmoe_compile.generation import PLAIN, generate
from dmoe_compile.problems import Problem
from dmoe_compile.report import explain
from dmoe_compile.sampling import Sampling

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table


@dataclass(frozen=True)
class Settings:
    """Which problems, and how they are decoded.

    Attributes:
        problems: how many, of every skill in turn.
        seed: of the problems.
        skills: some of problems.SKILLS; None is all of them.
        batch: sequences that are decoded together. Experts are counted by forward, so with more than one it is what all
            of them read.
        threshold: tokens that are surer than this are committed at once.
        max_new_tokens: length of the longest answer.
    """

    problems: int = 500
    seed: int = 0
    skills: tuple[str, ...] | None = None
    batch: int = 1
    threshold: float = 0.9
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        check_int("problems", self.problems, "how many are decoded")
        check_int("batch", self.batch, "sequences that are decoded together")
        check_int("max_new_tokens", self.max_new_tokens, "length of the longest answer")
        Sampling(mask_token_id=0, threshold=self.threshold)  # which knows what is wrong with a threshold
        next(problems.draw("test", self.seed, self.skills))  # which knows what is wrong with a skill

    def groups(self) -> list[list[Problem]]:
        """Return the problems, those that are decoded together in a list of their own."""
        wanted = list(itertools.islice(problems.draw("test", self.seed, self.skills), self.problems))
        return [wanted[i : i + self.batch] for i in range(0, len(wanted), self.batch)]


@dataclass(frozen=True)
class Summary:
    """What a run comes to.

    Attributes:
        problems, right: how many, and how many of them ended with the right answer.
        accuracy: the share that is right.
        by_skill: share that is right by skill.
        unique_mean, unique_p95: experts that a layer used in a denoising forward, over layers and forwards; 0 where
            none were counted.
        tokens: of all answers.
        forwards: of each kind.
        forwards_per_token: all forwards; tokens_per_forward: of the denoising ones alone.
        expert_bytes_per_token: of expert weights that the denoising forwards read, if each expert in use is read once.
        seconds: of decoding, compiling left out.
    """

    problems: int
    right: int
    accuracy: float
    by_skill: dict[str, float]
    unique_mean: float
    unique_p95: float
    tokens: int
    forwards: dict[str, int]
    forwards_per_token: float
    tokens_per_forward: float
    expert_bytes_per_token: float
    seconds: float

    def interval(self) -> tuple[float, float]:
        """Return the 95% interval of the accuracy, Wilson's."""
        from scipy.stats import binomtest

        found = binomtest(self.right, self.problems).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


Run = list[Row]  # the lines of a run: a header, and one for every batch


def evaluate(
    model: str,
    config: Config,
    settings: Settings,
    file: Path | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Decode problems and return what came of them.

    Args:
        model: a checkpoint folder with a tokenizer.
        config: passes and options to compile with; its block_length is the model's.
        settings: which problems.
        file: takes the lines as they come; what an earlier run of the same header left there is gone on from.
        progress: shows a bar.
        threads: CPU threads; torch's own choice if None.
        trust_remote_code: run model code that lies in the folder.

    Raises:
        ValueError: for a folder without a tokenizer, a file of another run, or one that can't be there.
    """
    bench.use_threads(threads)
    earlier = [] if file is None else _lines(file)  # what is wrong with it is said now, not after minutes
    decoder = Decoder(model, config, settings, trust_remote_code)
    run = [decoder.header | bench.environment()] if file is None else _so_far(file, earlier, decoder.header)
    groups = settings.groups()
    bar = Bar(progress, total=len(groups))
    for number, group in enumerate(groups):
        if number >= len(run) - 1:
            line = decoder.decode(group)
            run.append(line)
            if file is not None:
                with file.open("a") as out:
                    out.write(json.dumps(line) + "\n")
        bar.say(f"{sum(sum(each['right']) for each in run[1:])} right of {len(run) - 1}")
        bar.advance()
    return run


class Decoder:
    """A model compiled with some passes, which decodes problems and counts what that takes.

    Attributes:
        header: the first line of its runs.
    """

    def __init__(self, model: str, config: Config | None, settings: Settings, trust_remote_code: bool = False) -> None:
        """Load and compile: see evaluate(). Without a config it is stock Inductor, and no experts are counted."""
        check_config(config)
        self._words = loading.need_tokenizer(model, trust_remote_code)
        self._settings = settings
        loaded, _ = loading.load_model(model, trust_remote_code)
        length = Config().block_length if config is None else config.block_length
        report = explain(loaded, config=Config(), input_ids=torch.zeros(1, length, dtype=torch.int64))
        names, sizes = distinct(site.name for site in report.sites), [site.expert_bytes for site in report.sites]
        header = {
            "kind": "run", "model": model, "options": None if config is None else config.to_options(),
            **asdict(settings), "num_experts": max((site.num_experts for site in report.sites), default=0),
            "expert_bytes": dict(zip(names, sizes, strict=True)), "weights": _fingerprint(loaded),
        }  # fmt: skip
        self.header: Row = json.loads(json.dumps(header))  # as a file gives it back
        self._block_length = length
        self._counts = config is not None
        self._compiled: Any = (
            torch.compile(loaded, isolate_recompiles=True)  # type: ignore[call-overload]  # not in the stubs
            if config is None
            else backend.compile(loaded, replace(config, stats=True))
        )

    def decode(self, group: Sequence[Problem]) -> Row:
        """Decode a few problems together and return what came of it; time that compiling took is left out."""
        before = _recompiles()
        line = self._decode(group)
        if _recompiles() > before:
            line["seconds"] = self._decode(group)["seconds"]
        return line

    def _decode(self, group: Sequence[Problem]) -> Row:
        words = self._words
        prompts = [torch.tensor(words(each.prompt)["input_ids"]) for each in group]
        lengths = torch.tensor([len(each) for each in prompts]).unsqueeze(1)
        input_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        unique: dict[str, Counter[int]] = {}

        def count(line: Mapping[str, Any]) -> None:
            if line["kind"] == "forward" and line["forward"] not in PLAIN:
                for site, used in line["unique_experts"].items():
                    unique.setdefault(site, Counter())[used] += 1

        start = time.perf_counter()
        result = generate(
            self._compiled, input_ids, attention_mask=torch.arange(input_ids.shape[1]) < lengths,
            block_length=self._block_length, mask_token_id=words.mask_token_id, threshold=self._settings.threshold,
            max_new_tokens=self._settings.max_new_tokens, trace=count,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if self._counts and self.header["expert_bytes"] and not unique:
            raise RuntimeError(
                "no expert was counted: Dynamo has given up compiling this model, and its warning says why; "
                "TORCH_LOGS=recompiles shows more"
            )
        texts = [words.decode(answer, skip_special_tokens=True) for answer in result.answers]
        return {
            "kind": "batch",
            "skills": [each.skill for each in group],
            "right": [problems.graded(each, text) for each, text in zip(group, texts, strict=True)],
            "texts": texts,
            "tokens": sum(map(len, result.answers)),
            "answers": [answer.tolist() for answer in result.answers],
            "forwards": result.forwards,
            "unique": {site: {str(used): times for used, times in counts.items()} for site, counts in unique.items()},
            "seconds": seconds,
        }


def read(file: Path) -> Run:
    """Return the run that a file holds.

    Raises:
        ValueError: where it is no file of lines.
    """
    try:
        run = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} can't be read as a run's lines ({error}); name what --lines wrote") from error
    if len(run) < 2 or run[0].get("kind") != "run":
        raise ValueError(f"{file} holds no run; name what --lines wrote")
    return run


def summary(run: Run) -> Summary:
    """Return what a run comes to."""
    import numpy as np

    header, batches = run[0], run[1:]
    right = [each for line in batches for each in line["right"]]
    skills = [each for line in batches for each in line["skills"]]
    used: Counter[int] = Counter()
    nbytes = 0
    for line in batches:
        for site, counts in line["unique"].items():
            for count, times in counts.items():
                used[int(count)] += times
                nbytes += int(count) * times * header["expert_bytes"].get(site, 0)
    tokens = sum(line["tokens"] for line in batches)
    forwards: Counter[str] = Counter()
    for line in batches:
        forwards.update(line["forwards"])
    every = np.repeat(list(used) or [0], list(used.values()) or [1])
    denoising = sum(count for kind, count in forwards.items() if kind not in PLAIN)
    return Summary(
        len(right), sum(right), sum(right) / len(right),
        {skill: _share(r for r, s in zip(right, skills, strict=True) if s == skill) for skill in dict.fromkeys(skills)},
        float(every.mean()), float(np.percentile(every, 95)), tokens, dict(forwards), forwards.total() / tokens,
        tokens / denoising, nbytes / tokens, sum(line["seconds"] for line in batches),
    )  # fmt: skip


def compare(run: Run, other: Run) -> tuple[int, int, float]:
    """Return how many problems only the first run has right, how many only the second, and McNemar's exact p.

    Raises:
        ValueError: where the runs are not of the same problems.
    """
    from scipy.stats import binomtest

    for each in (run, other):
        check_paired(run[0], each)
    first, second = ([right for line in each[1:] for right in line["right"]] for each in (run, other))
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, differing).pvalue) if differing else 1.0


def check_paired(header: Mapping[str, Any], other: Run) -> None:
    """Raise ValueError unless a finished run is of the problems that a header or Settings' fields name."""
    for name in ("problems", "seed", "skills"):
        mine, theirs = (list(each) if isinstance(each, tuple) else each for each in (header[name], other[0][name]))
        if mine != theirs:
            raise ValueError(f"{name} is {mine} in one run and {theirs} in the other: not paired")
    answered = sum(len(line["right"]) for line in other[1:])
    if answered != other[0]["problems"]:
        raise ValueError(f"one run has {answered} of its {other[0]['problems']} problems: finish it first")


def table(runs: Sequence[Run]) -> Table:
    """Return what runs come to, a row each."""
    out = narrow_table(
        *("model", "options", "right", "95%", "experts", "p95", "tokens", "MB", "ms"),
        title="Right final answers; experts of a layer in a denoising forward; tokens a forward; MB of experts and ms "
        "a token",
    )
    for run in runs:
        found = summary(run)
        low, high = found.interval()
        options = ", ".join(f"{name}={value}" for name, value in run[0]["options"].items())
        out.add_row(
            Path(run[0]["model"]).name, options or "-", f"{found.accuracy:.1%} of {found.problems}",
            f"{low:.1%}-{high:.1%}", f"{found.unique_mean:.1f}", f"{found.unique_p95:.0f}",
            f"{found.tokens_per_forward:.2f}", f"{found.expert_bytes_per_token / 1e6:.3g}",
            f"{found.seconds / found.tokens * 1e3:.2f}",
        )  # fmt: skip
    return out


def row(run: Run) -> Row:
    """Return a run as one line for --json: its header, its summary, and the accuracy's 95% interval."""
    found = summary(run)
    return run[0] | asdict(found) | {"interval": found.interval()}


def remarks(run: Run, other: Run | None) -> list[str]:
    """Return what the table does not say: skills one by one, and how the run differs from another."""
    found = [f"{skill}: {share:.1%}" for skill, share in summary(run).by_skill.items()]
    if other is not None:
        mine, theirs, chance = compare(run, other)
        found.append(f"right here alone {mine}, there alone {theirs}; McNemar's exact test: p = {chance:.2g}")
    return found


def _recompiles() -> int:
    """Return how often Dynamo has compiled something in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _lines(file: Path) -> Run:
    """Return the whole lines of a file, none where there is no file.

    Raises:
        ValueError: for a file of anything else, or one that can't be written.
    """
    bench.check_file("--lines", file)
    if not file.is_file():
        return []
    try:
        return [json.loads(line) for line in _whole(file.read_text()).splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} holds no lines of a run ({error}): name another file, or remove it") from error


def _whole(text: str) -> str:
    """Return a text without a last line that was cut off."""
    return text[: text.rfind("\n") + 1]


def _so_far(file: Path, run: Run, header: Row) -> Run:
    """Return the earlier run of this header whose lines a file holds; begin the file where there is none."""
    if not file.is_file():
        run = [header | bench.environment()]
        file.write_text(json.dumps(run[0]) + "\n")
        return run
    found = {name: run[0].get(name) for name in header} if run and isinstance(run[0], dict) else None
    if found != header:
        raise ValueError(f"{file} holds another run ({found}), not {header}: name another file, or remove it")
    text = file.read_text()
    if (whole := _whole(text)) != text:
        aside = file.with_name(f"{file.name}.part")
        aside.write_text(whole)
        aside.replace(file)
    return run


def _fingerprint(model: torch.nn.Module) -> str:
    """Return what tells a model's weights from others of the same shapes: a hash of the beginning of each."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        first = weight.detach()[(slice(1),) * max(weight.dim() - 1, 0)].reshape(-1)[:64]
        digest.update(name.encode() + first.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _share(right: Iterable[bool]) -> float:
    each = list(right)
    return sum(each) / len(each)
