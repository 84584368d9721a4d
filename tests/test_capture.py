"""prepare(): what it leaves as it was, what it follows, and what it refuses."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import forms
from dmoe_compile import prepare, unprepare

LOOPS = [name for name, form in forms.FORMS.items() if form.prepared]
OF_LISTS = [name for name in LOOPS if name != "expert_hit"]
HIDDEN = forms.CONFIG["hidden_size"]
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-5, "atol": 2**-5}}


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 16, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def output(block: Callable[..., Any], x: Tensor) -> Tensor:
    with torch.no_grad():
        result = block(x)
    return result[0] if isinstance(result, tuple) else result


def replaced(block: nn.Module) -> bool:
    return hasattr(block, "_dmoe_kind")


class Stack(nn.Module):
    """Layers of one form, one after the other."""

    def __init__(self, name: str, num_layers: int = 2, **changes: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([forms.build(name, **changes) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            result = layer(self.norm(x))
            x = x + (result[0] if isinstance(result, tuple) else result)
        return x


# What stays.


@pytest.mark.parametrize("name", LOOPS)
def test_weights_stay_what_they_were(name: str, tmp_path: Path) -> None:
    block = forms.build(name)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    parameters = dict(block.named_parameters())
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    prepare(block)
    after = block.state_dict()
    assert list(after) == list(before)
    assert_close(after, before, rtol=0, atol=0)
    assert all(parameters[key] is value for key, value in block.named_parameters())
    save_file(after, tmp_path / "weights.safetensors")
    assert_close(load_file(tmp_path / "weights.safetensors"), before, rtol=0, atol=0)
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = inputs()
    unchanged = output(block, x)
    optimizer.step()  # an optimizer made before writes into the weights that the experts read
    fresh = forms.build(name)
    fresh.load_state_dict({key: value - 1 if key in parameters else value for key, value in before.items()})
    assert_close(output(block, x), output(fresh, x), **CLOSE[torch.float32])
    assert not torch.allclose(output(block, x), unchanged)


@pytest.mark.parametrize("name", LOOPS)
def test_idempotent_and_undone(name: str) -> None:
    block, x = forms.build(name), inputs()
    own = block(x)
    storages = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    first, second = prepare(block), prepare(block)
    assert [entry.how for entry in second.blocks] == ["prepared before"]
    assert len(first.prepared) == len(second.prepared) == 1
    assert str(first) != str(second)
    unprepare(block)
    assert_close(block(x), own, rtol=0, atol=0)
    assert not any("_dmoe" in vars(module) or hasattr(module, "_dmoe_kind") for module in block.modules())
    if name in OF_LISTS:
        now = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        assert len(now) == len(storages)  # each parameter has memory of its own again
    unprepare(block)  # nothing left to do
    assert [entry.how != "prepared before" for entry in prepare(block).blocks] == [True]


def test_no_second_copy_of_the_weights() -> None:
    """The peak is measured in a process of its own: 6 layers of 72 MiB; one of them may be there twice."""
    script = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import torch
import forms
from dmoe_compile import prepare
torch.set_num_threads(1)
prepare(forms.build("bailing"))  # what a first call imports
make = lambda: forms.build("bailing", num_experts=48, n_group=4, hidden_size=512, moe_intermediate_size=256)
model = torch.nn.ModuleList([make() for _ in range(6)])
layer = sum(p.numel() * p.element_size() for p in model[0].experts.parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
report = prepare(model)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"prepared": len(report.prepared), "layers": (after - before) / layer}))
"""
    command = [sys.executable, "-P", "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prepared"] == 6
    assert found["layers"] < 2  # one layer, and what the allocator and the comparisons need besides


def test_random_numbers_and_modes_are_left_alone() -> None:
    block = forms.build("softmax_loop").train()
    block.experts[3].eval()
    state = torch.get_rng_state()
    prepare(block)
    assert torch.equal(torch.get_rng_state(), state)
    assert block.training
    assert not block.experts[3].training


# What is followed.


def moved(block: nn.Module) -> nn.Module:
    return block.to(torch.bfloat16)


def halved(block: nn.Module) -> nn.Module:
    return block.half()


def copied(block: nn.Module) -> nn.Module:
    return copy.deepcopy(block)


def assigned(block: nn.Module) -> nn.Module:
    block.load_state_dict({key: value * 1.5 for key, value in block.state_dict().items()}, assign=True)
    return block


def loaded(block: nn.Module) -> nn.Module:
    block.load_state_dict({key: value * 1.5 for key, value in block.state_dict().items()})
    return block


def given_other_memory(block: nn.Module) -> nn.Module:
    for parameter in block.parameters():
        parameter.data = parameter.data * 1.5
    return block


def a_part_moved(block: nn.Module) -> nn.Module:
    experts = block.experts
    assert isinstance(experts, nn.Module)
    experts.to(torch.float64).to(torch.float32)
    return block


CHANGES = [moved, halved, copied, assigned, loaded, given_other_memory, a_part_moved]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LOOPS)
def test_weights_are_never_stale(name: str, change: Callable[[nn.Module], nn.Module]) -> None:
    block, plain = forms.build(name), forms.build(name)
    prepare(block)
    changed, wanted = change(block), change(plain)
    x = inputs(next(wanted.parameters()).dtype)
    tolerance = CLOSE.get(x.dtype, CLOSE[torch.bfloat16])
    assert_close(output(changed, x), output(wanted, x), **tolerance)
    with torch.no_grad():
        for parameters in (changed.parameters(), wanted.parameters()):
            for parameter in parameters:
                parameter.mul_(0.5)  # in place, after all that
    assert_close(output(changed, x), output(wanted, x), **tolerance)


@pytest.mark.parametrize("change", [moved, assigned, a_part_moved])
def test_compiled_code_follows_too(change: Callable[[nn.Module], nn.Module]) -> None:
    block, plain = forms.build("bailing"), forms.build("bailing")
    prepare(block)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    output(compiled, inputs())
    change(block), change(plain)
    with torch.no_grad():
        for parameter in (*block.parameters(), *plain.parameters()):
            parameter.mul_(0.5)  # stale weights would still have the values of before
    x = inputs(next(plain.parameters()).dtype)
    assert_close(output(compiled, x), output(plain, x), **CLOSE[x.dtype])


def test_a_copy_has_weights_of_its_own() -> None:
    block, x = forms.build("softmax_loop"), inputs()
    prepare(block)
    other, own = copy.deepcopy(block), output(block, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_close(output(block, x), own, rtol=0, atol=0)
    assert not output(other, x).any()


@pytest.mark.parametrize("name", LOOPS)
def test_gradients_reach_every_expert(name: str) -> None:
    block, plain, x = forms.build(name), forms.build(name), inputs()
    prepare(block)
    for each in (block, plain):
        result = each(x)
        (result[0] if isinstance(result, tuple) else result).square().sum().backward()
    for (path, ours), theirs in zip(block.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:  # moe_infer() runs without gradients
            assert ours.grad is not None, path
            assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OF_LISTS)
def test_biases(name: str) -> None:
    block, plain, x = forms.build(name, mlp_bias=True), forms.build(name, mlp_bias=True), inputs()
    assert prepare(block).prepared
    assert_close(output(block, x), output(plain, x), **CLOSE[torch.float32])


def test_experts_of_other_shapes() -> None:
    """No gate, another activation, gate and up in one Linear: the form is read from the expert's own forward."""

    class Ungated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(HIDDEN, 16), nn.Linear(16, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x)).square())

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up, self.down = nn.Linear(HIDDEN, 32, bias=False), nn.Linear(16, HIDDEN, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(torch.nn.functional.gelu(gate, approximate="tanh").clamp(max=7.0) * (up + 1))

    for kind in (Ungated, Fused):
        block, x = forms.build("softmax_loop"), inputs()
        block.experts = nn.ModuleList([kind() for _ in range(12)])
        own = output(block, x)
        (entry,) = prepare(block).blocks
        assert not entry.reason
        assert_close(output(block, x), own, **CLOSE[torch.float32])


# What is refused, by name, with nothing changed.


def tied(block: Any) -> None:
    block.experts[3].up_proj.weight = block.experts[2].up_proj.weight


def wider(block: Any) -> None:
    block.experts[3] = forms.MLP(forms.config(), 32)


def hooked(block: Any) -> None:
    block.experts[3].down_proj.register_forward_hook(lambda _module, _args, out: out * 2)


def with_a_forward_of_its_own(block: Any) -> None:
    block.experts[0].forward = lambda x: x


def quantised(block: Any) -> None:
    for expert in block.experts:
        expert.up_proj = torch.ao.nn.quantized.dynamic.Linear(HIDDEN, 24)


def quantised_by_subclass(block: Any) -> None:
    class Linear4bit(nn.Linear):
        """As bitsandbytes has it: a Linear that reads its weight in its own way."""

    for expert in block.experts:
        expert.up_proj.__class__ = Linear4bit


def on_meta(block: Any) -> None:
    block.to("meta")


def deeper(block: Any) -> None:
    for i in range(12):
        block.experts[i] = nn.Sequential(nn.Linear(HIDDEN, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, HIDDEN))


def with_a_norm(block: Any) -> None:
    for expert in block.experts:
        expert.act_fn = nn.Sequential(nn.SiLU(), nn.LayerNorm(24))


def differing_in_what_they_compute(block: Any) -> None:
    class Other(nn.SiLU):
        __qualname__ = __name__ = "SiLU"

        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

        def _get_name(self) -> str:
            return "SiLU"

    block.experts[7].act_fn = Other()


REFUSED: dict[Callable[[Any], None], str] = {
    tied: "2.up_proj.weight is 3.up_proj.weight",
    wider: "experts 0 and 3 are not of one shape",
    hooked: "hooks (expert 3)",
    with_a_forward_of_its_own: "a forward of their own",
    quantised: "quantized.dynamic.modules.linear.Linear",
    quantised_by_subclass: "Linear4bit",
    on_meta: "meta device",
    deeper: "not Linears on the input",
    with_a_norm: "LayerNorm",
    differing_in_what_they_compute: "off by",
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused(change: Callable[[Any], None]) -> None:
    block, x = forms.build("softmax_loop"), inputs()
    change(block)
    pointers = [parameter.data_ptr() for parameter in block.parameters()]
    own = None if change in (on_meta, quantised) else output(block, x)
    (entry,) = prepare(block).blocks
    assert REFUSED[change] in entry.reason
    assert not entry.how
    assert [parameter.data_ptr() for parameter in block.parameters()] == pointers
    assert not replaced(block)
    if own is not None:
        assert_close(output(block, x), own, rtol=0, atol=0)


def test_stacked_experts_on_meta_are_refused() -> None:
    block = forms.build("expert_hit").to("meta")
    (entry,) = prepare(block).blocks
    assert "meta device" in entry.reason


def test_a_list_without_a_router_is_no_block() -> None:
    assert prepare(nn.Sequential(nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]))).blocks == ()
    assert str(prepare(nn.Linear(2, 2))) == "No block of experts in a Python loop was found."


def test_layers_of_a_model_are_named() -> None:
    report = prepare(Stack("bailing"))
    assert [entry.name for entry in report.prepared] == ["layers.0", "layers.1"]
    assert "Bailing.moe_infer()" in str(report)


def test_what_torch_compile_returned_can_be_given() -> None:
    block = forms.build("softmax_loop")
    compiled = torch.compile(block, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert prepare(compiled).prepared
    assert replaced(block)
    unprepare(compiled)
    assert not replaced(block)
