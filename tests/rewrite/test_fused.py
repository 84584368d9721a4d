"""RND1 and dInfer with a serving engine's kernel: routing in PyTorch, then one opaque op for the experts.

    published   softmax -> topk -> renormalise -> engine::fused_experts(hidden, w1, w2, weights, ids)
    rewritten   softmax -> [votes -> coreset -> -inf outside] -> topk -> ... -> the same op

Dynamo traces it as it is. The op is found by its expert weights [E, ., .] and its routing; it is left alone.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import FileCheck

import forms
from dmoe_compile import prepare
from rewriting import DTYPES, Rewritten, check_counters, check_numerics, inputs


def test_rule_stands_between_scores_and_topk() -> None:
    rewritten = Rewritten(forms.build("fused"), inputs(), prepared=False)
    FileCheck().check("aten._softmax.default").check("aten.where.self").check("aten.topk.default").check_count(
        "dmoe_test.fused_experts.default", 1, exactly=True
    ).run(rewritten.graph)
    check_counters(rewritten)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype) -> None:
    check_numerics("fused", dtype, prepared=False)


def test_site() -> None:
    (outcome,) = Rewritten(forms.build("fused"), inputs(), prepared=False).backend.outcomes
    assert outcome.site.form == "dmoe_test.fused_experts"
    assert outcome.site.combine.target is torch.ops.dmoe_test.fused_experts.default


def test_nothing_to_prepare() -> None:
    assert prepare(forms.build("fused")).blocks == ()
