"""Count the distinct experts that routed tokens use: what decides the bytes of expert weights a layer reads.

T: tokens, k: experts a token, E: experts of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def launch(ids: Tensor, routed: Tensor | None, num_experts: int) -> Tensor:
    """Return the number of distinct experts, [] int64, on the device of `ids`: nothing waits for the host.

    Args:
        ids: [T, k] int64, each in [0, num_experts).
        routed: [T] bool, the tokens that count; None means all.
        num_experts: E.

    A token that does not count hits one slot past the experts, which is cut off.
    """
    hits = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    if routed is not None:
        ids = torch.where(routed.unsqueeze(-1), ids, num_experts)
    return hits.index_fill_(0, ids.reshape(-1), 1)[:num_experts].sum()


def reference(ids: Tensor, routed: Tensor | None, num_experts: int) -> Tensor:
    """What launch computes, by sorting out duplicates on the host."""
    counted = ids if routed is None else ids[routed]
    return torch.tensor(len(set(counted.flatten().tolist())), device=ids.device)


count_experts = torch.library.custom_op("dmoe::count_experts", launch, mutates_args=())
count_experts.register_fake(lambda ids, routed, num_experts: ids.new_empty((), dtype=torch.int64))
