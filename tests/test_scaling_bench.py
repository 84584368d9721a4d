"""`dmoe bench scaling` on a tiny layer: what is on its axes, and that the picture is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmoe_compile.bench import scaling
from dmoe_compile.bench.scaling import Settings


@pytest.fixture(scope="module")
def rows(aten: None) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "LENGTHS", (1, 64))
        patch.setattr(scaling, "BATCHES", (2,))
        patch.setattr(scaling, "_CORESET", 5)
        return scaling.run(Settings("tiny", calls=2, dtype="float32"))


def found(rows: list[dict[str, Any]], sweep: str) -> dict[tuple[int, str], int]:
    return {(row["value"], row["way"]): row["unique"] for row in rows if row["sweep"] == sweep}


def test_the_experts_in_use_are_those_of_the_axis(rows: list[dict[str, Any]]) -> None:
    sizes = (4, 8, 16)
    assert found(rows, "experts") == {(size, way): size for size in sizes for way in ("inductor", "dmoe")}


def test_tokens_use_more_experts(rows: list[dict[str, Any]]) -> None:
    counts = found(rows, "tokens")
    assert counts[1, "dmoe"] == counts[1, "inductor"] == 4
    assert counts[64, "dmoe"] == 16


def test_one_coreset_for_a_batch_is_smaller_than_one_for_each_block(rows: list[dict[str, Any]]) -> None:
    counts = found(rows, "batch")
    assert counts[2, "dmoe, batch"] == 5
    assert 5 < counts[2, "dmoe, block"] <= 10
    assert counts[2, "inductor"] == counts[2, "dmoe"] == 16


def test_the_roofline_is_the_larger_of_reading_and_multiplying(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        read = (row["unique"] * 3 * 64 * 32 * 4 + row["other_bytes"]) / row["gb_per_s"] / 1e6
        work = 2 * row["tokens"] * (4 * 3 * 64 * 32 + row["other_bytes"] / 4) / row["tflop_per_s"] / 1e9
        assert row["floor_ms"] == pytest.approx(max(read, work))
        assert row["ms"] > 0


def test_a_picture_and_a_row_for_each_way(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    png, svg = scaling.draw(rows, tmp_path / "scaling")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.stat().st_size > 10_000
    assert len(scaling.table(rows).rows) == len(rows)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"calls": 0}, "calls=0"), ({"shape": "x"}, "shape='x'"), ({"sweeps": ("x",)}, "sweeps='x'"),
     ({"dtype": "int8"}, "dtype='int8'"), ({"threads": 0}, "threads=0")],
)  # fmt: skip
def test_bad_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
