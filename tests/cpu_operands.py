"""dmoe::experts_cpu on the instruction sets of this machine, and how close it is to its reference."""

from __future__ import annotations

import hashlib
import itertools
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import torch
from dmoe_compile.kernels import experts_cpu as module
from dmoe_compile.kernels.experts_cpu import Isa, Operands, best_isa, built, reference
from torch import Tensor

from expert_operands import DTYPES

ISAS = get_args(Isa)
X86 = platform.machine() in ("x86_64", "AMD64")
HERE = list(ISAS[ISAS.index(best_isa()) :]) if X86 else ["portable"]  # one that has a set has those behind it
EMULATED = "emulated_amx"  # where there are pairs of bf16 but no tiles, the code for them runs on tiles in C++
if HERE[0] == "avx512_bf16":
    header = Path(__file__).with_name(f"{EMULATED}.h")
    version = hashlib.sha256(header.read_bytes()).hexdigest()[:16]  # Inductor's cache does not look into it
    flags = "-include", str(header), "-D__AMX_BF16__", f"-DHEADER=0x{version}"
    module.FLAGS[EMULATED] = (*module.FLAGS["avx512_bf16"], *flags)
    HERE.insert(0, EMULATED)
PAIRING = (EMULATED, "amx_bf16", "avx512_bf16")  # take subnormal bf16 values for zero

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
