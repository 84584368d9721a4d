"""transformers' eager experts, and files that copy them: stacked weights, a loop over the experts that were hit.

    published   softmax -> topk -> experts(hidden, ids, weights): nonzero, for e in hit: where, index_add_
    prepared    softmax -> topk -> sort -> grouped_mm -> silu * up -> grouped_mm -> sum
    rewritten   softmax -> [votes -> coreset -> -inf outside] -> topk -> ...

Only the experts' forward is replaced; the router stays the model's own code. The weights are stacked already.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import FileCheck, assert_close

import forms
import zoo
from dmoe_compile import prepare, unprepare
from rewriting import DTYPES, Rewritten, check_counters, check_numerics, inputs


def test_rule_stands_between_scores_and_topk() -> None:
    rewritten = Rewritten(forms.build("expert_hit"), inputs())
    FileCheck().check("aten._softmax.default").check("aten.where.self").check("aten.topk.default").check_count(
        "grouped_mm", 2
    ).run(rewritten.graph)
    check_counters(rewritten)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype) -> None:
    check_numerics("expert_hit", dtype)


def test_weights_are_not_copied() -> None:
    block = forms.build("expert_hit")
    before = {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
    prepare(block)
    assert {name: parameter.data_ptr() for name, parameter in block.named_parameters()} == before


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_transformers_own_eager_experts(name: str) -> None:
    """gpt_oss's weights are transposed and interleaved, with biases and a clamp."""
    model, inputs = zoo.build(name, "grouped_mm"), zoo.inputs(name)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        own = model(**inputs).logits
        report = prepare(model)
        assert [entry.reason for entry in report.blocks] == [""] * len(zoo.expected(name).names)
        assert_close(model(**inputs).logits, own, rtol=1e-4, atol=1e-5)
        unprepare(model)
        assert_close(model(**inputs).logits, own, rtol=0, atol=0)


def test_experts_that_do_more_are_left_alone() -> None:
    class Normed(forms.StackedExperts):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            out = super().forward(hidden_states, top_k_index, top_k_weights)
            return out / out.norm(dim=-1, keepdim=True)

    block = forms.build("expert_hit")
    block.experts = Normed(forms.config()).eval()
    (entry,) = prepare(block).blocks
    assert "no known form" in entry.reason
    assert "forward" not in block.experts.__dict__
