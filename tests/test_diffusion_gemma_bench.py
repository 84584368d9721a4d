"""The figure on a model small enough for every change."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from dmoe_compile.bench import diffusion_gemma

SEED = 3
TEXT = {
    **diffusion_gemma.SIZES["small"].text,
    "layer_types": ["full_attention", "full_attention"],  # alike, so that their kernels compile once
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "global_head_dim": 16,
    "num_experts": 32,
    "top_k_experts": 4,
}
SIZE = diffusion_gemma.Size(TEXT, canvas_length=32, dtype=torch.float32)


@pytest.mark.usefixtures("aten")
def test_the_whole_figure(monkeypatch):
    """Everything one run must hold, in one test: the run compiles five times."""
    monkeypatch.setitem(diffusion_gemma.SIZES, "tiny", SIZE)
    monkeypatch.setattr(diffusion_gemma, "MIN_EXPERTS", 8)
    result = diffusion_gemma.run(diffusion_gemma.Settings("tiny", steps=1, repeats=2, threads=1, seed=SEED))
    assert result.tokens_equal
    check_layers(result.layers)
    check_times(result)
    check_rows(result.rows())


def check_layers(layers):
    """Unique experts counted in the compiled graph are those that hooks see in an eager forward of the same canvas."""
    model = diffusion_gemma.build(SIZE, SEED)
    seen = {}
    for layer in layers:
        router = model.get_submodule(f"{layer.name}.router")
        router.register_forward_hook(lambda _, args, out, name=layer.name: seen.update({name: out[2].unique().numel()}))
    torch.manual_seed(SEED)
    model.generate(diffusion_gemma._prompt(model, SEED), max_new_tokens=32, max_denoising_steps=1, disable_compile=True)
    assert {layer.name: layer.unique_before for layer in layers} == seen
    assert len(set(seen.values())) == 2  # else this could not tell the layers apart
    for layer in layers:
        assert 8 <= layer.unique_after < layer.unique_before <= layer.num_experts == 32
        assert layer.expert_bytes == 3 * 64 * 32 * 4  # gate, up and down of [32, 64] fp32


def check_times(result):
    assert list(result.timings) == ["inductor", "kernel", "dmoe"]
    for timing in result.timings.values():
        assert timing.forwards == 1
        assert len(timing.wall_s) == len(timing.decoder_s) == 2
        assert all(0 < decoder < wall for decoder, wall in zip(timing.decoder_s, timing.wall_s, strict=True))


def check_rows(rows):
    rows = [json.loads(json.dumps(row)) for row in rows]
    assert [row["kind"] for row in rows] == ["layer", "layer", *["decoding"] * 3, "lossless"]
    assert all({"device", "torch", "transformers", "size", "seed"} <= row.keys() for row in rows)
    assert {row["threads"] for row in rows} == {1}


def test_table_shows_predicted_bytes_and_marks_what_is_measured():
    layers = [
        diffusion_gemma.Layer(f"layer {i}", 128, 500_000, unique_before=100.0, unique_after=25.0) for i in range(2)
    ]
    before = diffusion_gemma.Timing(forwards=4, wall_s=[0.2, 0.4, 0.3], decoder_s=[0.1, 0.2, 0.1])
    after = diffusion_gemma.Timing(forwards=4, wall_s=[0.15, 0.15, 0.9], decoder_s=[0.05, 0.05, 0.05])
    timings = {"inductor": before, "kernel": before, "dmoe": after}
    result = diffusion_gemma.Result(
        diffusion_gemma.Settings(), diffusion_gemma.environment(), layers, timings, tokens_equal=False
    )
    text = shown(result.table())
    assert "-75.0%" in row_of(text, "layer 0")
    assert row_of(text, "(predicted)").split()[-4:] == ["100.0", "100.0", "25.0", "-75.0%"]
    assert row_of(text, "generate(), ms (measured)").split()[-4:] == ["300.0", "300.0", "150.0", "-50.0%"]
    assert row_of(text, "one forward, ms (measured)").split()[-4:] == ["25.00", "25.00", "12.50", "-50.0%"]
    assert "NO" in row_of(text, "same tokens")
    assert "Random weights" in text


def test_settings_name_the_value_and_the_rule():
    with pytest.raises(ValueError, match="config='medium' must be one of: small, large"):
        diffusion_gemma.Settings("medium")
    with pytest.raises(ValueError, match="repeats=0 must be an integer of at least 1"):
        diffusion_gemma.Settings(repeats=0)


def test_specialised_routers_agree_on_popular_experts():
    """Random tokens then choose fewer distinct experts than an even router would let them."""
    torch.manual_seed(0)
    router = nn.Linear(256, 128, bias=False)
    tokens = nn.functional.normalize(torch.randn(64, 256))
    even = nn.functional.linear(tokens, torch.randn(128, 256)).topk(8).indices.unique().numel()
    diffusion_gemma._specialise(router)
    logits = router(tokens)
    assert logits.topk(8).indices.unique().numel() < even - 10
    assert 0.7 < logits.std() < 1.7  # around _LOGIT_STD, so that softmax is neither flat nor a single peak


def shown(table):
    out = io.StringIO()
    Console(width=160, file=out).print(table)
    return out.getvalue()


def row_of(text, label):
    (line,) = [line for line in text.splitlines() if label in line and "│" in line]
    return line.replace("│", " ")
