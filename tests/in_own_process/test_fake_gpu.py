"""The GPU that is not there: code that Inductor generates for it says and computes what it should, and leaves no trace.

E: experts; H: hidden size; S: tokens
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from torch.library import triton_op, wrap_triton
from torch.testing import assert_close
from triton.runtime import driver

import dmoe_compile
import zoo
from dmoe_compile.testing.fake_gpu import Capability, fake_gpu
from dmoe_compile.testing.generated import Generated, generated
from dmoe_compile.testing.interpreter import OutOfBounds
from tiny_moe import ATEN

# fp32 differs in the order of sums, over at most 96 terms. A bf16 rounding moves a value by at most 2**-8 of itself;
# eager rounds between the operations of a chain, of which there are at most three here, fused code once.
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-6), torch.bfloat16: dict(rtol=3 * 2**-8, atol=2**-8)}
# The same for a whole model of one layer, whose logits are up to 4. An expert flipped moves some by 0.1 or more.
MODEL = dict(rtol=1e-4, atol=1e-5)


@triton.jit
def _axpy_kernel(x_ptr, y_ptr, out_ptr, numel, SCALE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offsets < numel) | (not MASKED)
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, SCALE * x + tl.load(y_ptr + offsets, mask=mask), mask=mask)


def _launch(x: Tensor, y: Tensor, masked: bool = True, num_programs: int | None = None) -> Tensor:
    out = torch.empty_like(x)
    grid = (num_programs or triton.cdiv(x.numel(), 64),)
    wrap_triton(_axpy_kernel)[grid](x, y, out, x.numel(), SCALE=0.5, MASKED=masked, BLOCK=64)
    return out


@triton_op("fake_gpu_test::axpy", mutates_args={})
def axpy(x: Tensor, y: Tensor) -> Tensor:
    return _launch(x, y)


@triton_op("fake_gpu_test::axpy_beyond", mutates_args={})
def axpy_beyond(x: Tensor, y: Tensor) -> Tensor:
    return _launch(x, y, masked=False)


@triton_op("fake_gpu_test::axpy_partly", mutates_args={})
def axpy_partly(x: Tensor, y: Tensor) -> Tensor:
    return _launch(x, y, num_programs=1)


@triton.jit
def _scale_kernel(x_ptr, out_ptr, scale, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) * scale, mask=mask)


@triton_op("fake_gpu_test::scale", mutates_args={})
def scale(x: Tensor, factor: float) -> Tensor:
    out = torch.empty_like(x)
    wrap_triton(_scale_kernel)[(triton.cdiv(x.numel(), 64),)](x, out, factor, x.numel(), BLOCK=64)
    return out


class Layer(nn.Module):
    """What the planted faults are planted in; nothing of it is one."""

    def __init__(self, fault: Callable[[Layer, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(64) + 0.5)
        self.linear = nn.Linear(64, 96)
        self.head = nn.Linear(96, 96, bias=False)
        self.tied = self.head.weight
        self.register_buffer("seen", torch.zeros(8, 96))
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.head(self.linear(F.rms_norm(x, (64,), self.norm)))
        return hidden.softmax(-1) if self.fault is None else self.fault(self, hidden)


def generate(function: Any, *args: Any, capability: Capability = 90, **kwargs: Any) -> Generated:
    compiled = torch.compile(function, **kwargs)
    with fake_gpu(capability):
        return generated(compiled, *args)


def faults(found: Generated) -> dict[str, Any]:
    """Return all that a GPU's code should be without, but for what is asked for by name."""
    lists = {name: getattr(found, name) for name in ("fp64", "host_syncs", "cudagraph_reasons", "graph_breaks")}
    return {name: each for name, each in (lists | {"copies": found.copies()}).items() if each}


def kinds(found: Generated) -> list[str]:
    return [launch.kind for launch in found.launches]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_layer(dtype: torch.dtype, capability: Capability) -> None:
    layer, x = Layer().to(dtype), torch.randn(8, 64, dtype=dtype)
    found = generate(layer, x, capability=capability)
    assert_close(found.run(x), layer(x), **TOLERANCE[dtype])
    assert kinds(found) == ["inductor", "extern", "extern", "inductor"]  # rms norm, two matmuls, softmax
    assert not faults(found)
    origins = {each.origin: each for graph in found.graphs for each in graph.inputs}
    assert {"norm", "linear.weight", "linear.bias", "head.weight", "x"} == origins.keys()
    assert all(each.is_static == each.is_parameter == (name != "x") for name, each in origins.items())
    binaries = found.compile_kernels()
    assert len(binaries) == 2
    assert all(f".target sm_{capability}" in binary.asm["ptx"] for binary in binaries.values())


def test_a_users_kernel() -> None:
    def function(x: Tensor, y: Tensor, shift: float = 1.0) -> Tensor:
        return F.silu(axpy(x + shift, y)).sum(-1)

    x, y = torch.randn(2, 7, 13).unbind()  # 91 elements: the second program of two is partly masked
    found = generate(function, x, y)
    assert kinds(found) == ["inductor", "user", "inductor"]
    plain = F.silu(0.5 * (x + 1) + y).sum(-1)
    for seed in (None, 1):
        assert_close(found.run(x, y, seed=seed), plain, **TOLERANCE[torch.float32])
    (launch,) = (each for each in found.launches if each.kind == "user")
    assert launch.writes == found.launches[2].reads
    assert set(launch.reads) == {
        found.launches[0].writes[0],
        *(i.name for i in found.graphs[0].inputs if i.origin == "y"),
    }


def test_a_users_kernel_out_of_bounds() -> None:
    x, y = torch.randn(2, 7, 13).unbind()
    with pytest.raises(OutOfBounds):
        generate(lambda x, y: axpy_beyond(x, y) + 1, x, y).run(x, y)


def test_a_users_kernel_with_a_size_of_one() -> None:
    """Triton makes a constant of a number that is 1, Inductor passes it all the same."""
    x, y = torch.randn(2, 1).unbind()
    assert_close(generate(lambda x, y: axpy(x, y) * 2, x, y).run(x, y), x + 2 * y)


def test_a_dynamic_reduction() -> None:
    """A loop over a size that is an argument, after one whose value Inductor knows."""
    x = torch.randn(3000)
    assert_close(generate(lambda x: x.sum(), x, dynamic=True).run(x), x.sum(), rtol=1e-4, atol=1e-4)


def test_memory_that_nobody_wrote() -> None:
    x, y = torch.randn(2, 100).unbind()
    out = generate(lambda x, y: axpy_partly(x, y) * 2, x, y).run(x, y)
    assert_close(out[:64], (x + 2 * y)[:64])
    assert out[64:].isnan().all()


def test_a_mutated_argument_is_no_matter_for_cuda_graphs() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        y.copy_(2 * x)
        return x + y

    x, y = torch.randn(2, 8, 64).unbind()
    found = generate(function, x, y)
    assert [each.origin for each in found.mutated] == ["y"]
    assert "mutated inputs" in found.cudagraph_reasons[0]
    assert_close(found.run(x, y), 3 * x)
    assert_close(y, 2 * x)


def test_a_mutated_buffer_is_one() -> None:
    def keep(layer: Layer, hidden: Tensor) -> Tensor:
        layer.seen.copy_(hidden)
        return hidden

    layer, x = Layer(keep), torch.randn(8, 64)
    found = generate(layer, x)
    assert [each.origin for each in found.mutated] == ["seen"]
    assert not found.cudagraph_reasons
    found.run(x)
    assert_close(layer.seen, layer(x).clone(), **TOLERANCE[torch.float32])


def test_fp64_is_found() -> None:
    layer, x = Layer(lambda _, hidden: (hidden.double() * 3).sum(-1).float()), torch.randn(8, 64)
    found = generate(layer, x)
    assert any("tl.float64" in line for line in found.fp64)
    assert_close(found.run(x), layer(x), **TOLERANCE[torch.float32])


def test_fp64_arguments_are_found() -> None:
    """What becomes of a Python float that a kernel takes as a number, not as a constant."""
    x = torch.randn(8, 64)
    assert generate(lambda x: scale(x, 0.3), x).fp64 == ["_scale_kernel_0: scale is fp64"]


@pytest.mark.parametrize(
    "copy",
    [
        lambda layer, hidden: hidden @ layer.tied.t().contiguous(),
        lambda layer, hidden: hidden.bfloat16() @ layer.tied.bfloat16(),
        lambda layer, hidden: hidden.unsqueeze(1) @ layer.tied.view(2, 48, 96)[torch.arange(8) % 2].mT,
    ],
    ids=["clone", "cast", "gather"],
)
def test_a_copied_weight_is_found(copy: Callable[[Layer, Tensor], Tensor]) -> None:
    layer, x = Layer(copy), torch.randn(8, 64)
    found = generate(layer, x)
    weight = next(each.name for each in found.graphs[0].inputs if each.origin == "head.weight")
    assert any(weight in launch.reads for launch in found.copies())
    assert found.copies() == found.copies("head.weight")
    assert not found.copies("linear.weight")
    plain = layer(x)
    assert_close(found.run(x), plain, **TOLERANCE[plain.dtype])


def test_work_on_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *args, **kwargs: None)  # not run, so not compiled
    layer, x = Layer(lambda _, hidden: (hidden.sum(-1).cpu() + 1).to(hidden.device) + hidden[:, 0]), torch.randn(8, 64)
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):  # it would compile a program to find out
        found = generate(layer, x)
    assert [line.split(".")[1].split("(")[0] for line in found.host_syncs] == ["copy_", "copy_"]  # there and back
    assert "cpp" in kinds(found)
    assert any(reason.startswith("cpu ops") for reason in found.cudagraph_reasons)


def test_a_number_from_the_device_is_found() -> None:
    layer, x = Layer(lambda _, hidden: hidden * hidden.sum().item()), torch.randn(8, 64)
    found = generate(layer, x)
    assert any("_local_scalar_dense" in line for line in found.host_syncs)
    assert any("item()" in line for line in found.graph_breaks)
    with pytest.raises(ValueError, match="only one whole graph"):
        found.run(x)


def test_a_shape_from_the_device_is_found() -> None:
    layer, x = Layer(lambda _, hidden: hidden[hidden[:, 0] > 0].sum()), torch.randn(8, 64)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = generate(layer, x)
    assert found.host_syncs
    assert found.cudagraph_reasons
    assert not found.graph_breaks
    assert_close(found.run(x), layer(x), **TOLERANCE[torch.float32])


def test_nothing_stays_behind() -> None:
    def cpu_code() -> str:
        torch._dynamo.reset()
        with (
            torch._inductor.config.patch(fx_graph_cache=False),
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            out, (code,) = run_and_get_code(torch.compile(layer), x)
        assert_close(out, layer(x), **TOLERANCE[torch.float32])
        return re.sub(r"AOT ID: .*", "", code)  # a running number

    layer, x = Layer(), torch.randn(8, 64)
    cuda, triton_driver = dict(vars(torch.cuda)), driver._active
    before, weights = cpu_code(), dict(layer.named_parameters(remove_duplicate=False))
    found = generate(layer, x)
    after = dict(layer.named_parameters(remove_duplicate=False))
    assert weights.keys() == after.keys()
    assert all(weights[name] is after[name] for name in weights)
    assert "cuda" in found.code
    assert cpu_code() == before
    assert not torch.cuda.is_available()
    assert torch.version.cuda is None
    assert driver._active is triton_driver
    assert {name: each for name, each in vars(torch.cuda).items() if name in cuda} == cuda
    with pytest.raises((AssertionError, RuntimeError), match=r"not (compiled|linked) with"):
        torch.empty(1, device="cuda")
    found.run(x)
    assert_close(layer(x), found.run(x), **TOLERANCE[torch.float32])
    with pytest.raises(NotImplementedError):
        torch.histc(torch.arange(3, dtype=torch.int32))  # what `fake_gpu` lets CPUs do
    with pytest.raises(ValueError, match="with fake_gpu"):
        generated(torch.compile(layer), x)


def test_a_function_without_a_graph() -> None:
    with pytest.raises(ValueError, match="compiled no graph"):
        generate(lambda x: x, torch.zeros(1))


def test_a_method() -> None:
    layer, x = Layer(), torch.randn(8, 64)
    assert_close(generate(layer.forward, x).run(x), layer(x), **TOLERANCE[torch.float32])


# Whole models, of one layer with H=64 and E=16, S tokens of one sequence.

S = 16


def model_and_inputs(experts: zoo.Experts = "grouped_mm") -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    model = zoo.build("qwen3_moe", experts=experts, num_layers=1)
    one, other = (zoo.inputs("qwen3_moe", batch=1, seq=S, seed=seed) for seed in (0, 1))
    return model, one, other


def test_a_model_under_inductor() -> None:
    """The gathered experts' weights of batched_mm are copies, which a tool that looks for them must say."""
    model, inputs, other = model_and_inputs("batched_mm")
    with fake_gpu():
        found = generated(torch.compile(model, fullgraph=True), **inputs)
    for each in (inputs, other):
        assert_close(found.run(**each).logits, model(**each).logits, **MODEL)
    gathered = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    names = {each.name: each.origin for each in found.graphs[0].inputs}
    assert {names[name] for launch in found.copies() for name in launch.reads if name in names} == gathered
    assert faults(found).keys() == {"copies"}
    assert not found.mutated


def test_a_model_under_dmoe() -> None:
    model, inputs, other = model_and_inputs()
    options = {"passes": ["dmoe"], "dmoe.min_experts": 2, "experts": False}
    with fake_gpu():
        found = generated(torch.compile(model, backend="dmoe", options=options, fullgraph=True), **inputs)
    ours = [found.run(**each).logits for each in (inputs, other)]
    on_cpu = torch.compile(model, backend="dmoe", options=options | ATEN)
    for each, logits in zip((inputs, other), ours, strict=True):
        assert_close(logits, on_cpu(**each).logits, **MODEL)
        assert (logits - model(**each).logits).abs().max() > 0.1  # the coreset was chosen, and matters
    assert len(found.graphs) == 1
    assert not faults(found)
    assert not found.mutated


def test_a_model_under_team() -> None:
    """Two steps of a decoding: what the first stores on the CPU, the second reads."""
    model, inputs, other = model_and_inputs()
    decoded, cold = torch.arange(S) < 5, torch.arange(S) >= 10
    options = {"passes": ["team"], "experts": False}

    def decode(call: Callable[..., Any]) -> list[Tensor]:
        with dmoe_compile.denoising() as context:
            context.step(cold=cold.unsqueeze(0))
            first = call(**inputs).logits.clone()
            context.step(decoded.unsqueeze(0), cold.unsqueeze(0))
            return [first, call(**other).logits.clone()]

    with fake_gpu(), dmoe_compile.denoising() as context:
        context.step(decoded.unsqueeze(0), cold.unsqueeze(0))
        found = generated(torch.compile(model, backend="dmoe", options=options, fullgraph=True), **inputs)
    ours = decode(found.run)
    theirs = decode(torch.compile(model, backend="dmoe", options=options | ATEN))
    for one, another in zip(ours, theirs, strict=True):
        assert_close(one, another, **MODEL)
    assert (ours[1] - model(**other).logits).abs().max() > 0.1  # decoded tokens were served
    (step,) = found.graphs
    assert [each.origin for each in step.mutated] == ["dmoe_stored_0"]
    # Roles and rows are new tensors at every step: a CUDA graph that took their addresses for granted would be recorded
    # anew each time.
    ours_given = {each.origin: each.is_static for each in step.inputs if each.origin.startswith("dmoe_")}
    assert ours_given == {"dmoe_roles": False, "dmoe_rows": False, "dmoe_stored_0": True}
    assert not faults(found)


def test_a_model_with_team_outside_of_a_decoding() -> None:
    model, inputs, other = model_and_inputs()
    with fake_gpu():
        compiled = torch.compile(model, backend="dmoe", options={"passes": ["team"], "experts": False}, fullgraph=True)
        found = generated(compiled, **inputs)
    (plain,) = found.graphs
    assert not plain.mutated
    assert_close(found.run(**other).logits, model(**other).logits, **MODEL)
