"""One decoding of a benchmark: its seconds, its forwards, what they had to read at least, and the memory it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dmoe_compile.decoding import Decoder, Forward
    from dmoe_compile.passes.team import Options


@dataclass(frozen=True)
class Trial:
    """One decoding: seconds of it all and in the context, forwards of it, bytes kept at most, tokens accepted."""

    seconds: float
    context_s: float
    forwards: list[Forward]
    nbytes: int
    tokens: int

    @property
    def denoising(self) -> list[Forward]:
        return [forward for forward in self.forwards if forward.committed is not None]


@dataclass(frozen=True)
class Costs:
    """What a forward has to read and multiply: bytes of an expert, of all else; parameters likewise; the machine."""

    layers: int
    top_k: int
    expert_bytes: int
    other_bytes: int
    itemsize: int
    gb_per_s: float
    tflop_per_s: float

    def floor_s(self, forward: Forward, unique: float) -> float:
        """Return the least seconds of a forward that uses `unique` experts a layer."""
        rows, candidates, length = forward.input_ids.shape
        cached = 0 if forward.decoded is None else candidates * int(forward.decoded.sum())
        tokens = rows * candidates * length
        routed = self.layers * self.top_k * (tokens - cached) * self.expert_bytes
        flop = 2 * (routed + tokens * self.other_bytes) / self.itemsize
        return max(self.nbytes(unique) / self.gb_per_s / 1e9, flop / self.tflop_per_s / 1e12)

    def nbytes(self, unique: float) -> float:
        """Return the bytes of weights that such a forward reads."""
        return self.layers * unique * self.expert_bytes + self.other_bytes


def decode(
    forward: Callable[..., Any], prompt: Tensor, mask: int, blocks: int, block_length: int, team: Options | None
) -> Trial:
    """Decode `blocks` blocks behind a prompt [1, S]; the first may begin with the prompt's tail."""
    from dmoe_compile.bench.stacks import THRESHOLD
    from dmoe_compile.decoding import Decoder
    from dmoe_compile.sampling import Sampling

    forwards: list[Forward] = []
    kept = 0

    def watch(forward: Forward) -> None:
        nonlocal kept
        kept = max(kept, decoder.context.nbytes)
        forwards.append(forward)

    new = blocks * block_length - prompt.shape[1] % block_length
    sampling = Sampling(mask, block_length, steps=block_length, threshold=THRESHOLD)
    decoder = Decoder(forward, prompt, [prompt.shape[1]], new, sampling, team, None, watch)
    with _timed(decoder) as spent:
        start = time.perf_counter()
        for _ in decoder.blocks():
            pass
        seconds = time.perf_counter() - start
    return Trial(seconds, sum(spent), forwards, kept, new)


@contextmanager
def _timed(decoder: Decoder) -> Iterator[list[float]]:
    """Give the seconds that the decoding context takes of a decoding, call by call."""
    spent: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return call

    context = decoder.context
    for name in ("step", "accept", "plain", "rows", "roles", "inputs", "done", "count", "attach", "detach"):
        setattr(context, name, timed(getattr(context, name)))
    yield spent


@contextmanager
def resident_peak(peaks: list[int]) -> Iterator[None]:
    """Add to `peaks` the most bytes that this process has resident inside; nothing where the system does not say."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        yield
        return
    reset.write_text("5")  # the peak begins anew: proc(5)
    yield
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
    peaks.append(int(line.split()[1]) * 1024)
