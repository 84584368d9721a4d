"""SDAR-30B-A3B, LLaDA-MoE, Qwen3-MoE and OLMoE as published: router and loop are one function.

    published   softmax -> topk -> one_hot -> for e in range(E): where, index_add_    E copies of the expert
    prepared    softmax -> topk -> sort -> grouped_mm -> silu * up -> grouped_mm -> sum
    rewritten   softmax -> [votes -> coreset -> -inf outside] -> topk -> ...

The whole block is replaced by a template, whose score function and renormalisation were found by comparing.
The router logits that it returns keep their values.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import FileCheck, assert_close

import forms
from dmoe_compile import prepare
from rewriting import DTYPES, L, Rewritten, S, check_counters, check_numerics, inputs

REFERENCE = Path(__file__).parents[1] / "reference"


def test_rule_stands_between_scores_and_topk() -> None:
    rewritten = Rewritten(forms.build("softmax_loop"), inputs())
    check = FileCheck().check("aten._softmax.default").check("aten.scatter").check("aten.where.self")
    check.check_count("aten.topk.default", 1, exactly=False).check_count("grouped_mm", 2).check("aten.sum").run(
        rewritten.graph
    )
    check_counters(rewritten)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype) -> None:
    check_numerics("softmax_loop", dtype)


@pytest.mark.parametrize("norm_topk_prob", [True, False])  # SDAR and Qwen3; LLaDA-MoE and OLMoE
def test_template_follows_the_model(norm_topk_prob: bool) -> None:
    block = forms.build("softmax_loop", norm_topk_prob=norm_topk_prob)
    (entry,) = prepare(block).blocks
    assert entry.how == f"the whole block (softmax{', renormalised' * norm_topk_prob})"


def test_every_block_stays_in_its_coreset() -> None:
    rewritten = Rewritten(forms.build("softmax_loop"), inputs())
    assert all(4 <= used < 12 for used in rewritten.experts_of_blocks)
    assert len(rewritten.experts_of_blocks) == 2 * S // L


def test_router_logits_keep_their_values() -> None:
    block, x = forms.build("softmax_loop"), inputs()
    with torch.no_grad():
        _, logits = block(x)
    assert_close(Rewritten(block, x).result[1], logits, rtol=0, atol=0)


def test_a_block_that_does_more_is_left_alone() -> None:
    class Jitter(forms.SoftmaxLoop):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(hidden_states * hidden_states.abs().amax())

    torch.manual_seed(0)
    block = Jitter(forms.config()).eval()
    before, x = copy.deepcopy(block), inputs()
    (entry,) = prepare(block).blocks
    assert "no known form" in entry.reason
    assert not entry.how
    with torch.no_grad():
        assert_close(block(x), before(x), rtol=0, atol=0)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_reproduces_the_released_block(norm_topk_prob: bool) -> None:
    tensors = load_file(REFERENCE / "case3_team_moe_block.safetensors")
    block = forms.build(
        "softmax_loop",
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=norm_topk_prob,
    )
    block.load_state_dict({name.removeprefix("w."): t for name, t in tensors.items() if name.startswith("w.")})
    rewritten = Rewritten(block, tensors["hidden_states"], **{"block_length": 128, "dmoe.min_experts": 16})
    output, logits = rewritten.result
    assert_close(logits, tensors["plain.router_logits"], rtol=0, atol=1e-5)
    assert_close(output, tensors[f"plain.norm{int(norm_topk_prob)}.output"], rtol=0, atol=1e-5)
