"""prepare(): what it leaves as it was, and which blocks it takes, in which modes and calls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import forms
from dmoe_compile import prepare, unprepare
from loop_blocks import HIDDEN, LOOPS, OF_LISTS, Wrapper, inputs, output, replaced
from tiny_moe import INDUCTOR

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
    assert_close(output(block, x), output(fresh, x), **INDUCTOR)
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
    """The peak is measured in a process of its own: 12 layers of 72 MiB; one of them may be there twice."""
    script = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import torch
import forms
from dmoe_compile import prepare
torch.set_num_threads(1)
prepare(forms.build("bailing"))  # what a first call imports
make = lambda: forms.build("bailing", num_experts=48, n_group=4, hidden_size=512, moe_intermediate_size=256)
model = torch.nn.ModuleList([make() for _ in range(12)])
layer = sum(p.numel() * p.element_size() for p in model[0].experts.parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
report = prepare(model)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"prepared": len(report.prepared), "layers": (after - before) / layer}))
"""
    command = [sys.executable, "-P", "-c", script, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prepared"] == 12
    assert found["layers"] < 2  # one layer, and what the allocator and the comparisons need besides


def test_random_numbers_and_modes_are_left_alone() -> None:
    block = forms.build("softmax_loop").train()
    block.experts[3].eval()
    state = torch.get_rng_state()
    prepare(block)
    assert torch.equal(torch.get_rng_state(), state)
    assert block.training
    assert not block.experts[3].training


def test_random_numbers_of_the_router_are_its_own() -> None:
    class Jittering(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1e-2 * torch.rand_like(x))

    block, plain = forms.build("softmax_loop"), forms.build("softmax_loop")
    block.gate.__class__ = plain.gate.__class__ = Jittering
    state = torch.get_rng_state()
    assert prepare(block).prepared
    assert torch.equal(torch.get_rng_state(), state)
    own = output(block, inputs())
    torch.set_rng_state(state)
    assert_close(own, output(plain, inputs()), **INDUCTOR)


def test_other_code_is_not_compiled_again_when_more_is_prepared() -> None:
    class Sliced(nn.Module):
        """As transformers' models: a slice of a list of layers is a new module, made in every forward."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[:2]:
                x = layer(x)
            return x

    first = forms.build("softmax_loop")
    prepare(first)
    counter = CompileCounter()
    compiled = torch.compile(Sliced(), backend=counter, fullgraph=True)
    compiled(torch.ones(2))
    prepare(forms.build("bailing"))
    compiled(torch.ones(2))
    assert counter.frame_count == 1


# In training, and called in other ways.


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
            # of squares of outputs: each is a product of two results that are as far apart as INDUCTOR says, summed
            assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_prepared_in_inference_mode_it_still_trains() -> None:
    block = forms.build("softmax_loop")
    with torch.inference_mode():
        assert prepare(block).prepared
        block(inputs())
    block(inputs())[0].sum().backward()
    assert block.experts[0].up_proj.weight.grad is not None


def test_in_training_mode_its_own_code_runs() -> None:
    class Dropping(forms.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 1.0, self.training))

    block = forms.build("bailing", num_shared_experts=None)
    block.experts = nn.ModuleList([Dropping(forms.config()) for _ in range(12)]).eval()
    assert prepare(block).prepared
    assert output(block, inputs()).any()
    assert not output(block.train(), inputs()).any()


def test_called_in_another_way_its_own_code_runs() -> None:
    block, plain, x = forms.build("softmax_loop"), forms.build("softmax_loop"), inputs()
    prepare(block)
    with torch.no_grad():
        assert_close(block(hidden_states=x), plain(hidden_states=x), **INDUCTOR)
        assert block(x[:, :0])[0].shape == (2, 0, HIDDEN)
        with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
            block(x, mask=None)


def test_a_method_with_another_argument_is_compared_with_that_argument() -> None:
    class Scaling(forms.Bailing):
        factor = 1.0

        def forward(self, hidden_states: Tensor) -> Tensor:
            ids, weights, _ = self.gate(hidden_states)
            rows = hidden_states.view(-1, hidden_states.shape[-1])
            return self.scaled(rows, ids, weights, self.factor).view(hidden_states.shape)

        def scaled(self, x: Tensor, ids: Tensor, weights: Tensor, factor: float) -> Tensor:
            return factor * self.moe_infer(x, ids, weights)

        moe_infer = torch.no_grad()(forms.Bailing.moe_infer)

    torch.manual_seed(0)
    block, x = Scaling(forms.config()).eval(), inputs()
    own = output(block, x)
    assert prepare(block).prepared
    assert_close(output(block, x), own, **INDUCTOR)
    block.factor = 3.0
    assert_close(output(block, x), 3 * own, **INDUCTOR)


# Where experts are, and what they look like.


@pytest.mark.parametrize("name", OF_LISTS)
def test_biases(name: str) -> None:
    block, plain, x = forms.build(name, mlp_bias=True), forms.build(name, mlp_bias=True), inputs()
    assert prepare(block).prepared
    assert_close(output(block, x), output(plain, x), **INDUCTOR)


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
        assert_close(output(block, x), own, **INDUCTOR)


def test_one_list_in_two_blocks() -> None:
    first, second = forms.build("softmax_loop"), forms.build("bailing")
    second.experts = first.experts
    both, x = nn.ModuleList([first, second]), inputs()
    own = [output(block, x) for block in both]
    assert len(prepare(both).prepared) == 2
    for block, wanted in zip(both, own, strict=True):
        assert_close(output(block, x), wanted, **INDUCTOR)
    unprepare(both)
    for block, wanted in zip(both, own, strict=True):
        assert_close(output(block, x), wanted, rtol=0, atol=0)


def test_two_lists_in_one_block() -> None:
    block = forms.build("bailing")
    block.others = forms.experts_of(forms.config())
    x = inputs()
    own = output(block, x)
    first, second = prepare(block).blocks
    assert first.how
    assert second.reason == "another list of experts in it was replaced"
    assert_close(output(block, x), own, **INDUCTOR)


@pytest.mark.parametrize("kind", ["ModuleList", "ModuleDict"])
def test_experts_in_a_module_of_their_own(kind: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            experts = forms.experts_of(forms.config())
            named = nn.ModuleDict({f"expert_{i}": expert for i, expert in enumerate(experts)})
            self.gate = nn.Linear(HIDDEN, len(experts), bias=False)
            self.experts = Wrapper(experts if kind == "ModuleList" else named)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.view(-1, HIDDEN)
            weights, ids = self.gate(rows).softmax(-1).topk(3)
            return self.experts(rows, ids, weights).view(x.shape)

    block, x = Block().eval(), inputs()
    own = output(block, x)
    (entry,) = prepare(block).blocks
    assert entry.how == "Wrapper.forward()"
    assert_close(output(block, x), own, **INDUCTOR)
    assert_close(output(torch.compile(block, backend="eager", fullgraph=True), x), own, **INDUCTOR)
    unprepare(block)
    assert_close(output(block, x), own, rtol=0, atol=0)


# What it is given, and what it reports.


def test_a_list_without_a_router_is_no_block() -> None:
    assert prepare(nn.Sequential(nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]))).blocks == ()
    assert str(prepare(nn.Linear(2, 2))) == "No block of experts in a Python loop was found."


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
