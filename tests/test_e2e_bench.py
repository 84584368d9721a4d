"""`dmoe bench e2e` on models small enough for every change: what is assumed holds, what is measured adds up."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters

from dmoe_compile.bench import e2e as figure
from dmoe_compile.bench import stacks

pytestmark = pytest.mark.usefixtures("aten")
REFERENCE = Path(__file__).parent / "reference"
SMALL = {
    "hidden_size": 64,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY = {
    "SDAR-30B-A3B": {"num_experts": 32, "moe_intermediate_size": 32},
    "LLaDA2.0-mini": {"n_routed_experts": 32, "moe_intermediate_size": 32},
    "LLaDA-MoE-7B-A1B": {"num_experts": 16, "intermediate_size": 32},
    "DiffusionGemma-26B-A4B": {"num_experts": 32, "moe_intermediate_size": 32},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every stack narrow; its class, router and block stay."""
    for name, stack in stacks.STACKS.items():
        config = {**stack.config, **SMALL, **TINY[name]}
        made = stacks.Stack(stack.architecture, config, 3, min(stack.block_length, 64), stack.tokens_per_forward)
        monkeypatch.setitem(stacks.STACKS, name, made)


def printed(rows: list[dict[str, Any]], width: int = 160) -> str:
    out = io.StringIO()
    console = Console(width=width, file=out)
    console.print(figure.table(rows))
    for remark in figure.remarks(rows):
        console.print(remark, soft_wrap=True)
    return out.getvalue()


@pytest.mark.usefixtures("small")
def test_rows_and_what_is_printed() -> None:
    ways = ("eager", "inductor", "kernel", "team + dmoe 0.6 one row")
    settings = figure.Settings(
        ("SDAR-30B-A3B",), ways, layers=2, blocks=1, prompt=40, repeats=1, tokens_per_forward=3.0, dtype="float32"
    )
    rows = [json.loads(json.dumps(row)) for row in figure.run(settings)]
    assert [row["way"] for row in rows] == list(ways)
    eager, inductor, kernel, team = rows
    for row in rows:
        assert row["tokens"] == 24  # to the end of the block that the prompt begins
        assert row["tokens_per_step"] == kernel["tokens_per_step"] == 24 / row["steps"]  # the script is as sure
        per_token = row["unique_experts"] / row["tokens_per_step"] * 2 * 3 * 64 * 32 * 4
        assert row["expert_bytes_per_token"] == pytest.approx(per_token)
        assert row["bytes_per_step"] == pytest.approx(2 * row["unique_experts"] * 3 * 64 * 32 * 4 + row["other_bytes"])
        assert row["s_per_step"] == pytest.approx(row["wall_s"][0] / row["steps"])
        assert 0 < row["of_roofline"] < 1
        assert row["peak_bytes"] > 2**27
        assert row["device"]
    assert eager["compile_cold_s"] is None
    assert all(inductor[key] > 0 for key in ("compile_cold_s", "compile_warm_s"))
    assert eager["unique_experts"] == inductor["unique_experts"]
    assert kernel["unique_experts"] == pytest.approx(eager["unique_experts"])  # counted in compiled code, and by hooks
    assert team["unique_experts"] < kernel["unique_experts"]
    assert team["context_bytes"] == 2 * 32 * 64 * 4  # a layer, a block of the hidden size, fp32
    assert 0 < team["context_share"] < 1
    text = printed(rows)
    assert "SDAR-30B-A3B: 2 layers, float32, blocks of 32; times faster than inductor" in text
    narrow = printed(rows, width=80)
    assert "…" not in narrow
    assert "resident at most: " in text
    assert all(f"{row['s_per_step'] * 1e3:.3g}" in narrow for row in rows)
    assert f"tokens a step: {kernel['tokens_per_step']:.2f} without team, assumed" in text
    for way in ("kernel 1.8x a step: ", "team + dmoe 0.6 one row 5x an accepted token: "):
        assert f"goal: {way}" in text


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "shape",
    ["LLaDA2.0-mini", "DiffusionGemma-26B-A4B"]
    + [pytest.param(each, marks=pytest.mark.nightly) for each in ("SDAR-30B-A3B", "LLaDA-MoE-7B-A1B")],
)
def test_every_stack_decodes(shape: str) -> None:
    ways = ("eager", "des vote")
    settings = figure.Settings((shape,), ways, layers=1, blocks=1, prompt=64, repeats=1, dtype="float32")
    before = counters["dmoe"]["experts_fused"]
    rows = figure.run(settings)
    assert [row["way"] for row in rows] == list(ways)
    assert {row["tokens"] for row in rows} == {stacks.STACKS[shape].block_length}
    assert counters["dmoe"]["experts_fused"] > before
    assert rows[1]["unique_experts"] <= 4 * 4 + 4
    assert f"{shape}: 1 layers" in printed(rows)


@pytest.mark.parametrize("wanted", [1.0, 1.5, 4.0, 32.0])
def test_the_script_accepts_as_many_tokens_as_asked(wanted: float) -> None:
    prompt = torch.zeros(1, 32, dtype=torch.int64)
    script = figure.scripted(stacks.STACKS["SDAR-30B-A3B"], 4, prompt, 0, wanted)
    trial = figure.decode(script.around(None, 32), prompt, script.mask, 4, 32, None)
    assert trial.tokens / len(trial.denoising) == pytest.approx(wanted, rel=0.1)  # in steps of whole forwards


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", TINY)
def test_routers_use_the_published_share_of_experts(shape: str) -> None:
    model = stacks.build(stacks.STACKS[shape], 2, 128, torch.float32, 0)
    count = len(stacks.layers_of(model)[0].mlp.experts.down_proj)
    found = stacks.unique_of_blocks(model, torch.Generator().manual_seed(7))  # other tokens than it was calibrated with
    assert found == pytest.approx(stacks.published_unique(count, 4), rel=0.1)


def test_the_published_share_is_that_of_the_paper() -> None:
    assert stacks.published_unique(256, 8) == pytest.approx(69.5, rel=0.01)


def test_as_many_layers_as_fit() -> None:
    stack = stacks.STACKS["SDAR-30B-A3B"]
    layer = 128 * 3 * 2048 * 768 * 2 + 2 * 2048 * 2 * (32 + 4) * 128  # experts; attention's four projections
    assert stacks.layers_that_fit(stack, 4.1 * layer, torch.bfloat16) == 4
    assert stacks.layers_that_fit(stack, 1e6, torch.bfloat16) == 1
    assert stacks.layers_that_fit(stack, 1e15, torch.bfloat16) == 48
    with torch.device("meta"):
        widths = {name: stacks._model(stack, 1, 0) for name, stack in stacks.STACKS.items()}
    experts = {name: stacks.expert_bytes(model) for name, model in widths.items()}
    assert list(experts.values()) == [4 * 3 * 2048 * width for width in (768, 512, 1024)] + [4 * 3 * 2816 * 704]


def test_the_recorded_model_decodes_by_its_own_confidences() -> None:
    path = REFERENCE / "sdar_tiny_weights.json"
    model, mask = stacks.recorded(path)
    assert mask == 127
    assert model.config.num_experts == 16
    (eager, team) = figure.run(figure.Settings(ways=("eager", "team"), blocks=1, repeats=1, recorded=str(path)))
    assert team["tokens_per_step"] > eager["tokens_per_step"]
    assert "by its own confidences" in printed([eager, team])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": ("GPT-2",)}, "shapes='GPT-2' must be one of: SDAR-30B-A3B, LLaDA2.0-mini"),
        ({"ways": ("slow",)}, "ways='slow' must be one of: eager, inductor loop"),
        ({"ways": ()}, "ways is empty, but must name one"),
        ({"blocks": 0}, "blocks=0"),
        ({"layers": 0}, "layers=0 must be an integer of at least 1"),
        ({"memory_gib": 0.0}, r"memory_gib is 0.0, but must be above 0"),
        ({"tokens_per_forward": 0.5}, r"tokens_per_forward is 0.5, but must be at least 1"),
        ({"tokens_per_forward": 33.0}, "tokens_per_forward is 33.0, but SDAR-30B-A3B has blocks of 32 tokens"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"recorded": "nowhere.json"}, "recorded is nowhere.json, but there is no such file"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figure.Settings(**changes)
