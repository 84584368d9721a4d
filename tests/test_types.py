"""What docs/models.md says of transformers' types: which have their layers with experts rewritten, and which not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dmoe_compile.passes.dmoe import Options as DMoE

import dmoe_compile
from dmoe_compile import loading

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/models.md").read_text().partition("## Types of transformers")[2]
TABLES = [dict(re.findall(r"^\| (\S+) \| (.+) \|$", part, re.MULTILINE)) for part in TEXT.split("These are refused")]
FOUND = {name: score for score, names in TABLES[0].items() for name in re.findall(r"`(\w+)`", names)}
REFUSED = {name.strip("`"): reason for name, reason in TABLES[1].items() if name.startswith("`")}
QUICK = ("qwen3_moe", "solar_open", "granitemoe", "zaya")  # of each kind one; the others nightly


def kinds(names: dict[str, str]) -> list[object]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in names]


def test_the_tables_are_read() -> None:
    assert f"lists\n{len(FOUND)} types" in (ROOT / "README.md").read_text()
    assert len(REFUSED) == 5
    assert set(FOUND.values()) == {"softmax", "sigmoid", "logits"}


@pytest.mark.parametrize("model_type", kinds(FOUND))
def test_a_type_is_found(model_type: str) -> None:
    loaded = loading.load(model_type, batch=2, tokens=40)
    sites = dmoe_compile.explain(loaded.model, **loaded.inputs).sites
    assert sites
    assert all(site.rewritten for site in sites)
    assert {site.score_function for site in sites} == {FOUND[model_type]}
    least = DMoE().min_experts  # of a coreset: where no more are used, there is nothing to save
    for site in sites:
        assert site.unique_experts_before is not None
        assert site.unique_experts_after is not None
        if site.unique_experts_before > least:
            assert least <= site.unique_experts_after < site.unique_experts_before


@pytest.mark.parametrize("model_type", kinds(REFUSED))
def test_a_type_is_refused_for_its_reason(model_type: str) -> None:
    loaded = loading.load(model_type, batch=2, tokens=40)
    report = dmoe_compile.explain(loaded.model, **loaded.inputs)
    assert not report.sites
    assert any(REFUSED[model_type] in reason for _, reason in report.refused)
