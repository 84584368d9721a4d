"""A coreset method of your own, beside the others on the model that comes along: python examples/own_policy.py"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import dmoe_compile
from dmoe_compile import evaluation


@dataclass(frozen=True)
class Options:
    """size: experts of a block."""

    size: int = 24

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"first_choices.size={self.size!r} must be an integer of at least 1; 24 is usual")

    def all_experts(self) -> "Options":
        """Return the options under which nothing changes."""
        return Options(size=2**31)


def coreset(scores: Tensor, ids: Tensor, voting: Tensor, options: Options) -> Tensor:
    """Keep the experts that most tokens want first; scores [N, L, E], ids [N, L, k], voting [N, L] -> [N, E] bool."""
    first = scores.argmax(-1, keepdim=True)
    count = torch.zeros_like(scores).scatter(-1, first, voting.unsqueeze(-1).to(scores.dtype)).sum(1)
    count = count + torch.zeros_like(scores).scatter(-1, ids, voting.unsqueeze(-1).expand_as(ids) * 1e-3).sum(1)
    size = min(max(options.size, ids.shape[-1]), scores.shape[-1])
    best = count.sort(dim=-1, descending=True, stable=True).indices[..., :size]
    return torch.zeros_like(count, dtype=torch.bool).scatter(-1, best, True)


dmoe_compile.register_policy("first_choices", sys.modules[__name__])
settings = evaluation.Settings(problems=10)
for options in ({}, {"passes": ["first_choices"], "first_choices.size": 16}, {"passes": ["cover"], "cover.mass": 0.7}):
    found = evaluation.summary(evaluation.evaluate("demo", dmoe_compile.Config.from_options(options), settings))
    print(f"{options or 'no pass'}: {found.right} of {found.problems} right, {found.unique_mean:.1f} experts")
