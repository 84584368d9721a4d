"""`dmoe generate` on a checkpoint folder with a tokenizer: what it prints where, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dmoe_compile import loading
from test_cli import invoke
from test_decoding import MASK, load
from test_pipelines import tokenizer

SHORT = ("--threshold", "0.5", "--option", "fallback_by_default=true", "--block-length", "32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdar")
    load(path)
    tokenizer(MASK).save_pretrained(path)
    return path


def generate(folder: Path, *args: str) -> Result:
    return invoke("generate", str(folder), "--mask-token-id", str(MASK), *SHORT, *args)


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_streams_text(folder: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out.jsonl", tmp_path / "trace.jsonl"
    result = generate(
        folder, "--prompt", "w20 w21 w22", "--max-new-tokens", "20", "--json", str(out), "--trace", str(trace)
    )
    assert result.exit_code == 0
    (row,) = rows(out)
    assert result.stdout.split() == [f"w{i}" for i in row["answers"][0]]
    assert row["tokens"] == 20
    assert "20 tokens in" in result.stderr.splitlines()[-1]
    lines = rows(trace)
    assert lines[0]["prompts"] == [5]  # in the chat template: <user> w20 w21 w22 <model>
    assert sum(line["kind"] == "forward" for line in lines) == sum(row["forwards"].values())


def test_a_trace_beside_stats(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    args = ("--prompt-ids", "20,21", "--max-new-tokens", "5", "--trace", str(path), "--option", "stats=true")
    assert generate(folder, *args).exit_code == 0
    assert all(line["unique_experts"] for line in rows(path) if line["kind"] == "forward")


def test_batches_are_lines_of_their_rows(folder: Path) -> None:
    result = generate(folder, "--prompt-ids", "20,21", "--prompt-ids", "30", "--max-new-tokens", "40", "--json", "-")
    assert result.exit_code == 0
    (row,) = map(json.loads, result.stdout.splitlines())  # standard output is JSON alone
    words: list[list[str]] = [[], []]
    for line in result.stderr.splitlines():
        if line.startswith("["):
            number, *text = line.split()
            words[int(number.strip("[]"))] += text
    assert [[word for word in each if word != "<pad>"] for each in words] == [
        [f"w{i}" for i in answer] for answer in row["answers"]
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "there is no prompt: give --prompt TEXT, or --prompt-ids 1,2,3"),
        (("--prompt-ids", "1,x"), "--prompt-ids 1,x: must be token ids"),
        (("--prompt-ids", "1", "--max-new-tokens", "0"), "max_new_tokens=0 must be an integer of at least 1"),
        (("--prompt-ids", "1", "--temperature", "-1"), "temperature=-1.0 must be a number of at least 0"),
        (("--prompt-ids", "1", "--passes", "tem"), "there is no pass 'tem'"),
        (("--prompt-ids", "1", "--trace", "no/such/file"), "there is no folder no/such"),
    ],
)
def test_usage_errors(folder: Path, args: tuple[str, ...], words: str) -> None:
    result = generate(folder, *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--max-new-tokens", "0"), "max_new_tokens=0"),
        (("--threshold", "0"), "threshold=0.0"),
        (("--temperature", "-1"), "temperature=-1.0"),
        (("--steps", "0"), "steps=0"),
        (("--top-k", "0"), "top_k=0"),
        (("--top-p", "2"), "top_p=2.0"),
    ],
)
def test_numbers_are_looked_at_before_a_model_loads(
    monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], words: str
) -> None:
    monkeypatch.delattr(loading, "load_model")
    result = invoke("generate", "qwen3_moe", "--prompt-ids", "1", *args)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_model_type_has_no_tokenizer() -> None:
    result = invoke("generate", "qwen3_moe", "--prompt", "hello")
    assert result.exit_code == 2
    assert "qwen3_moe has no tokenizer: give --prompt-ids 1,2,3" in result.stderr
