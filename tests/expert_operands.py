"""Operands of the ops for experts, dmoe::experts and dmoe::experts_cpu, and the forms that they come in.

T, H, F: tokens, hidden size, expert width; E, k: experts, experts a token
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from dmoe_compile.kernels.experts_cpu import Activation, Layout
from torch import Tensor

LAYOUTS, ACTIVATIONS = get_args(Layout), get_args(Activation)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS: Mapping[str, Sequence[Any]] = dict(
    layout=LAYOUTS,
    activation=ACTIVATIONS,
    dtype=DTYPES,
    transposed=[False, True],
    down_transposed=[False, True],
    biases=[False, True],
)


def forms(**others: Sequence[Any]) -> list[dict[str, Any]]:
    """Return every form, and of each every value of what other options there are."""
    options = {**FORMS, **others}
    every = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    return [form for form in every if (form["layout"], form["activation"]) != ("plain", "swigluoai")]


def operands(
    ids: Tensor,
    E: int,
    *,
    H: int = 72,  # whole steps of every instruction set and a rest; a whole tile of 64 and one of 8
    F: int = 40,
    dtype: torch.dtype = torch.float32,
    layout: str = "concatenated",
    transposed: bool = False,
    down_transposed: bool = False,
    activation: str = "silu",
    biases: bool = False,
) -> dict[str, Any]:
    """Return the arguments of either op's launch() for these ids. Whatever no pair needs is NaN."""
    unrouted = (ids < 0) | (ids >= E)
    used = set(ids[~unrouted].tolist())
    unused = [e for e in range(E) if e not in used]

    def bank(rows: int, *columns: int, swapped: bool = False) -> Tensor:
        drawn = torch.randn(E, rows, *columns) / (columns[0] ** 0.5 if columns else 1)
        drawn[unused] = torch.nan
        return (drawn.mT.contiguous() if swapped else drawn).to(dtype)

    rows = 2 * F if layout in ("concatenated", "interleaved") else F
    separate = layout == "separate"
    return dict(
        hidden=torch.randn(len(ids), H).masked_fill(unrouted.all(1, keepdim=True), torch.nan).to(dtype),
        ids=ids,
        weights=torch.rand(ids.shape).masked_fill(unrouted, torch.nan),
        gate_up=bank(rows, H, swapped=transposed),
        up=bank(F, H, swapped=transposed) if separate else None,
        down=bank(H, F, swapped=down_transposed),
        gate_up_bias=bank(rows) if biases else None,
        up_bias=bank(F) if biases and separate else None,
        down_bias=bank(H) if biases else None,
        layout=layout,
        transposed=transposed,
        down_transposed=down_transposed,
        activation=activation,
        alpha=1.702,
        limit=1.5,  # some of the values of these tests are beyond it
    )


def routing(T: int, E: int, k: int) -> Tensor:
    """Return ids, [T, k], of the first two thirds of the experts; some pairs, and every fifth token, are unrouted."""
    ids = torch.rand(T, E)[:, : max(k, 2 * E // 3)].argsort(-1)[:, :k]
    ids = torch.where(torch.rand(T, k) < 0.1, E, ids)
    ids[4::5] = torch.tensor([-1, E, 10**10] * k)[:k]
    return ids
