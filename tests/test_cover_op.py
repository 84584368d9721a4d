"""dmoe::cover against its reference, and against the smallest coreset there is.

N: blocks; L: tokens of a block; E, k: experts, experts a token
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from dmoe_compile.kernels.cover import cover, greedy, launch, reference
from hypothesis import given
from torch import Tensor

Block = tuple[Tensor, Tensor, Tensor, int]  # ids, weights, voting, E


@st.composite
def blocks(draw: st.DrawFn, most_experts: int = 20) -> Block:
    """Weights of random routers: flat, peaked, or with a few experts that everybody wants."""
    num_experts, tokens = draw(st.integers(2, most_experts)), draw(st.integers(1, 10))
    top_k = draw(st.integers(1, min(6, num_experts)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread, popularity = draw(st.sampled_from([0.1, 1.0, 5.0])), draw(st.sampled_from([0.0, 1.0, 4.0]))
    logits = spread * torch.randn(2, tokens, num_experts, generator=generator)
    logits += popularity * torch.randn(num_experts, generator=generator)
    weights, ids = logits.softmax(-1).topk(top_k)
    voting = torch.rand(2, tokens, generator=generator) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    return ids, weights, voting, num_experts


MASS = st.floats(0.05, 1.0)


def kept(block: Block, inside: Tensor) -> Tensor:
    """Return the share of its routing weight that each token keeps, [N, L]; 1 for those that don't vote."""
    ids, weights, voting, _ = block
    served = torch.where(inside.unsqueeze(1).expand(*ids.shape[:2], -1).gather(-1, ids), weights, 0)
    return torch.where(voting, served.double().sum(-1) / weights.double().sum(-1), 1.0)


@pytest.mark.parametrize("implementation", [launch, greedy])
@given(block=blocks(), mass=MASS, most=st.integers(1, 20))
def test_is_the_greedy_rule(implementation: Callable[..., Tensor], block: Block, mass: float, most: int) -> None:
    inside = implementation(*block, mass, most)
    assert torch.equal(inside, reference(*block, mass, most))
    assert (inside.sum(-1) <= most).all()


@given(blocks(), MASS)
def test_every_token_keeps_what_is_promised(block: Block, mass: float) -> None:
    assert (kept(block, launch(*block, mass, block[-1])) >= mass * (1 - 2e-6)).all()


@given(blocks(), MASS, MASS)
def test_a_larger_promise_keeps_more(block: Block, one: float, other: float) -> None:
    less, more = (launch(*block, mass, block[-1]) for mass in sorted((one, other)))
    assert (kept(block, more).amin(-1) >= min(one, other) * (1 - 2e-6)).all()
    assert (less.sum(-1) <= block[-1]).all()


def smallest(block: Block, mass: float) -> list[int]:
    """Return the size of the smallest coreset that keeps every promise, by trying all."""
    ids, _, _, num_experts = block
    sizes = [num_experts] * len(ids)
    for members in itertools.product([False, True], repeat=num_experts):
        inside = torch.tensor([members] * len(ids))
        enough = (kept(block, inside) >= mass * (1 - 1e-6)).all(-1).tolist()
        sizes = [min(size, sum(members)) if done else size for size, done in zip(sizes, enough, strict=True)]
    return sizes


@given(blocks(most_experts=7), MASS)
def test_is_within_the_guarantee(block: Block, mass: float) -> None:
    inside = launch(*block, mass, block[-1])
    without_last = [launch(*block, mass, max(1, int(size) - 1)) for size in inside.sum(-1)]
    _, weights, voting, _ = block
    need = torch.where(voting, mass * weights.double().sum(-1), 0.0)
    for n, least in enumerate(smallest(block, mass)):
        size = int(inside[n].sum())
        assert size >= least
        if size > 1:
            served = torch.minimum(kept(block, without_last[n])[n] * weights[n].double().sum(-1), need[n])
            rest = (need[n] - torch.where(voting[n], served, 0.0)).sum().item()
            assert size <= 1 + least * math.log(need[n].sum().item() / rest) + 1e-6


def test_greedy_is_not_always_the_smallest() -> None:
    """Two experts serve all; greedy takes the popular third first."""
    ids = torch.tensor([[[0, 2], [0, 2], [1, 2], [1, 2]]])
    weights = torch.tensor([[[0.6, 0.4]] * 4])
    block = ids, weights, torch.ones(1, 4, dtype=torch.bool), 3
    assert smallest(block, 0.6) == [2]
    assert launch(*block, 0.6, 3).sum() == 3


def test_ties_go_to_the_expert_with_more_weight() -> None:
    """Either serves both tokens; the second has more of their weight."""
    ids, weights = torch.tensor([[[0, 1], [0, 1]]]), torch.tensor([[[0.4, 0.6]] * 2])
    inside = launch(ids, weights, torch.ones(1, 2, dtype=torch.bool), 2, 0.3, 2)
    assert inside.nonzero()[:, 1].tolist() == [1]


def test_other_ties_go_to_the_lower_expert() -> None:
    ids, weights = torch.tensor([[[3, 1]]]), torch.tensor([[[0.5, 0.5]]])
    inside = launch(ids, weights, torch.ones(1, 1, dtype=torch.bool), 5, 0.5, 5)
    assert inside.nonzero()[:, 1].tolist() == [1]


def test_operands_that_do_not_fit_are_refused() -> None:
    ids = torch.zeros(1, 2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got ids \[1, 2, 3\], weights \[1, 2, 2\]"):
        cover(ids, torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.bool), 4, 0.9, 4)


def test_an_id_that_is_no_expert_is_refused() -> None:
    ids = torch.tensor([[[0, 4]]])
    with pytest.raises(ValueError, match=r"an id is not in \[0, 4\); the largest is 4"):
        cover(ids, torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool), 4, 0.9, 4)


def test_as_an_operator() -> None:
    weights, ids = torch.rand(2, 4, 8).topk(3)
    args = ids, weights, torch.rand(2, 4) < 0.7, 8, 0.9, 8
    torch.library.opcheck(cover, args)
    before = [x.clone() for x in args[:3]]
    cover(*args)
    assert all(torch.equal(a, b) for a, b in zip(args[:3], before, strict=True))
