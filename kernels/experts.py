"""dmoe::experts: the experts of a mixture-of-experts layer on the tokens routed to them, in two GPU launches.

    mid[t, e]   = act(gate[e] @ hidden[t]) * (up[e] @ hidden[t]) * weights[t, e]    the first; rounded once, here
    partials[p] = a share of the sum over e of down[e] @ mid[t, e] + bias * weight  the second

The layer's result is partials.sum(0), left to the caller: Inductor fuses it with the residual and the next norm, and
as no program adds to what another wrote, equal inputs give equal bits.

A denoising step is bound by the bytes of the experts it reads: each weight should be read once, by 16-byte
asynchronous loads, and nothing may wait for the host. Either launch has two variants.

    dense over T: with a list of the experts in use, every listed expert multiplies all T tokens, which costs no more
        time than its own few: the weights are read anyway, and tensor cores take no fewer than 8. The first launch
        keeps an expert's own products. The second sums over the whole list, in SPLIT shares, and sees zeros for what
        is not an expert's own; as its sums stay in registers, it is for more tokens, in tiles, than the first.
    routed: more tokens, or no list. A program owns some rows of one expert, finds that expert's tokens by scanning
        all ids, and takes every TILES-th tile of them. The second launch writes a partial for each of a token's k
        experts, which for many tokens are as many bytes as some experts' weights.

The programs with the other tiles of tokens are neighbours in the grid: they read the same weights at about the same
time, from the cache. Between the launches lie the products of each token and each of its experts, [T * k, F].

Grids are fixed; programs past the end of the list, or of an expert without tokens, exit at once. The weights are the
left operand of every tl.dot: Hopper's and Blackwell's tensor cores want 64 rows there, of which 32 tokens are half.
Layouts are strides, known when compiling, on the weights as they lie; masks are only where a tile does not fit.

T, H, F: tokens, hidden size, expert width; E, k: experts, experts a token; A: list entries that there are programs for
P: partials, SPLIT or k; BT, BN, BK: tokens, rows and depth (the dimension summed over) of a tile; KP: k as power of 2
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from dmoe_compile.kernels.experts_arguments import check
from dmoe_compile.kernels.experts_cpu import Operands
from dmoe_compile.kernels.limits import DENSE_TOKENS, LISTED_TOKENS
from dmoe_compile.kernels.tiles import candidates, default_config, target_of, tuned
from torch import Tensor
from torch.library import wrap_triton

_SCAN = tl.constexpr(64)  # tokens that a step of that scan looks at


@triton.jit
def _gate_up_kernel(
    hidden_ptr, ids_ptr, weights_ptr, gate_up_ptr, up_ptr, gate_up_bias_ptr, up_bias_ptr, active_ptr, counts_ptr,
    mid_ptr, T,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    EXPERT: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, UP: tl.constexpr,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    ROUTED: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of F x TILES, A; without a list, E). TILES is 1 unless ROUTED."""
    TWO: tl.constexpr = LAYOUT == "concatenated" or LAYOUT == "separate"
    # Rows of gate and up that lie in turn are read as one tile and told apart after the sum: loads stay 16 bytes wide.
    IN_TURN: tl.constexpr = LAYOUT == "interleaved"
    BR: tl.constexpr = 2 * BN if IN_TURN else BN
    R: tl.constexpr = 2 * F if IN_TURN else F
    EVEN: tl.constexpr = F % BN == 0 and H % BK == 0
    FILL: tl.constexpr = None if EVEN else 0
    block, tile = tl.program_id(0), 0
    if ROUTED:
        block, tile = block // TILES, block % TILES
    rows = block * BR + tl.arange(0, BR)
    depth = tl.arange(0, BK)
    slots = tl.arange(0, KP)
    places = tl.arange(0, BT)
    expert = tl.program_id(1)
    if active_ptr is not None:
        if expert >= tl.load(counts_ptr):
            return
        expert = tl.load(active_ptr + expert)
    if ROUTED:
        num_tokens = 0
        for start in tl.range(0, T, _SCAN, num_stages=1):
            seen = start + tl.arange(0, _SCAN)
            known = (seen < T)[:, None] & (slots < K)[None, :]
            ids = tl.load(ids_ptr + seen[:, None] * K + slots[None, :], mask=known, other=-1)
            num_tokens += tl.sum((ids == expert).to(tl.int32))
    else:
        num_tokens = BT  # a loop of one step, which the compiler removes
    at = expert.to(tl.int64) * EXPERT  # all experts together can have more than 2**31 weights
    gate_ptrs = gate_up_ptr + at + rows[:, None] * ROW + depth[None, :] * COLUMN
    if LAYOUT == "separate":
        up_ptrs = up_ptr + at + rows[:, None] * ROW + depth[None, :] * COLUMN
    else:
        up_ptrs = gate_ptrs + UP
    for first in range(tile * BT, num_tokens, TILES * BT):
        if ROUTED:
            inside = first + places < num_tokens
            tokens = tl.zeros((BT,), tl.int32)
            before = 0
            for start in tl.range(0, T, _SCAN, num_stages=1):
                seen = start + tl.arange(0, _SCAN)
                known = (seen < T)[:, None] & (slots < K)[None, :]
                ids = tl.load(ids_ptr + seen[:, None] * K + slots[None, :], mask=known, other=-1)
                skipped, before = _skipped(ids == expert, before, first + places)
                tokens += skipped
        else:
            tokens = places
            inside = tokens < T
        known = inside[:, None] & (slots < K)[None, :]
        pairs = tokens[:, None] * K + slots[None, :]
        own = tl.load(ids_ptr + pairs, mask=known, other=-1) == expert
        given = tl.load(weights_ptr + pairs, mask=known, other=0).to(tl.float32)
        weight = tl.sum(tl.where(own, given, 0.0), 1)
        into = tl.max(tl.where(own, pairs, -1), 1)

        hidden_ptrs = hidden_ptr + tokens[:, None] * H + depth[None, :]
        gate = tl.zeros((BR, BT), tl.float32)
        up = tl.zeros((BR, BT), tl.float32)
        for k in range(0, H, BK):
            within = None if EVEN else (rows < R)[:, None] & (k + depth < H)[None, :]
            there = inside[:, None] if H % BK == 0 else inside[:, None] & (k + depth < H)[None, :]
            x = tl.load(hidden_ptrs + k, mask=there, other=0).T
            # evict_first: nobody else reads them. Triton 3.7 forgets it where the load becomes an asynchronous copy.
            w = tl.load(gate_ptrs + k * COLUMN, mask=within, other=FILL, eviction_policy="evict_first")
            gate = tl.dot(w, x, gate, input_precision="ieee")
            if TWO:
                w = tl.load(up_ptrs + k * COLUMN, mask=within, other=FILL, eviction_policy="evict_first")
                up = tl.dot(w, x, up, input_precision="ieee")

        if gate_up_bias_ptr is not None:
            bias_ptrs = gate_up_bias_ptr + expert * (2 * F if LAYOUT == "concatenated" else R) + rows
            gate += tl.load(bias_ptrs, mask=rows < R, other=0).to(tl.float32)[:, None]
            if LAYOUT == "concatenated":
                up += tl.load(bias_ptrs + F, mask=rows < R, other=0).to(tl.float32)[:, None]
        if up_bias_ptr is not None:
            up += tl.load(up_bias_ptr + expert * F + rows, mask=rows < R, other=0).to(tl.float32)[:, None]
        if IN_TURN:
            gate, up = tl.split(tl.permute(tl.reshape(gate, (BN, 2, BT)), (0, 2, 1)))
        acted = _activated(gate, up, LAYOUT, ACTIVATION, ALPHA, LIMIT) * weight[None, :]
        columns = block * BN + tl.arange(0, BN)
        stored = (into >= 0)[None, :] if F % BN == 0 else (into >= 0)[None, :] & (columns < F)[:, None]
        tl.store(mid_ptr + into[None, :] * F + columns[:, None], acted.to(mid_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _down_dense_kernel(
    mid_ptr, ids_ptr, weights_ptr, down_ptr, down_bias_ptr, active_ptr, counts_ptr, partials_ptr, T,
    H: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
    SPLIT: tl.constexpr, CUTS: tl.constexpr, TILES: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of H x TILES, SPLIT). A share is one of CUTS pieces of F, of every SPLIT // CUTS-th list entry."""
    SPAN: tl.constexpr = F // CUTS
    EVEN: tl.constexpr = H % BN == 0 and SPAN % BK == 0
    FILL: tl.constexpr = None if EVEN else 0
    share = tl.program_id(1)
    rows = tl.program_id(0) // TILES * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    tokens = tl.program_id(0) % TILES * BT + tl.arange(0, BT)
    slots = tl.arange(0, KP)
    inside = tokens < T
    known = inside[:, None] & (slots < K)[None, :]
    pairs = tokens[:, None] * K + slots[None, :]
    ids = tl.load(ids_ptr + pairs, mask=known, other=-1)
    count = tl.load(counts_ptr)
    begin = share % CUTS * SPAN
    down_ptrs = down_ptr + begin * COLUMN + rows[:, None] * ROW + depth[None, :] * COLUMN
    acc = tl.zeros((BN, BT), tl.float32)
    # flatten: one pipeline through all experts. With one loop over (expert, k) in the source, the compiler has half as
    # many loads on their way, as it must load the expert first; none, where that is done only as k starts anew.
    for entry in tl.range(share // CUTS, count, SPLIT // CUTS, flatten=True):
        expert = tl.load(active_ptr + entry).to(tl.int64)
        pair = tl.max(tl.where(ids == expert, pairs, -1), 1)
        mid_ptrs = mid_ptr + begin + pair[:, None] * F + depth[None, :]
        for k in range(0, SPAN, BK):
            within = None if EVEN else (rows < H)[:, None] & (k + depth < SPAN)[None, :]
            own = (pair >= 0)[:, None] if SPAN % BK == 0 else (pair >= 0)[:, None] & (k + depth < SPAN)[None, :]
            x = tl.load(mid_ptrs + k, mask=own, other=0).T
            w = tl.load(
                down_ptrs + expert * (H * F) + k * COLUMN, mask=within, other=FILL, eviction_policy="evict_first"
            )
            acc = tl.dot(w, x, acc, input_precision="ieee")
    if down_bias_ptr is not None:
        given = tl.load(weights_ptr + pairs, mask=known, other=0).to(tl.float32)
        for entry in tl.range(share, count, SPLIT, num_stages=1):
            expert = tl.load(active_ptr + entry)
            bias = tl.load(down_bias_ptr + expert * H + rows, mask=rows < H, other=0).to(tl.float32)
            acc += bias[:, None] * tl.sum(tl.where(ids == expert, given, 0.0), 1)[None, :]
    stored = inside[None, :] if H % BN == 0 else inside[None, :] & (rows < H)[:, None]
    tl.store(partials_ptr + (share * T + tokens)[None, :] * H + rows[:, None], acc, mask=stored)


@triton.jit
def _down_routed_kernel(
    mid_ptr, ids_ptr, weights_ptr, down_ptr, down_bias_ptr, partials_ptr, T,
    H: tl.constexpr, F: tl.constexpr, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr, TILES: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of H x TILES, E). Writes the partials of the expert's pairs, and zeros for unrouted ones."""
    EVEN: tl.constexpr = H % BN == 0 and F % BK == 0
    FILL: tl.constexpr = None if EVEN else 0
    rows = tl.program_id(0) // TILES * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    slots = tl.arange(0, KP)
    places = tl.arange(0, BT)
    tile = tl.program_id(0) % TILES
    expert = tl.program_id(1)
    for start in tl.range((expert * TILES + tile) * BT, T * K, E * TILES * BT, num_stages=1):
        pairs = start + places
        ids = tl.load(ids_ptr + pairs, mask=pairs < T * K, other=0)
        unrouted = ((ids < 0) | (ids >= E))[None, :] & (rows < H)[:, None]
        place = (pairs % K * T + pairs // K)[None, :] * H
        tl.store(partials_ptr + place + rows[:, None], tl.zeros((BN, BT), tl.float32), mask=unrouted)
    num_tokens = 0
    for start in tl.range(0, T, _SCAN, num_stages=1):
        seen = start + tl.arange(0, _SCAN)
        known = (seen < T)[:, None] & (slots < K)[None, :]
        ids = tl.load(ids_ptr + seen[:, None] * K + slots[None, :], mask=known, other=-1)
        num_tokens += tl.sum((ids == expert).to(tl.int32))
    down_ptrs = down_ptr + expert.to(tl.int64) * (H * F) + rows[:, None] * ROW + depth[None, :] * COLUMN
    for first in range(tile * BT, num_tokens, TILES * BT):
        inside = first + places < num_tokens
        tokens = tl.zeros((BT,), tl.int32)
        before = 0
        for start in tl.range(0, T, _SCAN, num_stages=1):
            seen = start + tl.arange(0, _SCAN)
            known = (seen < T)[:, None] & (slots < K)[None, :]
            ids = tl.load(ids_ptr + seen[:, None] * K + slots[None, :], mask=known, other=-1)
            skipped, before = _skipped(ids == expert, before, first + places)
            tokens += skipped
        known = inside[:, None] & (slots < K)[None, :]
        own = tl.load(ids_ptr + tokens[:, None] * K + slots[None, :], mask=known, other=-1) == expert
        slot = tl.sum(tl.where(own, slots[None, :], 0), 1)
        pairs = tokens * K + slot
        mid_ptrs = mid_ptr + pairs[:, None] * F + depth[None, :]
        acc = tl.zeros((BN, BT), tl.float32)
        for k in range(0, F, BK):
            within = None if EVEN else (rows < H)[:, None] & (k + depth < F)[None, :]
            there = inside[:, None] if F % BK == 0 else inside[:, None] & (k + depth < F)[None, :]
            x = tl.load(mid_ptrs + k, mask=there, other=0).T
            w = tl.load(down_ptrs + k * COLUMN, mask=within, other=FILL, eviction_policy="evict_first")
            acc = tl.dot(w, x, acc, input_precision="ieee")
        if down_bias_ptr is not None:
            weight = tl.load(weights_ptr + pairs, mask=inside, other=0).to(tl.float32)
            bias = tl.load(down_bias_ptr + expert * H + rows, mask=rows < H, other=0).to(tl.float32)
            acc += bias[:, None] * weight[None, :]
        stored = inside[None, :] if H % BN == 0 else inside[None, :] & (rows < H)[:, None]
        tl.store(partials_ptr + (slot * T + tokens)[None, :] * H + rows[:, None], acc, mask=stored)


# The loads of both scans stand in the kernels: of a function that is passed a pointer, Inductor supposes that it writes
# there, and clones the tensor.
@triton.jit
def _skipped(own, before, wanted):
    """Return how many of these tokens stand before the wanted-th of the expert's own, and how many own were seen.

    Summed over all tokens, the first is the index of the wanted-th. own: [tokens, KP], at most one of a row is true.
    """
    mine = tl.sum(own.to(tl.int32), 1)
    upto = before + tl.cumsum(mine, 0)
    return tl.sum((upto[:, None] <= wanted[None, :]).to(tl.int32), 0), before + tl.sum(mine, 0)


@triton.jit
def _activated(gate, up, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Return what experts_cpu.activated does; the comparisons are such that NaN stays NaN."""
    if ACTIVATION == "swigluoai":
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        acted = (up + 1) * gate * tl.sigmoid(ALPHA * gate)
    elif ACTIVATION == "silu":
        acted = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        acted = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))  # 1 / sqrt(2)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 is sigmoid(2 z); the factor is 2 sqrt(2 / pi)
        acted = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        acted = tl.where(gate < 0, 0.0, gate)
    if ACTIVATION == "relu2":
        acted = acted * acted
    if LAYOUT != "plain" and ACTIVATION != "swigluoai":
        acted = acted * up
    return acted


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
    active: Tensor | None,
    counts: Tensor | None,
    layout: str,
    transposed: bool,
    down_transposed: bool,
    activation: str,
    alpha: float,
    limit: float,
    autotune: bool = False,
) -> Tensor:
    """Return [P, T, H] fp32, whose sum over P is the weighted sum of each token's experts.

    Args:
        hidden, ids, weights, gate_up, up, down, gate_up_bias, up_bias, down_bias: as in experts_cpu.launch. Rows of
            hidden that are not routed, and weights of experts that nobody uses, may hold anything.
        active: [1, E] int32, the experts that `ids` holds, each once, in any order, then anything.
        counts: [1] int32, how many those are. Both come from dmoe::route, or both are None. With more than
            DENSE_TOKENS tokens, a list is worth giving where they share few experts.
        layout, transposed, down_transposed, activation, alpha, limit: as in experts_cpu.launch.
        autotune: time the candidates for this GPU and these sizes at the first call, instead of the default tiles.

    Raises:
        ValueError: where check() does.
    """
    check(
        Operands(hidden, ids, weights, gate_up, up, down, gate_up_bias, up_bias, down_bias, layout, transposed,
                 down_transposed, activation, alpha, limit),
        active, counts,
    )  # fmt: skip
    T, _ = hidden.shape  # the only size that may be symbolic: a kernel is compiled for each of the others
    E, k = int(gate_up.shape[0]), int(ids.shape[1])
    F, H = (int(size) for size in (down.shape[1:] if down_transposed else down.shape[:0:-1]))
    dense = active is not None and T <= DENSE_TOKENS
    listed = active is not None and T <= LISTED_TOKENS
    gated = layout != "plain"
    target = target_of(hidden.device)
    config = default_config(target, T, H, F, E, k, hidden.itemsize, gated, listed)
    BT, SPLIT = config.tokens, config.split
    hidden, ids, weights = hidden.contiguous(), ids.contiguous(), weights.contiguous()
    entries = min(E, BT * k) if dense else E
    active, counts = (active, counts) if listed else (None, None)
    mid = hidden.new_empty(T * k, F)
    partials = hidden.new_empty((SPLIT if listed else k), T, H, dtype=torch.float32)
    tiles = config.tiles
    sizes: dict[str, Any] = dict(T=T, H=H, F=F, K=k, KP=triton.next_power_of_2(k), BT=BT)

    tried = candidates(target, config.gate_up, 2 if gated else 1, BT, H, hidden.itemsize) if autotune else ()
    gate_up_kernel = tuned(_gate_up_kernel, config.gate_up, tried)
    width = 2 * F if layout in ("concatenated", "interleaved") else F
    wrap_triton(gate_up_kernel)[lambda meta: (triton.cdiv(F, meta["BN"]) * tiles, entries)](
        hidden_ptr=hidden, ids_ptr=ids, weights_ptr=weights, gate_up_ptr=gate_up, up_ptr=up,
        gate_up_bias_ptr=gate_up_bias, up_bias_ptr=up_bias, active_ptr=active,
        counts_ptr=counts, mid_ptr=mid, **sizes,
        EXPERT=width * H, ROW=1 if transposed else H, COLUMN=width if transposed else 1,
        UP=F if transposed else F * H, LAYOUT=layout, ACTIVATION=activation,
        ALPHA=alpha if activation == "swigluoai" else 0.0, LIMIT=limit if activation == "swigluoai" else 0.0,
        ROUTED=not dense, TILES=tiles,
    )  # fmt: skip

    span = F // config.cuts
    tried = candidates(target, config.down, 1, BT, span, hidden.itemsize) if autotune else ()
    sizes |= dict(ROW=1 if down_transposed else F, COLUMN=H if down_transposed else 1)
    if listed:
        down_kernel = tuned(_down_dense_kernel, config.down, tried)
        wrap_triton(down_kernel)[lambda meta: (triton.cdiv(H, meta["BN"]) * tiles, SPLIT)](
            mid_ptr=mid, ids_ptr=ids, weights_ptr=weights, down_ptr=down, down_bias_ptr=down_bias, active_ptr=active,
            counts_ptr=counts, partials_ptr=partials, **sizes, SPLIT=SPLIT, CUTS=config.cuts, TILES=tiles,
        )  # fmt: skip
    else:
        down_kernel = tuned(_down_routed_kernel, config.down, tried)
        wrap_triton(down_kernel)[lambda meta: (triton.cdiv(H, meta["BN"]) * tiles, E)](
            mid_ptr=mid, ids_ptr=ids, weights_ptr=weights, down_ptr=down, down_bias_ptr=down_bias,
            partials_ptr=partials, **sizes, E=E, TILES=tiles,
        )  # fmt: skip
    return partials


experts = torch.library.triton_op("dmoe::experts", launch, mutates_args=())
