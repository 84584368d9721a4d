"""What is rewritten, what is read off the graph to do it, and what is left alone.

B, S: sequences, tokens per sequence; L: tokens of a block; T = B*S; E, k: experts, experts per token; H: model width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dmoe_compile.passes.layouts import Layout
from dmoe_compile.passes.nodes import shape
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from reference_model import Experts, Gate, MoeBlock, Rewriting

E, H, K, L = 16, 8, 2, 4
TIGHT = {"block_length": L, "dmoe.top_p": 0.3, "dmoe.min_experts": K}
GROUPS = {"no groups": (1, 1), "groups": (4, 2)}

pytestmark = pytest.mark.usefixtures("without_gradients")


def _block(groups: tuple[int, int] = (1, 1)) -> MoeBlock:
    """Return a block whose tokens disagree enough for a coreset to change the routing of most."""
    gate = Gate(E, H, K, groups)
    gate.weight.data.normal_()
    return MoeBlock(gate)


def _run(model: nn.Module, *args: Any, dynamic: bool = False, **options: Any) -> tuple[Any, Rewriting]:
    torch._dynamo.reset()
    rewriting = Rewriting(**{**TIGHT, **options})
    return torch.compile(model, backend=rewriting, fullgraph=True, dynamic=dynamic)(*args), rewriting


def _coresets(rewriting: Rewriting, batch: int) -> Tensor:
    """Return [B, S, E] what each token may use at the one site."""
    (ranked,) = rewriting.ranked
    return ranked.view(batch, -1, E) > -torch.inf


def _assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit: the same graph ran on the same numbers."""
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Where B and S are read.


class _Behind(nn.Module):
    """A block whose tokens were flattened, normalised and reshaped some steps before the router."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _block()

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


@pytest.mark.parametrize("model", [_block, _Behind, _RankThree])
def test_finds_the_rows_behind_the_tokens(model: Any) -> None:
    _, rewriting = _run(model(), torch.randn(2, 11, H))
    ((layout,),) = (findings.layouts for findings in rewriting.findings)
    (outcome,) = rewriting.outcomes
    assert layout.rows is not None
    assert (shape(layout.rows)[:2], layout.batch, layout.seq, layout.mask) == ((2, 11), 2, 11, None)
    assert (outcome.rewritten, outcome.reason, outcome.tokens_per_block) == (True, "", L)
    assert outcome.notes == ("no 2D attention_mask input: every token votes and blocks start at position 0",)
    inside = _coresets(rewriting, 2)
    for block in inside.split(L, dim=1):  # 11 tokens: the last block has three
        assert torch.equal(block, block[:, :1].expand_as(block))
    assert (inside.sum(-1) < E).all()


def test_rank_three_routes_as_rank_two() -> None:
    model = _RankThree()
    hidden = torch.randn(2, 11, H)
    (_, ids), rewriting = _run(model, hidden)
    flat = _block()
    flat.gate.weight.data.copy_(model.router.weight)
    scores = model.router(hidden).softmax(-1)
    constrained = scores.masked_fill(~_coresets(rewriting, 2), -torch.inf)
    assert torch.equal(ids.sort(-1).values, constrained.topk(K).indices.sort(-1).values)


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = _block()

    def forward(self, tokens: Tensor) -> Tensor:
        ids, weights, _ = self.block.gate(tokens)
        return self.block.experts(tokens, ids, weights)


def test_without_rows_all_tokens_are_one_row_and_the_report_says_so() -> None:
    _, rewriting = _run(_Flat(), torch.randn(22, H))
    ((layout,),) = (findings.layouts for findings in rewriting.findings)
    assert layout == Layout(None, 1, 22, None)
    (outcome,) = rewriting.outcomes
    assert outcome.rewritten
    assert outcome.notes == ("no [B, S] behind the router's tokens: blocks run over all of them as one row",)
    inside = _coresets(rewriting, 1)
    for block in inside.split(L, dim=1):
        assert torch.equal(block, block[:, :1].expand_as(block))


def test_block_longer_than_the_rows_is_reported_as_it_is() -> None:
    _, rewriting = _run(_block(), torch.randn(2, 3, H), block_length=32)
    assert rewriting.outcomes[0].tokens_per_block == 3


# Padding.


def _padded(seq: int = 10) -> tuple[Tensor, Tensor]:
    """Two rows, the second with three tokens of padding on the left."""
    mask = torch.ones(2, seq, dtype=torch.int64)
    mask[1, :3] = 0
    return torch.randn(2, seq, H), mask


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_padded_rows_are_routed_as_they_would_be_alone(groups: tuple[int, int]) -> None:
    block = _block(groups)
    hidden, mask = _padded()
    out, rewriting = _run(block, hidden, mask)
    assert rewriting.findings[0].layouts[0].mask is not None
    assert rewriting.outcomes[0].notes == ()
    alone = [_run(block, row[None])[0]["ids"][0] for row in (hidden[0], hidden[1, 3:])]
    assert torch.equal(out["ids"][0], alone[0])
    assert torch.equal(out["ids"][1, 3:], alone[1])
    assert set(out["ids"][1, :3].flatten().tolist()) <= set(out["ids"][mask.bool()].flatten().tolist())
    unmasked, _ = _run(block, hidden)
    assert not torch.equal(unmasked["ids"][1, 3:], alone[1])


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_blocks_of_nothing_but_padding_activate_no_expert_of_their_own(groups: tuple[int, int]) -> None:
    hidden, mask = torch.randn(2, 30, H), torch.ones(2, 30, dtype=torch.int64)
    mask[:, 6:] = 0
    out, _ = _run(_block(groups), hidden, mask)
    routed = set(out["ids"][mask.bool()].flatten().tolist())
    assert len(routed) < E
    assert set(out["ids"][~mask.bool()].flatten().tolist()) <= routed


def test_of_a_longer_mask_the_last_columns_count() -> None:
    block = _block()
    hidden, mask = _padded()
    short, _ = _run(block, hidden, mask)
    cached = torch.cat([torch.zeros(2, 4, dtype=torch.int64), mask], 1)  # what was cached was padding, or so it says
    long, rewriting = _run(block, hidden, cached)
    assert rewriting.findings[0].layouts[0].mask is not None
    _assert_same(long, short)


def test_a_mask_row_of_zeros_means_all_tokens() -> None:
    block = _block()
    hidden, mask = _padded()
    mask[1] = 0
    out, _ = _run(block, hidden, mask)
    every, _ = _run(block, hidden)
    assert torch.equal(out["ids"], every["ids"])


class _ReadsMasks(nn.Module):
    """Reads its masks, so that they are inputs of the graph, but routes without them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _block()

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


# What is left alone.


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_long_forwards_are_left_alone(groups: tuple[int, int]) -> None:
    block = _block(groups)
    hidden = torch.randn(2, 10, H)
    out, rewriting = _run(block, hidden, max_block_tokens=9)
    (outcome,) = rewriting.outcomes
    assert (outcome.rewritten, outcome.tokens_per_block) == (False, None)
    assert outcome.reason == "10 tokens a sequence are more than max_block_tokens=9"
    plain, untouched = _run(block, hidden, passes=[])
    assert rewriting.graphs[0].code == untouched.graphs[0].code
    _assert_same(out, plain)
    constrained, rewriting = _run(block, hidden, max_block_tokens=10)
    assert rewriting.outcomes[0].rewritten
    assert not torch.equal(constrained["ids"], plain["ids"])


# Symbolic sizes.


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_one_graph_with_symbolic_sizes_is_right_for_every_length(groups: tuple[int, int], masked: bool) -> None:
    block = _block(groups)
    rewriting = Rewriting(**TIGHT)
    compiled = torch.compile(block, backend=rewriting, fullgraph=True, dynamic=True)
    cases = [(2, 9), (3, 12), (2, 5), (5, 23), (2, 16), (2, 40)]
    outs = []
    for batch, seq in cases:
        hidden = torch.randn(batch, seq, H, generator=torch.Generator().manual_seed(seq))
        mask = (torch.arange(seq) >= torch.arange(batch).unsqueeze(1)).long()  # one more of padding in each row
        args = (hidden, mask) if masked else (hidden,)
        outs.append((args, compiled(*args)))
    assert len(rewriting.findings) == 1
    assert rewriting.outcomes[0].rewritten
    assert rewriting.outcomes[0].tokens_per_block == L
    for args, out in outs:
        static, _ = _run(block, *args)
        assert torch.equal(out["ids"], static["ids"])


def test_symbolic_rows_shorter_than_a_block() -> None:
    block = _block()
    rewriting = Rewriting(**TIGHT | {"block_length": 32})
    compiled = torch.compile(block, backend=rewriting, fullgraph=True, dynamic=True)
    hiddens = [torch.randn(2, seq, H) for seq in (31, 5, 32, 2)]
    outs = [compiled(hidden) for hidden in hiddens]
    for hidden, out in zip(hiddens, outs, strict=True):
        assert torch.equal(out["ids"], _run(block, hidden, block_length=32)[0]["ids"])


# What else reads the graph.


class _TwoBanks(nn.Module):
    """One router drives two banks of experts: two sites, one selection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = _block().gate
        self.first, self.second = Experts(E, H, 2), Experts(E, H, 2)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, weights, _ = self.gate(hidden)
        flat = hidden.view(-1, H)
        return self.first(flat, ids, weights).sin(), self.second(flat, ids, weights).cos(), ids


def test_layers_of_other_k_have_rules_of_their_own() -> None:
    """Whatever else they have in common: what is traced once is used again."""
    blocks = nn.ModuleList(MoeBlock(Gate(E, H, k)) for k in (2, 3))
    blocks[1].gate.weight = blocks[0].gate.weight

    class Both(nn.Module):
        def forward(self, hidden: Tensor) -> list[dict[str, Tensor]]:
            return [block(hidden) for block in blocks]

    hidden = torch.randn(1, 12, H)
    least = {"dmoe.min_experts": 1, "dmoe.top_p": 0.01}  # so that k bounds coresets
    both, _ = _run(Both(), hidden, **least)
    alone = [_run(block, hidden, **least)[0]["ids"] for block in blocks]
    assert all(torch.equal(one["ids"], other) for one, other in zip(both, alone, strict=True))


def test_a_selection_that_two_banks_share_is_rewritten_once() -> None:
    model, hidden = _TwoBanks(), torch.randn(2, 8, H)
    (first, second, ids), rewriting = _run(model, hidden)
    assert [outcome.rewritten for outcome in rewriting.outcomes] == [True, True]
    one, other = (outcome.site for outcome in rewriting.outcomes)
    assert one.select is other.select
    assert one.experts != other.experts
    single = _block()
    single.gate.load_state_dict(model.gate.state_dict())
    alone, watched = _run(single, hidden)
    assert torch.equal(ids.view(2, 8, K), alone["ids"])
    sorts = [[n for n in each.graphs[0].graph.nodes if "sort" in str(n.target)] for each in (rewriting, watched)]
    assert len(sorts[0]) == len(sorts[1]) == 1
    weights = model.gate(hidden)[2].sigmoid().gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * model.gate.scale
    flat = hidden.view(-1, H)
    assert_close((first, second), (model.first(flat, ids, weights).sin(), model.second(flat, ids, weights).cos()))


class _Observed(nn.Module):
    """A group-limited router whose scores, masked or not, others read too: a loss, a log."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _block((4, 2))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        gate, flat = self.block.gate, hidden.view(-1, H)
        scores = nn.functional.linear(flat, gate.weight).sigmoid() + gate.expert_bias
        masked = gate.group_mask(scores)
        ids = masked.topk(K).indices
        weights = scores.gather(1, ids)
        return self.block.experts(flat, ids, weights), ids, scores, masked, masked.isinf().sum(-1)


def test_other_readers_of_the_scores_see_what_they_saw() -> None:
    model, hidden = _Observed(), torch.randn(2, 8, H)
    (_, ids, *seen), rewriting = _run(model, hidden)
    (_, own_ids, *own), _ = _run(model, hidden, passes=[])
    assert rewriting.outcomes[0].rewritten
    assert not torch.equal(ids, own_ids)
    assert all(torch.equal(a, b) for a, b in zip(seen, own, strict=True))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_only_the_routing_changes(groups: tuple[int, int]) -> None:
    """The model's own weights follow its own rule from the ids; logits and the shared expert are what they were."""
    block, hidden = _block(groups), torch.randn(2, 10, H)
    out, _ = _run(block, hidden)
    plain, _ = _run(block, hidden, passes=[])
    assert torch.equal(out["logits"], plain["logits"])
    assert torch.equal((out["ids"] == plain["ids"]).all(-1), (out["weights"] == plain["weights"]).all(-1))
    weights = out["logits"].sigmoid().gather(-1, out["ids"])
    assert_close(out["weights"], weights / weights.sum(-1, keepdim=True) * block.gate.scale)
    shared = block.shared_experts(hidden)
    assert_close(out["output"], out["routed"] + shared)


class _Given(nn.Module):
    """A router that ranks the logits it is given, times one: no rounding, so ties are ties."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(E, E, bias=False)
        self.router.weight.copy_(torch.eye(E))
        self.experts = Experts(E, E, 2)
        self.top_k = top_k

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden.view(-1, E)
        weights, ids = self.router(flat).topk(self.top_k)
        return self.experts(flat, ids, weights.softmax(-1)), ids


def test_ties_in_choosing_a_coreset_go_to_the_lower_index_compiled_or_not() -> None:
    """Each token asks for one expert, with equal votes; with fewer in the coreset, whose?"""
    asked = torch.tensor([[9, 2, 14, 5], [3, 1, 2, 0], [15, 14, 13, 12], [7, 7, 4, 4]])
    rank = torch.arange(E).expand(4, 4, E) / E  # of the others: the higher the index, the better, and never a tie
    hidden = rank.scatter(-1, asked.unsqueeze(-1), 2.0)
    options = {"block_length": 4, "dmoe.top_p": 0.3, "dmoe.min_experts": 1}  # 1/4 does not exceed it, 2/4 does
    # Coresets {2, 5}, {0, 1}, {12, 13} and, as one half is enough, {4}.
    expected = torch.tensor([[5, 2, 5, 5], [1, 1, 1, 0], [13, 13, 13, 12], [4, 4, 4, 4]])
    model = _Given(1)
    (_, ids), _ = _run(model, hidden, **options)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="dmoe", options={"passes": ["dmoe"], **options}, fullgraph=True)
    assert torch.equal(compiled(hidden)[1], ids)
    assert torch.equal(ids.view(4, 4), expected)


# Scope.


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("gate", GROUPS)
@pytest.mark.parametrize(("batch", "seq"), [(1, 4), (3, 4), (5, 11)])
def test_a_batch_that_shares_a_coreset_reads_no_more_experts_than_that(
    gate: str, mask: bool, batch: int, seq: int
) -> None:
    torch.manual_seed(1)
    block = MoeBlock(Gate(E, H, K, GROUPS[gate]))
    padding = torch.ones(batch, seq, dtype=torch.int64)
    padding[:, 0] = 0
    args = (torch.randn(batch, seq, H), padding) if mask else (torch.randn(batch, seq, H),)
    options = {"passes": ["des"], "des.variant": "vote", "des.coreset_size": 5, "block_length": L}
    used = {}
    for scope in ("block", "batch"):
        torch._dynamo.reset()
        out = torch.compile(block, backend=Rewriting(**options, scope=scope), fullgraph=True)(*args)
        used[scope] = out["ids"].unique().numel()
    assert used["batch"] <= 5
    if batch > 1:
        assert used["block"] > 5


def test_a_batch_of_any_size_is_one_block() -> None:
    block = MoeBlock(Gate(E, H, K))
    rewriting = Rewriting(passes=["des"], scope="batch", **{"des.variant": "vote", "des.coreset_size": 4})
    compiled = torch.compile(block, backend=rewriting, fullgraph=True, dynamic=True)
    for batch, seq in ((2, 9), (3, 14)):
        assert compiled(torch.randn(batch, seq, H))["ids"].unique().numel() <= 4
    (outcome,) = rewriting.outcomes
    assert outcome.tokens_per_block is None
    assert outcome.notes == ("no 2D attention_mask input: every token votes",)
