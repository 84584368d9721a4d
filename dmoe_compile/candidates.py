"""TEAM's candidates: which tokens are hopeless, what is guessed, and which candidate of a block goes on.

Source: TEAM, arXiv 2602.08404.

B: sequences; C: candidates of each; L: block length; n: tokens that are guessed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dmoe_compile.passes.team import Options


def cold_tokens(masked: Tensor, known: Tensor, confidence: Tensor, team: Options) -> Tensor:
    """Return the masked tokens that nothing speaks for, [B, L] bool: far from known ones, unsure, none of the surest.

    Args:
        masked: [B, L] bool, tokens that are not known yet.
        known: [B, L] bool, those that are, and those that are speculated on.
        confidence: [B, L], probability of each token's prediction in the last step.
        team: `distance`, `confidence` and `candidates`.
    """
    cold = masked & (_distance(known) > team.distance) & (confidence < team.confidence)
    return cold.scatter(1, most_confident(masked, confidence, team), False)


def most_confident(masked: Tensor, confidence: Tensor, team: Options) -> Tensor:
    """Return the positions of the most confident masked tokens, best first, [B, n] int64, n at most team.candidates.

    Args:
        masked: [B, L] bool, tokens that are not known yet.
        confidence: [B, L], probability of each token's prediction in the last step.
        team: `candidates`.
    """
    sure = torch.where(masked, confidence.float(), -torch.inf)
    return sure.topk(min(team.candidates, sure.shape[1]), dim=1).indices


def filled_in(ids: Tensor, places: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """Return the candidates of each block, [B, C, L]: as it is, with the first token, the second, both.

    Args:
        ids: [B, L] int64, the block.
        places, tokens: [B, n] int64, what is filled in where.
        masked: [B, L] bool; other places stay.
    """
    rows = [ids]
    for i in range(places.shape[1]):
        at = places[:, i : i + 1]
        token = torch.where(masked.gather(1, at), tokens[:, i : i + 1], ids.gather(1, at))
        rows += [row.scatter(1, at, token) for row in rows]
    return torch.stack(rows, 1)


def verify(predicted: Tensor, moved: Tensor, places: Tensor) -> Tensor:
    """Return the candidate of each sequence that the next step goes on from, [B] int64.

    Args:
        predicted: [B, C, L], what each candidate predicts; where it was given a token, that token.
        moved: [B, C, L] bool, what each candidate commits.
        places: [B, n], the positions that were filled in: the first in candidate 1, the second in 2, both in 3.
    """

    def agrees(one: int, other: int, place: int) -> Tensor:
        at = places[:, place : place + 1]
        first, second = predicted[:, one].gather(1, at), predicted[:, other].gather(1, at)
        return (moved[:, one].gather(1, at) & (first == second)).squeeze(1)

    first = agrees(0, 1, 0)
    choice = first.long()
    if predicted.shape[1] == 2:
        return choice
    second = agrees(0, 2, 1)
    both = (first & second) | (first & agrees(1, 2, 1)) | (second & agrees(2, 1, 0))
    choice = torch.where(~first & second, 2, choice)
    return torch.where(both, 3, choice)


def _distance(known: Tensor) -> Tensor:
    """Return how far each position is from the nearest known one, [B, L] int64; L where none is known."""
    length = known.shape[1]
    places = torch.arange(length, device=known.device)
    apart = (places.unsqueeze(0) - places.unsqueeze(1)).abs()
    return torch.where(known.unsqueeze(1), apart, length).amin(-1)
