"""What an expert layer costs at least, and whether fewer experts make it cheaper.

A layer reads the weights of the experts in use once, and multiplies each token by k of them: it takes at least

    max(U * m*H*I*b / B, 2 * T*k * m*H*I / P) seconds

    T, k: tokens, experts a token; U: unique experts; H, I: hidden size and expert width; m: matrices of an expert
    b: bytes of a weight; B: memory bandwidth in bytes/s; P: peak in FLOP/s
Fewer experts pay as long as the first term is the larger one. Activations are left out: weights are over 94% of what a
layer of real width reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from dmoe_compile.passes.nodes import shape
from dmoe_compile.passes.sites import Site

T, K, U, H, WIDTH, M, BYTES, BANDWIDTH, PEAK = sympy.symbols("T k U H I m b B P", positive=True)

READ = U * M * H * WIDTH * BYTES / BANDWIDTH
COMPUTE = 2 * T * K * M * H * WIDTH / PEAK
FLOOR = sympy.Max(READ, COMPUTE)
BREAK_EVEN = COMPUTE / (READ / U)  # the U at which both take as long


@dataclass(frozen=True)
class Machine:
    """What a device does at best: reads, in GB/s, and multiplies in the experts' dtype, in TFLOP/s."""

    gb_per_s: float
    tflop_per_s: float


@dataclass(frozen=True)
class Gpu:
    """What a GPU does at best: reads, in GB/s, and multiplies, in TFLOP/s, half precision and exact fp32 (no TF32)."""

    gb_per_s: float
    half: float
    fp32: float

    def machine(self, itemsize: int) -> Machine:
        """Return what it does with weights of this many bytes."""
        return Machine(self.gb_per_s, self.half if itemsize < 4 else self.fp32)


# What vendors state: A100 80 GB SXM, H100 SXM, B200, MI300X.
GPUS = {
    "sm_80": Gpu(2039, 312, 19.5),
    "sm_90": Gpu(3350, 989, 67),
    "sm_100": Gpu(8000, 2250, 75),
    "gfx942": Gpu(5300, 1307, 163),
}


@dataclass(frozen=True)
class Verdict:
    """Whether a coreset pays at a site; `why` says it with its numbers."""

    pays: bool
    why: str


def formula() -> str:
    """Return the cost of a layer, and what follows from it, in symbols."""
    return f"a layer takes at least {FLOOR} s; fewer experts pay while U > {BREAK_EVEN}"


def judge(site: Site, tokens: int, unique: float, coreset: float, machine: Machine, min_gain: float) -> Verdict:
    """Return whether `coreset` experts instead of `unique` save `min_gain` of what a site's experts take at least.

    Args:
        site: the layer.
        tokens: T of the forward.
        unique: experts that the model's own routing uses.
        coreset: experts that are used inside the coreset.
        machine: where it runs.
        min_gain: the smallest gain worth a coreset, as a share: what choosing it may cost.
    """
    known = {**_sizes(site), T: tokens, BANDWIDTH: machine.gb_per_s * 1e9, PEAK: machine.tflop_per_s * 1e12}
    floor = FLOOR.subs(known)
    own, ours = (float(floor.subs(U, count)) for count in (unique, coreset))
    pays = ours <= (1 - min_gain) * own
    why = (
        f"a coreset {'pays' if pays else 'would not pay'}: {unique:g} -> {coreset:g} unique experts, at least "
        f"{own * 1e3:.3g} -> {ours * 1e3:.3g} ms; reading is the limit above "
        f"{float(BREAK_EVEN.subs(known)):.3g} experts (T={tokens}, k={site.top_k}, {machine.gb_per_s:.3g} GB/s, "
        f"{machine.tflop_per_s:.3g} TFLOP/s)"
    )
    return Verdict(pays, why)


def reading_limits(site: Site, tokens: int, gpu: Gpu) -> bool:
    """Say whether a site's experts take longer to read than to multiply by, where tokens choose them evenly."""
    unique = site.num_experts * (1 - (1 - site.top_k / site.num_experts) ** tokens)
    sizes = _sizes(site)
    machine = gpu.machine(sizes[BYTES])
    known = {**sizes, T: tokens, U: unique, BANDWIDTH: machine.gb_per_s * 1e9, PEAK: machine.tflop_per_s * 1e12}
    return bool(READ.subs(known) >= COMPUTE.subs(known))


def _sizes(site: Site) -> dict[Any, Any]:
    """Return k, H, I, m and b of a site's experts: the narrowest of their matrices is as wide as I."""
    hidden = (shape(site.combine) or (1,))[-1]
    values = [weight.meta["val"] for weight in site.expert_weights]
    each = [value.numel() // site.num_experts for value in values]
    width = sympy.Rational(min(each), hidden)
    size = max(value.element_size() for value in values)
    return {K: site.top_k, H: hidden, WIDTH: width, M: sum(each) / (hidden * width), BYTES: size}
