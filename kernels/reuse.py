"""A layer's output from its experts' partial sums, with what was stored for decoded tokens, stored anew; one launch.

    out: [R, S, H] = where(roles == DECODED, stored[rows], sum(partials)), and then stored = out

TEAM's delayed caching (arXiv 2602.08404; passes/team.py) at the end of a layer of fused experts. Left to Inductor it is
a sum, an index_select, a where and a copy back, and the copy waits for all that reads `stored`. Here each element is
read and written once: of a decoded token nothing but what was stored, of another one nothing but its partial sums.

The rows of a sequence's candidates may all go on from one of them, so a program holds one position of all candidates
and reads them before it writes any. Sums run from the first partial to the last: equal inputs, equal outputs.

    P: partial sums; R, S: rows, tokens of a row; T = R * S; H: width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_ELEMENTS = 1024  # of a program: 128 threads x 8 bf16 = one 16-byte access each
_NUM_WARPS = 2 if torch.version.hip else 4  # AMD's have 64 threads

_DECODED: tl.constexpr = tl.constexpr(2)  # as passes/limit.py numbers roles


@triton.jit
def _reuse_kernel(
    partials_ptr,
    stored_ptr,
    rows_ptr,
    roles_ptr,
    out_ptr,
    seq,
    tokens,
    P: tl.constexpr,
    H: tl.constexpr,
    CANDIDATES: tl.constexpr,
    LANES: tl.constexpr,  # places for candidates, a power of two
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    position = tl.program_id(1)
    lanes = tl.arange(0, LANES)[:, None]
    present = lanes < CANDIDATES
    row = tl.program_id(2) * CANDIDATES + lanes
    source = tl.load(rows_ptr + row, mask=present, other=0)
    token = row * seq + position
    decoded = tl.load(roles_ptr + token, mask=present, other=0) == _DECODED

    inside = present & (columns < H)
    kept = tl.load(stored_ptr + (source * seq + position) * H + columns, mask=inside & decoded)
    at = token.to(tl.int64) * H + columns
    total = tl.load(partials_ptr + at, mask=inside & ~decoded, other=0)
    for p in tl.static_range(1, P):  # a count of 1 is a constant to Triton, and has no .to()
        total += tl.load(partials_ptr + p * tl.cast(tokens, tl.int64) * H + at, mask=inside & ~decoded, other=0)
    out = tl.where(decoded, kept, total.to(kept.dtype))

    tl.debug_barrier()  # what one warp stores, another may have yet to read for its own candidate
    tl.store(stored_ptr + at, out, mask=inside)
    tl.store(out_ptr + at, out, mask=inside)


def launch(partials: Tensor, stored: Tensor, rows: Tensor, roles: Tensor, candidates: int) -> Tensor:
    """Return the layer's output, [T, H] in stored's dtype, and write it to `stored`.

    Args:
        partials: [P, T, H] fp32, contiguous, what kernels/experts.py makes.
        stored: [R, S, H] fp32, bf16 or fp16, contiguous, the last forward's outputs; changed in place.
        rows: [R] int64, contiguous, the row of `stored` that each row goes on from: one of its own sequence, which
            nobody checks.
        roles: [R, S] int8, contiguous, see passes/limit.py; decoded tokens take what was stored.
        candidates: consecutive rows that are versions of one sequence.

    Raises:
        ValueError: for what unsupported() says.
    """
    why = unsupported(partials, stored, rows, roles, candidates)
    if why is not None:
        raise ValueError(f"reuse: {why}")
    num_partials, tokens, width = partials.shape
    batch, seq, _ = stored.shape
    lanes, block = _tile(candidates)
    out = stored.new_empty((tokens, width))
    wrap_triton(_reuse_kernel)[(triton.cdiv(width, block), seq, batch // candidates)](
        partials,
        stored,
        rows,
        roles,
        out,
        seq,
        tokens,
        P=num_partials,
        H=width,
        CANDIDATES=candidates,
        LANES=lanes,
        BLOCK=block,
        num_warps=_NUM_WARPS,
    )
    return out


def reference(partials: Tensor, stored: Tensor, rows: Tensor, roles: Tensor, candidates: int) -> Tensor:
    """What launch computes, bit for bit, in plain PyTorch; `candidates` only says which rows go together."""
    total = partials[0]
    for each in partials[1:]:
        total = total + each
    decoded = (roles == _DECODED.value).unsqueeze(-1)
    stored.copy_(torch.where(decoded, stored.index_select(0, rows), total.view(stored.shape).to(stored.dtype)))
    return stored.flatten(0, 1).clone()


def unsupported(partials: Tensor, stored: Tensor, rows: Tensor, roles: Tensor, candidates: int) -> str | None:
    """Say why launch() does not take these arguments, None if it does; tensors may be fake."""
    if stored.dim() != 3 or not stored.is_floating_point() or stored.itemsize > 4 or not stored.is_contiguous():
        return f"stored must be [R, S, H], fp32, bf16 or fp16, contiguous; got {_described(stored)}"
    batch, seq, width = stored.shape
    for name, each, dtype, shape in (
        ("partials", partials, torch.float32, (*partials.shape[:1], batch * seq, width)),
        ("rows", rows, torch.int64, (batch,)),
        ("roles", roles, torch.int8, (batch, seq)),
    ):
        if each.dtype != dtype or each.shape != shape or not each.is_contiguous():
            wanted = f"{dtype} {list(shape)}, contiguous"
            return f"{name} must be {wanted}, for stored {list(stored.shape)}; got {_described(each)}"
        if each.device != stored.device:
            return f"{name} must be on {stored.device}, as stored is; got {each.device}"
    if partials.shape[0] < 1:
        return "partials has no partial sum: there must be at least one"
    if candidates < 1 or batch % candidates:
        return f"{batch} rows are not sequences of candidates={candidates} rows each"
    return None


def _tile(candidates: int) -> tuple[int, int]:
    """Return the places for candidates and the columns of a program."""
    lanes = triton.next_power_of_2(candidates)
    return lanes, max(32, _ELEMENTS // lanes)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"


reuse = triton_op("dmoe::reuse", launch, mutates_args=("stored",))
