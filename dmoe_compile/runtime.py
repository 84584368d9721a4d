"""What happens on every call: the unique experts of each site and forward, recorded where stats are on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmoe_compile import context as contexts

_MAX_RECORDS = 65_536  # forwards kept; the oldest go first, so that a server that never reads does not grow


@dataclass(frozen=True)
class RoutingStats:
    """Unique experts per site and forward, oldest first.

    Attributes:
        sites: for each site's name, the number of distinct experts that its tokens used in each forward.
        unsound: likewise, tokens whose router scores were NaN or infinite. They vote for no coreset.
        below_promise: likewise, tokens for which a policy could not keep what it promises (see `cover`).
        forwards: forwards recorded; with graph breaks, calls of the graph that ran most often.
    """

    sites: dict[str, list[int]] = field(default_factory=dict)
    unsound: dict[str, list[int]] = field(default_factory=dict)
    below_promise: dict[str, list[int]] = field(default_factory=dict)

    @property
    def forwards(self) -> int:
        return max(map(len, self.sites.values()), default=0)

    def mean(self) -> float:
        """Return unique experts per site and forward on average; NaN where nothing was recorded."""
        counts = [count for each in self.sites.values() for count in each]
        return sum(counts) / len(counts) if counts else float("nan")


class Recorder:
    """Keeps the counts of recent forwards on the device they came from; reading them is what waits for it."""

    def __init__(self) -> None:
        self._records: deque[tuple[Sequence[str], Tensor]] = deque(maxlen=_MAX_RECORDS)

    def add(self, names: Sequence[str], counts: Tensor) -> None:
        """Keep counts, [sites, 3] int64, see passes/count.py.

        They are copied: under CUDA graphs the next replay writes over them.
        """
        self._records.append((names, counts.clone()))

    def read(self, *, reset: bool) -> RoutingStats:
        """Return what was recorded; with `reset`, forget it."""
        stats = RoutingStats()
        for names, counts in list(self._records):
            for name, row in zip(names, counts.tolist(), strict=True):
                for of_sites, count in zip((stats.sites, stats.unsound, stats.below_promise), row, strict=True):
                    of_sites.setdefault(name, []).append(count)
        if reset:
            self._records.clear()
        return stats


recorder = Recorder()


def recording(compiled: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """Return `compiled` without its last output, the counts of the sites `names`, which are recorded.

    The decoding context that it is called in, if any, gets them too.
    """

    def call(*args: Any) -> Any:
        *outputs, counts = compiled(*args)
        recorder.add(names, counts)
        if (context := contexts.current(strict=False)) is not None:
            context.count(names, counts)
        return outputs

    return call


def routing_stats(*, reset: bool = False) -> RoutingStats:
    """Return the unique experts per site and forward of models compiled with ``options={"stats": True}``.

    Args:
        reset: forget what was recorded, so that the next call starts anew.
    """
    with torch.no_grad():
        return recorder.read(reset=reset)
