"""The figure of a whole decoder layer, on a tiny one."""

from __future__ import annotations

from typing import Any

import pytest

from dmoe_compile.bench import layer
from dmoe_compile.bench.layer import Settings


@pytest.fixture(scope="module")
def rows(aten: None) -> dict[str, dict[str, Any]]:
    found = layer.run(Settings(shapes=("tiny",), coreset=5, calls=2, dtype="float32"))
    return {row["way"]: row for row in found}


def test_every_way_is_timed_against_inductor(rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == [*layer.WAYS, "routing, cold", "routing"]
    assert rows["inductor"]["faster"] == 1
    assert all(row["ms"] > 0 and row["faster"] > 0 and row["gb_per_s"] > 0 for row in rows.values())
    assert rows["routing"]["share"] == rows["routing"]["ms"] / rows["kernel + dmoe"]["ms"]
    assert rows["routing"]["ms"] > 64 * 16 * 4 / rows["routing"]["gb_per_s"] / 1e6  # the router's weights alone


def test_the_coreset_is_as_small_as_asked_for(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["inductor"]["unique"] == rows["kernel"]["unique"] == 16
    assert rows["kernel + dmoe"]["unique"] == 5


def test_what_reading_takes(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["kernel + dmoe"]
    assert row["read_ms"] == pytest.approx(5 * 3 * 64 * 32 * 4 / row["gb_per_s"] / 1e6)


def test_a_row_for_each_way_and_a_remark_for_each_shape(rows: dict[str, dict[str, Any]]) -> None:
    assert len(layer.table(list(rows.values())).rows) == len(rows)
    (remark,) = layer.remarks(list(rows.values()))
    assert "tiny: kernel " in remark


def test_a_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "_TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="a wrong kernel has no speed"):
        layer.run(Settings(shapes=("tiny",), coreset=5, calls=1, dtype="float32"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"calls": 0}, "calls=0"), ({"coreset": 0}, "coreset=0"), ({"shapes": ("x",)}, "shapes='x'"),
     ({"dtype": "int8"}, "dtype='int8'"), ({"threads": 0}, "threads=0")],
)  # fmt: skip
def test_bad_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
