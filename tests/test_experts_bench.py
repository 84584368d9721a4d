"""The experts figure on a tiny shape: every way is compared, held against fp32, and timed beside both probes."""

import pytest

from dmoe_compile import huge_pages
from dmoe_compile.bench import experts
from dmoe_compile.bench.experts import Settings, regime

TINY = dict(shapes=("tiny",), tokens=(16,), distinct=(0, 8), dtypes=("bfloat16",), calls=2)


def test_every_way_is_compared_and_timed() -> None:
    rows = experts.run(Settings(**TINY))
    assert [row["distinct"] for row in rows] == [0, 8]
    assert rows[0]["unique"] > rows[1]["unique"] == 8
    for row in rows:
        assert set(row["ms"]) == {"dmoe", *experts.WAYS, "read", "multiply"} - {experts.HUGE}
        assert all(ms > 0 for ms in row["ms"].values())
        assert row["fraction"] == pytest.approx(row["roofline_ms"] / row["ms"]["dmoe"])
        assert row["roofline_ms"] >= row["ms"]["read"]
    assert [len(table.rows) for table in experts.table(rows).renderables[:-1]] == [2]
    assert any("of the roofline (goal" in line for line in experts.remarks(rows))


def test_both_dtypes_and_a_slower_instruction_set() -> None:
    rows = experts.run(Settings(**TINY | dict(dtypes=experts.DTYPES, isa="portable", inductor=False, distinct=(8,))))
    assert [row["dtype"] for row in rows] == ["bfloat16", "float32"]
    assert all(row["isa"] == "portable" and "inductor" not in row["ms"] for row in rows)


def test_weights_on_huge_pages_are_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "use", lambda tensors: sum(each.nbytes for each in tensors))  # these are too small
    (row,) = experts.run(Settings(**TINY | dict(huge_pages=True, inductor=False, distinct=(8,))))
    assert row["over"][experts.HUGE] == row["ms"][experts.HUGE] / row["ms"]["dmoe"]
    assert row["huge_pages_s"] > 0


def test_without_huge_pages_there_is_no_row_for_them() -> None:
    with pytest.raises(ValueError, match="there are none to have"):
        experts.run(Settings(**TINY | dict(huge_pages=True)))


def test_a_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_TOLERANCE", {"bfloat16": 0.0})
    with pytest.raises(RuntimeError, match="a wrong kernel has no speed"):
        experts.run(Settings(**TINY))


def test_regimes() -> None:
    assert [regime(*each) for each in ((2, 1), (1.9, 1), (1, 1.9), (1, 2))] == [
        "memory-bound", "balanced", "balanced", "compute-bound"
    ]  # fmt: skip


def test_a_shape_that_is_published_with_many_tokens_has_no_row_with_few() -> None:
    settings = Settings(shapes=("DiffusionGemma-26B-A4B",))
    assert {tokens for tokens, _ in experts._sizes(settings, experts.SHAPES["DiffusionGemma-26B-A4B"])} == {256}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"calls": 0}, "calls=0"),
        ({"tokens": (0,)}, "at least one call, one token"),
        ({"shapes": ("x",)}, "shapes='x'"),
        ({"dtypes": ("int8",)}, "dtypes='int8'"),
        ({"isa": "mmx"}, "isa='mmx'"),
    ],
)
def test_bad_settings_are_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
