"""dmoe::route where scores tie, are NaN or infinite, or add up to a bound: interpreted, against the eager rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from route_rules import METHODS, Case, check, distinct, expected, inside_of, run


@pytest.mark.parametrize("method", [m for m in METHODS if m != "seq, more than k"])  # whose rule has a torch.topk
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_a_tie_goes_to_the_lower_expert(levels: int, method: str) -> None:
    case = Case(top_k=4, score="logits", weighting="softmax", seq=17).named(method)
    if method == "dmoe":  # shares of equal votes add up to this one only within rounding
        case = replace(case, p=0.6137)
    check(case, torch.randint(levels, (17, 24)).float(), ties=True)


def test_a_tie_of_groups_goes_to_the_lower_group() -> None:
    case = Case(top_k=4, score="logits", groups=6, top_groups=2, group_score="top2", method="own", seq=1)
    assert run(case, torch.ones(1, 24))[0].tolist() == [[0, 1, 2, 3]]
    logits = torch.ones(1, 24).index_fill(1, torch.tensor([9, 21, 22]), 2)  # sums 2 2 3 2 2 4
    assert run(case, logits)[0].tolist() == [[9, 21, 22, 8]]


def test_both_zeros_are_equal() -> None:
    case = Case(top_k=3, score="logits", method="own", seq=1, weighting="scores")
    logits, bias = torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0]]), torch.full((5,), -0.0)  # without a bias, 0 is added
    assert run(case, logits, bias)[0].tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "logits"])
@pytest.mark.parametrize("method", ["own", "dmoe, small", "seq", "vote"])
def test_a_token_that_can_not_be_counted(method: str, score: str, bad: float) -> None:
    """It is routed, NaN first, but does not vote: the rest of its block is as it is without it."""
    case = Case(score=score, weighting="scores", seq=12, block_length=6).named(method)
    logits = distinct(case, 24)
    bias = 3 * torch.rand(24) if score == "sigmoid" else None
    logits[5, 3] = bad
    logits[10] = bad
    check(case, logits, bias, ties=True)


def test_nan_and_groups() -> None:
    """A token with NaN in a group-limited router still chooses different experts inside its coreset."""
    case = Case(score="sigmoid", groups=4, top_groups=2, group_score="top2", weighting="scores", seq=12, p=0.3)
    logits = distinct(case, 24)
    logits[5, 3] = torch.nan
    ids, *_ = run(case, logits)
    inside = inside_of(case, logits.sigmoid(), torch.zeros(1, 12, dtype=torch.int8), ties=False)
    assert inside.gather(1, ids).all()
    assert len(set(ids[5].tolist())) == case.top_k
    others = torch.arange(12) != 5
    assert torch.equal(ids[others], expected(case, logits)[0][others])


def test_a_share_of_exactly_top_p_is_not_exceeded() -> None:
    """Four experts with a quarter of the votes each: two of them hold 0.5, a third makes the share exceed it."""
    case = Case(top_k=2, score="logits", weighting="scores", p=0.5, size=1, seq=2)
    logits = torch.tensor([[1.0, 1, 0, 0, -1], [0, 0, 1, 1, -1]])
    ids, *_ = check(case, logits, ties=True)
    assert ids.tolist() == [[0, 1], [2, 0]]


def test_all_shares_keep_every_expert() -> None:
    """These six add up to 1.0000001 in fp32; the second token does not vote, and wants the experts without votes."""
    case = Case(top_k=6, score="logits", weighting="scores", p=1.0, size=1, seq=2)
    logits = torch.full((2, 12), -1.0)
    logits[0, :6] = torch.tensor([37.0, 18, 8, 15, 32, 16])
    logits[1, 6:] = torch.tensor([torch.inf, 5, 4, 3, 2, 1])
    assert check(case, logits)[0][1].tolist() == [6, 7, 8, 9, 10, 11]


def test_a_block_in_which_nobody_votes() -> None:
    for method in METHODS:
        case = Case(seq=4, score="sigmoid", weighting="scores").named(method)
        check(case, torch.full((4, 24), torch.nan), ties=True)


def test_weights_that_vanish_are_zero() -> None:
    """exp(-200) is 0 in fp32; 0 / 0 would be NaN."""
    case = Case(top_k=2, score="sigmoid", method="own", seq=1)
    assert run(case, torch.full((1, 4), -200.0))[1].tolist() == [[0.0, 0.0]]
