"""DeepSeek-V2 and -V3 as published: a ModuleList behind moe_infer(), which splits sorted tokens by expert.

    published   softmax -> topk -> moe_infer(): argsort, .tolist(), split, for e, tokens
    prepared    softmax -> topk -> sort -> grouped_mm -> silu * up -> grouped_mm -> sum
    rewritten   softmax -> [votes -> coreset -> -inf outside] -> topk -> ...

moe_infer() is replaced; the gate with its unsorted top-k and its scale, and the shared experts, stay the model's own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import FileCheck

import forms
from dmoe_compile import prepare
from rewriting import DTYPES, Rewritten, check_counters, check_numerics, inputs


def test_rule_stands_between_scores_and_topk() -> None:
    rewritten = Rewritten(forms.build("deepseek"), inputs())
    FileCheck().check("aten._softmax.default").check("aten.where.self").check("aten.topk.default").check_count(
        "grouped_mm", 2
    ).run(rewritten.graph)
    check_counters(rewritten)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype) -> None:
    check_numerics("deepseek", dtype)


def test_weights_are_not_renormalised() -> None:
    (outcome,) = Rewritten(forms.build("deepseek"), inputs()).backend.outcomes
    assert not outcome.site.renormalised


def test_a_moe_infer_that_does_more_is_left_alone() -> None:
    class Dropping(forms.Deepseek):
        def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
            return super().moe_infer(x, topk_ids, topk_weight).clamp(-0.1, 0.1)

    torch.manual_seed(0)
    block = Dropping(forms.config()).eval()
    (entry,) = prepare(block).blocks
    assert "no known form" in entry.reason
    assert "moe_infer" not in block.__dict__
