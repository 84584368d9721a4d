"""The harness: what it counts of a small model's decoding, that it goes on, and its statistics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dmoe_compile import Config, cli, decoding, evaluation, pareto
from dmoe_compile.evaluation import Run, Settings, compare, evaluate, summary
from tiny_moe import ATEN

pytestmark = pytest.mark.usefixtures("aten")
SMALL = Settings(problems=5, max_new_tokens=32, threshold=0.004)


@pytest.fixture(scope="module")
def run(aten: None, untrained: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    file = tmp_path_factory.mktemp("runs") / "dmoe.jsonl"
    return evaluate(untrained, Config(passes=("dmoe",)), SMALL, file), file


def test_what_a_run_counts(run: tuple[Run, Path]) -> None:
    lines, _ = run
    found = summary(lines)
    assert [line["skills"] for line in lines[1:]] == [[skill] for skill in evaluation.problems.SKILLS]
    assert (found.problems, found.right) == (5, 0)
    low, high = found.interval()
    assert low == 0 < high < 0.5
    assert found.by_skill == dict.fromkeys(evaluation.problems.SKILLS, 0.0)
    assert 8 <= found.unique_mean <= found.unique_p95 <= 64  # a token's experts, and all
    assert found.tokens == sum(line["tokens"] for line in lines[1:])
    denoising = found.forwards["denoise"]
    assert found.tokens_per_forward == found.tokens / denoising
    assert found.forwards_per_token == sum(found.forwards.values()) / found.tokens
    # Every denoising forward counts each of 4 layers once; an expert is 3 matrices of 32 x 128 in bf16.
    counts = [
        (int(used), times) for line in lines[1:] for site in line["unique"].values() for used, times in site.items()
    ]
    assert sum(times for _, times in counts) == 4 * denoising
    used = sum(used * times for used, times in counts)
    assert found.unique_mean == used / (4 * denoising)
    assert found.expert_bytes_per_token == used * 3 * 32 * 128 * 2 / found.tokens


def test_it_goes_on_behind_the_last_whole_line(run: tuple[Run, Path], untrained: str, tmp_path: Path) -> None:
    lines, file = run
    text = file.read_text().splitlines(keepends=True)
    again = tmp_path / "again.jsonl"
    again.write_text("".join(text[:4]) + text[4][:20])
    rest = evaluate(untrained, Config(passes=("dmoe",)), SMALL, again)
    assert rest[:4] == lines[:4]
    assert [line["texts"] for line in rest[1:]] == [line["texts"] for line in lines[1:]]
    assert [json.loads(line) for line in again.read_text().splitlines()] == rest == evaluation.read(again)


def test_another_runs_file_is_left_alone(run: tuple[Run, Path], untrained: str) -> None:
    _, file = run
    before = file.read_text()
    with pytest.raises(ValueError, match=r"holds another run .*: name another file, or remove it"):
        evaluate(untrained, Config(passes=("cover",)), SMALL, file)
    assert file.read_text() == before


def test_a_run_of_other_weights_is_another(run: tuple[Run, Path], untrained: str, tmp_path: Path) -> None:
    """The same folder, trained in between."""
    lines, _ = run
    folder = tmp_path / "tuned"
    shutil.copytree(untrained, folder)
    again = tmp_path / "run.jsonl"
    header = {**lines[0], "model": str(folder)}
    again.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines[1:]]))
    again.chmod(0o444)  # what is complete is only read
    assert evaluate(str(folder), Config(passes=("dmoe",)), SMALL, again)[1:] == lines[1:]
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds another run"):
        evaluate(str(folder), Config(passes=("dmoe",)), SMALL, again)


def test_a_batch_decodes_the_same_problems(run: tuple[Run, Path], untrained: str) -> None:
    """Answers of untrained weights may differ in a batch: near ties, and sums in another order."""
    lines, _ = run
    together = evaluate(untrained, Config(passes=("dmoe",)), Settings(**{**vars(SMALL), "batch": 5}))
    assert len(together) == 2
    assert together[1]["skills"] == [line["skills"][0] for line in lines[1:]]
    assert len({tuple(answer) for answer in together[1]["answers"]}) > 1
    same = [a == b["answers"][0] for a, b in zip(together[1]["answers"], lines[1:], strict=True)]
    assert sum(same) >= 3, same
    assert summary(together).problems == 5


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Dynamo compile three graphs of a model's code, of which a run takes two, and no more."""
    monkeypatch.setattr(decoding, "_RECOMPILE_LIMIT", 3)
    with torch._dynamo.config.patch(recompile_limit=3):
        yield


def covered(folder: str, mass: float) -> Run:
    config = Config.from_options({"passes": ["cover"], "cover.mass": mass, "experts": False, **ATEN})
    return evaluate(folder, config, Settings(problems=1, threshold=0.004))


@pytest.mark.usefixtures("limit")
def test_what_other_runs_compiled_does_not_count(untrained: str) -> None:
    for mass in (0.5, 0.6):
        assert summary(covered(untrained, mass)).unique_mean >= 8


@pytest.mark.usefixtures("limit")
def test_a_run_that_dynamo_gave_up_is_no_result(untrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = partial(evaluation.backend.compile, isolate_recompiles=False)  # in the cache that all runs share
    monkeypatch.setattr(evaluation.backend, "compile", shared)
    covered(untrained, 0.5)
    with pytest.raises(RuntimeError, match="no expert was counted: Dynamo has given up compiling this model"):
        covered(untrained, 0.6)


def lines(right: list[bool], **header: object) -> Run:
    head = {"kind": "run", "problems": len(right), "seed": 0, "skills": None, "expert_bytes": {"a": 10}, **header}
    batch = dict(unique={"a": {"3": 1, "5": 3}}, tokens=4, forwards={"denoise": 2, "store": 1}, seconds=0.5)
    return [head, *({"kind": "batch", "right": [each], "skills": ["sorting"], **batch} for each in right)]


def test_statistics() -> None:
    found = summary(lines([True] * 90 + [False] * 10))
    assert found.accuracy == 0.9
    assert found.interval() == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))  # Wilson
    assert (found.unique_mean, found.unique_p95) == (4.5, 5)
    assert found.expert_bytes_per_token == (3 + 15) * 10 / 4
    assert (found.forwards_per_token, found.tokens_per_forward) == (0.75, 2)


def test_pairs_are_compared_exactly() -> None:
    first, second = lines([True] * 8 + [False] * 2), lines([True] * 2 + [False] * 8)
    assert compare(first, second) == (6, 0, pytest.approx(2 / 2**6))
    assert compare(first, first) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="seed is 0 in one run and 1 in the other: not paired"):
        compare(first, lines([True] * 10, seed=1))
    with pytest.raises(ValueError, match="one run has 9 of its 10 problems: finish it first"):
        compare(first, lines([True] * 9, problems=10))


def test_runs_that_are_not_paired_are_said_before_anything_is_decoded(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines([True] * 10)))
    result = CliRunner().invoke(cli.app, ["eval", "no-such-model", "--problems", "9", "--against", str(file)])
    assert result.exit_code == 2
    assert "problems is 9 in one run and 10 in the other: not paired" in result.stderr


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\nx\n")
    with pytest.raises(ValueError, match=r"bad.jsonl can't be read as a run's lines .*; name what --lines wrote"):
        evaluation.read(tmp_path / "bad.jsonl")
    (tmp_path / "none.jsonl").write_text("{}\n{}\n")
    with pytest.raises(ValueError, match=r"none.jsonl holds no run"):
        evaluation.read(tmp_path / "none.jsonl")


def test_every_method_is_on_the_grid_once() -> None:
    points = pareto.grid(8, 8)
    assert len(set(zip((p.curve for p in points), (p.name for p in points), strict=True))) == len(points)
    for point in points:
        Config.from_options(point.options)  # knows every option
    curves = {point.curve for point in points}
    assert curves >= {
        "vanilla",
        "dmoe",
        "dmoe, tuned",
        "des, seq",
        "des, vote",
        "cover",
        "top_any",
        "team",
        "team + dmoe",
    }


def test_a_sweep_is_drawn_and_goes_on(untrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [point for point in pareto.grid(8, 8) if point.name in ("vanilla", "p=0.6", "keep=1") and not point.tuned]
    monkeypatch.setattr(pareto, "grid", lambda top_k, least: some)
    runs = pareto.sweep(untrained, Settings(problems=2, max_new_tokens=32, threshold=0.004), tmp_path)
    assert [point.curve for point in runs] == ["vanilla", "dmoe", "des, seq"]
    unique = [summary(run).unique_mean for run in runs.values()]
    assert unique[0] > unique[1] >= 8
    assert len(pareto.table(runs).rows) == 3
    png, svg = pareto.draw(runs, tmp_path / "pareto")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    before = {file: file.read_text() for file in tmp_path.glob("*.jsonl")}
    assert len(before) == 3
    pareto.sweep(untrained, Settings(problems=2, max_new_tokens=32, threshold=0.004), tmp_path)
    assert {file: file.read_text() for file in tmp_path.glob("*.jsonl")} == before
