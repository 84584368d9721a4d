"""dmoe::store writes its first operand, in eager code and where Inductor compiles it, and is fused with nothing."""

from __future__ import annotations

import pytest
import torch
from dmoe_compile.kernels.store import launch, reference
from torch import Tensor


def test_it_is_what_the_reference_does() -> None:
    new = torch.randn(2, 3, 4)
    stored, other = torch.full_like(new, float("nan")), torch.zeros_like(new)
    launch(stored, new)
    reference(other, new)
    assert torch.equal(stored, new)
    assert torch.equal(other, new)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.dmoe.store.default, (torch.zeros(2, 3), torch.ones(2, 3)))


@torch.no_grad()
def test_inductor_writes_the_callers_tensor_after_it_was_read() -> None:
    def step(stored: Tensor, x: Tensor) -> Tensor:
        out = stored + x
        torch.ops.dmoe.store(stored, out * 2)
        return out

    stored, x = torch.ones(4), torch.ones(4)
    compiled = torch.compile(step, fullgraph=True)
    assert compiled(stored, x).tolist() == [2] * 4
    assert stored.tolist() == [4] * 4
    assert compiled(stored, x).tolist() == [5] * 4
    assert stored.tolist() == [10] * 4


@pytest.mark.parametrize("new", [torch.ones(3), torch.ones(2, 3, dtype=torch.bfloat16)], ids=["broadcast", "rounded"])
def test_what_is_not_alike_is_refused(new: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be alike; got torch.float32 \[2, 3\] on cpu and"):
        launch(torch.zeros(2, 3), new)
