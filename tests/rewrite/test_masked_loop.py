"""LLaDA2 as trainers run it: rows repeated k times, and for every expert a mask of the rows that are its own.

    published   gate -> ids, weights -> for e: y[ids == e] = experts[e](rows[ids == e]) -> weighted sum, + shared
    prepared    gate -> ids, weights -> sort -> grouped_mm -> silu * up -> grouped_mm -> sum, + shared
    rewritten   ... -> [coreset] -> group top-k of penalised scores -> [coreset first, never outside] -> topk -> ...

The loop is in the block's own forward, which a template replaces. The gate is a module of its own and stays.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import FileCheck, assert_close

import forms
from dmoe_compile import prepare
from rewriting import DTYPES, TOLERANCE, Rewritten, check_counters, inputs


def test_groups_are_ranked_by_penalised_scores() -> None:
    rewritten = Rewritten(forms.build("masked_loop"), inputs())
    FileCheck().check("aten.sigmoid").check("aten.sort").check_count("aten.topk.default", 3).check_count(
        "grouped_mm", 2
    ).run(rewritten.graph)
    check_counters(rewritten)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_experts_give_the_published_block(dtype: torch.dtype) -> None:
    block, x = forms.build("masked_loop", dtype), inputs(dtype)
    with torch.no_grad():
        own = block(x)
    assert_close(Rewritten(block, x, **{"dmoe.min_experts": 12}).result, own, **TOLERANCE[dtype])


def test_the_same_as_the_form_for_inference() -> None:
    """moe_infer() and this loop are two forms of one block; the rewritten graphs route alike."""
    loop, infer, x = forms.build("masked_loop"), forms.build("bailing"), inputs()
    infer.load_state_dict(loop.state_dict())
    assert_close(Rewritten(loop, x).result, Rewritten(infer, x).result, rtol=1e-4, atol=1e-5)


def test_training_runs_the_published_code() -> None:
    block = forms.build("masked_loop")
    before = copy.deepcopy(block).train()
    prepare(block)
    x = inputs()
    with torch.no_grad():
        assert_close(block.train()(x), before(x), rtol=0, atol=0)
