"""The experts implementation "dmoe" of transformers: model.set_experts_implementation("dmoe").

transformers hands over a module with stacked weights and says on it how they lie (gate, bias, transposed,
interleaved, a norm after the experts, ids of experts on other ranks). All of that is computed by its own
grouped_mm here, which Inductor compiles and whose routing the passes rewrite.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

NAME = "dmoe"


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts.

    Args:
        self: a transformers experts module, or what has its attributes.
        hidden_states: [T, H].
        top_k_index: [T, k] ids; with expert parallelism, E and above stand for experts elsewhere.
        top_k_weights: [T, k].

    Returns:
        [T, H] in hidden_states' dtype.
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    out: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return out


def register() -> None:
    """Tell transformers of the implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
