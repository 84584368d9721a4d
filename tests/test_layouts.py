"""Where B and S of a site are read, and which tokens are padding.

B, S: sequences, tokens per sequence; L: tokens of a block; T = B*S; E, k: experts, experts per token; H: model width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dmoe_compile.passes.layouts import Layout
from dmoe_compile.passes.nodes import shape
from torch import Tensor, nn

import zoo
from constrained import GROUPS, TIGHT, E, H, K, L, assert_same, coresets, run, tight_block
from reference_model import Experts, Rewriting

pytestmark = pytest.mark.usefixtures("without_gradients")


# Where B and S are read.


class _Behind(nn.Module):
    """A block whose tokens were flattened, normalised and reshaped some steps before the router."""

    def __init__(self) -> None:
        super().__init__()
        self.block = tight_block()

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        flat = flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + 1e-6)
        ids, weights, _ = self.block.gate(flat)
        return self.block.experts(flat, ids, weights).view(hidden.shape)


class _RankThree(nn.Module):
    """A router that never flattens its tokens: scores [B, S, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = Experts(E, H, 2)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(hidden).softmax(-1).topk(K)
        flat = hidden.view(-1, H)
        return self.experts(flat, ids.view(-1, K), weights.view(-1, K)).view(hidden.shape), ids


class _ByEinsum(nn.Module):
    """A router whose einsum merges the rows to one for its product."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = Experts(E, H, 2)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("bsh,eh->bse", hidden, self.router.weight)
        weights, ids = logits.view(-1, E).softmax(-1).topk(K)
        return self.experts(hidden.view(-1, H), ids, weights).view(hidden.shape), ids


@pytest.mark.parametrize("model", [tight_block, _Behind, _RankThree, _ByEinsum])
def test_finds_the_rows_behind_the_tokens(model: Any) -> None:
    _, rewriting = run(model(), torch.randn(2, 11, H))
    ((layout,),) = (findings.layouts for findings in rewriting.findings)
    (outcome,) = rewriting.outcomes
    assert layout.rows is not None
    assert (shape(layout.rows)[:2], layout.batch, layout.seq, layout.mask) == ((2, 11), 2, 11, None)
    assert (outcome.rewritten, outcome.reason, outcome.tokens_per_block) == (True, "", L)
    assert outcome.notes == ("no 2D attention_mask input: every token votes and blocks start at position 0",)
    inside = coresets(rewriting, 2)
    for block in inside.split(L, dim=1):  # 11 tokens: the last block has three
        assert torch.equal(block, block[:, :1].expand_as(block))
    assert (inside.sum(-1) < E).all()


def test_rank_three_routes_as_rank_two() -> None:
    model = _RankThree()
    hidden = torch.randn(2, 11, H)
    (_, ids), rewriting = run(model, hidden)
    flat = tight_block()
    flat.gate.weight.data.copy_(model.router.weight)
    scores = model.router(hidden).softmax(-1)
    constrained = scores.masked_fill(~coresets(rewriting, 2), -torch.inf)
    assert torch.equal(ids.sort(-1).values, constrained.topk(K).indices.sort(-1).values)


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = tight_block()

    def forward(self, tokens: Tensor) -> Tensor:
        ids, weights, _ = self.block.gate(tokens)
        return self.block.experts(tokens, ids, weights)


def test_without_rows_all_tokens_are_one_row_and_the_report_says_so() -> None:
    _, rewriting = run(_Flat(), torch.randn(22, H))
    ((layout,),) = (findings.layouts for findings in rewriting.findings)
    assert layout == Layout(None, 1, 22, None)
    (outcome,) = rewriting.outcomes
    assert outcome.rewritten
    assert outcome.notes == ("no [B, S] behind the router's tokens: blocks run over all of them as one row",)
    inside = coresets(rewriting, 1)
    for block in inside.split(L, dim=1):
        assert torch.equal(block, block[:, :1].expand_as(block))


def test_block_longer_than_the_rows_is_reported_as_it_is() -> None:
    _, rewriting = run(tight_block(), torch.randn(2, 3, H), block_length=32)
    assert rewriting.outcomes[0].tokens_per_block == 3


# Padding.


def _padded(seq: int = 10) -> tuple[Tensor, Tensor]:
    """Two rows, the second with three tokens of padding on the left."""
    mask = torch.ones(2, seq, dtype=torch.int64)
    mask[1, :3] = 0
    return torch.randn(2, seq, H), mask


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_padded_rows_are_routed_as_they_would_be_alone(groups: tuple[int, int]) -> None:
    block = tight_block(groups)
    hidden, mask = _padded()
    out, rewriting = run(block, hidden, mask)
    assert rewriting.findings[0].layouts[0].mask is not None
    assert rewriting.outcomes[0].notes == ()
    alone = [run(block, row[None])[0]["ids"][0] for row in (hidden[0], hidden[1, 3:])]
    assert torch.equal(out["ids"][0], alone[0])
    assert torch.equal(out["ids"][1, 3:], alone[1])
    assert set(out["ids"][1, :3].flatten().tolist()) <= set(out["ids"][mask.bool()].flatten().tolist())
    unmasked, _ = run(block, hidden)
    assert not torch.equal(unmasked["ids"][1, 3:], alone[1])


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_blocks_of_nothing_but_padding_activate_no_expert_of_their_own(groups: tuple[int, int]) -> None:
    hidden, mask = torch.randn(2, 30, H), torch.ones(2, 30, dtype=torch.int64)
    mask[:, 6:] = 0
    out, _ = run(tight_block(groups), hidden, mask)
    routed = set(out["ids"][mask.bool()].flatten().tolist())
    assert len(routed) < E
    assert set(out["ids"][~mask.bool()].flatten().tolist()) <= routed


def test_of_a_longer_mask_the_last_columns_count() -> None:
    block = tight_block()
    hidden, mask = _padded()
    short, _ = run(block, hidden, mask)
    cached = torch.cat([torch.zeros(2, 4, dtype=torch.int64), mask], 1)  # what was cached was padding, or so it says
    long, rewriting = run(block, hidden, cached)
    assert rewriting.findings[0].layouts[0].mask is not None
    assert_same(long, short)


def test_a_mask_row_of_zeros_means_all_tokens() -> None:
    block = tight_block()
    hidden, mask = _padded()
    mask[1] = 0
    out, _ = run(block, hidden, mask)
    every, _ = run(block, hidden)
    assert torch.equal(out["ids"], every["ids"])


class _ReadsMasks(nn.Module):
    """Reads its masks, so that they are inputs of the graph, but routes without them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = tight_block()

    def forward(
        self,
        hidden: Tensor,
        keep: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        masks = (keep, attention_mask, encoder_attention_mask, decoder_attention_mask)
        return self.block(hidden), [mask + 1 for mask in masks if mask is not None]


def _taken(hidden: Tensor, masks: dict[str, Tensor]) -> list[int] | None:
    """Return the shape of the mask that was taken for that of the tokens."""
    torch._dynamo.reset()
    rewriting = Rewriting(**TIGHT)
    torch.compile(_ReadsMasks(), backend=rewriting, fullgraph=True)(hidden, **masks)
    ((layout,),) = (findings.layouts for findings in rewriting.findings)
    (outcome,) = rewriting.outcomes
    assert (layout.mask is None) == any("every token votes" in note for note in outcome.notes)
    return None if layout.mask is None else list(shape(layout.mask) or ())


def _ones(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(size, dtype=dtype)


@pytest.mark.parametrize(
    ("masks", "taken"),
    [
        ({"attention_mask": _ones(2, 10)}, [2, 10]),
        ({"attention_mask": _ones(2, 10, dtype=torch.bool)}, [2, 10]),
        ({"attention_mask": _ones(2, 14)}, [2, 14]),  # it covers what is cached, too
        ({"keep": _ones(2, 10)}, None),
        ({"attention_mask": _ones(2, 9)}, None),  # of fewer tokens than the forward has
        ({"attention_mask": _ones(3, 10)}, None),  # of other rows
        ({"attention_mask": _ones(2, 10, 10, 10)}, None),  # 4D: it says who sees whom, here for 10 heads
        ({"attention_mask": _ones(2, 10, dtype=torch.float32)}, None),  # to be added to scores: 0 means visible
        ({"encoder_attention_mask": _ones(2, 14), "decoder_attention_mask": _ones(2, 10)}, [2, 10]),
    ],
    ids=["int", "bool", "longer", "other name", "too short", "other batch", "4D", "float", "of two the exact one"],
)
def test_takes_a_2d_mask_over_the_tokens_and_no_other(masks: dict[str, Tensor], taken: list[int] | None) -> None:
    assert _taken(torch.randn(2, 10, H), masks) == taken


def test_a_longer_mask_of_other_tokens_is_not_theirs() -> None:
    """DiffusionGemma's decoder in one graph with its encoder, whose mask is longer than the canvas."""
    inputs = zoo.inputs("diffusion_gemma")
    rows, length = inputs["input_ids"].shape
    rewriting, model = Rewriting(**TIGHT), zoo.build("diffusion_gemma", num_layers=1)
    torch.compile(model, backend=rewriting, fullgraph=True)(**inputs, attention_mask=_ones(rows, length))
    ((encoder, decoder),) = (findings.layouts for findings in rewriting.findings)
    assert encoder.seq == length > decoder.seq
    assert encoder.mask is not None
    assert decoder.mask is None
