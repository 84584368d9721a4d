"""A KV cache that many forwards read from, and its sizes as Dynamo should see them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache


def aside(cache: DynamicCache) -> DynamicCache:
    """Return a cache of the same tensors: what a forward adds to it does not reach `cache`."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]  # a layer never writes to its tensors: it replaces them
    return other


def keep(cache: DynamicCache) -> None:
    """Move what a forward has left in a cache into memory of its own, as its shape says it lies.

    Memory of a CUDA graph's outputs is written again by its next replay; and Dynamo guards on strides, also on those of
    sizes of 1.
    """
    for layer in cache.layers:
        layer.keys, layer.values = (
            each.clone(memory_format=torch.contiguous_format) for each in (layer.keys, layer.values)
        )


def compact(x: Tensor) -> Tensor:
    """Return a tensor of the strides that follow from its shape, which Dynamo guards on: also those of sizes of 1."""
    usual = torch.empty(x.shape, device="meta").stride()
    return x if x.stride() == usual else x.clone(memory_format=torch.contiguous_format)


def mark_sizes(cache: DynamicCache, mask: Tensor, ids: Tensor, positions: Tensor, *, whole: bool) -> None:
    """Tell Dynamo which sizes change: one graph for all lengths of the cache, not one each until it gives up.

    Args:
        cache: of the sequence so far.
        mask: [R, 1, S, P + S].
        ids, positions: [R, S].
        whole: S is that of every denoising step, and a number in its graphs, though a prompt has another: the kernels
            for GPUs are chosen by it.
    """
    stored = [each for layer in cache.layers for each in (layer.keys, layer.values) if isinstance(each, Tensor)]
    stored = [each for each in stored if each.dim() == 4]
    for each in (mask, ids, positions, *stored):
        torch._dynamo.mark_static(each, 0)
    if whole:
        for each, dim in ((mask, 2), (ids, 1), (positions, 1)):
            torch._dynamo.mark_static(each, dim)
    for each in stored:
        torch._dynamo.maybe_mark_dynamic(each, 2)
    torch._dynamo.maybe_mark_dynamic(mask, 3)
