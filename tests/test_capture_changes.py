"""prepare(): changes that a prepared block follows, of its weights and of its experts, compiled or not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.testing import assert_close

import forms
from dmoe_compile import prepare, unprepare
from loop_blocks import HIDDEN, LOOPS, inputs, output
from tiny_moe import INDUCTOR, TOLERANCE

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


def moved_with_other_parameters(block: nn.Module) -> nn.Module:
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # as between kinds of devices
    try:
        return block.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def a_part_moved(block: nn.Module) -> nn.Module:
    experts = block.experts
    assert isinstance(experts, nn.Module)
    experts.to(torch.float64).to(torch.float32)
    return block


CHANGES = [moved, halved, copied, assigned, loaded, given_other_memory, moved_with_other_parameters, a_part_moved]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LOOPS)
def test_weights_are_never_stale(name: str, change: Callable[[nn.Module], nn.Module]) -> None:
    block, plain = forms.build(name), forms.build(name)
    prepare(block)
    changed, wanted = change(block), change(plain)
    x = inputs(next(wanted.parameters()).dtype)
    tolerance = TOLERANCE.get(x.dtype, TOLERANCE[torch.bfloat16])
    assert_close(output(changed, x), output(wanted, x), **tolerance)
    with torch.no_grad():
        for parameters in (changed.parameters(), wanted.parameters()):
            for parameter in parameters:
                parameter.mul_(0.5)  # in place, after all that
    assert_close(output(changed, x), output(wanted, x), **tolerance)


@pytest.mark.parametrize("change", [moved, assigned, moved_with_other_parameters, a_part_moved])
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
    assert_close(output(compiled, x), output(plain, x), **TOLERANCE[x.dtype])


def test_a_copy_has_weights_of_its_own() -> None:
    block, x = forms.build("softmax_loop"), inputs()
    prepare(block)
    other, own = copy.deepcopy(block), output(block, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_close(output(block, x), own, rtol=0, atol=0)
    assert not output(other, x).any()


def test_gradients_of_weights_that_are_unfrozen_later() -> None:
    block, x = forms.build("softmax_loop").requires_grad_(requires_grad=False), inputs()
    prepare(block)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    compiled(x)
    for expert in block.experts:
        expert.up_proj.requires_grad_()
    compiled(x)[0].sum().backward()
    assert all(expert.up_proj.weight.grad is not None for expert in block.experts)


def test_weights_lent_for_one_call_are_used_for_that_call() -> None:
    block, x = forms.build("softmax_loop"), inputs()
    prepare(block)
    own = output(block, x)
    lent = {name: torch.zeros_like(value) for name, value in block.state_dict().items() if "down_proj" in name}
    with torch.no_grad():
        out, _ = torch.func.functional_call(block, lent, (x,))
    assert not out.any()
    assert_close(output(block, x), own, rtol=0, atol=0)


# What is saved and freed.


@pytest.mark.parametrize("name", LOOPS)
def test_a_prepared_block_can_be_saved_whole(name: str, tmp_path: Path) -> None:
    block, x = forms.build(name), inputs()
    prepare(block)
    own = output(block, x)
    torch.save(block, tmp_path / "block.pt")
    for other in (torch.load(tmp_path / "block.pt", weights_only=False), pickle.loads(pickle.dumps(block))):
        assert_close(output(other, x), own, rtol=0, atol=0)
        assert [entry.how for entry in prepare(other).blocks] == ["prepared before"]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not output(other, x).any()
        unprepare(other)
        assert not output(other, x).any()


def test_every_parameter_can_be_saved_alone(tmp_path: Path) -> None:
    block, plain = forms.build("softmax_loop"), forms.build("softmax_loop")
    prepare(block)
    save_model(block, tmp_path / "model.safetensors")  # which refuses tensors that share a storage
    load_model(forms.build("softmax_loop"), tmp_path / "model.safetensors")
    sizes = []
    for each in (block, plain):
        torch.save(each.experts[0].state_dict(), tmp_path / "expert.pt")
        sizes.append((tmp_path / "expert.pt").stat().st_size)
    assert sizes[0] == sizes[1]


def test_a_prepared_block_is_freed_with_its_last_user() -> None:
    block = forms.build("softmax_loop")
    prepare(block)
    gone = weakref.ref(block)
    gc.disable()
    try:
        del block
        assert gone() is None
    finally:
        gc.enable()


# What is done to experts later, and how a block notices.


def wrapped(block: Any) -> None:
    """As PEFT does it."""

    class LoRA(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(HIDDEN, 2, bias=False), nn.Linear(2, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(5)
    for expert in block.experts:
        expert.up_proj = LoRA(expert.up_proj)


def another_expert(block: Any) -> None:
    torch.manual_seed(5)
    block.experts[2] = forms.MLP(forms.config())


def another_list(block: Any) -> None:
    torch.manual_seed(5)
    block.experts = forms.experts_of(forms.config())


def another_linear(block: Any) -> None:
    torch.manual_seed(5)
    block.experts[2].down_proj = nn.Linear(24, HIDDEN, bias=False)


def another_parameter(block: Any) -> None:
    for expert in block.experts:
        expert.up_proj.weight = nn.Parameter(expert.up_proj.weight * 2)


def parametrised(block: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(block.experts[2].up_proj, "weight", Doubled())


def hooked_later(block: Any) -> None:
    for expert in block.experts:
        expert.register_forward_hook(lambda _module, _args, out: out * 2)


def patched_later(block: Any) -> None:
    for expert in block.experts:
        own = expert.forward
        expert.forward = lambda x, own=own: own(x) * 2


def fewer_experts_a_token(block: Any) -> None:
    block.top_k = block.num_experts_per_tok = 1


def another_gate(block: Any) -> None:
    torch.manual_seed(5)
    kind = type(block.gate)
    block.gate = kind(HIDDEN, 12, bias=False) if kind is nn.Linear else kind(forms.config())


LATER = [
    wrapped, another_expert, another_list, another_linear, another_parameter, parametrised, hooked_later,
    patched_later, fewer_experts_a_token, another_gate,
]  # fmt: skip


@pytest.mark.parametrize("change", LATER)
@pytest.mark.parametrize("name", ["softmax_loop", "bailing"])
def test_what_happens_to_experts_later_is_not_lost(
    name: str, change: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    block, plain, x = forms.build(name), forms.build(name), inputs()
    prepare(block)
    own = output(block, x)
    change(block), change(plain)
    wanted = output(plain, x)
    if not (name == "bailing" and change is fewer_experts_a_token):  # which its gate does not read
        assert not torch.allclose(own, wanted, **INDUCTOR)
    assert_close(output(block, x), wanted, **INDUCTOR)
    assert_close(output(block, x), wanted, **INDUCTOR)
    assert len(caplog.messages) <= 1  # said once
    (entry,) = prepare(block).blocks
    assert entry.reason or entry.how
    assert_close(output(block, x), wanted, **INDUCTOR)
    unprepare(block)
    assert_close(output(block, x), wanted, **INDUCTOR)


NOT_TOLD = {hooked_later, patched_later}  # Dynamo ignores hooks on a module that it has compiled, in any model


@pytest.mark.parametrize("change", [change for change in LATER if change not in NOT_TOLD])
def test_compiled_code_notices_too(change: Callable[[Any], None]) -> None:
    block, plain, x = forms.build("softmax_loop"), forms.build("softmax_loop"), inputs()
    prepare(block)
    compiled = torch.compile(block, backend="eager")
    output(compiled, x)
    change(block), change(plain)
    assert_close(output(compiled, x), output(plain, x), **INDUCTOR)


def test_compiled_code_stays_stacked_with_new_parameters() -> None:
    block, plain, x = forms.build("bailing"), forms.build("bailing"), inputs()
    prepare(block)
    compiled = torch.compile(block, backend="eager", fullgraph=True)  # its own code would break the graph
    output(compiled, x)
    another_parameter(block), another_parameter(plain)
    assert_close(output(compiled, x), output(plain, x), **INDUCTOR)
