"""prepare(): what it leaves as it was, what it follows, and what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
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
    tolerance = CLOSE.get(x.dtype, CLOSE[torch.bfloat16])
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
        assert not torch.allclose(own, wanted, **CLOSE[torch.float32])
    assert_close(output(block, x), wanted, **CLOSE[torch.float32])
    assert_close(output(block, x), wanted, **CLOSE[torch.float32])
    assert len(caplog.messages) <= 1  # said once
    (entry,) = prepare(block).blocks
    assert entry.reason or entry.how
    assert_close(output(block, x), wanted, **CLOSE[torch.float32])
    unprepare(block)
    assert_close(output(block, x), wanted, **CLOSE[torch.float32])


NOT_TOLD = {hooked_later, patched_later}  # Dynamo ignores hooks on a module that it has compiled, in any model


@pytest.mark.parametrize("change", [change for change in LATER if change not in NOT_TOLD])
def test_compiled_code_notices_too(change: Callable[[Any], None]) -> None:
    block, plain, x = forms.build("softmax_loop"), forms.build("softmax_loop"), inputs()
    prepare(block)
    compiled = torch.compile(block, backend="eager")
    output(compiled, x)
    change(block), change(plain)
    assert_close(output(compiled, x), output(plain, x), **CLOSE[torch.float32])


def test_weights_lent_for_one_call_are_used_for_that_call() -> None:
    block, x = forms.build("softmax_loop"), inputs()
    prepare(block)
    own = output(block, x)
    lent = {name: torch.zeros_like(value) for name, value in block.state_dict().items() if "down_proj" in name}
    with torch.no_grad():
        out, _ = torch.func.functional_call(block, lent, (x,))
    assert not out.any()
    assert_close(output(block, x), own, rtol=0, atol=0)


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


def test_what_its_forward_changes_is_kept_or_refused() -> None:
    class Counting(forms.SoftmaxLoop):
        load: Tensor

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("load", torch.zeros(config.num_experts))
            self.calls = 0

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            self.load += 1
            self.calls += 1
            return super().forward(hidden_states)

    block = Counting(forms.config()).eval()
    (entry,) = prepare(block).blocks
    assert entry.reason == "its forward is of no known form; it changes calls, load"
    assert (block.load == 0).all()
    assert block.calls == 0


def test_what_its_experts_change_is_not_lost() -> None:
    class Counting(forms.MLP):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    block = forms.build("softmax_loop")
    block.experts = nn.ModuleList([Counting(forms.config()) for _ in range(12)])
    (entry,) = prepare(block).blocks
    assert entry.reason.startswith("its experts change 0.calls, 1.calls")
    assert not any("calls" in vars(expert) for expert in block.experts)


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
    assert_close(own, output(plain, inputs()), **CLOSE[torch.float32])


def test_called_in_another_way_its_own_code_runs() -> None:
    block, plain, x = forms.build("softmax_loop"), forms.build("softmax_loop"), inputs()
    prepare(block)
    with torch.no_grad():
        assert_close(block(hidden_states=x), plain(hidden_states=x), **CLOSE[torch.float32])
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
    assert_close(output(block, x), own, **CLOSE[torch.float32])
    block.factor = 3.0
    assert_close(output(block, x), 3 * own, **CLOSE[torch.float32])


def test_a_method_with_an_argument_that_varies_is_refused() -> None:
    class Chunked(forms.Bailing):
        def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor, tokens: int = 0) -> Tensor:
            return super().moe_infer(x, topk_ids, topk_weight) if tokens else self.in_chunks(x, topk_ids, topk_weight)

        def in_chunks(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> list[Tensor]:
            return [self.moe_infer(x, topk_ids, topk_weight, len(x))]

        def forward(self, hidden_states: Tensor) -> Tensor:
            ids, weights, _ = self.gate(hidden_states)
            (out,) = self.in_chunks(hidden_states.view(-1, HIDDEN), ids, weights)
            return out.view(hidden_states.shape)

    block = Chunked(forms.config()).eval()
    (entry,) = prepare(block).blocks
    assert entry.reason == "its forward is of no known form"


def test_compiled_code_stays_stacked_with_new_parameters() -> None:
    block, plain, x = forms.build("bailing"), forms.build("bailing"), inputs()
    prepare(block)
    compiled = torch.compile(block, backend="eager", fullgraph=True)  # its own code would break the graph
    output(compiled, x)
    another_parameter(block), another_parameter(plain)
    assert_close(output(compiled, x), output(plain, x), **CLOSE[torch.float32])


def test_gradients_of_weights_that_are_unfrozen_later() -> None:
    block, x = forms.build("softmax_loop").requires_grad_(requires_grad=False), inputs()
    prepare(block)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    compiled(x)
    for expert in block.experts:
        expert.up_proj.requires_grad_()
    compiled(x)[0].sum().backward()
    assert all(expert.up_proj.weight.grad is not None for expert in block.experts)


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


def test_one_list_in_two_blocks() -> None:
    first, second = forms.build("softmax_loop"), forms.build("bailing")
    second.experts = first.experts
    both, x = nn.ModuleList([first, second]), inputs()
    own = [output(block, x) for block in both]
    assert len(prepare(both).prepared) == 2
    for block, wanted in zip(both, own, strict=True):
        assert_close(output(block, x), wanted, **CLOSE[torch.float32])
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
    assert_close(output(block, x), own, **CLOSE[torch.float32])


class Wrapper(nn.Module):
    """Experts in a module of their own, which is called with (hidden, ids, weights)."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mlps = experts

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.mlps.children()):
            tokens, places = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None])
        return out


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
    assert_close(output(block, x), own, **CLOSE[torch.float32])
    assert_close(output(torch.compile(block, backend="eager", fullgraph=True), x), own, **CLOSE[torch.float32])
    unprepare(block)
    assert_close(output(block, x), own, rtol=0, atol=0)


# What only looks right: wrong mathematics that the block's own weights, or small inputs, would not show.


class Biased(forms.SoftmaxLoop):
    """The choice has a bias, which is zero before the weights are loaded."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(rows)
        scores = logits.sigmoid()
        ids = (scores + self.bias).topk(self.top_k).indices
        weights = scores.gather(-1, ids)
        return Wrapper(self.experts)(rows, ids, weights).view(hidden_states.shape), logits


class SoftCapped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 30 * torch.tanh(super().forward(x) / 30)


class Clamped(forms.SoftmaxLoop):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        out, logits = super().forward(hidden_states)
        return out.clamp(-100, 100), logits


class Limited(forms.SoftmaxLoop):
    """An expert takes no more than 64 tokens."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(rows)
        weights, ids = logits.softmax(-1).topk(self.top_k)
        place = F.one_hot(ids, self.num_experts).sum(1).cumsum(0).gather(-1, ids)
        return Wrapper(self.experts)(rows, ids, weights * (place <= 64)).view(hidden_states.shape), logits


class Louder(forms.SoftmaxLoop):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        out, logits = super().forward(hidden_states)
        return out * 1.02, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Biased, Clamped, Limited, Louder])
def test_what_only_looks_right_is_refused(kind: type[forms.SoftmaxLoop], dtype: torch.dtype) -> None:
    block = kind(forms.config(hidden_size=64)).eval().to(dtype)
    (entry,) = prepare(block).blocks
    assert "of no known form" in entry.reason


def test_weights_that_show_nothing_do_not_mislead() -> None:
    """Not renormalised, with experts that are all zero when it is prepared."""
    block = forms.build("softmax_loop", norm_topk_prob=False)
    plain = copy.deepcopy(block)
    for expert in block.experts:
        nn.init.zeros_(expert.down_proj.weight)
    assert str(prepare(block).prepared[0].how) == "the whole block (softmax)"
    block.load_state_dict(plain.state_dict())
    assert_close(output(block, inputs()), output(plain, inputs()), **CLOSE[torch.float32])


def test_a_softmax_in_low_precision_is_told_from_one_in_fp32() -> None:
    class Native(forms.SoftmaxLoop):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            rows = hidden_states.view(-1, hidden_states.shape[-1])
            logits = self.gate(rows)
            weights, ids = logits.softmax(-1).topk(self.top_k)
            return Wrapper(self.experts)(rows, ids, weights).view(hidden_states.shape), logits

    block = Native(forms.config(num_experts=128)).eval().to(torch.bfloat16)  # so many that some scores are equal
    (entry,) = prepare(block).blocks
    assert entry.how == "the whole block (softmax, in the logits' dtype)"


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
