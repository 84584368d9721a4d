"""Which layers get the fused kernels, as decided from shapes, dtypes, devices and options."""

from __future__ import annotations

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from dmoe_compile.kernels.limits import MAX_TOKENS
from dmoe_compile.passes import lower
from dmoe_compile.passes.constrain import Settings
from dmoe_compile.passes.cost import GPUS
from dmoe_compile.passes.fuse_experts import Reader
from dmoe_compile.passes.layouts import Layout
from dmoe_compile.passes.lower import Lowering, NotFusedError
from dmoe_compile.passes.nodes import Sources
from dmoe_compile.passes.readings import Bank, Form
from dmoe_compile.passes.sites import Refusal, Site
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import dmoe_compile
import zoo
from dmoe_compile import Config, backend
from llada2 import tiny
from moe_forms import H, Sampled
from reference_model import Rewriting
from tiny_moe import ATEN, INDUCTOR

S = 8


@pytest.fixture
def site() -> Site:
    watch = Rewriting(passes=[], experts=False)
    block = zoo.build("qwen3_moe").model.layers[0].mlp
    with torch.no_grad():
        torch.compile(block, backend=watch)(torch.randn(1, S, zoo.HIDDEN))
    return watch.outcomes[0].site


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_target", lambda device: "sm_90")


def on(site: Site, device: str, tokens: int = S, dtype: torch.dtype = torch.bfloat16) -> Site:
    """Return a site as it would be on another device, of another width, and with more tokens."""

    def moved(node: Any, *size: int, to: torch.dtype = dtype) -> Any:
        other = torch.fx.Graph().placeholder(node.name)
        shape = size or node.meta["val"].shape
        with torch._subclasses.FakeTensorMode():
            other.meta["val"] = torch.empty(shape, dtype=to, device=device)
        return other

    combine = moved(site.combine, tokens, zoo.HIDDEN)
    weights = tuple(moved(weight) for weight in site.expert_weights)
    ids = moved(site.ids, tokens, site.top_k, to=torch.int64)
    return dataclasses.replace(site, combine=combine, expert_weights=weights, ids=ids)


def auto(**how: Any) -> Lowering:
    return Lowering(Reader(Sources({}, frozenset())), **{"experts": "auto", **how})


@pytest.mark.usefixtures("h100")
def test_where_reading_limits_the_layer_a_gpu_gets_the_kernel(site: Site) -> None:
    assert auto()._reason(on(site, "cuda")) == ""


@pytest.mark.usefixtures("h100")
def test_exact_fp32_is_slower_than_half_precision(site: Site) -> None:
    """16 experts, 4 a token: 400 tokens are 100 for each, 100 FLOP a byte of bf16 and 50 of fp32.

    An H100 does 295 of the one before reading is the shorter part, and 20 of the other.
    """
    assert auto()._size_reason(on(site, "cuda", 400)) == ""
    reason = auto()._size_reason(on(site, "cuda", 400, torch.float32))
    assert reason == "with 400 tokens it is limited by arithmetic, not by reading weights"
    assert auto(experts=True)._size_reason(on(site, "cuda", 400, torch.float32)) == ""


@pytest.mark.usefixtures("h100")
def test_longer_forwards_than_the_kernels_take(site: Site) -> None:
    """A prompt may well be one: that is no error, even where the kernel is insisted on."""
    many = on(site, "cuda", MAX_TOKENS + 1)
    for how in ("auto", True):
        found = auto(experts=how).bank(many)
        assert isinstance(found, str)
        assert f"{MAX_TOKENS + 1} tokens are more than the {MAX_TOKENS}" in found


@pytest.mark.parametrize(
    ("target", "dtype", "spills"),
    [("sm_75", torch.bfloat16, True), ("sm_80", torch.float32, False), ("sm_120", torch.bfloat16, False),
     ("gfx942", torch.float32, False), ("gfx1201", torch.float32, True), ("gfx1201", torch.bfloat16, False)],
)  # fmt: skip
def test_a_gpu_whose_registers_the_kernels_do_not_fit(
    site: Site, monkeypatch: pytest.MonkeyPatch, target: str, dtype: torch.dtype, spills: bool
) -> None:
    monkeypatch.setattr(lower, "_target", lambda device: target)
    there = on(site, "cuda", dtype=dtype)
    assert (f"would spill registers on {target}" in auto()._reason(there)) == spills
    assert auto(experts=True)._reason(there) == ""


def test_other_devices_have_no_kernel(site: Site) -> None:
    assert auto()._reason(on(site, "xpu")) == "there is no fused kernel for xpu"


def test_without_triton_a_gpu_has_none(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in auto()._reason(on(site, "cuda"))


def test_insisting_names_the_layer_and_the_way_out(site: Site) -> None:
    with pytest.raises(NotFusedError, match=r"experts=True, but .* can't have .* for xpu; use experts='auto'"):
        auto(experts=True).bank(on(site, "xpu"))
    with pytest.raises(NotFusedError, match=r"experts=True, but mlp can't .*: no top-k; use experts='auto'"):
        auto(experts=True).insist([Refusal("mlp", "no top-k")])
    auto().insist([Refusal("mlp", "no top-k")])


def test_insisting_on_a_refused_layer_is_an_error() -> None:
    """Half of its experts get no token of this router: the matcher makes no site of it."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = zoo.build("qwen3_moe").model.layers[0].mlp

        def forward(self, x: torch.Tensor) -> Any:
            values, ids = x.topk(2, dim=-1)
            return self.mlp.experts(x.reshape(-1, zoo.HIDDEN), ids.reshape(-1, 2), values.reshape(-1, 2))

    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="experts=True, but"):
        torch.compile(Odd(), backend="dmoe", options={"experts": True})(torch.rand(1, S, zoo.HIDDEN))


def test_insisting_means_layers_of_experts() -> None:
    """What else a model selects, the best tokens of a vocabulary, keeps its own code."""
    model, x = Sampled(), torch.randn(1, S, H)
    compiled = torch.compile(model, backend="dmoe", options={"experts": True, **ATEN}, fullgraph=True)
    with torch.no_grad():
        out, (_, best) = compiled(x)
        own, (_, own_best) = model(x)
    torch.testing.assert_close(out, own, **INDUCTOR)
    assert torch.equal(best, own_best)


def test_insisting_where_there_is_no_layer_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        torch.compile(nn.Linear(4, 4), backend="dmoe", options={"experts": True})(torch.randn(1, 4))
    assert [record.message for record in caplog.records if "no mixture-of-experts layer" in record.message]


@pytest.mark.parametrize("way", ["torch.compile", "dmoe_compile.compile"])
def test_insisting_makes_loops_traceable(way: str) -> None:
    block = tiny().model.layers[0].mlp
    x = torch.randn(1, S, 32)
    with torch.no_grad():
        own = block(x)[0]
        if way == "torch.compile":
            compiled = torch.compile(block, backend="dmoe", options={"experts": True, **ATEN}, fullgraph=True)
        else:
            compiled = dmoe_compile.compile(block, Config(experts=True, inductor=ATEN), fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], own, **INDUCTOR)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, False), ({"mode": "max-autotune"}, True), ({"mode": "reduce-overhead"}, False),
        ({"max_autotune": True}, True), ({"mode": "max-autotune", "max_autotune": False}, False),
    ],
    ids=str,
)  # fmt: skip
def test_the_kernels_are_tuned_where_inductor_is(options: dict[str, Any], wanted: bool) -> None:
    assert backend._autotunes(Config.from_options(options)) is wanted


def test_explain_says_what_is_fused_and_insists_on_nothing() -> None:
    model, inputs = zoo.build("qwen3_moe", num_layers=1), zoo.inputs("qwen3_moe", batch=1, seq=S)
    report = dmoe_compile.explain(model, config=Config(experts=True), **inputs)
    assert report.sites[0].fused
    assert "experts: fused" in str(report)
    own = dmoe_compile.explain(model, config=Config(experts=False), **inputs)
    assert not own.sites[0].fused
    assert "their own code: " in str(own)


def test_a_forward_that_is_too_long_says_so_where_routing_is_fused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(Lowering, "_tried", lambda self, reading, *args: None)
    where, settings = Layout(None, 1, S, None), Settings(max_block_tokens=4)
    here = on(site, "cuda")
    tracer: Any = None
    graph: Any = None
    monkeypatch.setattr(lower, "route", lambda *args: object())
    done = auto().route(graph, here, where, {"dmoe": None}, settings, tracer)
    assert not isinstance(done, str)
    assert done[0].reason == "8 tokens a sequence are more than max_block_tokens=4"


def decoded(model: nn.Module, inputs: dict[str, Any], compiled: Any, steps: int = 4) -> list[torch.Tensor]:
    """Return the tokens of a few steps of greedy parallel decoding: each step reads what the one before chose."""
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    found = [inputs[name]]
    with torch.no_grad():
        for _ in range(steps):
            found.append(compiled(**{**inputs, name: found[-1]}).logits.argmax(-1))
    return found


@pytest.mark.parametrize("experts", zoo.EXPERTS)
@pytest.mark.parametrize("name", zoo.ROUTABLE)
def test_every_model_decodes_the_same_tokens_with_and_without(name: str, experts: zoo.Experts) -> None:
    """In fp32, by the rewritten graph without Inductor."""
    model = zoo.build(name, experts, num_layers=2 if name == "deepseek_v3" else 1)  # its first has no router
    inputs = zoo.inputs(name, batch=2, seq=S)
    watch = Rewriting(passes=[], experts="auto")
    with_kernel = decoded(model, inputs, torch.compile(model, backend=watch))
    assert all(not outcome.own_experts for outcome in watch.outcomes)
    for ours, own in zip(with_kernel, decoded(model, inputs, model), strict=True):
        assert torch.equal(ours, own)


@pytest.mark.nightly
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", zoo.ROUTABLE)
def test_every_model_decodes_the_same_tokens_through_inductor(name: str, dynamic: bool) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, batch=2, seq=S)
    left = name == "gpt_oss" and dynamic  # alpha and limit are inputs then, see the next test
    ours, own = (
        decoded(model, inputs, torch.compile(model, backend="dmoe", dynamic=dynamic, options={"experts": experts}))
        for experts in ("auto" if left else True, False)
    )
    for each, other in zip(ours, own, strict=True):
        assert torch.equal(each, other)


def test_numbers_that_are_inputs_leave_experts_alone() -> None:
    """dynamic=True makes inputs of a module's floats; sizes alone, as torch.compile finds them by itself, do not."""
    model = zoo.build("gpt_oss")
    for dynamic, count in ((True, 0), (None, 2)):
        torch._dynamo.reset()
        watch = Rewriting(passes=[], experts="auto")
        compiled = torch.compile(model, backend=watch, dynamic=dynamic)
        with torch.no_grad():
            for seq in (S, S + 1):
                compiled(**zoo.inputs("gpt_oss", batch=2, seq=seq))
        last = watch.outcomes[-2:]
        assert sum(not outcome.own_experts for outcome in last) == count
        if dynamic:
            assert all("a number of the model's that dynamic=True has made an input" in o.own_experts for o in last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_cpu_the_kernel_is_the_default_and_takes_any_number_of_tokens(dtype: torch.dtype) -> None:
    """One graph of symbolic sizes; the result is in the dtype that the model's own is in."""
    block = zoo.build("qwen3_moe", dtype=dtype).model.layers[0].mlp
    watch = Rewriting(passes=[], experts="auto")
    compiled = torch.compile(block, backend=watch, dynamic=True)
    for batch, seq in ((2, S), (3, 5), (4, 40)):
        x = torch.randn(batch, seq, zoo.HIDDEN).to(dtype)
        with torch.no_grad():
            out, own = compiled(x), block(x)
        assert out.dtype == own.dtype
        torch.testing.assert_close(out, own, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert len(watch.graphs) == 1
    assert "dmoe.experts_cpu" in str(watch.graphs[0].graph)


# Sums in another order; in half precision each expert's result is rounded once less than in the model.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


def test_without_a_compiler_a_model_keeps_its_own_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "available", lambda dtype: False)
    watch = Rewriting(passes=[], experts="auto")
    block = zoo.build("qwen3_moe").model.layers[0].mlp
    with torch.no_grad():
        torch.compile(block, backend=watch)(torch.randn(1, S, zoo.HIDDEN))
    assert watch.outcomes[0].own_experts == "the C++ kernel can't be built here"
    assert "grouped_mm" in str(watch.graphs[0].graph)


def test_insisting_takes_the_operators_own_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler too: what experts=True asks for is there, only slower."""
    monkeypatch.setattr(lower, "available", lambda dtype: False)
    watch = Rewriting(passes=[], experts=True)
    block = zoo.build("qwen3_moe").model.layers[0].mlp
    with torch.no_grad():
        torch.compile(block, backend=watch)(torch.randn(1, S, zoo.HIDDEN))
    assert watch.outcomes[0].own_experts == ""


@pytest.mark.parametrize(
    ("capability", "arch", "found"),
    [((8, 0), None, "sm_80"), ((10, 0), None, "sm_100"), ((7, 5), None, "sm_90"), (None, "gfx942:sramecc+", "gfx942")],
)
def test_a_gpu_is_known_by_its_architecture(
    capability: Any, arch: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", arch and "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    assert lower.gpu_of(torch.device("cuda")) is GPUS[found]


@pytest.mark.parametrize(("transposed", "down_transposed"), [(True, True), (True, False), (False, True)])
def test_by_columns_amx_is_left_to_onednn_where_experts_have_many_tokens(
    site: Site, transposed: bool, down_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower, "best_isa", lambda: "amx_bf16")
    few, many, wide = on(site, "cpu", 64), on(site, "cpu", 65), on(site, "cpu", 65, torch.float32)  # 16 experts, 4 each
    bank = Bank(site.hidden, (), Form("concatenated", transposed, down_transposed, "silu", 1, 1))
    by_rows = Bank(site.hidden, (), Form("concatenated", False, False, "silu", 1, 1))

    def found(site: Site, bank: Bank = bank, experts: Literal[True, "auto"] = "auto") -> Bank | str:
        reader: Any = SimpleNamespace(read=lambda site: bank)
        return Lowering(reader, experts).bank(site)

    assert "over 16 tokens each" in str(found(many))
    assert found(many, experts=True) is found(few) is found(wide) is bank
    assert found(many, by_rows) is by_rows
    monkeypatch.setattr(lower, "best_isa", lambda: "avx512_bf16")
    assert found(many) is bank


def test_a_graph_without_a_router_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "rewrite", lambda *args: pytest.fail("it was"))
    with torch.no_grad():
        torch.compile(nn.Linear(4, 4), backend="dmoe")(torch.randn(2, 4))
