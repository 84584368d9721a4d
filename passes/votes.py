"""Votes of a block's tokens for experts, and the experts that have most of them: what several policies share.

N: blocks; L: tokens of a block; E, k: experts, experts a token
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_votes(scores: Tensor, ids: Tensor, voting: Tensor) -> Tensor:
    """Return [N, E] fp32: the sum, over a block's voting tokens, of the scores of each one's top-k.

    Where a selected score is negative, a vote is taken relative to the token's smallest selected score: a negative
    vote would push an expert behind those nobody asked for.

    Args:
        scores: [N, L, E] fp32.
        ids: [N, L, k] int64, every token's own top-k.
        voting: [N, L] bool.
    """
    picked = scores.gather(-1, ids)
    picked = picked - picked.amin(-1, keepdim=True).clamp(max=0)
    picked = torch.where(voting.unsqueeze(-1), picked, 0)
    return torch.zeros_like(scores).scatter(-1, ids, picked).sum(1)


def union(ids: Tensor, voting: Tensor, num_experts: int) -> Tensor:
    """Return the experts that any voting token of a block has in `ids` [N, L, n], [N, E] bool."""
    wanted = voting.unsqueeze(-1).expand_as(ids).to(torch.float32)
    return torch.zeros(*ids.shape[:2], num_experts, device=ids.device).scatter(-1, ids, wanted).amax(1) > 0


def best(votes: Tensor, size: int) -> Tensor:
    """Return the `size` experts with most votes, [N, E] bool; a tie goes to the lower index.

    Args:
        votes: [N, E].
        size: experts of each block.
    """
    order = votes.sort(dim=-1, descending=True, stable=True).indices[..., :size]
    return torch.zeros_like(votes, dtype=torch.bool).scatter(-1, order, True)


def topped_up(inside: Tensor, votes: Tensor, size: int) -> Tensor:
    """Return a coreset with at least `size` experts, [N, E] bool: those with most votes of the others are added.

    Args:
        inside: [N, E] bool.
        votes: [N, E].
        size: experts of each block.
    """
    order = votes.sort(dim=-1, descending=True, stable=True).indices
    # A second stable sort, by membership: the coreset's own experts first, then the others by votes.
    first = inside.gather(-1, order).to(torch.int8).sort(dim=-1, descending=True, stable=True)
    kept = (first.values > 0) | (torch.arange(inside.shape[-1], device=inside.device) < size)
    return torch.zeros_like(inside).scatter(-1, order.gather(-1, first.indices), kept)
