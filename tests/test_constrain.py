"""What is rewritten, and what is left alone.

B, S: sequences, tokens per sequence; L: tokens of a block; T = B*S; E, k: experts, experts per token; H: model width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from constrained import GROUPS, TIGHT, E, H, K, L, assert_same, run, tight_block
from reference_model import Experts, Gate, MoeBlock, Rewriting

pytestmark = pytest.mark.usefixtures("without_gradients")


# What is left alone.


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_long_forwards_are_left_alone(groups: tuple[int, int]) -> None:
    block = tight_block(groups)
    hidden = torch.randn(2, 10, H)
    out, rewriting = run(block, hidden, max_block_tokens=9)
    (outcome,) = rewriting.outcomes
    assert (outcome.rewritten, outcome.tokens_per_block) == (False, None)
    assert outcome.reason == "10 tokens a sequence are more than max_block_tokens=9"
    plain, untouched = run(block, hidden, passes=[])
    assert rewriting.graphs[0].code == untouched.graphs[0].code
    assert_same(out, plain)
    constrained, rewriting = run(block, hidden, max_block_tokens=10)
    assert rewriting.outcomes[0].rewritten
    assert not torch.equal(constrained["ids"], plain["ids"])


# Symbolic sizes.


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_one_graph_with_symbolic_sizes_is_right_for_every_length(groups: tuple[int, int], masked: bool) -> None:
    block = tight_block(groups)
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
        static, _ = run(block, *args)
        assert torch.equal(out["ids"], static["ids"])


def test_symbolic_rows_shorter_than_a_block() -> None:
    block = tight_block()
    rewriting = Rewriting(**TIGHT | {"block_length": 32})
    compiled = torch.compile(block, backend=rewriting, fullgraph=True, dynamic=True)
    hiddens = [torch.randn(2, seq, H) for seq in (31, 5, 32, 2)]
    outs = [compiled(hidden) for hidden in hiddens]
    for hidden, out in zip(hiddens, outs, strict=True):
        assert torch.equal(out["ids"], run(block, hidden, block_length=32)[0]["ids"])


# What else reads the graph.


class _TwoBanks(nn.Module):
    """One router drives two banks of experts: two sites, one selection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = tight_block().gate
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
    both, _ = run(Both(), hidden, **least)
    alone = [run(block, hidden, **least)[0]["ids"] for block in blocks]
    assert all(torch.equal(one["ids"], other) for one, other in zip(both, alone, strict=True))


def test_a_selection_that_two_banks_share_is_rewritten_once() -> None:
    model, hidden = _TwoBanks(), torch.randn(2, 8, H)
    (first, second, ids), rewriting = run(model, hidden)
    assert [outcome.rewritten for outcome in rewriting.outcomes] == [True, True]
    one, other = (outcome.site for outcome in rewriting.outcomes)
    assert one.select is other.select
    assert one.experts != other.experts
    single = tight_block()
    single.gate.load_state_dict(model.gate.state_dict())
    alone, watched = run(single, hidden)
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
        self.block = tight_block((4, 2))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        gate, flat = self.block.gate, hidden.view(-1, H)
        scores = nn.functional.linear(flat, gate.weight).sigmoid() + gate.expert_bias
        masked = gate.group_mask(scores)
        ids = masked.topk(K).indices
        weights = scores.gather(1, ids)
        return self.block.experts(flat, ids, weights), ids, scores, masked, masked.isinf().sum(-1)


def test_other_readers_of_the_scores_see_what_they_saw() -> None:
    model, hidden = _Observed(), torch.randn(2, 8, H)
    (_, ids, *seen), rewriting = run(model, hidden)
    (_, own_ids, *own), _ = run(model, hidden, passes=[])
    assert rewriting.outcomes[0].rewritten
    assert not torch.equal(ids, own_ids)
    assert all(torch.equal(a, b) for a, b in zip(seen, own, strict=True))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_only_the_routing_changes(groups: tuple[int, int]) -> None:
    """The model's own weights follow its own rule from the ids; logits and the shared expert are what they were."""
    block, hidden = tight_block(groups), torch.randn(2, 10, H)
    out, _ = run(block, hidden)
    plain, _ = run(block, hidden, passes=[])
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
    (_, ids), _ = run(model, hidden, **options)
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
