"""What a comparison puts back, how far it lets results be apart, and what it sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dmoe_compile.verify import (
    State,
    at_rest,
    distance,
    fill_randomly,
    hidden_states,
    is_telling,
    random_weights,
    routed_rows,
    tolerance,
)


class Busy(nn.Module):
    """Changes whatever a forward can change."""

    total: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout()
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))
        self.calls, self.plain = 0, torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.sum(0)  # in place
        self.last = x[0]  # another tensor
        self.calls += 1
        self.plain.add_(1)
        self.new = x
        return self.drop(self.linear(x) + torch.rand(()))


def test_everything_is_put_back() -> None:
    module = Busy().train()
    module.drop.eval()
    last, plain, rng = module.last, module.plain, torch.get_rng_state()
    names = set(vars(module))
    with at_rest(module) as state:
        assert not module.training
        assert not torch.is_grad_enabled()
        module(torch.ones(2, 4))
        assert set(state.changed()) == {"total", "last", "calls", "plain", "new"}
    assert module.training
    assert not module.drop.training
    assert set(vars(module)) == names
    assert module.last is last
    assert module.plain is plain
    assert (module.calls, module.total.sum(), module.plain.sum()) == (0, 0, 0)
    assert torch.equal(torch.get_rng_state(), rng)


def test_put_back_after_an_error_too() -> None:
    module = Busy()
    with pytest.raises(RuntimeError), at_rest(module):
        module(torch.ones(2, 5))
    assert module.total.sum() == 0


def test_train_is_not_called() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("merges its weights")

    module = Merging(2, 2)
    with at_rest(module):
        assert not module.training
    assert module.training


def test_a_state_knows_what_has_not_changed() -> None:
    module = Busy()
    state = State(module)
    assert state.changed() == {}
    module.total += 0
    assert state.changed() == {}


def test_weights_are_random_for_a_while() -> None:
    weights = [torch.zeros(3, 4), torch.zeros(2, 3, 4), torch.ones(4), torch.tensor(2.0), torch.tensor([1, 2])]
    before = [weight.clone() for weight in weights]
    with random_weights(weights):
        for weight, was in zip(weights[:-1], before[:-1], strict=True):
            assert (weight != was).all()
        assert torch.equal(weights[-1], before[-1])
        assert not torch.equal(weights[1][0], weights[1][1])  # experts differ
    for weight, was in zip(weights, before, strict=True):
        assert torch.equal(weight, was)


def test_random_weights_are_of_a_usual_size() -> None:
    for weight in (torch.empty(64, 256), torch.empty(8, 64, 256)):
        fill_randomly(weight)
        assert 0.5 < (weight @ torch.randn(256, 100)).std() < 3


def test_inputs_are_of_every_kind() -> None:
    short, one, alike, large, many = hidden_states(torch.empty(0, dtype=torch.bfloat16), 16)
    assert {each.dtype for each in (short, one, alike, large, many)} == {torch.bfloat16}
    assert one.shape == (1, 1, 16)
    assert (alike == alike[:, :1]).all()
    assert large.abs().max() > 20 * short.abs().max()
    assert many.shape[1] >= 512


def test_routed_inputs_use_every_expert_and_only_two() -> None:
    in_turn, on_two, _ = routed_rows(torch.empty(0), 16, 12)
    assert set(in_turn[1].flatten().tolist()) == set(range(12))
    assert set(on_two[1].flatten().tolist()) == {0, 1}
    assert (in_turn[1][:, 0] != in_turn[1][:, 1]).all()


A = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))


def one_row_off(by: float) -> Tensor:
    off = A.clone()
    off[5] *= 1 + by
    return off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_let_through(dtype: torch.dtype) -> None:
    noise = 1 + torch.finfo(dtype).eps / 2 * (2 * torch.rand_like(A) - 1)  # each off by at most half an eps
    assert distance((A * noise).to(dtype), A.to(dtype)) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [A * 1.02, one_row_off(0.2), A.roll(1, 0), -A, torch.zeros_like(A), A * torch.nan])
def test_anything_else_is_not(wrong: Tensor, dtype: torch.dtype) -> None:
    assert not distance(wrong.to(dtype), A.to(dtype)) <= tolerance(dtype)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ((A, A), A),
        (A[:3], A),
        (A.double(), A),
        ((A, None), (A, A)),
        ((A, 1), (A, 2)),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (A.masked_fill(A > 2, torch.inf), A),
        ({"out": A}, {"other": A}),
    ],
)
def test_results_that_differ_in_kind_are_infinitely_far_apart(result: object, expected: object) -> None:
    assert distance(result, expected) == float("inf")


def test_infinities_in_the_same_places_are_no_difference() -> None:
    one = A.masked_fill(A > 2, torch.inf)
    assert distance(one, one.clone()) == 0


def test_what_tells_nothing() -> None:
    assert is_telling((A, None))
    assert not is_telling(torch.zeros(3))
    assert not is_telling((A, torch.tensor([torch.nan])))
    assert not is_telling(None)
