"""The ways that `dmoe bench e2e` decodes in, and how many times as fast as the baseline they should be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Way:
    """How a model runs: what compiles it, which experts of transformers it has, and options of our backend."""

    compiler: Literal["none", "inductor", "dmoe"] = "dmoe"
    options: Mapping[str, Any] = field(default_factory=dict)
    experts: str = "grouped_mm"

    @property
    def team(self) -> bool:
        return "team" in self.options.get("passes", ())


def _team(*strategies: str, **options: Any) -> Way:
    chosen = {f"team.{each}": each in strategies for each in ("cache", "limit", "speculate")}
    return Way(options={"passes": ["team"], **chosen, **options})


_P6, _P8 = ({"dmoe.top_p": p} for p in (0.6, 0.8))
BASELINE, KERNEL = "inductor", "kernel"
WAYS = {
    "eager": Way("none"),
    "inductor loop": Way("inductor", experts="eager"),
    BASELINE: Way("inductor"),
    KERNEL: Way(),
    "dmoe 0.8": Way(options={"passes": ["dmoe"], **_P8}),
    "dmoe 0.6": Way(options={"passes": ["dmoe"], **_P6}),
    "des vote": Way(options={"passes": ["des"], "des.variant": "vote"}),
    "cover 0.7": Way(options={"passes": ["cover"], "cover.mass": 0.7}),
    "team": _team("cache", "limit", "speculate"),
    "team + dmoe 0.6": Way(options={"passes": ["team", "dmoe"], **_P6}),
    "team + dmoe 0.6 one row": Way(options={"passes": ["team", "dmoe"], "team.speculate": False, **_P6}),
}
STRATEGIES = {
    "cache": _team("cache"),
    "limit": _team("limit"),
    "speculate": _team("speculate"),
    "team two rows": _team("cache", "limit", "speculate", **{"team.candidates": 1}),
}
# Way, against the baseline, what is compared, and how many times as fast it should be.
GOALS = (
    (KERNEL, "s_per_step", 1.8),
    ("dmoe 0.6", "s_per_step", 3.5),
    ("team + dmoe 0.6", "s_per_token", 5.0),
    ("team + dmoe 0.6 one row", "s_per_token", 5.0),
)
