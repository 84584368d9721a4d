"""`dmoe bench decoding` on a model small enough for every change: what is assumed holds, what is measured adds up."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters

from dmoe_compile.bench import decoding as figure
from test_backend import ATEN

SMALL = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "num_experts": 32, "head_dim": 16}
SMALL |= {"num_experts_per_tok": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
WAYS = {"no pass": ATEN, "cache": figure.WAYS["cache"] | ATEN, "team, dmoe": figure.WAYS["team, dmoe"] | ATEN}
REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "_CONFIG", figure._CONFIG | SMALL)
    monkeypatch.setattr(figure, "WAYS", WAYS)


@pytest.mark.usefixtures("small")
def test_rows_and_table() -> None:
    settings = figure.Settings(layers=1, blocks=1, prompt=40, repeats=1, tokens_per_forward=3.0, dtype="float32")
    rows = [json.loads(json.dumps(row)) for row in figure.run(settings)]
    assert [row["way"] for row in rows] == list(WAYS)
    plain, cache, team = rows
    for row in rows:
        assert row["tokens"] == 24  # to the end of the block that the prompt begins
        assert row["accepted_per_forward"] * row["forwards_per_block"] == pytest.approx(24)
        assert row["unique_per_token"] == pytest.approx(row["unique_per_forward"] / row["accepted_per_forward"])
        assert row["expert_bytes_per_token"] == pytest.approx(row["unique_per_token"] * 3 * 64 * 32 * 4)
        assert len(row["wall_s"]) == 1
        assert row["device"]
    assert cache["accepted_per_forward"] == plain["accepted_per_forward"]  # the script is sure of the same tokens
    assert cache["unique_per_forward"] < plain["unique_per_forward"]
    assert cache["context_bytes"] == 32 * 64 * 4  # a layer, a block of the hidden size, fp32
    assert team["accepted_per_forward"] > plain["accepted_per_forward"]
    assert 0 < team["context_share"] < 1
    out = io.StringIO()
    Console(width=160, file=out).print(figure.table(rows))
    assert "Assumed: 3 tokens a forward" in out.getvalue()
    assert "team, dmoe" in out.getvalue()
    assert "fused experts" in out.getvalue()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("own", [False, True], ids=["kernel", "own experts"])
def test_whose_experts_run(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "WAYS", {"no pass": ATEN})
    settings = figure.Settings(layers=1, blocks=1, repeats=1, dtype="float32", own_experts=own)
    before = counters["dmoe"]["experts_fused"]
    rows = figure.run(settings)
    fused = counters["dmoe"]["experts_fused"] - before
    assert (fused == 0) == own
    out = io.StringIO()
    Console(width=160, file=out).print(figure.table(rows))
    assert ("the model's own experts" in out.getvalue()) == own


@pytest.mark.parametrize("wanted", [1.5, 4.0])
def test_the_script_accepts_as_many_tokens_as_asked(wanted: float) -> None:
    settings = figure.Settings(blocks=4, prompt=32, tokens_per_forward=wanted)
    mask = 1023
    prompt = torch.zeros(1, 32, dtype=torch.int64)
    script = figure.calibrated(settings, prompt, mask)
    trial = figure._decode(None, prompt, settings, script, mask, None, {})
    assert trial.tokens / len(trial.denoising) == pytest.approx(wanted, rel=0.1)  # in steps of whole forwards


@pytest.mark.usefixtures("small")
def test_routers_use_the_published_share_of_experts() -> None:
    settings = figure.Settings(layers=2, blocks=2, dtype="float32")
    model, _ = figure._stack(settings)
    used: list[int] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: used.append(out[2].unique().numel()))
    ids = torch.randint(0, 1023, (1, 32))
    ids[:, 16:] = figure._VOCABULARY + torch.arange(16)
    with torch.no_grad():
        model(ids, attention_mask=torch.zeros(1, 1, 32, 32), use_cache=False)
    even = 32 * (1 - (1 - 4 / 32) ** 32)
    assert sum(used) / len(used) == pytest.approx(figure.UNIQUE_SHARE * even, rel=0.25)  # other tokens, one block


def test_the_recorded_model_loads() -> None:
    model, mask = figure._recorded(REFERENCE / "sdar_tiny_weights.json")
    assert mask == 127
    assert model.config.num_experts == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 0}, "blocks is 0, but must be at least 1"),
        ({"tokens_per_forward": 0.5}, r"tokens_per_forward is 0.5, but must be in \[1, 32\]"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"recorded": "nowhere.json"}, "recorded is nowhere.json, but there is no such file"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure.Settings(**changes)
