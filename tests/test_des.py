"""Both DES rules against plain-Python oracles, and their options."""

from __future__ import annotations

import pytest
import torch
from dmoe_compile.passes.des import Options, coreset
from torch import Tensor

E, K, L = 40, 8, 16


def block(tokens: int = L, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.rand(1, tokens, E, generator=torch.Generator().manual_seed(seed))
    return scores, scores.topk(K).indices, torch.ones(1, tokens, dtype=torch.bool)


def members(inside: Tensor) -> set[int]:
    (row,) = inside
    return set(row.nonzero().flatten().tolist())


def by_votes(scores: Tensor, ids: Tensor) -> list[int]:
    votes = [0.0] * E
    for row, chosen in zip(scores[0].tolist(), ids[0].tolist(), strict=True):
        for e in chosen:
            votes[e] += row[e]
    return sorted(range(E), key=lambda e: (-votes[e], e))


@pytest.mark.parametrize("keep", [1, 2, 4, 8])
def test_seq_is_the_union_of_every_tokens_best(keep: int) -> None:
    scores, ids, voting = block()
    union = {e for row in ids[0].tolist() for e in row[:keep]}
    assert len(union) > K
    assert members(coreset(scores, ids, voting, Options(keep=keep))) == union


def test_seq_may_keep_more_than_a_token_uses() -> None:
    scores, ids, voting = block(tokens=2)
    union = set(scores.topk(12).indices.flatten().tolist())
    assert members(coreset(scores, ids, voting, Options(keep=12))) == union


def test_seq_is_topped_up_by_votes() -> None:
    scores, ids, voting = block(tokens=3)
    union = [e for row in ids[0].tolist() for e in row[:1]]
    rest = [e for e in by_votes(scores, ids) if e not in union]
    assert len(set(union)) == 3
    assert members(coreset(scores, ids, voting, Options(keep=1))) == {*union, *rest[: K - 3]}


@pytest.mark.parametrize("size", [1, 8, 13, 36, 64])
def test_vote_takes_the_experts_with_most_votes(size: int) -> None:
    scores, ids, voting = block()
    wanted = by_votes(scores, ids)[: max(size, K)]
    assert members(coreset(scores, ids, voting, Options("vote", coreset_size=size))) == set(wanted)


def test_defaults_follow_the_models_k() -> None:
    scores, ids, voting = block()
    half = coreset(scores, ids, voting, Options(keep=4))
    assert torch.equal(coreset(scores, ids, voting, Options()), half)
    assert coreset(scores, ids, voting, Options("vote")).sum() == 4 * K + 4
    odd = scores.topk(3).indices
    assert torch.equal(coreset(scores, odd, voting, Options()), coreset(scores, odd, voting, Options(keep=2)))


def test_without_votes_the_lowest_experts_are_taken() -> None:
    scores, ids, voting = block()
    for options in (Options(), Options("vote", coreset_size=8)):
        assert members(coreset(scores, ids, ~voting, options)) == set(range(K))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "both"}, "des.variant='both' must be one of: seq, vote"),
        ({"keep": 0}, "des.keep=0 must be an integer of at least 1"),
        ({"keep": True}, "des.keep=True"),
        ({"coreset_size": 1.5}, "des.coreset_size=1.5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)  # type: ignore[arg-type]
