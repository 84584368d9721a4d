"""The experts of a site are read right and given to the fused op, or left alone with a reason.

T: tokens; H, I: hidden size, expert width; E, k: experts, experts a token
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dmoe_compile.kernels.experts_cpu import launch
from dmoe_compile.passes import fuse_experts
from dmoe_compile.passes.readings import Form
from dmoe_compile.passes.region import Region
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing import assert_close
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

import dmoe_compile
import forms
import zoo
from dmoe_compile import prepare
from reference_model import Rewriting
from tiny_moe import ATEN, TOLERANCE

B, S = 2, 8
FORM = {
    "gpt_oss": Form("interleaved", True, True, "swigluoai", 1.702, 7.0),
    "diffusion_gemma": Form("concatenated", False, False, "gelu_tanh"),
}
SILU = Form("concatenated", False, False, "silu")


def fused(block: nn.Module, x: Tensor, **options: Any) -> tuple[Any, Rewriting, str]:
    """Return what a block gives with fused experts, the backend that saw it, and its graph."""
    backend = Rewriting(**{"passes": [], "experts": "auto", **options})
    with torch.no_grad():
        out = torch.compile(block, backend=backend, fullgraph=True)(x)
    (gm,) = backend.graphs
    return out, backend, str(gm.graph)


def output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was read of each site, in order."""
    said: list[Any] = []
    own = fuse_experts.Reader.read

    def listen(self: fuse_experts.Reader, site: Any) -> Any:
        said.append(own(self, site))
        return said[-1]

    monkeypatch.setattr(fuse_experts.Reader, "read", listen)
    return said


@pytest.mark.parametrize("experts", zoo.EXPERTS)
@pytest.mark.parametrize("name", zoo.ROUTABLE)
def test_every_model_of_transformers(name: str, experts: Any, read: list[Any]) -> None:
    num_layers = 2 if name == "deepseek_v3" else 1  # whose first has no router
    model = zoo.build(name, experts=experts, num_layers=num_layers)
    inputs = zoo.inputs(name, batch=1, seq=S)
    backend = Rewriting(passes=[], experts=True)
    with torch.no_grad():
        out = torch.compile(model, backend=backend, fullgraph=True)(**inputs).logits
        assert_close(out, model(**inputs).logits, **TOLERANCE[torch.float32])
    assert {bank.form for bank in read} == {FORM.get(name, SILU)}
    (gm,) = backend.graphs
    sites = len(zoo.expected(name, num_layers).names)
    assert str(gm.graph).count("dmoe.experts_cpu") == sites
    assert "grouped_mm" not in str(gm.graph)
    assert backend.findings[0].fused == sites


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in forms.FORMS if name != "fused"])
def test_every_published_form(name: str, dtype: torch.dtype, read: list[Any]) -> None:
    """As prepare() leaves it; experts that all run on every token are read too."""
    block = forms.build(name, dtype)
    x = torch.randn(B, S, forms.CONFIG["hidden_size"]).to(dtype)
    with torch.no_grad():
        own = output(block(x))
    prepare(block)
    out, _, graph = fused(block, x, experts=True)
    assert_close(output(out), own, **TOLERANCE[dtype])
    assert graph.count("dmoe.experts_cpu") == 1
    assert "grouped_mm" not in graph


def test_an_engines_own_kernel_is_left_alone() -> None:
    block = forms.build("fused")
    x = torch.randn(B, S, forms.CONFIG["hidden_size"])
    with pytest.raises(
        BackendCompilerFailed, match=r"experts=True, but .* no two or three matrices with an activation"
    ):
        fused(block, x, experts=True)


class Experts(nn.Module):
    """Stacked experts with everything that a form may differ in; `act` makes of gate and up what goes down."""

    def __init__(self, num_matrices: int = 2, transposed: bool = False, act: Any = None, bias: bool = False) -> None:
        super().__init__()
        num_experts, hidden, width = 8, 16, 8  # 2I = H: the first matrix is square
        rows = 2 * width if num_matrices == 2 else width
        self.transposed, self.act = transposed, act or (lambda gate, up: F.silu(gate) * up)
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.first = nn.Parameter(torch.randn(num_experts, *((hidden, rows) if transposed else (rows, hidden))) / 4)
        self.up = nn.Parameter(torch.randn_like(self.first) / 4) if num_matrices == 3 else None
        self.down = nn.Parameter(torch.randn(num_experts, *((width, hidden) if transposed else (hidden, width))) / 3)
        sizes = (rows, rows, hidden) if num_matrices == 3 else (rows, hidden)
        self.biases = nn.ParameterList(torch.randn(num_experts, n) for n in (sizes if bias else ()))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        rows = x.reshape(-1, 1, x.shape[-1])

        def project(rows: Tensor, weight: Tensor, bias: int) -> Tensor:
            chosen = weight[ids.reshape(-1)]
            out = torch.bmm(rows, chosen if self.transposed else chosen.transpose(1, 2))
            return out + self.biases[bias][ids.reshape(-1)].unsqueeze(1) if len(self.biases) else out

        pairs = rows.expand(-1, 2, -1).reshape(-1, 1, x.shape[-1])
        first = project(pairs, self.first, 0)
        mid = self.act(first, project(pairs, self.up, 1)) if self.up is not None else self.act(*first.chunk(2, dim=-1))
        out = project(mid, self.down, len(self.biases) - 1).reshape(-1, 2, x.shape[-1])
        return (out * weights.reshape(-1, 2, 1)).sum(1).view(x.shape)


def random_experts(**how: Any) -> Experts:
    torch.manual_seed(0)
    return Experts(**how).eval()


ACTS = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "relu2": lambda gate, up: F.relu(gate).square() * up,
}
FORMS = [
    *((dict(act=act), Form("concatenated", False, False, name)) for name, act in ACTS.items()),
    (dict(act=lambda gate, up: gate * gate.sigmoid() * up), Form("concatenated", False, False, "silu")),
    (dict(transposed=True), Form("concatenated", True, True, "silu")),
    (dict(num_matrices=3), Form("separate", False, False, "silu")),
    (dict(num_matrices=3, transposed=True), Form("separate", True, True, "silu")),
    (dict(bias=True), Form("concatenated", False, False, "silu")),
    (dict(num_matrices=3, bias=True), Form("separate", False, False, "silu")),
    (dict(act=lambda up, gate: F.silu(gate) * up, num_matrices=3, bias=True), Form("separate", False, False, "silu")),
    (dict(act=lambda up, gate: F.silu(gate) * up, num_matrices=3), Form("separate", False, False, "silu")),
]


@pytest.mark.parametrize(("how", "form"), FORMS, ids=[str(i) for i in range(len(FORMS))])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "read only"])
def test_layouts_and_activations(how: Any, form: Form, verify: bool, read: list[Any]) -> None:
    """2I = H, so that shapes tell nothing. Without the check, only what operations say is known."""
    block, x = random_experts(**how), torch.randn(B, S, 16)
    out, _, graph = fused(block, x, experts=True, verify_experts=verify)
    assert "dmoe.experts_cpu" in graph
    swapped = how.get("num_matrices") == 3 and "act" in how
    if verify or not swapped:  # which of two matrices is the gate, operations don't say
        assert [bank.form for bank in read] == [form]
        assert_close(out, block(x), **TOLERANCE[torch.float32])


def test_an_interleaved_gate_is_read_off_its_slices() -> None:
    model, inputs = zoo.build("gpt_oss"), zoo.inputs("gpt_oss", batch=1, seq=S)
    backend = Rewriting(passes=[], experts=True, verify_experts=False)
    with torch.no_grad():
        out = torch.compile(model, backend=backend, fullgraph=True)(**inputs).logits
        assert_close(out, model(**inputs).logits, **TOLERANCE[torch.float32])


def test_a_dense_layer_of_symbolic_length() -> None:
    """Its result is [B, S, H], as its hidden states are."""
    block, backend = forms.build("dense"), Rewriting(passes=[], experts=True)
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for seq in (S, S + 3):
            x = torch.randn(B, seq, forms.CONFIG["hidden_size"])
            assert_close(output(compiled(x)), output(block(x)), **TOLERANCE[torch.float32])
    assert len(backend.graphs) == 1


def test_layers_alike_but_for_the_activation_are_read_apart(read: list[Any]) -> None:
    names = ["silu", "gelu", "relu"]
    model, x = nn.Sequential(*(random_experts(act=ACTS[name]) for name in names)), torch.randn(B, S, 16)
    out, _, _ = fused(model, x, experts=True)
    assert [bank.form.activation for bank in read] == names
    assert_close(out, model(x), **TOLERANCE[torch.float32])


def test_experts_without_a_gate(read: list[Any]) -> None:
    class Plain(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
            pairs = x.reshape(-1, 1, 16).expand(-1, 2, -1).reshape(-1, 1, 16)
            mid = F.relu(torch.bmm(pairs, self.first[ids.reshape(-1)].transpose(1, 2))).square()
            out = torch.bmm(mid, self.down[ids.reshape(-1)].transpose(1, 2)).reshape(-1, 2, 16)
            return (out * weights.reshape(-1, 2, 1)).sum(1).view(x.shape)

    torch.manual_seed(0)
    block, x = Plain(num_matrices=3), torch.randn(B, S, 16)
    out, _, _ = fused(block, x, experts=True)
    assert [bank.form for bank in read] == [Form("plain", False, False, "relu2")]
    assert_close(out, block(x), **TOLERANCE[torch.float32])


WRONG = {
    "tanh": (lambda gate, up: torch.tanh(gate) * up, "no two or three matrices with an activation"),
    "scaled": (lambda gate, up: F.silu(gate) * up * 1.02, "compute something else"),
    "clamped": (lambda gate, up: F.silu(gate.clamp(max=10)) * up.clamp(-10, 10), "no two or three matrices"),
    "soft cap": (lambda gate, up: 30 * torch.tanh(F.silu(gate) * up / 30), "compute something else"),
    "zeros": (lambda gate, up: F.silu(gate) * up * 0, "nothing but zeros"),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_other_mathematics_keeps_its_own_code(name: str, dtype: torch.dtype) -> None:
    """Also where it shows only in large numbers, or is near what roundings do."""
    act, reason = WRONG[name]
    block, x = random_experts(act=act).to(dtype), torch.randn(B, S, 16, dtype=dtype)
    with pytest.raises(BackendCompilerFailed, match=reason):
        fused(block, x, experts=True)


def test_norm_inside_the_experts_is_named() -> None:
    class Normed(Experts):
        def __init__(self) -> None:
            super().__init__(num_matrices=3)
            self.scale = nn.Parameter(torch.rand(8))
            self.act = lambda gate, up: F.silu(gate) * up * self.scale

    torch.manual_seed(0)
    with pytest.raises(BackendCompilerFailed, match="besides hidden states, routing and their weights"):
        fused(Normed(), torch.randn(B, S, 16), experts=True)


class Argmax(Experts):
    """One expert a token, whose ids are [T]."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x.reshape(-1, 16)).softmax(-1)
        ids = scores.argmax(-1)
        weights = scores.gather(-1, ids.unsqueeze(-1))
        gate, up = torch.bmm(x.reshape(-1, 1, 16), self.first[ids].transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down[ids].transpose(1, 2)).squeeze(1)
        return (out * weights).view(x.shape)


def test_a_router_with_one_expert_a_token_under_team() -> None:
    torch.manual_seed(0)
    block, x = Argmax(), torch.randn(B, S, 16)
    options = {"passes": ["team"], "experts": True, **ATEN}
    compiled = torch.compile(block, backend="dmoe", options=options, fullgraph=True)
    with torch.no_grad(), dmoe_compile.denoising() as context:
        context.step(shape=(B, S))
        assert_close(compiled(x), block(x), **TOLERANCE[torch.float32])


def test_one_layer_reads_what_another_makes() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Experts(), Experts()), torch.randn(B, S, 16)
    out, backend, graph = fused(model, x, experts=True)
    assert backend.findings[0].fused == graph.count("dmoe.experts_cpu") == 2
    assert "bmm" not in graph
    assert_close(out, model(x), **TOLERANCE[torch.float32])


def test_a_check_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Region, "callable", full)
    block, x = random_experts(), torch.randn(B, S, 16)
    with pytest.raises(BackendCompilerFailed, match=r"can't be checked \(OutOfMemoryError: no room\)"):
        fused(block, x, experts=True)


def test_a_check_that_takes_too_much_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_experts, "_MAX_CHECK_BYTES", 1000)
    with pytest.raises(BackendCompilerFailed, match=r"makes a tensor of .* GiB, too much to check it by"):
        fused(random_experts(), torch.randn(B, S, 16), experts=True)


def test_weights_that_can_not_be_seen_are_made_up_unless_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_experts, "seen", lambda values: {})
    block, x = random_experts(), torch.randn(B, S, 16)
    assert fused(block, x, experts=True)[1].findings[0].fused == 1
    monkeypatch.setattr(fuse_experts, "_MAX_MADE_UP", 1000)
    with pytest.raises(BackendCompilerFailed, match="can't be seen here, and are too large to be made up"):
        fused(block, x, experts=True)


def test_layers_alike_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    own = Region.callable
    monkeypatch.setattr(Region, "callable", lambda self, *args: runs.append(self.key) or own(self, *args))
    model = zoo.build("qwen3_moe", num_layers=3)
    backend = Rewriting(passes=[], experts=True)
    with torch.no_grad():
        torch.compile(model, backend=backend)(**zoo.inputs("qwen3_moe", batch=1, seq=S))
    assert len(runs) == 1


def test_gradients_refuse_it() -> None:
    block = zoo.build("qwen3_moe").model.layers[0].mlp
    with pytest.raises(BackendCompilerFailed, match="experts=True, but gradients are required"):
        torch.compile(block, backend="dmoe", options={"experts": True})(torch.randn(B, S, zoo.HIDDEN))


@pytest.mark.parametrize("passes", [[], ["dmoe"], ["cover"], ["top_any"], ["dmoe", "top_any"]], ids="+".join)
def test_every_pass_routes_for_it(passes: list[str]) -> None:
    """Through Inductor; the routing is the same as without."""
    model = zoo.build("deepseek_v3")
    inputs = zoo.inputs("deepseek_v3", batch=1, seq=S)
    options: dict[str, Any] = {"passes": passes, "block_length": 4, **ATEN}
    if "dmoe" in passes:
        options["dmoe.min_experts"] = 5
    outs = []
    for experts in (True, False):
        with torch.no_grad():
            compiled = torch.compile(model, backend="dmoe", options={**options, "experts": experts})
            outs.append(compiled(**inputs).logits)
    assert_close(*outs, **TOLERANCE[torch.float32])


def in_another_width() -> nn.Module:
    """Return a block whose experts work on half of the model's width, between two projections."""
    sizes = {"hidden_size": zoo.HIDDEN, "moe_latent_size": zoo.HIDDEN // 2, "moe_intermediate_size": 24}
    config = NemotronHConfig(**sizes, n_routed_experts=16, num_experts_per_tok=4)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    block = NemotronHMoE(config).eval()
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return block


BLOCKS = {"qwen3_moe": lambda: zoo.build("qwen3_moe").model.layers[0].mlp, "nemotron_h": in_another_width}


@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
def test_decoded_tokens_reach_no_expert(build: Callable[[], nn.Module]) -> None:
    """They carry an id that no expert has, and take what was stored; so do tokens of finished sequences."""
    block = build()
    x = torch.randn(4, B, S, zoo.HIDDEN)
    some = torch.rand((B, S), generator=torch.Generator().manual_seed(3)) < 0.5
    finished = torch.tensor([False, True])
    routed: list[Tensor] = []

    def watched(hidden: Tensor, ids: Tensor, *rest: Any) -> Tensor:
        routed.append((ids < 16).all(-1).view(B, S))
        assert ((ids < 16) == (ids < 16).any(-1, keepdim=True)).all()
        return launch(hidden, ids, *rest)

    results = {}
    with torch.library._scoped_library("dmoe", "IMPL") as library:
        library.impl("experts_cpu", watched, "CPU", allow_override=True)
        for experts in (True, False):
            options = {"passes": ["team"], "experts": experts, **ATEN}
            compiled = torch.compile(block, backend="dmoe", options=options, fullgraph=True)
            with torch.no_grad(), dmoe_compile.denoising() as context:
                outs = []
                for decoded, done, each in zip((None, some, some, None), (None, None, None, finished), x, strict=True):
                    context.step(decoded, finished=done, shape=(B, S))
                    outs.append(output(compiled(each)))
                if experts:
                    assert_close(outs[0], output(block(x[0])), **TOLERANCE[torch.float32])
                results[experts] = torch.stack(outs[:3]), [step.unique_experts for step in context.stats]
    check, *steps = routed  # the first is the comparison when it is compiled
    assert check.all()
    assert torch.equal(torch.stack(steps[-3:]), torch.stack([~some, ~some, ~finished.unsqueeze(1).expand(B, S)]))
    assert_close(results[True][0], results[False][0], **TOLERANCE[torch.float32])
    assert results[True][1] == results[False][1]
