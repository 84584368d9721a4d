"""dmoe::experts_cpu: the experts of a mixture-of-experts layer on the tokens that are routed to them, on CPUs.

    out[t] = sum over t's experts e of weights[t, e] * (down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])) + bias[e])

What kernels/experts.py does in Triton, on CPUs: a triton_op's body is traced on every device, so this is an op of its
own. `reference` is the truth for both, and check() says what either takes. The kernel is kernels/experts.cpp, built at
first use for the hidden state's dtype and what the machine has; where there is no compiler, `composed` runs instead.

Numerics of the kernel: products and sums in fp32; act(gate) * up is rounded once, to hidden's dtype, and the sum over
experts once, to the result's. A token's experts are added in the order of their ids, each times its routing weight, in
fp32. With avx512_bf16 and amx_bf16, subnormal bf16 values count as zero in products.
Batch invariance: a token's result has the same bits alone and in any batch, with any number of threads, every time.

After a fork it is as it is with PyTorch's own operations: a child hangs at its first parallel region if the parent has
had one. Fork before, spawn, or set one thread in the child.

T: tokens; k: experts a token; E: experts; H, I: hidden size and expert width
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from dmoe_compile.kernels.native import library
from torch import Tensor

# How gate and up lie: gate_up [E, 2I, H] with the gate's rows first, or row by row in turn; gate_up [E, I, H] is the
# gate, and `up` another tensor; or there is no gate, and gate_up is all there is.
Layout = Literal["concatenated", "interleaved", "separate", "plain"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai"]
# What the kernel is compiled for, the fastest first, and what of torch.cpu.get_capabilities() that takes.
Isa = Literal["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"]
_AVX2 = ("avx2", "fma3", "f16c")
_AVX512 = (*_AVX2, "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_NEEDS: dict[Isa, tuple[str, ...]] = {
    "amx_bf16": (*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512_bf16": (*_AVX512, "avx512_bf16"), "avx512": _AVX512, "avx2": _AVX2, "portable": ()
}  # fmt: skip
_O2 = "-O2"  # Inductor's -O3 takes a third longer to compile, and its copies of the inner loops spill registers
_AVX512_FLAGS = (_O2, "-march=haswell", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
FLAGS: dict[Isa, tuple[str, ...]] = {
    "amx_bf16": (*_AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": (*_AVX512_FLAGS, "-mavx512bf16"),
    "avx512": _AVX512_FLAGS,
    "avx2": (_O2, "-march=haswell"),
    "portable": (_O2, "-march=x86-64") if platform.machine() in ("x86_64", "AMD64") else (_O2,),
}
_ELEMENTS = {torch.float32: "float", torch.bfloat16: "BFloat", torch.float16: "Half"}  # as the source names them


class Operands(NamedTuple):
    """The experts of a layer and the tokens that are routed to them; launch() says what each is."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    gate_up: Tensor
    up: Tensor | None
    down: Tensor
    gate_up_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    layout: str
    transposed: bool
    down_transposed: bool
    activation: str
    alpha: float
    limit: float


def launch(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_up_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: str,
    transposed: bool,
    down_transposed: bool,
    activation: str,
    alpha: float,
    limit: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the weighted sum of each token's experts, [T, H].

    Args:
        hidden: [T, H] fp32, bf16 or fp16.
        ids: [T, k] int; any outside [0, E) is a sentinel: that pair is not routed. A token's own are distinct.
        weights: [T, k] float, routing weights.
        gate_up: [E, 2I, H], or [E, I, H], as `layout` says.
        up: [E, I, H] where `layout` is "separate", else None.
        down: [E, H, I].
        gate_up_bias: [E, 2I] or [E, I], one for each row of gate_up.
        up_bias: [E, I].
        down_bias: [E, H].
        layout: see Layout.
        transposed: the last two dims of gate_up and up are swapped.
        down_transposed: those of down are.
        activation: see Activation. "swigluoai" is gpt-oss's: (up + 1) * gate * sigmoid(alpha * gate), clamped.
        alpha: of "swigluoai".
        limit: of "swigluoai", the largest gate and the largest up of either sign.
        out_dtype: of the result, fp32, bf16 or fp16; hidden's if left out.

    Raises:
        ValueError: for shapes, dtypes and names that don't fit.
        MemoryError: if the kernel gets no memory to work in.
    """
    given = Operands(hidden, ids, weights, gate_up, up, down, gate_up_bias, up_bias, down_bias, layout, transposed,
                     down_transposed, activation, alpha, limit)  # fmt: skip
    check(given, out_dtype)
    kernel = built(hidden.dtype) if hidden.device.type == "cpu" and down.numel() else None
    if kernel is None:
        return composed(given, out_dtype or hidden.dtype)
    return run(kernel, given, out_dtype or hidden.dtype)


def available(dtype: torch.dtype) -> bool:
    """Whether the kernel can be built here; if not, a model's own way is faster than `composed`."""
    return built(dtype) is not None


@functools.cache
def built(dtype: torch.dtype, isa: Isa | None = None) -> Callable[..., int] | None:
    """Return the kernel for a dtype of hidden, None where it can't be built.

    Args:
        dtype: fp32, bf16 or fp16.
        isa: what to build for, this machine's best if left out; one that it lacks ends the process when called.
    """
    best = best_isa()  # which also asks the system for AMX's registers
    found = library("experts", (*FLAGS[isa or best], f"-DELEMENT={_ELEMENTS[dtype]}"))
    if found is None:
        return None
    pointers, sizes, numbers = [ctypes.c_void_p] * 10, [ctypes.c_int64] * 5, [ctypes.c_int] * 5
    found.experts.argtypes = [*pointers, *sizes, *numbers, ctypes.c_float, ctypes.c_float, ctypes.c_int]
    return found.experts


@functools.cache
def best_isa() -> Isa:
    """Return the fastest instruction set of Isa that this machine has."""
    has = torch.cpu.get_capabilities()
    found = [isa for isa, needs in _NEEDS.items() if all(has.get(each) for each in needs)]
    return found[1] if found[0] == "amx_bf16" and not _amx_works() else found[0]


def _amx_works() -> bool:
    """Ask the compiler, GCC from 11 on, and the system, Linux from 5.16 on, as Inductor does."""
    from torch._inductor.cpu_vec_isa import VecAMX

    try:
        return bool(VecAMX())
    except Exception:  # as library() has it, which says so
        return False


def run(kernel: Callable[..., int], given: Operands, out_dtype: torch.dtype) -> Tensor:
    """Return what launch() does, by the kernel; operands are those that check() has let pass."""
    hidden = given.hidden
    out = torch.empty(hidden.shape, dtype=out_dtype)
    if out.numel() == 0:
        return out
    biases = given.gate_up_bias, given.up_bias, given.down_bias
    routed = hidden.contiguous(), given.ids.to(torch.int64).contiguous(), given.weights.to(torch.float32).contiguous()
    added = (None if bias is None else bias.to(hidden.dtype).contiguous() for bias in biases)
    operands = (*routed, given.gate_up, given.up, given.down, *added, out)  # held until the call returns
    width = given.down.shape[1 if given.down_transposed else 2]
    sizes = *given.ids.shape, given.gate_up.shape[0], hidden.shape[1], width
    form = (
        list(_ELEMENTS).index(out_dtype), get_args(Layout).index(given.layout), given.transposed, given.down_transposed,
        get_args(Activation).index(given.activation), given.alpha, given.limit, torch.get_num_threads(),
    )  # fmt: skip
    if kernel(*(None if x is None else x.data_ptr() for x in operands), *sizes, *form):
        size = tuple(given.ids.shape)
        raise MemoryError(f"experts: no memory to work in for T, k = {size}; call it on fewer tokens?")
    return out


def composed(given: Operands, out_dtype: torch.dtype) -> Tensor:
    """Return what launch() does, in PyTorch, which rounds to hidden's dtype after every operation of an expert."""
    hidden, ids, layout = given.hidden, given.ids, given.layout
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for e in ids.unique().tolist():
        if not 0 <= e < len(given.gate_up):
            continue
        tokens, slots = (ids == e).nonzero(as_tuple=True)
        gate = _project(hidden[tokens], given.gate_up[e], given.gate_up_bias, e, given.transposed)
        other = None
        if layout == "concatenated":
            gate, other = gate.chunk(2, dim=-1)
        elif layout == "interleaved":
            gate, other = gate[:, 0::2], gate[:, 1::2]
        elif given.up is not None:
            other = _project(hidden[tokens], given.up[e], given.up_bias, e, given.transposed)
        mid = activated(gate, other, given.activation, given.alpha, given.limit)
        result = _project(mid, given.down[e], given.down_bias, e, given.down_transposed)
        out[tokens] += given.weights[tokens, slots].float().unsqueeze(-1) * result.float()
    return out.to(out_dtype)


def reference(given: Operands) -> Tensor:
    """Return what launch() computes, [T, H] fp32, with nothing rounded below that."""
    wide: Any = (x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)
    return composed(Operands(*wide), torch.float32)


def activated(gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float) -> Tensor:
    """Return what an expert makes of its gate and up projections, [..., I] each, or of the only one.

    Args:
        gate, up: of one shape and dtype; `up` is None where there is one projection.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2" (its square) or "swigluoai".
        alpha, limit: of "swigluoai": slope of its sigmoid, and where both are clamped.
    """
    if activation == "swigluoai":
        assert up is not None
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    if activation == "gelu_tanh":
        acted = F.gelu(gate, approximate="tanh")
    elif activation == "relu2":
        acted = F.relu(gate).square()
    elif activation == "silu":
        acted = F.silu(gate)
    else:
        acted = F.gelu(gate) if activation == "gelu" else F.relu(gate)
    return acted if up is None else acted * up


def check(given: Operands, out_dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless the operands of experts fit together."""
    hidden, ids, weights, gate_up, up, down, *biases, layout, transposed, down_transposed, activation, _, _ = given
    if out_dtype not in (None, *_ELEMENTS):
        raise ValueError(f"experts: out_dtype is {out_dtype}, but must be fp32, bf16 or fp16")
    if layout not in get_args(Layout) or activation not in get_args(Activation):
        known = f"{', '.join(get_args(Layout))}, and {', '.join(get_args(Activation))}"
        raise ValueError(f"experts: layout {layout!r} and activation {activation!r} must be of {known}")
    if activation == "swigluoai" and layout == "plain":
        raise ValueError("experts: activation 'swigluoai' multiplies two projections, but layout 'plain' has one")
    if hidden.dtype not in _ELEMENTS or hidden.dim() != 2:
        raise ValueError(f"experts: hidden is {_describe(hidden)}, but must be fp32, bf16 or fp16 [T, H]")
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != hidden.shape[0] or ids.is_floating_point():
        got = f"ids {_describe(ids)} and weights {_describe(weights)}"
        raise ValueError(f"experts: {got} must both be [T, k] with T={hidden.shape[0]}, ids integers")
    num_experts, rows, columns = gate_up.shape if gate_up.dim() == 3 else (0, 0, 0)
    rows, columns = (columns, rows) if transposed else (rows, columns)
    width = rows // 2 if layout in ("concatenated", "interleaved") else rows
    down_shape = (num_experts, width, columns) if down_transposed else (num_experts, columns, width)
    if columns != hidden.shape[1] or tuple(down.shape) != down_shape or (rows != width and rows % 2):
        raise ValueError(
            f"experts: gate_up {_describe(gate_up)} and down {_describe(down)} do not fit H={hidden.shape[1]} as "
            f"layout {layout!r}, transposed={transposed}, down_transposed={down_transposed}"
        )
    if (up is None) != (layout != "separate") or (up is not None and up.shape != gate_up.shape):
        got = "None" if up is None else _describe(up)
        raise ValueError(f"experts: up is {got}; with layout 'separate' it is like gate_up, with others None")
    operands = (ids, weights, gate_up, up, down, *biases)
    if any(x is not None and x.device != hidden.device for x in operands):
        got = ", ".join(str(x.device) for x in (hidden, *operands) if x is not None)
        raise ValueError(f"experts: operands are on {got}, but must be on one device")
    names = ("gate_up_bias", "up_bias", "down_bias")
    for name, bias, size in zip(names, biases, (rows, width, columns), strict=True):
        if bias is not None and tuple(bias.shape) != (num_experts, size):
            raise ValueError(f"experts: {name} is {_describe(bias)}, but must be [{num_experts}, {size}]")
    for name, operand in (("gate_up", gate_up), ("up", up), ("down", down)):
        if operand is not None and (operand.dtype != hidden.dtype or not operand.is_contiguous()):
            raise ValueError(
                f"experts: {name} is {_describe(operand)} with strides {operand.stride()}, but must be contiguous and "
                f"{hidden.dtype} as hidden is; it is read as it lies"
            )


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, transposed: bool) -> Tensor:
    own = None if bias is None else bias[expert].to(x.dtype)
    return F.linear(x, weight.T if transposed else weight, own)


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _fake(hidden: Tensor, *rest: object, out_dtype: torch.dtype | None = None) -> Tensor:
    given = rest[-1] if isinstance(rest[-1], torch.dtype) else out_dtype
    return hidden.new_empty(hidden.shape, dtype=given or hidden.dtype)


experts_cpu = torch.library.custom_op("dmoe::experts_cpu", launch, mutates_args=())
experts_cpu.register_fake(_fake)
