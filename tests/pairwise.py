"""Few enough combinations of options for every change, with every two values among them."""

from __future__ import annotations

import itertools
from typing import Any


def covering(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return forms enough that every two values that occur together do so among them."""
    pairs = [set(itertools.combinations(form.items(), 2)) for form in every]
    left: set[Any] = set().union(*pairs)
    chosen = []
    while left:
        most = max(range(len(every)), key=lambda i: len(pairs[i] & left))
        left -= pairs[most]
        chosen.append(every[most])
    return chosen
