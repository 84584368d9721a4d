"""Blocks against a loop over tokens; who votes and who is routed; that no block leaves its coreset.

B, S: sequences, tokens per sequence; L: tokens of a block; N: blocks; E, k: experts, experts per token; T = B*S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from dmoe_compile.passes.coreset import Blocks, choose, penalise, restrict, restrict_groups, unroute
from dmoe_compile.passes.dmoe import Options, coreset
from dmoe_compile.passes.layouts import voting_tokens
from hypothesis import given
from torch import Tensor

E, K = 12, 3
TIGHT = Options(0.3, 1)
LAYOUTS = {
    "one block": (1, 8, 8),
    "even": (2, 12, 4),
    "ragged": (2, 11, 4),
    "a tail of one": (1, 9, 4),
    "shorter than a block": (3, 3, 8),
    "one token": (2, 1, 4),
    "blocks of one": (2, 3, 1),
}


def _masks(batch: int, seq: int) -> dict[str, Tensor | None]:
    """Padding of every kind, more of it in each row."""
    position, width = torch.arange(seq).expand(batch, seq), torch.arange(batch).unsqueeze(1) + 1
    random = torch.rand(batch, seq) < 0.6
    random[:, seq // 2] = True
    return {
        "no mask": None,
        "no padding": position >= 0,
        "padded left": (position >= width) | (position == seq - 1),
        "padded right": (position < seq - width) | (position == 0),
        "padded in the middle": (position != seq // 2) | (seq == 1),
        "anywhere": random,
    }


def _block_numbers(layout: Blocks) -> list[list[int]]:
    """Return, for each row, the block of each token, counted over all rows; a loop, so that it can be read."""
    numbers = []
    for row in range(layout.batch):
        votes = [True] * layout.seq if layout.voting is None else layout.voting[row].tolist()
        start = votes.index(True)
        in_row = [max(0, position - start) // layout.length for position in range(layout.seq)]
        numbers.append([row * layout.count + block for block in in_row])
    return numbers


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def sizes(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.fixture(params=_masks(1, 1))
def layout(request: pytest.FixtureRequest, sizes: tuple[int, int, int]) -> Blocks:
    batch, seq, length = sizes
    return Blocks(batch, seq, length, _masks(batch, seq)[request.param])


@pytest.fixture(params=[name for name, mask in _masks(1, 1).items() if mask is not None])
def padded(request: pytest.FixtureRequest, sizes: tuple[int, int, int]) -> tuple[Blocks, Tensor]:
    """A layout with padding, and its tokens that vote, [T] bool."""
    batch, seq, length = sizes
    mask = _masks(batch, seq)[request.param]
    assert mask is not None
    return Blocks(batch, seq, length, mask), mask.reshape(-1)


def test_blocks_hold_the_tokens_that_a_loop_puts_there(layout: Blocks) -> None:
    tokens = torch.arange(1, layout.batch * layout.seq + 1).unsqueeze(-1)  # each token's number, from 1
    split, voting = layout.split(tokens)
    assert split.shape == (layout.batch * layout.count, layout.tokens, 1)
    expected: list[list[int]] = [[] for _ in split]
    for row, numbers in enumerate(_block_numbers(layout)):
        for position, block in enumerate(numbers):
            if layout.voting is None or layout.voting[row, position]:
                expected[block].append(row * layout.seq + position + 1)
    voters = [
        [int(t) for t, votes in zip(*pair, strict=True) if votes] for pair in zip(split[..., 0], voting, strict=True)
    ]
    assert voters == expected


def test_spread_gives_each_token_what_its_block_has(layout: Blocks) -> None:
    blocks = torch.arange(layout.batch * layout.count).unsqueeze(-1).expand(-1, 2)
    spread = layout.spread(blocks)
    assert spread.shape == (layout.batch * layout.seq, 2)
    assert spread[:, 0].view(layout.batch, layout.seq).tolist() == _block_numbers(layout)


def test_silent_tokens_stay_in_their_block_and_do_not_vote(layout: Blocks) -> None:
    tokens, silent = torch.arange(layout.batch * layout.seq).unsqueeze(-1), torch.rand(layout.batch, layout.seq) < 0.5
    for whole in (False, True):
        plain = replace(layout, whole=whole)
        split, voting = plain.split(tokens)
        same, heard = replace(plain, silent=silent).split(tokens)
        assert torch.equal(same, split)
        assert torch.equal(heard, voting & ~silent.view(-1)[split.squeeze(-1)])


def test_blocks_of_symbolic_length_are_the_same(sizes: tuple[int, int, int]) -> None:
    """A layout that is not even takes the way that symbolic sizes take: it must agree where both can be taken."""
    batch, seq, length = sizes
    plain, masked = Blocks(batch, seq, length), Blocks(batch, seq, length, torch.ones(batch, seq, dtype=torch.bool))
    scores = torch.rand(batch * seq, E)
    assert torch.equal(_inside(scores, plain), _inside(scores, masked))


def test_blocks_never_cross_rows() -> None:
    """Two rows of one half-full block each: what the other row holds must not matter."""
    scores = torch.rand(2, 6, E)
    alone = [_inside(row, Blocks(1, 6, 8)) for row in scores]
    assert torch.equal(_inside(scores.view(12, E), Blocks(2, 6, 8)), torch.cat(alone))
    assert not torch.equal(*alone)


def test_a_whole_forward_is_one_block(layout: Blocks) -> None:
    """scope="batch": whatever the rows and blocks, all tokens share what one row of all voting tokens would have."""
    scores = torch.rand(layout.batch * layout.seq, E)
    whole = Blocks(layout.batch, layout.seq, layout.length, layout.voting, whole=True)
    voting = torch.ones(len(scores), dtype=torch.bool) if layout.voting is None else layout.voting.view(-1)
    row = scores[voting]
    (expected,) = _inside(row, Blocks(1, len(row), len(row))).unique(dim=0)
    inside = _inside(scores, whole)
    assert torch.equal(inside, expected.expand_as(inside))


# Who votes.


def test_padding_never_votes(padded: tuple[Blocks, Tensor]) -> None:
    layout, voting = padded
    scores = torch.rand(len(voting), E)
    ids, inside = _route(scores, layout, None)
    for garbage in (torch.nan, torch.inf, 1e30):
        other_ids, other = _route(torch.where(voting.unsqueeze(1), scores, garbage), layout, None)
        assert torch.equal(other, inside)
        assert torch.equal(other_ids, ids)


def test_tokens_with_scores_or_weights_that_are_no_numbers_do_not_vote() -> None:
    """A router may make weights of 0 / 0 from scores that are numbers."""
    scores = torch.rand(8, E)
    weights, ids = scores.topk(K)
    weights[5, 1], scores[2, ids[2, 0]] = torch.nan, torch.inf
    heard = []

    def rule(scores: Tensor, ids: Tensor, voting: Tensor, weights: Tensor) -> Tensor:
        heard.append(voting)
        return torch.ones(1, E, dtype=torch.bool)

    choose(scores, Blocks(1, 8, 8), K, rule, (ids, weights))
    assert heard[0].tolist() == [[token not in (2, 5) for token in range(8)]]


def test_a_row_is_routed_the_same_wherever_its_padding_stands() -> None:
    row = torch.rand(10, E)
    inside = _inside(row, Blocks(1, 10, 4))
    for left, right in ((3, 0), (0, 3), (5, 2)):
        padded = torch.cat([torch.rand(left, E), row, torch.rand(right, E)])
        voting = torch.tensor([[False] * left + [True] * 10 + [False] * right])
        assert torch.equal(_inside(padded, Blocks(1, len(padded), 4, voting))[left : left + 10], inside)


def _inside(scores: Tensor, layout: Blocks, options: Options = TIGHT) -> Tensor:
    """Return the experts [T, E] that each token may use under the dMoE rule."""
    return choose(scores, layout, K, partial(coreset, options=options))


def _route(
    scores: Tensor, layout: Blocks, router: Callable[[Tensor], Tensor] | None, options: Options = TIGHT
) -> tuple[Tensor, Tensor]:
    """Return the ids [T, K] that a router with or without a group mask chooses, and what was inside its coresets."""
    inside = _inside(scores, layout, options)
    if router is None:
        ranked = restrict(scores, inside)
    else:
        lowered = penalise(scores, inside)
        ranked = restrict_groups(router(lowered), lowered, inside, K)
    if layout.voting is not None:
        ranked = unroute(ranked, layout.voting.view(-1), K)
    return ranked.topk(K).indices, inside


def _group_mask(scores: Tensor, fill: float = -torch.inf, kept: int = 2, count: int = 4) -> Tensor:
    """Keep the `kept` of `count` groups whose best two scores sum highest, as DeepSeek-V3 and LLaDA2 do."""
    grouped = scores.view(len(scores), count, -1)
    best = grouped.topk(2).values.sum(-1).topk(kept).indices
    mask = torch.zeros(len(scores), count).scatter(1, best, 1).bool()
    return scores.masked_fill(~mask.unsqueeze(-1).expand_as(grouped).reshape(scores.shape), fill)


ROUTERS = {"no groups": None, "groups": _group_mask, "one group": partial(_group_mask, kept=1)}


@pytest.mark.parametrize("offset", [0, -1], ids=["positive scores", "negative scores"])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_padding_activates_no_expert_of_its_own(
    padded: tuple[Blocks, Tensor], router: Callable[[Tensor], Tensor] | None, offset: int
) -> None:
    layout, voting = padded
    for top_p in (0.3, 0.6, 0.9, 1.0) * 3:
        scores = torch.rand(len(voting), E) + offset
        ids, inside = _route(scores, layout, router, Options(top_p, 1))
        routed = set(ids[voting].flatten().tolist())
        assert set(ids[~voting].flatten().tolist()) <= routed
        assert inside[voting].gather(1, ids[voting]).all()


# What the selection ranks.


def test_inside_even_minus_infinity_beats_outside() -> None:
    scores = torch.tensor([[5.0, -torch.inf, 4, -torch.inf, -torch.inf, 3]])
    inside = torch.tensor([[False, True, False, False, True, True]])
    ranked = restrict(scores, inside)
    assert set(ranked.topk(3).indices[0].tolist()) == {1, 4, 5}
    assert ranked[~inside].eq(-torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restrict_keeps_scores_and_dtype(dtype: torch.dtype) -> None:
    scores = torch.randn(7, E, dtype=dtype)
    inside = torch.rand(7, E) < 0.5
    ranked = restrict(scores, inside)
    assert ranked.dtype == dtype
    assert torch.equal(ranked[inside], scores[inside])


def test_groups_are_ranked_by_their_experts_in_the_coreset() -> None:
    """With -inf outside, both groups with one expert would be equal; with the penalty the better one wins."""
    scores = torch.tensor([[9.0, 0.1, 9, 0.2, 9, 9]])
    inside = torch.tensor([[False, True, False, True, False, False]])
    lowered = penalise(scores, inside).view(1, 3, 2)
    assert lowered.topk(2).values.sum(-1).argmax() == 1


@given(st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6), st.integers(0, 63))
def test_two_experts_in_the_coreset_beat_one(scores: list[float], members: int) -> None:
    row = torch.tensor([scores])
    inside = torch.tensor([[bool(members >> e & 1) for e in range(6)]])
    lowered = penalise(row, inside)
    assert torch.equal(lowered[inside], row[inside])
    sums = lowered.view(3, 2).sum(-1).tolist()
    held = inside.view(3, 2).sum(-1).tolist()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        if held[a] != held[b]:
            assert (sums[a] > sums[b]) == (held[a] > held[b])


@given(
    seed=st.integers(0, 2**32 - 1),
    kept=st.integers(1, 3),
    size=st.integers(2, 5),
    fill=st.sampled_from([-torch.inf, 0.0]),
    low=st.sampled_from([0.0, -1.0]),
    share=st.floats(0, 1),
)
def test_no_token_of_a_group_limited_router_leaves_the_coreset(
    seed: int, kept: int, size: int, fill: float, low: float, share: float
) -> None:
    """Also where its groups starve: then its experts there stay, and the rest are the best of the coreset elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    num_experts, tokens = 4 * size, 16
    scores = torch.rand(tokens, num_experts, generator=generator) * (1 - low) + low
    members = torch.rand(num_experts, generator=generator) < share
    members[torch.randperm(num_experts, generator=generator)[:K]] = True
    inside = members.expand_as(scores)
    lowered = penalise(scores, inside)
    masked = _group_mask(lowered, fill, kept)
    in_groups = (_group_mask(lowered, torch.nan, kept) == lowered) & inside
    ids = restrict_groups(masked, lowered, inside, K).topk(K).indices
    assert inside.gather(1, ids).all()
    for row, chosen in enumerate(ids.tolist()):
        own = [e for e in range(num_experts) if in_groups[row, e]]
        others = [e for e in range(num_experts) if inside[row, e] and e not in own]
        others.sort(key=lambda e: -scores[row, e].item())
        if len(own) < K:
            assert set(chosen) == {*own, *others[: K - len(own)]}
        elif fill != 0.0:  # with 0 as fill the model itself may prefer a masked expert to a negative score
            own.sort(key=lambda e: -scores[row, e].item())
            assert set(chosen) == set(own[:K])


@pytest.mark.parametrize("fill", [-torch.inf, 0.0])
@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_experts_inside_the_choice_is_the_models_own(dtype: torch.dtype, low: float, fill: float) -> None:
    scores = (torch.rand(200, E) * (1 - low) + low).to(dtype)
    everything = torch.ones_like(scores, dtype=torch.bool)
    own = _group_mask(scores, fill)
    lowered = penalise(scores, everything)
    assert torch.equal(lowered, scores)
    ours = restrict_groups(own, lowered, everything, K)
    for theirs, chosen in zip(own.topk(K), ours.topk(K), strict=True):
        assert torch.equal(theirs, chosen)
    kept = own > -torch.inf
    assert torch.equal(ours[kept], own[kept])
    for theirs, chosen in zip(scores.topk(K), restrict(scores, everything).topk(K), strict=True):
        assert torch.equal(theirs, chosen)


def test_nan_stays_in_its_block() -> None:
    layout = Blocks(2, 10, 4)
    scores = torch.rand(20, E)
    clean, _ = _route(scores, layout, None)
    grouped, _ = _route(scores, layout, _group_mask)
    broken = scores.clone()
    broken[5, 3] = torch.nan  # the second block of the first row: tokens 4 to 7
    elsewhere = (torch.arange(20) < 4) | (torch.arange(20) > 7)
    assert torch.equal(_route(broken, layout, None)[0][elsewhere], clean[elsewhere])
    assert torch.equal(_route(broken, layout, _group_mask)[0][elsewhere], grouped[elsewhere])


# A mask as it comes, and what it says of a forward's tokens.


def test_voting_tokens_are_the_last_of_a_longer_mask() -> None:
    """The mask of a forward with a KV cache covers what is cached too."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    assert voting_tokens(3, mask).tolist() == [[True, True, True], [True, True, False]]
    assert voting_tokens(6, mask).tolist() == mask.bool().tolist()
    assert voting_tokens(6, mask.float()).tolist() == mask.bool().tolist()


def test_a_row_without_a_token_is_taken_as_all_tokens() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert voting_tokens(2, mask).tolist() == [[True, True], [True, False]]
