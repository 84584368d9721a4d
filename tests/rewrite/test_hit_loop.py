"""RND1 as published: a ModuleList indexed by the experts that were hit, routing weights left in fp32.

    published   softmax -> topk -> nonzero -> for e in hit: experts[e], where, index_add_
    prepared    softmax -> topk -> sort -> grouped_mm -> silu * up -> grouped_mm -> sum
    rewritten   softmax -> [votes -> coreset -> -inf outside] -> topk -> ...

The whole block is replaced by a template, which returns the router logits as [B, S, E] as the block does.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import FileCheck

import forms
from dmoe_compile import prepare
from rewriting import DTYPES, B, Rewritten, S, check_counters, check_numerics, inputs


def test_rule_stands_between_scores_and_topk() -> None:
    rewritten = Rewritten(forms.build("hit_loop"), inputs())
    FileCheck().check("aten._softmax.default").check("aten.where.self").check("aten.topk.default").check_count(
        "grouped_mm", 2
    ).run(rewritten.graph)
    check_counters(rewritten)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype) -> None:
    check_numerics("hit_loop", dtype)


def test_logits_are_returned_by_sequence() -> None:
    result = Rewritten(forms.build("hit_loop"), inputs()).result
    assert result[1].shape == (B, S, 12)


def test_an_unknown_result_is_left_alone() -> None:
    class Counting(forms.HitLoop):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            out, logits = super().forward(hidden_states)
            return out, logits.argmax(-1).view(-1).bincount(minlength=12)

    torch.manual_seed(0)
    (entry,) = prepare(Counting(forms.config()).eval()).blocks
    assert "no known form" in entry.reason
