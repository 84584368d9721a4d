"""What dmoe::route takes, and what its kernel is compiled for; the names are those of launch() in route.py."""

from __future__ import annotations

import torch
import triton
from dmoe_compile.kernels.limits import MAX_TOKENS
from torch import Tensor

_MAX_EXPERTS = 512
_CHUNK = 16  # tokens at once, two of each warp
# Scores at once, at most: 16 registers for each tensor of them. With 32, 16 tokens of 512 experts, little is left.
_CHUNK_SCORES = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCORES = ("softmax", "sigmoid", "logits")
_GROUP_SCORES = ("max", "top2")
_WEIGHTINGS = ("scores", "renormalised", "softmax")
_METHODS = ("own", "dmoe", "des_seq", "des_vote")


def constants(
    num_experts: int,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
    weighting: str,
    scale: float,
    method: str,
    p: float,
    size: int,
    candidates: int,
) -> dict[str, int | float | str]:
    """Return what the kernel is compiled for; the names are launch()'s. What has no effect has one value."""
    group_lanes = triton.next_power_of_2(num_experts // groups)
    lanes = group_lanes * triton.next_power_of_2(groups)
    least = 1 if method == "des_seq" else top_k
    return {
        "E": num_experts,
        "TOP_K": top_k,
        "SCORE": score,
        "GROUPS": groups,
        "TOP_GROUPS": top_groups,
        "GROUP_SCORE": group_score if groups > 1 else "",
        "WEIGHTING": weighting,
        "SCALE": float(scale),
        "METHOD": method,
        "P": float(p) if method == "dmoe" else 0.0,
        "SIZE": min(max(size, least), num_experts) if method != "own" else 0,
        "CANDIDATES": candidates,
        "CHUNK": min(_CHUNK, _CHUNK_SCORES // lanes),
        "GROUP_LANES": group_lanes,
        "LANES": lanes,
        "SLOTS": triton.next_power_of_2(top_k),
    }


def unsupported(
    logits: Tensor,
    bias: Tensor | None,
    expert_scale: Tensor | None,
    roles: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    group_score: str,
    weighting: str,
    scale: float,
    method: str,
    p: float,
    size: int,
    batch: int,
    seq: int,
    block_length: int,
    whole: bool,
    candidates: int,
) -> str | None:
    """Say why launch() does not take these arguments, None if it does; tensors may be fake."""
    for name, value, known in (
        ("score", score, _SCORES),
        ("group_score", group_score, _GROUP_SCORES),
        ("weighting", weighting, _WEIGHTINGS),
        ("method", method, _METHODS),
    ):
        if value not in known:
            return f"{name}={value!r} is none of: {', '.join(known)}"
    if logits.dim() != 2 or logits.dtype not in _DTYPES or not logits.is_contiguous():
        got = f"{logits.dtype} {list(logits.shape)} with strides {logits.stride()}"
        return f"logits must be [T, E], fp32, bf16 or fp16, contiguous; got {got}"
    tokens, num_experts = logits.shape
    for name, each in (("bias", bias), ("expert_scale", expert_scale)):
        if each is None:
            continue
        if each.shape != (num_experts,) or each.dtype not in _DTYPES or not each.is_contiguous():
            got = f"{each.dtype} {list(each.shape)} with strides {each.stride()}"
            return f"{name} must be [{num_experts}], fp32, bf16 or fp16, contiguous; got {got}"
    if roles is not None and (roles.shape != (tokens,) or roles.dtype != torch.int8 or not roles.is_contiguous()):
        got = f"{roles.dtype} {list(roles.shape)} with strides {roles.stride()}"
        return f"roles must be [{tokens}] int8, contiguous; got {got}"
    devices = {each.device for each in (logits, bias, expert_scale, roles) if each is not None}
    if len(devices) > 1:
        return f"logits, bias, scale and roles are on {len(devices)} devices: {', '.join(sorted(map(str, devices)))}"
    if num_experts > _MAX_EXPERTS:
        return f"{num_experts} experts are more than {_MAX_EXPERTS}: the scores of a chunk would leave the registers"
    if not 0 < tokens <= MAX_TOKENS:
        return f"{tokens} tokens are not between 1 and {MAX_TOKENS}: longer forwards gain nothing from one launch"
    if batch * seq != tokens:
        return f"{tokens} tokens are not batch={batch} rows of seq={seq}"
    if not 1 <= top_k <= num_experts:
        return f"top_k={top_k} is not between 1 and {num_experts}, the experts there are"
    if groups < 1 or num_experts % groups or not 1 <= top_groups <= groups:
        kept = f"each token keeps top_groups={top_groups}"
        return f"{num_experts} experts can't be cut into groups={groups} of which {kept}"
    if groups > 1 and group_score == "top2" and groups == num_experts:
        return f"groups={groups} of one expert have no best two to sum: use group_score='max'"
    if triton.next_power_of_2(num_experts // groups) * triton.next_power_of_2(groups) > _MAX_EXPERTS:
        padded = f"more than {_MAX_EXPERTS} lanes when padded to powers of two"
        return f"groups={groups} of {num_experts // groups} experts need {padded}"
    if size < 1 and method != "own":
        return f"size={size} must be at least 1: the experts of a coreset, or those of each token that make it"
    if block_length < 1:
        return f"block_length={block_length} must be at least 1"
    if candidates < 1 or batch % candidates:
        return f"batch={batch} rows are not sequences of candidates={candidates} rows each"
    if roles is not None and (batch != candidates if whole else seq > block_length):
        got = f"batch={batch}, seq={seq}, block_length={block_length}, whole={whole}, candidates={candidates}"
        return f"roles limit the tokens of a sequence among themselves, so it must be one block; got {got}"
    return None
