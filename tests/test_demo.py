"""The demonstration: real text from the trained model, in every way."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from dmoe_compile import demo, problems


@pytest.mark.usefixtures("aten")
def test_the_whole_demonstration() -> None:
    """Everything one run must hold, in one test: the run compiles five times."""
    result = demo.run(demo.Settings(problems=5, threads=1))
    assert result.tokens_equal
    check_ways(result)
    check_experts_and_answers(result)
    check_what_is_printed(result)
    check_rows(result)


def check_ways(result: demo.Result) -> None:
    assert list(result.runs) == ["inductor", "kernel", "dmoe", "team + dmoe"]
    assert [problem.skill for problem in result.problems] == [*problems.SKILLS]
    for run in result.runs.values():
        assert [line["skills"] for line in run[1:]] == [[skill] for skill in problems.SKILLS]
    assert result.runs["inductor"][1]["unique"] == {}


def check_experts_and_answers(result: demo.Result) -> None:
    found = {way: demo.evaluation.summary(run) for way, run in result.runs.items()}
    assert found["dmoe"].unique_mean < 0.6 * found["kernel"].unique_mean
    assert found["team + dmoe"].expert_bytes_per_token < found["dmoe"].expert_bytes_per_token
    assert found["inductor"].right >= 4
    assert found["kernel"].right >= 4


def check_what_is_printed(result: demo.Result) -> None:
    out = io.StringIO()
    Console(width=80, file=out).print(result.table())
    table = [line.split() for line in out.getvalue().splitlines()]
    kernel, dmoe = (next(line for line in table if line[:1] == [way]) for way in ("kernel", "dmoe"))
    assert kernel[2:4] == ["of", "5"]
    assert float(dmoe[4]) < float(kernel[4])
    text = "\n".join(result.remarks())
    for problem, line in zip(result.problems, result.runs["kernel"][1:], strict=True):
        verdict = "right" if line["right"][0] else "wrong"
        assert f"{problem.skill}: {problem.prompt}\n  vanilla  {line['texts'][0]}  [{verdict}]\n  dmoe " in text
    assert "all experts: yes" in text


def check_rows(result: demo.Result) -> None:
    rows = json.loads(json.dumps(result.rows()))
    assert [row["kind"] for row in rows] == [*["way"] * 4, *["problem"] * 5, "lossless"]
    assert all({"device", "torch", "transformers"} <= row.keys() for row in rows)
    assert rows[4]["prompt"] == result.problems[0].prompt
    assert rows[4]["answers"]["kernel"] == result.runs["kernel"][1]["texts"][0]
    assert rows[-1]["tokens_equal"] is True


def test_settings_name_the_value_and_the_rule() -> None:
    with pytest.raises(ValueError, match=r"problems=0.*at least 1"):
        demo.Settings(problems=0)
    with pytest.raises(ValueError, match="threads=0 must be an integer of at least 1"):
        demo.Settings(threads=0)
