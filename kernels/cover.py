"""Choose, greedily, the fewest experts with which every token of a block keeps its share of routing weight.

A token t is served by a coreset C as far as its own top-k lies in it: min(sum of its weights in C, need[t]), where
need[t] is `mass` times the sum of all its k weights. What a block is served, f(C), is monotone and submodular. Each
step takes the expert that raises f most, until every token has what it needs; of equals the one with more weight in
all, then the lower index.

Guarantee (Wolsey 1982, Combinatorica 2:385, the greedy rule for submodular covering): if the smallest coreset that
serves all has OPT experts and greedy takes g, then g <= 1 + OPT * ln(f(all) / rest), where `rest` is what was still
missing before the last step: each step serves at least 1/OPT of what is missing.

N: blocks; L: tokens of a block; E, k: experts, experts a token
"""

from __future__ import annotations

import ctypes

import torch
from dmoe_compile.kernels.native import library
from torch import Tensor

_SERVED = 1e-6  # of a token's need: a rest this small is the rounding of fp32 sums


def launch(ids: Tensor, weights: Tensor, voting: Tensor, num_experts: int, mass: float, max_experts: int) -> Tensor:
    """Return the coreset of each block, [N, E] bool.

    Args:
        ids: [N, L, k] int64, every token's own top-k, distinct.
        weights: [N, L, k] fp32, not negative, the routing weight of each.
        voting: [N, L] bool, the tokens that count.
        num_experts: E.
        mass: share of its routing weight that a token needs, in (0, 1].
        max_experts: largest coreset.

    Raises:
        ValueError: for shapes that don't fit, or, on a CPU, an id that is no expert.
    """
    if weights.shape != ids.shape or voting.shape != ids.shape[:2]:
        got = f"ids {list(ids.shape)}, weights {list(weights.shape)} and voting {list(voting.shape)}"
        raise ValueError(f"cover needs ids and weights [N, L, k] and voting [N, L], got {got}")
    kernel = library("cover") if ids.device.type == "cpu" else None
    if kernel is None:
        return greedy(ids, weights, voting, num_experts, mass, max_experts)
    operands = ids.contiguous(), weights.float().contiguous(), voting.contiguous()
    inside = torch.zeros(len(ids), num_experts, dtype=torch.bool)
    pointers = (ctypes.c_void_p(each.data_ptr()) for each in (*operands, inside))
    sizes = (ctypes.c_int64(size) for size in (*ids.shape, num_experts))
    rule = ctypes.c_double(mass), ctypes.c_int64(max_experts), ctypes.c_double(_SERVED)
    if kernel.cover(*pointers, *sizes, *rule):
        raise ValueError(f"cover: an id is not in [0, {num_experts}); the largest is {ids.max()}")
    return inside


def greedy(ids: Tensor, weights: Tensor, voting: Tensor, num_experts: int, mass: float, max_experts: int) -> Tensor:
    """Return what launch() does, in PyTorch: for GPUs, and where there is no C++ compiler.

    The trip count is fixed, max_experts, so that nothing waits for the host on a GPU; on a CPU the loop ends once
    every token has what it needs, with the same result.
    """
    blocks, tokens, _ = ids.shape
    dtype = torch.float32 if ids.device.type == "mps" else torch.float64  # as the kernel counts; Metal has no more
    given = torch.where(voting.unsqueeze(-1), weights.to(dtype), 0).transpose(1, 2)  # [N, k, L]
    # Tokens come last: rows are all summed in one order, so that experts that serve the same stay equal.
    left = torch.zeros(blocks, num_experts, tokens, dtype=dtype, device=ids.device)  # of experts not chosen
    left = left.scatter(1, ids.transpose(1, 2), given)
    popular = left.sum(-1)
    need = mass * given.sum(1, keepdim=True)
    least = _SERVED * need
    inside = torch.zeros(blocks, num_experts, dtype=torch.bool, device=ids.device)
    for _ in range(min(max_experts, num_experts)):
        gains = torch.minimum(left, need).sum(-1)
        gain = gains.amax(-1, keepdim=True)
        best = torch.where(gains == gain, popular, -1).argmax(-1, keepdim=True)
        if ids.device.type == "cpu" and not (gain > 0).any():
            break
        inside |= torch.zeros_like(inside).scatter(-1, best, gain > 0)
        row = best.unsqueeze(-1).expand(blocks, 1, tokens)
        need = need - left.gather(1, row)
        need = torch.where(need > least, need, 0)
        left = left.scatter(1, row, 0)
    return inside


def reference(ids: Tensor, weights: Tensor, voting: Tensor, num_experts: int, mass: float, max_experts: int) -> Tensor:
    """What launch computes, token by token in Python."""
    inside = torch.zeros(len(ids), num_experts, dtype=torch.bool)
    for n, (block, given, votes) in enumerate(zip(ids.tolist(), weights.tolist(), voting.tolist(), strict=True)):
        tokens = [dict(zip(*token, strict=True)) for *token, here in zip(block, given, votes, strict=True) if here]
        total = [mass * sum(token.values()) for token in tokens]
        need = list(total)
        popular = [sum(token.get(e, 0.0) for token in tokens) for e in range(num_experts)]
        for _ in range(min(max_experts, num_experts)):
            gains = [
                sum(min(token.get(e, 0.0), rest) for token, rest in zip(tokens, need, strict=True))
                if not inside[n, e]
                else 0.0
                for e in range(num_experts)
            ]
            best = max(range(num_experts), key=lambda e: (gains[e], popular[e], -e))
            if gains[best] <= 0:
                break
            inside[n, best] = True
            need = [rest - token.get(best, 0.0) for token, rest in zip(tokens, need, strict=True)]
            need = [rest if rest > _SERVED * whole else 0.0 for rest, whole in zip(need, total, strict=True)]
    return inside.to(ids.device)


def _fake(ids: Tensor, weights: Tensor, voting: Tensor, num_experts: int, mass: float, max_experts: int) -> Tensor:
    return ids.new_empty((ids.shape[0], num_experts), dtype=torch.bool)


cover = torch.library.custom_op("dmoe::cover", launch, mutates_args=())
cover.register_fake(_fake)
