"""The dMoE rule against a plain-Python oracle.

L: tokens of a block; E, k: experts, experts per token.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from dmoe_compile.passes.dmoe import Options, coreset
from dmoe_compile.passes.votes import count_votes
from hypothesis import given
from torch import Tensor

from dmoe_oracle import members, oracle, oracle_votes


@st.composite
def blocks(draw: st.DrawFn, low: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores [1, L, E] in steps of 1/64, which float32 sums exactly; ids [1, L, k]; voting [1, L]."""
    num_experts = draw(st.integers(2, 13))
    tokens, top_k = draw(st.integers(1, 7)), draw(st.integers(1, min(5, num_experts)))
    score = st.integers(low, 127).map(lambda n: n / 64)
    rows = draw(st.lists(st.lists(score, min_size=num_experts, max_size=num_experts), min_size=tokens, max_size=tokens))
    voting = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    ids = [sorted(range(num_experts), key=lambda e, row=row: (-row[e], e))[:top_k] for row in rows]
    return torch.tensor([rows]), torch.tensor([ids]), torch.tensor([voting])


OPTIONS = st.builds(Options, st.floats(0.01, 1), st.integers(1, 4) | st.integers(1, 20))


@given(blocks(), OPTIONS)
def test_coreset_is_the_shortest_prefix(block: tuple[Tensor, Tensor, Tensor], options: Options) -> None:
    votes = oracle_votes(*block)
    assert count_votes(*block)[0].tolist() == votes
    assert members(coreset(*block, options)) == [oracle(votes, block[1].shape[-1], options)]


@given(blocks(low=-128), OPTIONS)
def test_coreset_of_negative_scores(block: tuple[Tensor, Tensor, Tensor], options: Options) -> None:
    votes = oracle_votes(*block)
    assert count_votes(*block)[0].tolist() == votes
    assert min(votes) >= 0
    assert members(coreset(*block, options)) == [oracle(votes, block[1].shape[-1], options)]


@given(blocks(low=-128), OPTIONS)
def test_tokens_that_do_not_vote_change_nothing(block: tuple[Tensor, Tensor, Tensor], options: Options) -> None:
    scores, ids, voting = block
    kept = coreset(*block, options), count_votes(*block)
    silent = ~voting[0]
    for garbage in (torch.nan, torch.inf, -torch.inf, 1e30):
        changed = scores.clone()
        changed[0, silent] = garbage
        other_ids = ids.clone()
        other_ids[0, silent] = torch.arange(ids.shape[-1])
        assert torch.equal(coreset(changed, other_ids, voting, options), kept[0])
        assert torch.equal(count_votes(changed, other_ids, voting), kept[1])
    without = [x[:, voting[0]] for x in block]
    if voting.any():
        assert torch.equal(coreset(*without, options), kept[0])


def test_blocks_are_chosen_one_by_one() -> None:
    block = torch.rand(5, 8, 11), torch.rand(5, 8, 11).topk(3).indices, torch.rand(5, 8) < 0.7
    alone = [coreset(*(x[n : n + 1] for x in block), Options(0.5, 1)) for n in range(5)]
    assert torch.equal(coreset(*block, Options(0.5, 1)), torch.cat(alone))
    assert len({tuple(map(int, row)) for row in torch.cat(alone)}) > 1


# Every expert e is voted for with votes[e]: token e has one choice, e, so votes are as given, exactly.
@pytest.mark.parametrize(
    ("votes", "options", "expected"),
    [
        ([4, 2, 1, 1], Options(0.4, 1), {0}),
        ([4, 2, 1, 1], Options(0.5, 1), {0, 1}),  # 4/8 does not exceed 0.5
        ([4, 2, 1, 1], Options(0.75, 1), {0, 1, 2}),  # 6/8 does not exceed 0.75; of the two 1s, the lower index
        ([1, 1, 2, 4], Options(0.75, 1), {3, 2, 0}),
        ([1, 1, 1, 1], Options(0.1, 1), {0}),
        ([1, 1, 1, 1], Options(0.1, 3), {0, 1, 2}),
        ([0, 0, 3, 0], Options(0.1, 3), {2, 0, 1}),  # topped up past the votes, lower index first
        ([4, 2, 1, 1], Options(0.1, 9), {0, 1, 2, 3}),
        ([4, 2, 1, 0], Options(0.999, 1), {0, 1, 2}),
        ([4, 2, 1, 0], Options(1.0, 1), {0, 1, 2, 3}),  # 1 is never exceeded
        ([4, 2, 1, 0], Options(1, 1), {0, 1, 2, 3}),
        ([3, 2, 1, 5, 4], Options(0.6, 1), {3, 4, 0}),  # five experts: nothing wants a power of two
    ],
)
def test_prefix_by_hand(votes: list[int], options: Options, expected: set[int]) -> None:
    scores = torch.diag(torch.tensor(votes, dtype=torch.float32)).unsqueeze(0)
    ids = torch.arange(len(votes)).view(1, -1, 1)
    assert members(coreset(scores, ids, torch.ones(1, len(votes), dtype=torch.bool), options)) == [expected]


def test_coreset_never_holds_fewer_than_k() -> None:
    scores = torch.tensor([[[8.0, 1, 1, 1, 0, 0]]])
    ids = torch.tensor([[[0, 1, 2, 3]]])
    assert members(coreset(scores, ids, torch.ones(1, 1, dtype=torch.bool), Options(0.1, 1))) == [{0, 1, 2, 3}]


def test_negative_votes_by_hand() -> None:
    """As released, expert 1's vote of -1 would put it behind experts 2 and 3, which nobody asked for."""
    scores = torch.tensor([[[4.0, -1, -2, -3], [3, -1, -2, -3]]])
    ids = torch.tensor([[[0, 1], [0, 1]]])
    votes = count_votes(scores, ids, torch.ones(1, 2, dtype=torch.bool))
    assert votes.tolist() == [[9, 0, 0, 0]]
    scores = torch.tensor([[[4.0, -1, -2, -3], [-3, -2, 4, -1]]])
    ids = torch.tensor([[[0, 1, 2], [2, 3, 1]]])
    votes = count_votes(scores, ids, torch.ones(1, 2, dtype=torch.bool))
    assert votes.tolist() == [[6, 1, 6, 1]]


def test_a_block_without_votes_keeps_all() -> None:
    """No prefix of nothing exceeds top_p; its share is 0, not NaN. Only padding, or k = 1 below zero, comes to this."""
    silent = torch.rand(1, 3, 5), torch.zeros(1, 3, 2).long(), torch.zeros(1, 3, dtype=torch.bool)
    below_zero = -torch.rand(1, 3, 5), torch.zeros(1, 3, 1).long(), torch.ones(1, 3, dtype=torch.bool)
    for block in (silent, below_zero):
        assert coreset(*block, Options(0.3, 1)).all()


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 4, 7), (200, 8, 100)])  # in some of 200, shares add up to over 1
def test_all_experts_keeps_all(shape: tuple[int, ...]) -> None:
    scores = torch.rand(shape)
    args = scores, scores.topk(2).indices, torch.ones(shape[:2], dtype=torch.bool)
    assert coreset(*args, Options(0.1, 1).all_experts()).all()
    assert coreset(*args, Options(1.0, 1)).all()


@pytest.mark.parametrize("options", [{"top_p": 0}, {"top_p": -0.1}, {"top_p": 1.5}, {"min_experts": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    (name, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"dmoe.{name}={value}"):
        Options(**options)
