"""How the launches of dmoe::experts are cut up: tiles, stages and shares by the sizes of a layer and the GPU.

T, H, F: tokens, hidden size, expert width; E, k: experts, experts a token; BT: tokens of a tile
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

_MOST_TILES = 4  # every one scans all tokens, most of them for an expert that has no so many
MOST_PARTIALS = 16  # of the second launch dense over T: each of them is written and read again


@dataclass(frozen=True)
class Target:
    """What decides tiles about a GPU."""

    shared_bytes: int  # that one program may have
    processors: int
    stages: int
    steps_in_registers: bool = False  # AMD: one step less in shared memory, as the next waits in registers


TARGETS = {  # by the names that their compilers have for them
    "sm_80": Target(163 << 10, 108, stages=4),
    "sm_90": Target(227 << 10, 132, stages=4),
    "sm_100": Target(227 << 10, 148, stages=4),
    "gfx942": Target(64 << 10, 304, stages=3, steps_in_registers=True),
}


def target_of(device: torch.device) -> Target:
    """Return the target that is `device`; of none, as on the CPU under the interpreter, the one with least to spare."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return TARGETS["sm_80"]
    known: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack half of it
    if torch.version.hip:
        return Target(known.shared_memory_per_block, known.multi_processor_count, stages=3, steps_in_registers=True)
    return Target(known.shared_memory_per_block_optin, known.multi_processor_count, stages=4)


@dataclass(frozen=True)
class Tile:
    """Of a weight: rows (of gate, as many of up), the depth of a step; warps of a program, stages of its pipeline."""

    rows: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """How both launches are cut up."""

    tokens: int
    tiles: int  # of tokens (of one expert's, where routed) that go to programs of their own
    gate_up: Tile
    down: Tile
    split: int  # partials of the second launch, where it has the list
    cuts: int  # of the expert width, among those


def default_config(
    target: Target, T: int, H: int, F: int, E: int, k: int, itemsize: int, gated: bool, listed: bool
) -> Config:
    """Return tiles that were compiled for each of TARGETS and keep everything in registers; none was timed.

    64 rows are what one warp group's tensor core instruction wants; the rest follows from the sizes.
    """
    # A routed expert may well get four times the mean: what is over takes another turn, which reads weights again.
    wanted = T if listed else min(T, 4 * T * k // E)
    tokens = 16 if wanted <= 16 else 32 if wanted <= 32 else 64
    tiles = min(_MOST_TILES, triton.cdiv(T, tokens))
    programs = triton.cdiv(H, 64) * tiles
    split = min(MOST_PARTIALS, max(1, round(target.processors / programs))) if listed else 1
    cuts = _cuts(F, split) if listed else 1
    depths = (64, 32) if itemsize == 2 else (32, 16)
    gate_up = _tile(target, 2 if gated else 1, tokens, _depth(H, depths), itemsize)
    # A step of twice the depth halves the steps, but a pipeline needs two within an expert to run on into the next.
    span = F // cuts
    deeper = (128,) if itemsize == 2 and not target.steps_in_registers and span >= 256 else ()
    down = _tile(target, 1, tokens, _depth(span, (*deeper, *depths)), itemsize)
    if listed and tiles > 1:
        # Programs with other tokens ask for the same weights, so fewer bytes are on their way: they need more steps.
        steps = target.shared_bytes // _step_bytes(1, down.rows, tokens, down.depth, itemsize)
        down = replace(down, stages=max(down.stages, min(2 * target.stages, steps)))
    return Config(tokens, tiles, gate_up, down, cuts * triton.cdiv(split, cuts), cuts)


def candidates(target: Target, default: Tile, operands: int, tokens: int, size: int, itemsize: int) -> tuple[Tile, ...]:
    """Return the tiles worth timing, `default` first: those that the target has shared memory and registers for.

    Args:
        target: the GPU.
        default: the tile of default_config().
        operands: 2 where gate and up are both read, else 1.
        tokens: BT.
        size: of the dimension summed over, in one piece.
        itemsize: of a weight.
    """
    found = {default: None}  # an ordered set
    for depth in (default.depth, 2 * default.depth):
        for rows, warps in ((64, 4), (64, 8), (32, 4), (128, 8)):
            tile = _tile(target, operands, tokens, depth, itemsize, rows, warps)
            sums = operands * rows * tokens // (32 * warps)  # registers of a thread
            # Twice the depth only where that adds no mask and leaves the pipeline two steps; see _cuts.
            even = depth == default.depth or (size % depth == 0 and size >= 2 * depth)
            # Sums and operands of 64 tokens fill the registers: more depth, or tiles higher than wide, spill.
            fits = sums <= 64 and (tokens < 64 or (depth == default.depth and rows >= tokens))
            if even and fits and tile.stages > 1:
                found[tile] = None
    return tuple(found)


def _cuts(width: int, split: int) -> int:
    """Return into how many pieces of two steps or more of 64 the expert width goes, if possible `split` or just above.

    Then every share is as long as any other, however many experts there are.
    """
    steps = width // 64 if width % 64 == 0 else 1
    possible = [n for n in range(1, steps // 2 + 1) if steps % n == 0] or [1]
    return next((n for n in possible if n >= split), possible[-1])


def _depth(size: int, depths: tuple[int, ...]) -> int:
    """Return the first that needs no mask, else the last but one, as the last is for small sizes."""
    return next((depth for depth in depths if size % depth == 0), depths[-2])


def _tile(
    target: Target, operands: int, tokens: int, depth: int, itemsize: int, rows: int = 64, warps: int = 4
) -> Tile:
    """Return the tile with as many stages as fit the target, or with one."""
    steps = target.shared_bytes // _step_bytes(operands, rows, tokens, depth, itemsize)
    steps += 1 if target.steps_in_registers else 0
    return Tile(rows, depth, warps, max(1, min(target.stages, steps)))


def _step_bytes(operands: int, rows: int, tokens: int, depth: int, itemsize: int) -> int:
    """Return the shared memory that one step of a pipeline takes."""
    return (operands * rows + tokens) * depth * itemsize


@functools.cache  # one object each: whoever traces a launch keeps it
def tuned(kernel: Callable[..., None], default: Tile, tiles: tuple[Tile, ...]) -> Any:
    """Return the kernel with its tiles set: to the default's, or to those of `tiles` that turn out best.

    Triton keeps results of timing on disk, by GPU, kernel and `key`.
    """
    configs = [
        triton.Config(dict(BN=tile.rows, BK=tile.depth), num_warps=tile.warps, num_stages=tile.stages)
        for tile in tiles or (default,)
    ]
    return triton.autotune(configs, key=["H", "F", "BT"], cache_results=True)(kernel)
