"""Few enough combinations of options for every change, with every two values among them."""

from __future__ import annotations

import itertools
import random
from typing import Any


def covering(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return forms enough that every two values that occur together do so among them."""
    seen: set[Any] = set()
    chosen = []
    for form in random.Random(0).sample(every, len(every)):
        pairs = set(itertools.combinations(form.items(), 2))
        if not pairs <= seen:
            seen |= pairs
            chosen.append(form)
    return chosen
