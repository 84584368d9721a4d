"""The coresets figure: scores as concentrated as published ones, and rows that keep what each method promises."""

import pytest

from dmoe_compile.bench import coresets
from dmoe_compile.bench.coresets import BLOCK, EXPERT_BYTES, NUM_EXPERTS, PUBLISHED, TOP_K, Settings


@pytest.fixture(scope="module")
def rows():
    return {row["method"]: row for row in coresets.run(Settings(blocks=32, calls=3))}


def test_scores_are_as_concentrated_as_published_ones(rows):
    own = rows["the model's own"]
    assert PUBLISHED[0] < own["unique"] < PUBLISHED[1]
    assert own["kept"] == own["kept_worst"] == 1
    _, scores = coresets.calibrated(Settings(blocks=8))
    assert scores.shape == (8, BLOCK, NUM_EXPERTS)


def test_every_method_reads_fewer_and_none_more_than_its_coreset(rows):
    for name, row in rows.items():
        assert TOP_K <= row["unique"] <= row["coreset"] + 1e-4
        assert 0 <= row["kept_worst"] <= row["kept"] <= 1
        if name != "the model's own":
            assert row["unique"] <= rows["the model's own"]["unique"]


def test_papers_operating_points_are_near(rows):
    """Within a fifth: scores are synthetic, and the released dMoE never chooses fewer than 16 experts."""
    marked = [row for row in rows.values() if row["paper"]]
    assert len(marked) == 5
    for row in marked:
        assert row["unique"] == pytest.approx(row["paper"], rel=0.2)


def test_cover_keeps_its_promise_to_the_worst_token(rows):
    masses = [0.7, 0.8, 0.9, 0.95, 0.99]
    kept = [rows[f"cover, mass {mass}"] for mass in masses]
    assert all(row["kept_worst"] >= mass - 1e-5 for row, mass in zip(kept, masses, strict=True))
    assert [row["unique"] for row in kept] == sorted(row["unique"] for row in kept)


def test_every_rule_is_timed(rows):
    """No absolute time is asserted; that it was taken, and of which experts the share is."""
    for row in rows.values():
        assert row["floor_ms"] == pytest.approx(row["unique"] * EXPERT_BYTES / row["gb_per_s"] / 1e6)
        assert row["of_layer"] == pytest.approx(row["rule_ms"] / row["floor_ms"])
    assert rows["the model's own"]["rule_ms"] == 0
    assert "of layer" in [column.header for column in coresets.table(list(rows.values())).columns]


@pytest.mark.parametrize("values", [{"blocks": 0}, {"calls": 0}, {"spread": 0.0}, {"spread": float("nan")}], ids=str)
def test_settings_that_mean_nothing_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Settings(**values)
