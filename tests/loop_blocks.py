"""Blocks whose experts are in a Python loop, for the tests of prepare(): which, an input, the output, how close."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import forms

LOOPS = [name for name, form in forms.FORMS.items() if form.prepared]
OF_LISTS = [name for name in LOOPS if name != "expert_hit"]
HIDDEN = forms.CONFIG["hidden_size"]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 16, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def output(block: Callable[..., Any], x: Tensor) -> Tensor:
    with torch.no_grad():
        result = block(x)
    return result[0] if isinstance(result, tuple) else result


def replaced(block: nn.Module) -> bool:
    return hasattr(block, "_dmoe_kind")


class Wrapper(nn.Module):
    """Experts in a module of their own, which is called with (hidden, ids, weights)."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mlps = experts

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.mlps.children()):
            tokens, places = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, places, None])
        return out
