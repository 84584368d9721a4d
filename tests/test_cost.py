"""The cost model against numbers worked out by hand.

T: tokens; E, k: experts, experts a token; H, F: hidden size, expert width
"""

from __future__ import annotations

import pytest
import torch
from dmoe_compile.passes.cost import BREAK_EVEN, Machine, U, formula, judge
from dmoe_compile.passes.sites import Site
from torch import nn

import forms
from reference_model import Gate, MoeBlock, Rewriting

# 100 GB/s and 2 TFLOP/s: 40 FLOP for each weight of 2 bytes that is read, 80 for 4 bytes.
MACHINE = Machine(gb_per_s=100.0, tflop_per_s=2.0)


def site_of(block: nn.Module, hidden: torch.Tensor) -> Site:
    rewriting = Rewriting(passes=[], stats=True)
    with torch.no_grad():
        torch.compile(block, backend=rewriting, fullgraph=True)(hidden)
    (outcome,) = rewriting.outcomes
    return outcome.site


@pytest.fixture(scope="module")
def site() -> Site:
    """3 matrices of 16 x 64 fp32 an expert, 4 of 24 experts a token."""
    return site_of(MoeBlock(Gate(24, 64, 4), width=16), torch.randn(2, 16, 64))


def test_reading_is_the_limit(site: Site) -> None:
    """20 experts: 20 * 12,288 bytes in 2.4576 us; 32 * 4 products of 3,072 weights in 0.39 us."""
    verdict = judge(site, 32, 20, 10, MACHINE, 0.05)
    assert verdict.pays
    assert "20 -> 10 unique experts, at least 0.00246 -> 0.00123 ms" in verdict.why
    assert "above 3.2 experts (T=32, k=4, 100 GB/s, 2 TFLOP/s)" in verdict.why


def test_computing_is_the_limit(site: Site) -> None:
    """Below the break-even of 2 * 100e9 * 320 * 4 / (2e12 * 4) = 32 experts nothing is gained."""
    verdict = judge(site, 320, 24, 8, MACHINE, 0.05)
    assert not verdict.pays
    assert "would not pay: 24 -> 8 unique experts" in verdict.why
    assert "above 32 experts" in verdict.why


@pytest.mark.parametrize(("coreset", "pays"), [(19.0, True), (19.01, False), (20, False)])
def test_a_small_gain_is_none(site: Site, coreset: float, pays: bool) -> None:
    assert judge(site, 32, 20, coreset, MACHINE, 0.05).pays is pays


def test_where_a_gain_ends_at_the_break_even(site: Site) -> None:
    """From 40 experts down to 10 the floor stops at 3.2 * 10 / 10 = 32 of them: 20% are gained."""
    assert judge(site, 320, 40, 10, MACHINE, 0.19).pays
    assert not judge(site, 320, 40, 10, MACHINE, 0.21).pays


@pytest.mark.parametrize("name", ["expert_hit", "fused"])
def test_matrices_in_one_tensor_count_alike(name: str) -> None:
    """gate and up in one tensor [E, 2F, H]: 3 * 32 * 24 weights an expert, as in three tensors."""
    block = forms.build(name)
    if name == "expert_hit":
        from dmoe_compile import prepare

        prepare(block)
    site = site_of(block, torch.randn(2, 16, 32))
    bytes_of_one = 3 * 32 * 24 * 4
    assert f"at least {12 * bytes_of_one / 100e9 * 1e3:.3g} ->" in judge(site, 1, 12, 3, MACHINE, 0.0).why


def test_formula() -> None:
    assert "Max(" in formula()
    assert str(BREAK_EVEN) == "2*B*T*k/(P*b)"
    assert U not in BREAK_EVEN.free_symbols
