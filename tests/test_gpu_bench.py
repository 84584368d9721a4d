"""The GPU figure, run where there is no GPU: its rows, and what it says without one."""

import pytest
import torch

from dmoe_compile.bench import gpu
from dmoe_compile.bench.gpu import Settings


@pytest.mark.usefixtures("aten")
def test_every_way_is_compared_and_timed() -> None:
    rows = gpu.run(Settings(shapes=("tiny",), calls=2, device="cpu"))
    ways = {row["way"]: row for row in rows}
    assert set(ways) == {*gpu.WAYS, "eager, grouped_mm"}
    assert ways["inductor"]["faster"] == 1
    assert ways["inductor"]["unique"] == ways["dmoe, no pass"]["unique"] > ways["dmoe 0.6"]["unique"] >= 4
    assert all(row["ms"] > 0 and len(row["spread_ms"]) == 2 for row in rows)
    assert len(gpu.table(rows).rows) == len(rows)


def test_a_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="what is wrong has no speed"):
        gpu.run(Settings(shapes=("tiny",), calls=1, device="cpu"))


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_an_eighth_of_the_tokens_may_have_another_expert(value: float) -> None:
    own = torch.randn(32, 8)
    other = own.clone()
    other[:4] *= value
    gpu.hold(other, own, "it")
    other[4] *= value
    with pytest.raises(RuntimeError, match="it is off by"):
        gpu.hold(other, own, "it")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_there_is_instead() -> None:
    with pytest.raises(ValueError, match=r"sees no GPU; install"):
        Settings()


@pytest.mark.parametrize(("wrong", "message"), [({"calls": 0}, "calls=0"), ({"shapes": ("x",)}, "shapes='x'")])
def test_bad_settings_are_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"device": "cpu", **wrong})
