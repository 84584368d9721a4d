"""passes="auto": cover where the cost model says that it pays, and nothing where it does not.

E, k: experts, experts a token
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from dmoe_compile.passes.auto import Options
from dmoe_compile.passes.cost import Verdict
from torch import Tensor, fx

import dmoe_compile
import zoo
from dmoe_compile import Config, calibrate
from dmoe_compile.joint import JointPass
from dmoe_compile.notices import Notices
from reference_model import Rewriting
from tiny_moe import ATEN, BLOCK, INDUCTOR, TinyMoE

# A machine that reads slowly, where every expert counts, and one that multiplies slowly, where none does.
SLOW_MEMORY = {"auto.gb_per_s": 1.0, "auto.tflop_per_s": 1000.0}
SLOW_PROCESSOR = {"auto.gb_per_s": 1000.0, "auto.tflop_per_s": 0.001}
COVER = {"cover.mass": 0.5, "block_length": BLOCK}
X = torch.randn(1, BLOCK, 16, generator=torch.Generator().manual_seed(0))


def build() -> TinyMoE:
    torch.manual_seed(0)
    return TinyMoE(num_experts=24, top_k=4)


def run(model: torch.nn.Module, x: Any, **options: Any) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="dmoe", options={**COVER, **ATEN, **options}, fullgraph=True)(x)


def test_is_cover_where_it_pays_and_plain_where_it_does_not() -> None:
    model = build()
    plain, cover = run(model, X, passes=[]), run(model, X, passes=["cover"])
    assert not torch.allclose(plain, cover, **INDUCTOR)
    assert torch.equal(run(model, X, passes="auto", **SLOW_MEMORY), cover)
    assert torch.equal(run(model, X, passes=["auto"], **SLOW_PROCESSOR), plain)


def test_what_is_given_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("nothing is left to find out")

    monkeypatch.setattr(calibrate, "machine", fail)
    monkeypatch.setattr(calibrate, "_unique", fail)
    model = build()
    given = {"auto.unique_experts": 20, "auto.coreset_experts": 8}
    assert torch.equal(run(model, X, passes="auto", **SLOW_MEMORY, **given), run(model, X, passes=["cover"]))
    given = {"auto.unique_experts": 20, "auto.coreset_experts": 19.5}
    assert torch.equal(run(model, X, passes="auto", **SLOW_MEMORY, **given), run(model, X, passes=[]))


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def slow_memory(*what: Any) -> Any:
        asked.append(what)
        return calibrate.Machine(1.0, 1000.0)

    monkeypatch.setattr(calibrate, "machine", slow_memory)
    model = build()
    assert torch.equal(run(model, X, passes="auto"), run(model, X, passes=["cover"]))
    assert asked == [(torch.device("cpu"), torch.float32)]


def test_every_site_is_asked() -> None:
    """The first layer's router sends all tokens to few experts: nothing is left to save there."""
    layers = torch.nn.Sequential(build(), build())
    with torch.no_grad():
        layers[0].gate.weight.zero_()  # all scores are equal, so every token takes the same four
    rewriting = Rewriting(**{**COVER, "passes": "auto", **SLOW_MEMORY})
    with torch.no_grad():
        torch.compile(layers, backend=rewriting, fullgraph=True)(X)
    first, second = rewriting.outcomes
    assert (first.rewritten, first.reason) == (False, "a coreset does not pay")
    assert first.notes[0].startswith("a coreset would not pay: 4 -> 4 unique experts")
    assert second.rewritten
    assert second.notes[-1].startswith("a coreset pays: ")


def test_counting_writes_to_nothing() -> None:
    """A model that keeps its last hidden states in a buffer: compiled or not, it is written once a call."""

    class Remembering(TinyMoE):
        def __init__(self) -> None:
            super().__init__(num_experts=24, top_k=4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x) + self.calls * 0

    model = Remembering()
    run(model, X, passes="auto", **SLOW_MEMORY)
    assert model.calls.item() == 1


def test_with_gradients() -> None:
    model = build()
    options = {**COVER, **ATEN, **SLOW_MEMORY, "passes": "auto"}
    out = torch.compile(model, backend="dmoe", options=options, fullgraph=True)(X)
    torch.testing.assert_close(out, run(model, X, passes=["cover"]), **INDUCTOR)
    out.sum().backward()
    assert model.gate.weight.grad is not None


def test_what_pays_is_part_of_what_compiled_code_is_cached_by() -> None:
    gm, config, notices = fx.symbolic_trace(torch.nn.Identity()), Config(passes="auto"), Notices()
    pays, does_not = (JointPass(config, gm, notices, [Verdict(each, "")]).uuid() for each in (True, False))
    assert pays != does_not


def test_with_symbolic_sizes() -> None:
    model, options = build(), {**COVER, **ATEN, **SLOW_MEMORY, "passes": "auto"}
    compiled = torch.compile(model, backend="dmoe", options=options, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (BLOCK, 2 * BLOCK + 3, 3 * BLOCK):
            x = torch.randn(2, tokens, 16)
            expected = torch.compile(model, backend=Rewriting(**COVER, passes=["cover"]), fullgraph=True)(x)
            torch.testing.assert_close(compiled(x), expected, **INDUCTOR)


def test_nothing_that_pays_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dmoe_compile"):
        run(build(), X, passes="auto", **SLOW_PROCESSOR)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "left alone: a coreset does not pay" in caplog.text


def test_the_report_has_the_formula_and_the_numbers() -> None:
    config = Config.from_options({**COVER, **ATEN, **SLOW_MEMORY, "passes": "auto"})
    report = dmoe_compile.explain(build(), X, config=config, verify=True)
    text = str(report)
    assert "cost model: a layer takes at least Max(" in text
    assert "a coreset pays: " in text
    assert "(T=8, k=4, 1 GB/s, 1e+03 TFLOP/s)" in text
    assert report.verified
    (site,) = report.sites
    found = f"{site.unique_experts_before} -> {site.unique_experts_after} unique experts"
    assert found in text  # what the cost model counted is what the report counts


@pytest.mark.parametrize("name", zoo.ROUTABLE)
def test_on_real_models(name: str) -> None:
    """Where it pays everywhere it is cover, where it pays nowhere it is the model."""
    model, inputs = zoo.build(name, num_layers=2 if name == "deepseek_v3" else 1), zoo.inputs(name)
    results = {}
    for key, options in {
        "own": {"passes": []},
        "cover": {"passes": ["cover"]},
        "pays": {"passes": "auto", **SLOW_MEMORY, "auto.unique_experts": 16, "auto.coreset_experts": 8},
        "does not": {"passes": "auto", **SLOW_PROCESSOR},
    }.items():
        rewriting = Rewriting(**{"cover.mass": 0.5, "block_length": 16, "stats": True, **options})
        torch._dynamo.reset()
        with torch.no_grad():
            results[key] = torch.compile(model, backend=rewriting, fullgraph=True)(**inputs)[0]
        rewritten = {outcome.rewritten for outcome in rewriting.outcomes}
        assert rewritten == {key in {"cover", "pays"}}
    assert torch.equal(results["pays"], results["cover"])
    assert torch.equal(results["does not"], results["own"])
    assert not torch.equal(results["own"], results["cover"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gb_per_s": 0}, "auto.gb_per_s=0 must be a positive number"),
        ({"tflop_per_s": True}, "auto.tflop_per_s=True"),
        ({"unique_experts": "70", "coreset_experts": 1}, "auto.unique_experts='70'"),
        ({"unique_experts": 70}, "auto.unique_experts=70 and auto.coreset_experts=None: give both"),
        ({"min_gain": 1}, r"auto.min_gain=1 must be a number in \[0, 1\)"),
        ({"min_gain": False}, "auto.min_gain=False"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.parametrize("passes", [["auto", "dmoe"], ["cover", "auto"]])
def test_auto_is_a_choice_of_a_coreset(passes: list[str]) -> None:
    with pytest.raises(ValueError, match="each choose the coreset of a block"):
        Config.from_options({"passes": passes})
