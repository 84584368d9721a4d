"""TinyMoE under the team pass, its inputs, and what it must give for tokens served from an earlier forward.

B, S: sequences, tokens of each; H: hidden
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from dmoe_compile.context import Denoising
from tiny_moe import ATEN, INDUCTOR, TinyMoE

B, S, H = 2, 8, 16
SIZE = (B, S)
SOME = torch.rand(SIZE, generator=torch.Generator().manual_seed(3)) < 0.5
ALL = torch.ones(SIZE, dtype=torch.bool)


def build(seed: int = 0) -> TinyMoE:
    torch.manual_seed(seed)
    return TinyMoE(num_experts=12, top_k=2)


def compiled(model: TinyMoE, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="dmoe", options={"passes": ["team"], **ATEN}, fullgraph=True, **kwargs)


def draw(seed: int, batch: int = B, seq: int = S) -> Tensor:
    return torch.randn(batch, seq, H, generator=torch.Generator().manual_seed(seed))


def poison(context: Denoising) -> None:
    """Fill all that is stored with NaN: what still comes out right did not read it."""
    for stored in context._store.now.values():
        stored.buffer.fill_(float("nan"))
    for spare in context._store.spare.values():
        spare.fill_(float("nan"))


def moe(out: Tensor, x: Tensor) -> Tensor:
    """Return what TinyMoE's experts gave: it adds its input."""
    return out - x


def expect(ours: Tensor, model: TinyMoE, x: Tensor, before: Tensor | None = None, decoded: Tensor = SOME) -> None:
    """Decoded tokens have the experts' outputs of `before` (an input), the others those of `x`."""
    own = moe(model(x), x)
    if before is not None:
        own = torch.where(decoded.unsqueeze(-1), moe(model(before), before), own)
    assert_close(moe(ours, x), own, **INDUCTOR)
