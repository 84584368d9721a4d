"""A Triton kernel of reductions over the columns of four rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reduce_kernel(x_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, 4)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + rows * BLOCK + columns)
    if OP == "sum":
        out = tl.sum(x, 1)
    elif OP == "amax":
        out = x.max(1)
    elif OP == "argmax":
        out = tl.argmax(x, 1)
    elif OP == "argmin":
        out = tl.argmin(x, 1)
    elif OP == "total":
        out = tl.sum(x) + tl.zeros((4,), tl.float32)
    elif OP == "product":
        out = tl.reduce(x, 1, product)
    elif OP == "last product":
        out = tl.sum(tl.where(columns == BLOCK - 1, tl.cumprod(x, 1), 0), 1)
    elif OP == "third sum":
        out = tl.sum(tl.where(columns == 2, tl.cumsum(x, 1, reverse=True), 0), 1)
    elif OP == "third":
        out = tl.sum(tl.where(columns == 2, tl.sort(x, 1, descending=True), 0), 1)
    tl.store(out_ptr + tl.arange(0, 4), out)


@triton.jit
def product(a, b):
    return a * b
