"""A block whose tokens disagree, and its routing under a tight coreset: what the tests of constrain and layouts run.

B, S: sequences, tokens per sequence; L: tokens of a block; T = B*S; E, k: experts, experts per token; H: model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reference_model import Gate, MoeBlock, Rewriting

E, H, K, L = 16, 8, 2, 4
TIGHT = {"block_length": L, "dmoe.top_p": 0.3, "dmoe.min_experts": K}
GROUPS = {"no groups": (1, 1), "groups": (4, 2)}


def tight_block(groups: tuple[int, int] = (1, 1)) -> MoeBlock:
    """Return a block whose tokens disagree enough for a coreset to change the routing of most."""
    gate = Gate(E, H, K, groups)
    gate.weight.data.normal_()
    return MoeBlock(gate)


def run(model: nn.Module, *args: Any, dynamic: bool = False, **options: Any) -> tuple[Any, Rewriting]:
    torch._dynamo.reset()
    rewriting = Rewriting(**{**TIGHT, **options})
    return torch.compile(model, backend=rewriting, fullgraph=True, dynamic=dynamic)(*args), rewriting


def coresets(rewriting: Rewriting, batch: int) -> Tensor:
    """Return [B, S, E] what each token may use at the one site."""
    (ranked,) = rewriting.ranked
    return ranked.view(batch, -1, E) > -torch.inf


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit: the same graph ran on the same numbers."""
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
