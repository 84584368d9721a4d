"""Limited activation, TEAM's second rule: cold tokens choose among the experts that other tokens of their block use.

A cold token is still masked, far from every known token and unsure: what it computes is thrown away in this step. N is
the union of what the computed tokens that are not cold choose, inside their coreset, over all candidates of one
sequence, never across sequences. With none of them there is no limit in that step.

Source: TEAM, arXiv 2602.08404.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What a token is in a denoising step, as an int8. Hot and cold tokens are computed; decoded ones take their stored
# expert outputs; idle ones (of a finished sequence) are nobody's concern. Only hot tokens vote.
HOT, COLD, DECODED, IDLE = range(4)


def allowed(ranked: Tensor, inside: Tensor, hot: Tensor, cold: Tensor, candidates: int, top_k: int) -> Tensor:
    """Return the experts each token may use, [R*S, E] bool: hot tokens their coreset, cold ones what is hot in it.

    Where fewer than k experts of a cold token's coreset are hot, it has all of them: the coreset is never left. Hot
    tokens of other blocks choose from other coresets.

    Args:
        ranked: [R*S, E], what the selection would rank without the limit.
        inside: [R*S, E] bool, the coreset of each token.
        hot: [R, S] bool, tokens that are computed and not cold.
        cold: [R, S] bool.
        candidates: rows of one sequence, one after the other.
        top_k: experts a token.
    """
    rows, num_experts = hot.shape[0], ranked.shape[-1]
    chosen = ranked.topk(top_k, dim=-1).indices
    wanted = hot.reshape(-1, 1).expand_as(chosen).to(torch.float32)
    used = torch.zeros_like(ranked, dtype=torch.float32).scatter(-1, chosen, wanted)
    necessary = used.reshape(rows // candidates, -1, num_experts).amax(1) > 0
    necessary = necessary | ~necessary.any(-1, keepdim=True)
    of_rows = necessary.unsqueeze(1).expand(-1, candidates, num_experts).reshape(rows, 1, num_experts)
    limited = inside & torch.where(cold.unsqueeze(-1), of_rows, True).reshape(inside.shape)
    return torch.where(limited.sum(-1, keepdim=True) >= top_k, limited, inside)
