"""gpt-oss's inference form and older Mixtral ports: every expert runs on every token, the routing is a mask.

    published   topk of logits -> softmax over k -> scatter to [T, E] -> bmm over all E, times the mask, sum over E
    rewritten   logits -> [votes -> coreset -> -inf outside] -> topk -> ...

Dynamo traces it as it is. The routing changes; all experts are still read, which the report's form, "dense", says.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import FileCheck

import capture
import forms
from dmoe_compile import prepare
from rewriting import DTYPES, Rewritten, check_counters, check_numerics, inputs


def test_rule_stands_between_logits_and_topk() -> None:
    rewritten = Rewritten(forms.build("dense"), inputs(), prepared=False)
    FileCheck().check("aten.addmm.default").check("aten.where.self").check("aten.topk.default").check_count(
        "aten.bmm.default", 2
    ).run(rewritten.graph)
    check_counters(rewritten)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype) -> None:
    check_numerics("dense", dtype, prepared=False)


def test_site() -> None:
    (outcome,) = Rewritten(forms.build("dense"), inputs(), prepared=False).backend.outcomes
    site = outcome.site
    assert (site.form, site.score_function, site.renormalised) == ("dense", "logits", True)
    assert "scatter float32[48, 12] is returned" in site.escapes  # the mask


def test_with_gradients() -> None:
    sites, refused = capture.joint(forms.build("dense"), inputs())
    assert [(site.form, site.top_k) for site in sites] == [("dense", 3)]
    assert refused == []


def test_nothing_to_prepare() -> None:
    assert prepare(forms.build("dense")).blocks == ()


def test_a_mixture_without_selection_is_refused() -> None:
    class Soft(nn.Module):
        """Every expert on every token, weighed by the softmax itself."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 12, bias=False)
            self.up = nn.Parameter(torch.randn(12, 32, 32))

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, 32)
            outs = torch.bmm(rows.expand(12, -1, -1), self.up)
            return (outs * F.softmax(self.gate(rows), dim=-1).t().unsqueeze(-1)).sum(0).view_as(x)

    (sites, refused), _ = capture.inference(Soft(), inputs())
    assert sites == []
    assert "none is chosen" in refused[0].reason
