"""Operands of dmoe::experts_cpu, its instruction sets on this machine, and how close it is to its reference.

T, H, I: tokens, hidden size, expert width; E, k: experts, experts a token
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import torch
from dmoe_compile.kernels import experts_cpu as module
from dmoe_compile.kernels.experts_cpu import Activation, Isa, Layout, Operands, best_isa, built, reference
from torch import Tensor

LAYOUTS, ACTIVATIONS, ISAS = get_args(Layout), get_args(Activation), get_args(Isa)
X86 = platform.machine() in ("x86_64", "AMD64")
HERE = ISAS[ISAS.index(best_isa()) :] if X86 else ["portable"]  # one that has a set has those behind it
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# mid and the result are rounded once each, by at most half this share of themselves; what is summed is smaller than the
# largest output. fp32 has no such rounding: there it is the sums' order, over up to 200 terms, and erf's 1.5e-7.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-18}


def build_two_at_a_time() -> None:
    """Most of a test file's time in a fresh cache is the compiler, which is another process."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: built(*pair), itertools.product(DTYPES, HERE)))


def on(isa: str) -> Callable[..., Tensor]:
    """Return launch() on an instruction set, for operands that fit."""

    def run(**args: Any) -> Tensor:
        dtype = args.pop("out_dtype", args["hidden"].dtype)
        return module.run(built(args["hidden"].dtype, isa), Operands(**args), dtype)

    return run


def operands(
    ids: Tensor,
    E: int,
    *,
    H: int = 72,  # whole steps of every instruction set, and a rest
    I: int = 40,  # noqa: E741
    dtype: torch.dtype = torch.float32,
    layout: str = "concatenated",
    transposed: bool = False,
    down_transposed: bool = False,
    activation: str = "silu",
    biases: bool = False,
) -> dict[str, Any]:
    """Return launch()'s arguments for these ids. Whatever no pair needs is NaN: tokens, weights, experts."""
    unrouted = (ids < 0) | (ids >= E)
    used = set(ids[~unrouted].tolist())
    unused = [e for e in range(E) if e not in used]

    def bank(rows: int, *columns: int, swapped: bool = False) -> Tensor:
        drawn = torch.randn(E, rows, *columns) / (columns[0] ** 0.5 if columns else 1)
        drawn[unused] = torch.nan
        return (drawn.mT.contiguous() if swapped else drawn).to(dtype)

    rows = 2 * I if layout in ("concatenated", "interleaved") else I
    separate = layout == "separate"
    return dict(
        hidden=torch.randn(len(ids), H).masked_fill(unrouted.all(1, keepdim=True), torch.nan).to(dtype),
        ids=ids,
        weights=torch.rand(ids.shape).masked_fill(unrouted, torch.nan),
        gate_up=bank(rows, H, swapped=transposed),
        up=bank(I, H, swapped=transposed) if separate else None,
        down=bank(H, I, swapped=down_transposed),
        gate_up_bias=bank(rows) if biases else None,
        up_bias=bank(I) if biases and separate else None,
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


def check(isa: str, args: dict[str, Any]) -> Tensor:
    out = on(isa)(**args)
    truth = reference(Operands(**args))
    assert out.dtype == args["hidden"].dtype
    assert not truth.isnan().any()
    slots = (dict(ids=args["ids"][:, [k]], weights=args["weights"][:, [k]]) for k in range(args["ids"].shape[1]))
    summed = sum(reference(Operands(**args | slot)).abs() for slot in slots)  # may be more than is left of it
    # Where the terms of a projection cancel out, its error is that of the terms: what they come to with random signs.
    squares = {name: x.square() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in args.items()}
    squares["activation"] = "relu2" if args["activation"] == "relu2" else "relu"
    terms = reference(Operands(**squares)).sqrt()
    bound = ROUNDING[args["hidden"].dtype] * max(float(summed.max()), float(terms.max()), 1e-3)
    torch.testing.assert_close(out.float(), truth, rtol=0, atol=bound)
    return out
