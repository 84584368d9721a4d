"""auto: cover where it pays. Lossy, as `cover` is; every site is asked by the cost model (passes/cost.py) first.

`passes="auto"` takes `cover.mass` and `cover.max_experts` for the coreset. How many experts a site uses with it and
without is counted on the first inputs of every graph, or given. What the machine does is measured once, or given.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Options:
    """Options of `passes="auto"`.

    Attributes:
        gb_per_s: memory bandwidth of the device, in GB/s; None measures it once and keeps it on disk.
        tflop_per_s: its peak in the experts' dtype, in TFLOP/s; likewise.
        unique_experts: unique experts of a forward with the model's own routing; None counts them.
        coreset_experts: unique experts of a forward with `cover`; given together with `unique_experts`.
        min_gain: the least that must be saved of what the experts take, as a share in [0, 1): what choosing a coreset
            may cost.
    """

    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    unique_experts: float | None = None
    coreset_experts: float | None = None
    min_gain: float = 0.05

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if each.name != "min_gain"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise ValueError(f"auto.{name}={value!r} must be a positive number, or None to have it measured")
        if (self.unique_experts is None) != (self.coreset_experts is None):
            raise ValueError(
                f"auto.unique_experts={self.unique_experts!r} and auto.coreset_experts={self.coreset_experts!r}: give "
                "both, or neither to have them counted"
            )
        gain = None if isinstance(self.min_gain, bool) else self.min_gain
        if not isinstance(gain, int | float) or not 0 <= gain < 1:
            raise ValueError(f"auto.min_gain={self.min_gain!r} must be a number in [0, 1): a share of the layer's time")
