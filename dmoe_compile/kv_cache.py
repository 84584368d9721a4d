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


def compact(x: Tensor) -> Tensor:
    """Return a tensor of the strides that follow from its shape, which Dynamo guards on: also those of sizes of 1."""
    usual = torch.empty(x.shape, device="meta").stride()
    return x if x.stride() == usual else x.clone(memory_format=torch.contiguous_format)


def mark_sizes(cache: DynamicCache, mask: Tensor, *others: Tensor) -> None:
    """Tell Dynamo that the cache grows and rows don't: one graph for all lengths, not one each until it gives up."""
    stored = [each for layer in cache.layers for each in (layer.keys, layer.values) if isinstance(each, Tensor)]
    stored = [each for each in stored if each.dim() == 4]
    for each in (mask, *others, *stored):
        torch._dynamo.mark_static(each, 0)
    for each in stored:
        torch._dynamo.maybe_mark_dynamic(each, 2)
    torch._dynamo.maybe_mark_dynamic(mask, 3)
