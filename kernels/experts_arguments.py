"""What dmoe::experts takes; the names are those of launch() in experts.py."""

from __future__ import annotations

from math import isfinite

import torch
from dmoe_compile.kernels import experts_cpu
from dmoe_compile.kernels.experts_cpu import Operands
from dmoe_compile.kernels.limits import MAX_TOKENS
from torch import Tensor


def check(given: Operands, active: Tensor | None, counts: Tensor | None) -> None:
    """Raise ValueError, in words for a report, for what launch() does not take; tensors may be fake."""
    experts_cpu.check(given)
    hidden, ids, gate_up, down = given.hidden, given.ids, given.gate_up, given.down
    if 0 in (*gate_up.shape, *down.shape, ids.shape[1]):
        got = f"gate_up {list(gate_up.shape)}, down {list(down.shape)} and ids {list(ids.shape)}"
        raise ValueError(f"experts: {got} have a dimension of 0, which leaves nothing to compute")
    if hidden.shape[0] > MAX_TOKENS:  # no len(): it makes a number of a symbolic size
        raise ValueError(
            f"experts: T={hidden.shape[0]} tokens, but at most {MAX_TOKENS} are worth it, as every program searches "
            "them all; a grouped matmul of tokens sorted by expert takes more"
        )
    for name in ("weights", "gate_up_bias", "up_bias", "down_bias"):
        floats = getattr(given, name)
        if floats is not None and not floats.is_floating_point():
            raise ValueError(f"experts: {name} is {floats.dtype}, but must be a float type")
        if floats is not None and name != "weights" and not floats.is_contiguous():
            raise ValueError(f"experts: {name} has strides {floats.stride()}, but must be contiguous")
    if given.up_bias is not None and given.layout != "separate":
        raise ValueError(f"experts: up_bias is given, but with layout {given.layout!r} all biases are in gate_up_bias")
    if (active is None) != (counts is None):
        raise ValueError("experts: active and counts are the two halves of one list; give both or neither")
    for name, numbers, shape in (("active", active, (1, gate_up.shape[0])), ("counts", counts, (1,))):
        if numbers is not None and (tuple(numbers.shape) != shape or numbers.dtype != torch.int32):
            got = f"{numbers.dtype}{list(numbers.shape)}"
            raise ValueError(f"experts: {name} is {got}, but must be int32{list(shape)}, of one block")
    alpha, limit = given.alpha, given.limit
    if given.activation == "swigluoai" and not (isfinite(alpha) and isfinite(limit) and limit > 0):
        raise ValueError(f"experts: alpha={alpha} and limit={limit} of 'swigluoai' must be finite, and limit above 0")
