"""Experts in a list as one stacked tensor: how their form is read, what they compute, and whose memory they use."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

from dmoe_compile import stacking
from dmoe_compile.bench.published import MLP, experts_of
from dmoe_compile.stacking import NotStackableError, Stack, read_form
from forms import CONFIG, config
from tiny_moe import SUMS

HIDDEN, EXPERTS, TOP_K = CONFIG["hidden_size"], CONFIG["num_experts"], CONFIG["num_experts_per_tok"]


def routed(tokens: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden [T, H], ids and weights [T, k]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    return hidden, ids, weights


def one_by_one(experts: nn.ModuleList, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Run every token through its experts, [T, H]."""
    rows = zip(hidden, ids.tolist(), weights, strict=True)
    return torch.stack([sum(w * experts[e](x) for e, w in zip(es, ws, strict=True)) for x, es, ws in rows])


def test_the_form_is_read_from_the_forward() -> None:
    form = read_form(MLP(config()))
    assert (form.ups, form.down) == (("gate_proj", "up_proj"), "down_proj")
    gate, up = torch.randn(2, 5, 24).unbind()
    assert_close(form.between(torch.cat([gate, up], dim=-1)), F.silu(gate) * up)


def test_linears_that_lie_deeper_are_found() -> None:
    class Deeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.ModuleDict({"in": nn.Linear(4, 6), "out": nn.Linear(6, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.proj["out"](F.relu(self.proj["in"](x)))

    form = read_form(Deeper())
    assert (form.ups, form.down) == (("proj.in",), "proj.out")


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) + x)


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)) * 2


class OneBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() * self.up(x))


class DependsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) if x.sum() > 0 else -self.up(x))


@pytest.mark.parametrize(
    ("expert", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), "LayerNorm (Sequential.1)"),
        (nn.Sequential(Branching(4, 4), nn.Linear(4, 4)), "Branching (Sequential.0)"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), "not Linears on the input"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "end in a Linear"),
        (nn.Linear(4, 4), "end in a Linear"),
        (Residual(), "not Linears on the input"),
        (Added(), "end in a Linear"),
        (Twice(), "use a Linear twice"),
        (OneBias(), "bias on some Linears only"),
        (DependsOnValues(), "can't be traced (TraceError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_experts_are_refused(expert: nn.Module, reason: str) -> None:
    with pytest.raises(NotStackableError) as error:
        read_form(expert)
    assert reason in str(error.value)


def test_weights_that_are_shared_inside_an_expert_are_refused() -> None:
    experts = [nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)) for _ in range(2)]
    for expert in experts:
        expert[2].weight = expert[0].weight
    with pytest.raises(NotStackableError, match=r"share a weight: 0\.0\.weight is 0\.2\.weight"):
        Stack(experts)


@pytest.mark.parametrize("bias", [False, True])
def test_computes_what_the_experts_compute(bias: bool) -> None:
    torch.manual_seed(0)
    experts = experts_of(config(mlp_bias=bias))
    with torch.no_grad():
        expected = one_by_one(experts, *routed())
        assert_close(Stack(list(experts))(*routed()), expected, **SUMS)


def test_parameters_become_views_and_get_their_memory_back() -> None:
    experts = experts_of(config())
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in experts.named_parameters()}
    stack = Stack(list(experts))
    ups, downs = stack.weights
    assert ups.shape == (EXPERTS, 2 * 24, HIDDEN)
    assert downs.shape == (EXPERTS, HIDDEN, 24)
    for name, parameter in experts.named_parameters():
        whole = downs if "down" in name else ups
        assert 0 <= parameter.data_ptr() - whole.data_ptr() < whole.nbytes
        assert parameter.untyped_storage().nbytes() == parameter.nbytes  # so that saving one saves no other
    stack.restore()
    for name, parameter in experts.named_parameters():
        was, pointer, value = before[name]
        assert parameter is was
        assert parameter.data_ptr() == pointer
        assert_close(parameter.detach(), value, rtol=0, atol=0)


def test_kept_experts_get_memory_of_their_own() -> None:
    experts = experts_of(config())
    stack = Stack(list(experts))
    stack.keep()
    stack.restore()
    assert len({p.untyped_storage().data_ptr() for p in experts.parameters()}) == 3 * EXPERTS


def test_follows_new_memory() -> None:
    experts = experts_of(config())
    stack = Stack(list(experts))
    held = stack.weights
    assert stack.refresh(list(experts)) == ""
    assert stack.weights is held  # nothing has changed
    experts[3].up_proj.weight.data = torch.zeros_like(experts[3].up_proj.weight)
    assert stack.refresh(list(experts)) == ""
    with torch.no_grad():
        assert_close(stack(*routed()), one_by_one(experts, *routed()), **SUMS)
    assert stack.weights is not held
    assert not stack.weights[0][3, 24:].any()


def test_follows_a_new_parameter() -> None:
    experts = experts_of(config())
    stack = Stack(list(experts))
    assert not stack.dirty
    experts[3].up_proj.weight = nn.Parameter(torch.zeros_like(experts[3].up_proj.weight))
    assert stack.dirty
    assert stack.refresh(list(experts)) == ""
    assert not stack.dirty
    assert not stack.weights[0][3, 24:].any()


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def replaced_expert(experts: nn.ModuleList) -> None:
    experts[3] = MLP(config())


def wrapped_linear(experts: nn.ModuleList) -> None:
    experts[3].up_proj = nn.Sequential(experts[3].up_proj, Scaled())


def hooked(experts: nn.ModuleList) -> None:
    experts[3].up_proj.register_forward_pre_hook(lambda _module, args: args)


def given_a_forward(experts: nn.ModuleList) -> None:
    experts[3].forward = lambda x: x


def parametrised(experts: nn.ModuleList) -> None:
    nn.utils.parametrize.register_parametrization(experts[3].up_proj, "weight", Scaled())


def pruned(experts: nn.ModuleList) -> None:
    prune.l1_unstructured(experts[3].up_proj, "weight", amount=0.5)


def given_a_bias(experts: nn.ModuleList) -> None:
    experts[3].up_proj.bias = nn.Parameter(torch.ones(24))


def of_another_dtype(experts: nn.ModuleList) -> None:
    experts[3].to(torch.bfloat16)


def of_another_shape(experts: nn.ModuleList) -> None:
    experts[3].up_proj.weight.data = torch.zeros(1, HIDDEN)  # which would be broadcast


def of_another_activation(experts: nn.ModuleList) -> None:
    for expert in experts:
        expert.act_fn = nn.GELU()


BREAKS = {
    replaced_expert: "other experts took the place",
    wrapped_linear: "differ: experts 0 and 3",
    hooked: "hooks",
    given_a_forward: "a forward of their own",
    parametrised: "differ: experts 0 and 3",
    pruned: "differ: experts 0 and 3",
    given_a_bias: "differ: experts 0 and 3",
    of_another_dtype: "differ: experts 0 and 3",
    of_another_shape: "differ: experts 0 and 3",
    of_another_activation: "",
}


@pytest.mark.parametrize("change", BREAKS)
def test_says_what_it_cannot_follow(change: Callable[[nn.ModuleList], None]) -> None:
    experts = experts_of(config())
    stack = Stack(list(experts))
    change(experts)
    reason = stack.refresh(list(experts))
    assert BREAKS[change] in reason
    if not reason:
        with torch.no_grad():
            assert_close(stack(*routed()), one_by_one(experts, *routed()), **SUMS)


def test_parameters_lent_for_one_call_are_not_stacked() -> None:
    experts = experts_of(config())
    stack = Stack(list(experts))
    other = {name: torch.zeros_like(value) for name, value in experts.state_dict().items()}

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self) -> bool:
            return stack.is_swapped()

    asking = Asking()
    assert torch.func.functional_call(asking, {f"experts.{name}": value for name, value in other.items()}, ())
    assert not asking()


def test_experts_of_two_lists_are_refused() -> None:
    experts = experts_of(config())
    stack = Stack(list(experts))
    with pytest.raises(NotStackableError, match="stacked in another list"):
        Stack(list(experts))
    stack.restore()
    Stack(list(experts))


def test_memory_that_two_parameters_share_is_refused() -> None:
    experts = experts_of(config())
    experts[2].up_proj.weight.data = experts[1].up_proj.weight.data
    with pytest.raises(NotStackableError, match=r"share memory: 1\.up_proj\.weight and 2\.up_proj\.weight"):
        Stack(list(experts))


def test_quantised_weights_in_plain_linears_are_refused() -> None:
    class Quantised(Tensor):
        pass

    experts = experts_of(config())
    for expert in experts:
        expert.up_proj.weight = nn.Parameter(torch.randn(24, HIDDEN).as_subclass(Quantised))
    with pytest.raises(NotStackableError, match=r"hold a (Quantised|Parameter)"):
        Stack(list(experts))


def test_an_interrupted_stacking_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = experts_of(config())
    pointers = [parameter.data_ptr() for parameter in experts.parameters()]
    gathered, calls = stacking._gathered, []

    def interrupted(parameters: list[list[nn.Parameter]]) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return gathered(parameters)

    monkeypatch.setattr(stacking, "_gathered", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Stack(list(experts))
    assert [parameter.data_ptr() for parameter in experts.parameters()] == pointers


def test_inference_mode_leaves_parameters_trainable() -> None:
    experts = experts_of(config())
    with torch.inference_mode():
        stack = Stack(list(experts))
    assert not any(parameter.is_inference() for parameter in (*experts.parameters(), *stack.weights))


def test_gradients_where_only_some_weights_want_them() -> None:
    experts = experts_of(config())
    for expert in experts:
        expert.gate_proj.requires_grad_(requires_grad=False)
    experts[0].requires_grad_(requires_grad=False)
    stack = Stack(list(experts))
    stack(*routed()).sum().backward()
    assert experts[1].up_proj.weight.grad is not None
    assert experts[1].gate_proj.weight.grad is None
    assert experts[0].up_proj.weight.grad is None


def test_a_copy_shares_nothing() -> None:
    experts = experts_of(config())
    holder = nn.ModuleDict({"experts": experts})
    stack = Stack(list(experts))
    holder.__dict__["stack"] = stack
    other = copy.deepcopy(holder)
    assert other.stack._linears[0][0] is other["experts"][0].gate_proj
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.zero_()
        assert other.stack(*routed()).abs().sum() > 0
        assert not stack(*routed()).any()


def test_frozen_weights_are_not_stacked_anew() -> None:
    experts = experts_of(config()).requires_grad_(requires_grad=False)
    hidden, ids, weights = routed()
    stack = Stack(list(experts))
    out = stack(hidden.requires_grad_(), ids, weights)
    out.sum().backward()
    assert hidden.grad is not None
    assert not stack._wants_gradients()
