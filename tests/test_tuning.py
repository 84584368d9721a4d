"""Tuning a model to a coreset: what is trained, through which graph, and that it gets nearer to the teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from dmoe_compile import training
from dmoe_compile.tuning import Settings, tune

pytestmark = pytest.mark.usefixtures("aten")


def test_the_student_gets_nearer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = training.tokenizer()
    model = Qwen3MoeForCausalLM(training.model_config(words))
    with torch.no_grad():
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.mlp.gate.weight, std=0.5)  # so that a coreset changes what comes out
            torch.nn.init.normal_(layer.mlp.experts.down_proj, std=0.2)
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    training.save(model, words, tmp_path / "base")
    losses = tune(
        str(tmp_path / "base"), tmp_path / "tuned", Settings(steps=60, tokens=512, learning_rate=4e-3, warm_up=5)
    )
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15]), losses
    assert all(loss > 0 for loss in losses)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("base", "tuned"))
    assert [name for name, x in after.items() if torch.equal(x, before[name])] == []
    (line,) = [json.loads(line) for line in (tmp_path / "tuned" / "log.jsonl").read_text().splitlines()]
    assert line["loss"] == [pytest.approx(sum(losses) / 60)]
    assert line["min_experts"] == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0 must be an integer of at least 1"),
        ({"tokens": 32}, "tokens is 32, but must be a multiple of two blocks, 64"),
        ({"learning_rate": -1.0}, r"learning_rate is -1.0, but must be above 0"),
    ],
)
def test_bad_settings_are_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
