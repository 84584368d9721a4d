"""The trained model that the package brings: that it loads as any other, what it knows, and how its routers behave."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

import dmoe_compile
from dmoe_compile import evaluation, loading, problems
from dmoe_compile.config import Config

pytestmark = pytest.mark.usefixtures("aten")
LEAST_RIGHT = 83  # of 100: 91.4% is what its card says, less three standard deviations


@pytest.mark.parametrize("tuned", [False, True])
def test_it_loads_as_any_other_model(tuned: bool) -> None:
    model, words = dmoe_compile.load_demo_model(tuned)
    assert type(model) is Qwen3MoeForCausalLM
    assert model.dtype == torch.bfloat16
    assert not model.training
    folder = loading.OWN["demo-tuned" if tuned else "demo"]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    text = "Mia has 7 pens. Mia buys 5 more. How many pens are left? Solution:"
    assert AutoTokenizer.from_pretrained(folder)(text) == words(text)
    assert words.decode(words(text)["input_ids"]) == text
    assert words.mask_token_id == model.config.mask_token_id
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 12 * 2**20


def test_a_folder_of_the_same_name_comes_first(untrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").symlink_to(untrained)
    model, _ = loading.load_model("demo")
    assert not torch.equal(model.lm_head.weight, dmoe_compile.load_demo_model()[0].lm_head.weight)


def test_the_tuned_one_solves_as_much_with_a_quarter_of_the_experts() -> None:
    """Decoded in batches as below, and a few problems by themselves: experts are counted by forward."""
    config = Config.from_options({"passes": ["dmoe"], "dmoe.top_p": 0.6, "dmoe.min_experts": 8})
    decoder = evaluation.Decoder("demo-tuned", config, evaluation.Settings(problems=100, batch=20))
    right = [each for group in decoder._settings.groups() for each in decoder.decode(group)["right"]]
    assert sum(right) >= LEAST_RIGHT
    alone = [decoder.decode(group) for group in evaluation.Settings(problems=5).groups()]
    assert evaluation.summary([decoder.header, *alone]).unique_mean < 0.25 * 42.9  # what the card has without a pass


def test_it_solves_what_its_card_says() -> None:
    """Decoded in batches: 100 of the 500 problems that the figures are of."""
    decoder = evaluation.Decoder("demo", None, evaluation.Settings(problems=100, batch=20))
    right = [each for group in decoder._settings.groups() for each in decoder.decode(group)["right"]]
    assert sum(right) >= LEAST_RIGHT


def test_every_expert_is_used_and_blocks_have_many() -> None:
    model, words = dmoe_compile.load_demo_model()
    used: dict[int, Counter[int]] = {number: Counter() for number in range(4)}
    by_block: list[int] = []

    def count(number: int) -> None:
        def hook(_: object, __: object, out: tuple[torch.Tensor, ...]) -> None:
            used[number].update(out[2].flatten().tolist())
            by_block.append(out[2].unique().numel())

        model.model.layers[number].mlp.gate.register_forward_hook(hook)

    for number in used:
        count(number)
    for problem in itertools.islice(problems.draw("test", 3), 25):
        ids = torch.tensor([words(problem.prompt)["input_ids"]])
        dmoe_compile.generate(model, ids, max_new_tokens=32, mask_token_id=words.mask_token_id)
    assert all(len(counts) >= 0.8 * 64 for counts in used.values())
    assert sum(by_block) / len(by_block) >= 4 * 8


def test_its_card_holds_the_log_of_its_training() -> None:
    folder = loading.OWN["demo"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    card = (folder / "README.md").read_text()
    assert f"--steps {lines[-1]['step']}" in card
    assert f"{lines[-1]['loss']:.4f}" in card
    assert sum(line["seconds"] for line in lines) < 4 * 3600
    assert lines[0]["loss"] > 10 * lines[-1]["loss"]


def test_the_tuned_one_s_card_holds_the_log_of_its_tuning() -> None:
    folder = loading.OWN["demo-tuned"]
    (line,) = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    card = (folder / "README.md").read_text()
    assert f"--steps {line['steps']}" in card
    assert f"top_p {line['top_p']}, min_experts {line['min_experts']}" in card
    assert f"| {line['steps']} | {line['loss'][-1]:.4f} |" in card


@pytest.mark.parametrize("name", ["demo", "demo-tuned"])
def test_commands_know_it_by_name(name: str) -> None:
    run = evaluation.evaluate(name, Config(), evaluation.Settings(problems=1, skills=("sorting",)))
    assert run[0]["model"] == name
    assert evaluation.summary(run).unique_mean > 8
