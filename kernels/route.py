"""Routing of one MoE layer in one launch: scores, the coreset of each block, every token's experts and their weights.

    scores -> coreset of the block (dMoE, DES, or every expert) -> top-k inside it -> weights, and the experts in use

One program holds one block: all of its tokens vote before any of them chooses. It goes over them in chunks, once for
the votes and once for the choice (twice with cold tokens), and computes scores anew each time: kept ones would fill
the registers. What a method chooses is said in passes/coreset.py, votes.py, dmoe.py, des.py and limit.py; this file
follows them, but for exact ties, which always go to the lower expert. Nothing is atomic: equal inputs, equal outputs.

Scores are compared as integers, which are ordered as floats are, with NaN first as in torch.topk: integer maxima are
one instruction for a warp from sm_80 on.

    T: tokens of the forward; E, k: experts, experts a token; N: blocks of the forward
    lanes: places for experts, a power of two; each group of experts starts at a power of two of its own
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dmoe_compile.kernels.route_arguments import constants, unsupported
from torch import Tensor
from torch.library import triton_op, wrap_triton

NUM_WARPS = 8

# Roles of tokens, as passes/limit.py numbers them. From _DECODED on, tokens are not routed.
_HOT: tl.constexpr = tl.constexpr(0)
_COLD: tl.constexpr = tl.constexpr(1)
_DECODED: tl.constexpr = tl.constexpr(2)

# Keys that no finite score has. A lane without an expert, or whose expert is taken, is GONE: less than -inf.
_KEY_NAN: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_KEY_INF: tl.constexpr = tl.constexpr(0x7F800000)
_KEY_MINUS_INF: tl.constexpr = tl.constexpr(-0x7F800001)
_GONE: tl.constexpr = tl.constexpr(-0x80000000)
_LANE_BITS: tl.constexpr = tl.constexpr(16)  # below the key in what experts of a block are sorted by
_MEMBER_BIT: tl.constexpr = tl.constexpr(48)  # above a key that is not negative: 31 bits


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    expert_scale_ptr,
    roles_ptr,
    ids_ptr,
    weights_ptr,
    active_ptr,
    counts_ptr,
    seq,  # tokens of a row
    length,  # of them in a block
    count,  # blocks of a row
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    SCALE: tl.constexpr,
    METHOD: tl.constexpr,
    P: tl.constexpr,
    SIZE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    block = tl.program_id(0)
    first_row = block // count * CANDIDATES
    start = block % count * length
    tokens = tl.minimum(length, seq - start)  # of each candidate; a row's last block may be short

    lane = tl.arange(0, LANES)
    exists = (lane // GROUP_LANES < GROUPS) & (lane % GROUP_LANES < E // GROUPS)
    expert = tl.where(exists, lane // GROUP_LANES * (E // GROUPS) + lane % GROUP_LANES, E)
    bias = tl.zeros((LANES,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert, mask=exists, other=0.0).to(tl.float32)

    inside = exists
    if METHOD != "own":
        votes = tl.zeros((LANES,), tl.float32)
        member = tl.zeros((LANES,), tl.int32)
        for begin in tl.range(0, CANDIDATES * tokens, CHUNK):
            place = begin + tl.arange(0, CHUNK)
            there = place < CANDIDATES * tokens
            token = (first_row + place // tokens) * seq + start + place % tokens
            here = there[:, None] & exists[None, :]
            at = token[:, None] * E + expert[None, :]
            logits = tl.load(logits_ptr + at, mask=here, other=float("-inf")).to(tl.float32)
            heard = there
            if roles_ptr is not None:
                heard = tl.load(roles_ptr + token, mask=there, other=_DECODED) == _HOT
            top, total = _normaliser(logits, SCORE)
            keys = tl.where(here, _key(_gate(logits, top[:, None], total[:, None], SCORE) + bias[None, :]), _GONE)
            picked, last = _take(keys, expert, TOP_K, E)
            # NaN and infinity are first if they are there at all; -inf is last.
            heard = heard & (tl.max(keys, axis=1) < _KEY_INF) & (last > _KEY_MINUS_INF)
            least = tl.minimum(_value(last), 0.0)
            given = here & heard[:, None] & (picked == _GONE)
            votes += tl.sum(tl.where(given, _value(keys) - least[:, None], 0.0), axis=0)
            if METHOD == "des_seq":
                kept, _ = _take(keys, expert, SIZE, E)
                wanted = here & heard[:, None] & (kept == _GONE)
                member = tl.maximum(member, tl.max(wanted.to(tl.int32), axis=0))
        inside = _coreset(votes, member, exists, lane, METHOD, P, SIZE, TOP_K, E, LANES)

    slot = tl.arange(0, SLOTS)
    allowed = inside
    used = tl.zeros((LANES,), tl.int32)
    for turn in tl.range(0, 1 if roles_ptr is None else 2):  # cold tokens come second
        for begin in tl.range(0, CANDIDATES * tokens, CHUNK):
            place = begin + tl.arange(0, CHUNK)
            there = place < CANDIDATES * tokens
            token = (first_row + place // tokens) * seq + start + place % tokens
            here = there[:, None] & exists[None, :]
            at = token[:, None] * E + expert[None, :]
            logits = tl.load(logits_ptr + at, mask=here, other=float("-inf")).to(tl.float32)
            due = there
            routed = there
            if roles_ptr is not None:
                role = tl.load(roles_ptr + token, mask=there, other=_DECODED)
                due = there & ((role == _COLD) == (turn == 1))
                routed = due & (role < _DECODED)
            top, total = _normaliser(logits, SCORE)
            keys = tl.where(here, _key(_gate(logits, top[:, None], total[:, None], SCORE) + bias[None, :]), _GONE)
            may = here & allowed[None, :]
            near = tl.where(may, keys, _GONE)
            if GROUPS > 1:
                in_groups = _in_top_groups(
                    keys, inside, METHOD, GROUPS, TOP_GROUPS, GROUP_SCORE, CHUNK, GROUP_LANES, LANES
                )
                held = tl.sum((may & in_groups).to(tl.int32), axis=1)
                far = tl.where(in_groups, _GONE, near)
                near = tl.where(in_groups, near, _GONE)
            chosen = tl.zeros((CHUNK, SLOTS), tl.int32)
            for i in tl.range(TOP_K):
                if GROUPS > 1:  # a token's groups are used up: on with the coreset's other experts
                    near = tl.where((held == i)[:, None], far, near)
                best = _first(near, tl.max(near, axis=1), expert, E)
                near = tl.where(expert[None, :] == best[:, None], _GONE, near)
                chosen = tl.where(slot[None, :] == i, best[:, None], chosen)
            taken = may & routed[:, None] & (near == _GONE)
            if GROUPS > 1:  # what is far was in `near` only for tokens that it was switched for
                taken = taken & ((far == _GONE) | (held < TOP_K)[:, None])
            used = tl.maximum(used, tl.max(taken.to(tl.int32), axis=0))

            filled = routed[:, None] & (slot < TOP_K)[None, :]
            of_chosen = tl.load(logits_ptr + token[:, None] * E + chosen, mask=filled, other=0.0).to(tl.float32)
            weights = _gate(of_chosen, top[:, None], total[:, None], SCORE)
            if WEIGHTING == "renormalised":
                weights = weights / (tl.sum(tl.where(filled, weights, 0.0), axis=1) + 1e-20)[:, None]
            elif WEIGHTING == "softmax":
                powers = tl.exp(weights - tl.max(tl.where(filled, weights, float("-inf")), axis=1)[:, None])
                weights = powers / tl.sum(tl.where(filled, powers, 0.0), axis=1)[:, None]
            weights = weights * SCALE
            if expert_scale_ptr is not None:
                weights *= tl.load(expert_scale_ptr + chosen, mask=filled, other=0.0).to(tl.float32)
            out = token[:, None] * TOP_K + slot[None, :]
            due = due[:, None] & (slot < TOP_K)[None, :]
            tl.store(ids_ptr + out, tl.where(filled, chosen, E).to(tl.int64), mask=due)
            tl.store(weights_ptr + out, tl.where(filled, weights, 0.0), mask=due)
        if roles_ptr is not None:
            allowed = inside & ((used > 0) | (tl.max(used, axis=0) == 0))  # no hot token: no limit

    number = tl.sum(used, axis=0)
    rank = tl.cumsum(used, axis=0)
    at = tl.where(used > 0, rank - 1, number + expert - rank)
    tl.store(active_ptr + block * E + at, tl.where(used > 0, expert, E), mask=exists)
    tl.store(counts_ptr + block, number)


@triton.jit
def _normaliser(logits, SCORE: tl.constexpr):
    """The largest logit of each token and the sum of its exponentials; 0 and 1 where there is no softmax."""
    top = tl.zeros((logits.shape[0],), tl.float32)
    total = top + 1.0
    if SCORE == "softmax":
        top = tl.max(logits, axis=1)
        total = tl.sum(tl.exp(logits - top[:, None]), axis=1)
    return top, total


@triton.jit
def _gate(logits, top, total, SCORE: tl.constexpr):
    if SCORE == "softmax":
        return tl.exp(logits - top) / total
    elif SCORE == "sigmoid":
        return tl.sigmoid(logits)
    else:
        return logits


@triton.jit
def _key(scores):
    """int32 that are ordered as the scores are; NaN is first, and both zeros are one."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(scores == scores, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _KEY_NAN)


@triton.jit
def _value(keys):
    """The scores that _key() made keys of."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit
def _first(keys, best, expert, E: tl.constexpr):
    """The lowest expert of each token that has the best key."""
    return tl.min(tl.where(keys == best[:, None], expert[None, :], E), axis=1)


@triton.jit
def _take(keys, expert, NUM: tl.constexpr, E: tl.constexpr):
    """Remove the NUM best of each token: what is left, and the last key that was removed."""
    last = tl.full((keys.shape[0],), _GONE, tl.int32)
    for _ in tl.range(NUM):  # rolled: NUM copies of the loop spill
        last = tl.max(keys, axis=1)
        keys = tl.where(expert[None, :] == _first(keys, last, expert, E)[:, None], _GONE, keys)
    return keys, last


@triton.jit
def _coreset(
    votes,
    member,
    exists,
    lane,
    METHOD: tl.constexpr,
    P: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    LANES: tl.constexpr,
):
    """The experts of a block, [LANES] bool: its best `size`, by an order and of a number that the method says."""
    if METHOD == "dmoe":
        votes = tl.div_rn(votes, tl.sum(votes, axis=0) + 1e-20)
    order = (_key(votes).to(tl.int64) << _LANE_BITS) | (LANES - 1 - lane)  # the lower expert is the better one
    if METHOD == "des_seq":
        order |= member.to(tl.int64) << _MEMBER_BIT
    order = tl.where(exists, order, -1)
    ranked = tl.sort(order, descending=True)
    if METHOD == "dmoe":
        size = E
        if P < 1.0:  # shares sum to 1, which never exceeds 1
            held = tl.cumsum(_value((ranked >> _LANE_BITS).to(tl.int32)), axis=0)
            last = tl.min(tl.where(held <= P, E - 1, lane), axis=0)
            size = tl.maximum(last + 1, SIZE)
    elif METHOD == "des_seq":
        size = tl.maximum(tl.sum(member, axis=0), TOP_K)
    else:
        size = SIZE
    worst = tl.min(tl.where(lane < size, ranked, 0x7FFFFFFFFFFFFFFF), axis=0)
    return order >= worst


@triton.jit
def _in_top_groups(
    keys,
    inside,
    METHOD: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Which experts are in a token's best groups, [CHUNK, LANES] bool, as passes/coreset.py's penalise() ranks them."""
    NUM: tl.constexpr = LANES // GROUP_LANES
    if METHOD != "own":
        spread = _value(tl.max(keys, axis=1)) - _value(tl.min(tl.where(keys == _GONE, _KEY_NAN, keys), axis=1))
        lowered = _key(_value(keys) - (2.0 * spread + 1.0)[:, None])
        keys = tl.where(inside[None, :] | (keys == _GONE), keys, lowered)
    grouped = tl.reshape(keys, (CHUNK, NUM, GROUP_LANES))
    score = tl.max(grouped, axis=2)
    if GROUP_SCORE == "top2":
        place = tl.arange(0, GROUP_LANES)[None, None, :]
        best = tl.min(tl.where(grouped == score[:, :, None], place, GROUP_LANES), axis=2)
        second = tl.max(tl.where(place == best[:, :, None], _GONE, grouped), axis=2)
        score = _key(_value(score) + _value(second))
    group = tl.arange(0, NUM)
    left, _ = _take(tl.where((group < GROUPS)[None, :], score, _GONE), group, TOP_GROUPS, NUM)
    best = tl.broadcast_to((left == _GONE)[:, :, None], (CHUNK, NUM, GROUP_LANES))
    return tl.reshape(best, (CHUNK, LANES))


def launch(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids [T, k] int64, weights [T, k] fp32, active [N, E] int32 and counts [N] int32.

    ids are best first; of a token that is not routed they are E and the weights 0. The first counts[n] of active[n]
    are the experts that block n's routed tokens use, in ascending order; the rest is E.

    Args:
        logits: [T, E] fp32, bf16 or fp16, contiguous; T = batch * seq.
        bias: [E] fp32, bf16, fp16 or None, added to the scores that select, not to those that weigh.
        expert_scale: [E] likewise, what an expert's weight is multiplied by, after everything else.
        roles: [T] int8 or None, see passes/limit.py; None means that all tokens are hot. Hot tokens vote, and limit
            cold ones to what they choose; others are not routed.
        top_k: k.
        score: what makes gate scores of logits: "softmax", "sigmoid", or "logits" for nothing.
        groups, top_groups: of how many groups each token keeps how many; 1 and 1 for none. Experts of other groups are
            chosen only where a token's groups hold fewer than k of those it may use.
        group_score: a group's best score, "max", or the sum of its best two, "top2".
        weighting: weights are gate "scores", these "renormalised" to sum 1, or the "softmax" of the k chosen ones.
        scale: what all weights are multiplied by.
        method: "own" (every expert is allowed), "dmoe", "des_seq" or "des_vote".
        p: dmoe.top_p.
        size: dmoe.min_experts, des.keep or des.coreset_size, by the method.
        batch, seq: rows of the forward and tokens of each.
        block_length: tokens of a block in one row; the last of a row may be shorter.
        whole: whether all tokens are one block instead.
        candidates: consecutive rows that are versions of one sequence, whose blocks they share.

    Raises:
        ValueError: for what unsupported() says.
    """
    rule = (top_k, score, groups, top_groups, group_score, weighting, scale, method, p, size)
    layout = (batch, seq, block_length, whole, candidates)
    why = unsupported(logits, bias, expert_scale, roles, *rule, *layout)
    if why is not None:
        raise ValueError(f"route: {why}")
    tokens, num_experts = logits.shape
    if whole:
        batch, seq, block_length, candidates = 1, tokens, tokens, 1
    length = min(block_length, seq)
    count = (seq + length - 1) // length
    blocks = batch // candidates * count
    ids = logits.new_empty((tokens, top_k), dtype=torch.int64)
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    active = logits.new_empty((blocks, num_experts), dtype=torch.int32)
    counts = logits.new_empty((blocks,), dtype=torch.int32)
    wrap_triton(_route_kernel)[(blocks,)](
        logits,
        bias,
        expert_scale,
        roles,
        ids,
        weights,
        active,
        counts,
        seq,
        length,
        count,
        **constants(num_experts, *rule, candidates),
        num_warps=NUM_WARPS,
    )
    return ids, weights, active, counts


route = triton_op("dmoe::route", launch, mutates_args={})
