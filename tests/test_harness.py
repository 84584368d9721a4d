"""The adapter of lm-evaluation-harness: a local task from its own command line, grouping, stops, refusals."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from dmoe_compile import problems
from dmoe_compile.harness import DmoeLM

pytestmark = pytest.mark.usefixtures("aten")
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{final}}}}"
generation_kwargs: {{until: ["nuts"], max_gen_toks: 32}}
metric_list:
  - metric: exact_match
"""


def test_a_task_from_the_harness_s_own_command_line(untrained: str, tmp_path: Path) -> None:
    lines = itertools.islice(problems.draw("test", 0), 3)
    (tmp_path / "data.json").write_text("".join(json.dumps(vars(each)) + "\n" for each in lines))
    (tmp_path / "sums.yaml").write_text(TASK.format(file=tmp_path / "data.json"))
    args = f"pretrained={untrained},passes=team+dmoe,dmoe.top_p=0.8,threshold=0.004,fallback_by_default=True"
    command = [sys.executable, "-P", "-m", "dmoe_compile.harness", "run", "--model", "dmoe", "--model_args", args]
    command += [
        "--tasks",
        "sums",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|sums |" in done.stdout
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["sums"]["exact_match,none"] == 0
    (samples,) = (tmp_path / "out").rglob("samples*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == 3
    assert all(answers)


def request(prompt: str, number: int, **how: object) -> Instance:
    return Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": 32, **how}), number)


def test_answers_come_in_the_order_of_requests_whatever_the_batches(untrained: str) -> None:
    prompts = [each.prompt for each in itertools.islice(problems.draw("test", 0), 5)]
    requests = [request(prompt, i, until=["red"] if i == 2 else []) for i, prompt in enumerate(prompts)]
    alone, together = (DmoeLM(untrained, batch_size=size, threshold=0.004, experts=False) for size in (1, 3))
    answers = alone.generate_until(requests, disable_tqdm=True)
    assert len(answers) == 5
    assert len(set(answers)) > 1
    assert together.generate_until(requests, disable_tqdm=True) == answers
    assert alone.generate_until(requests[::-1], disable_tqdm=True) == answers[::-1]


def test_a_chat_template_writes_its_special_tokens_itself(untrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = DmoeLM(untrained, threshold=0.004, experts=False), []
    encode = type(lm.tokenizer).__call__

    def watch(self: Any, text: str, **kwargs: Any) -> Any:
        seen.append(kwargs.get("add_special_tokens", True))
        return encode(self, text, **kwargs)

    monkeypatch.setattr(type(lm.tokenizer), "__call__", watch)
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    lm.generate_until([request("1 + 1", 0)], disable_tqdm=True)
    text = lm.apply_chat_template([{"role": "user", "content": "1 + 1"}])
    lm.generate_until([request(text, 0)], disable_tqdm=True)
    assert seen == [True, False]


def test_an_answer_ends_before_the_first_stop() -> None:
    lm, (problem,) = DmoeLM("demo"), itertools.islice(problems.draw("test", 0), 1)
    (whole,) = lm.generate_until([request(problem.prompt, 0)], disable_tqdm=True)
    stop = "Answer:"
    (cut,) = lm.generate_until([request(problem.prompt, 0, until=stop)], disable_tqdm=True)
    assert 0 < len(cut) < len(whole)
    assert cut == whole[: whole.index(stop)]


def test_likelihoods_are_refused(untrained: str, tmp_path: Path) -> None:
    lm = DmoeLM(untrained)
    with pytest.raises(NotImplementedError, match="choose tasks that generate, such as gsm8k, not multiple choice"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="gives no perplexity"):
        lm.loglikelihood_rolling([])
    with pytest.raises(ValueError, match=r"dmoe.top_q=1: there is no such option"):
        DmoeLM(untrained, **{"dmoe.top_q": 1})
    with pytest.raises(
        ValueError, match=r"has no tokenizer, and texts need one: give the folder of a whole checkpoint"
    ):
        DmoeLM(str(tmp_path))
