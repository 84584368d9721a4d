"""dmoe::experts_cpu: the experts of a mixture-of-experts layer on the tokens that are routed to them, in PyTorch.

    out[t] = sum over t's experts e of weights[t, e] * (down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])) + bias[e])

What kernels/experts.py does in Triton, on CPUs: a triton_op's body is traced on every device, so this is an op of its
own. `reference` is the truth for both, and check() says what either takes.

T: tokens; k: experts a token; E: experts; H, I: hidden size and expert width
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# How gate and up lie: gate_up [E, 2I, H] with the gate's rows first, or row by row in turn; gate_up [E, I, H] is the
# gate, and `up` another tensor; or there is no gate, and gate_up is all there is.
Layout = Literal["concatenated", "interleaved", "separate", "plain"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai"]


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
) -> Tensor:
    """Return the weighted sum of each token's experts, [T, H] in hidden's dtype; what is inside an expert is too.

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

    Raises:
        ValueError: for shapes, dtypes and names that don't fit.
    """
    check(hidden, ids, weights, gate_up, up, down, gate_up_bias, up_bias, down_bias, layout, transposed,
          down_transposed, activation)  # fmt: skip
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for e in ids.unique().tolist():
        if not 0 <= e < len(gate_up):
            continue
        tokens, slots = (ids == e).nonzero(as_tuple=True)
        gate = _project(hidden[tokens], gate_up[e], gate_up_bias, e, transposed)
        other = None
        if layout == "concatenated":
            gate, other = gate.chunk(2, dim=-1)
        elif layout == "interleaved":
            gate, other = gate[:, 0::2], gate[:, 1::2]
        elif up is not None:
            other = _project(hidden[tokens], up[e], up_bias, e, transposed)
        mid = activated(gate, other, activation, alpha, limit)
        result = _project(mid, down[e], down_bias, e, down_transposed)
        out[tokens] += weights[tokens, slots].float().unsqueeze(-1) * result.float()
    return out.to(hidden.dtype)


def reference(hidden: Tensor, ids: Tensor, weights: Tensor, *bank_and_form: Any) -> Tensor:
    """Return what launch() computes, [T, H] fp32, with nothing rounded below that; its arguments are launch()'s."""
    given = (hidden, ids, weights, *bank_and_form)
    args: list[Any] = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
    return launch(*args)


def activated(gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float) -> Tensor:
    """Return what an expert makes of its gate and up projections, or of the only one."""
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


def check(
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
) -> None:
    """Raise ValueError unless the operands of experts fit together; see launch() for what each is."""
    if layout not in get_args(Layout) or activation not in get_args(Activation):
        known = f"{', '.join(get_args(Layout))}, and {', '.join(get_args(Activation))}"
        raise ValueError(f"experts: layout {layout!r} and activation {activation!r} must be of {known}")
    if activation == "swigluoai" and layout == "plain":
        raise ValueError("experts: activation 'swigluoai' multiplies two projections, but layout 'plain' has one")
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16) or hidden.dim() != 2:
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
    for name, bias, size in (
        ("gate_up_bias", gate_up_bias, rows),
        ("up_bias", up_bias, width),
        ("down_bias", down_bias, columns),
    ):
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


def _fake(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(hidden.shape)


experts_cpu = torch.library.custom_op("dmoe::experts_cpu", launch, mutates_args=())
experts_cpu.register_fake(_fake)
