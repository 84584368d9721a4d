"""Every coreset method on every model of the zoo: real settings give what the rule gives in eager PyTorch.

The rule is applied to the model's own code by replacing the one top-k over its experts. Routers with groups are
compared in tests/test_dmoe_released.py (with the released tensors), test_constrain.py and test_cover.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from reference_model import Rewriting
from rewriting import EagerRule
from tiny_moe import MODEL

L = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "dmoe": {"passes": ["dmoe"], "dmoe.top_p": 0.3, "dmoe.min_experts": 2},
    "des seq": {"passes": ["des"], "des.keep": 1},
    "des vote": {"passes": ["des"], "des.variant": "vote", "des.coreset_size": 3},
    "des vote, batch": {"passes": ["des"], "des.variant": "vote", "des.coreset_size": 3, "scope": "batch"},
    "cover": {"passes": ["cover"], "cover.mass": 0.6},
    "cover, batch": {"passes": ["cover"], "cover.mass": 0.5, "cover.max_experts": 8, "scope": "batch"},
}
NO_GROUPS = [name for name in zoo.ROUTABLE if not zoo.expected(name).groups]
KINDS = ("diffusion_gemma", "qwen3_moe", "gpt_oss", "minimax_m2")  # on every change with every setting, others with two


def show_own_choice(model: nn.Module, name: str, rule: EagerRule) -> None:
    """Let every routed layer run twice: what its router gives its experts is the model's own choice for the rule."""
    expected = zoo.expected(name, num_layers=1)
    for path in expected.names:
        layer = model.get_submodule(path)
        routed = layer.router if name == "diffusion_gemma" else layer  # whose layer writes to its cache as well
        routed.forward = _twice(routed.forward, model.get_submodule(f"{path}.experts"), rule)


def _twice(forward: Callable[..., Any], experts: nn.Module, rule: EagerRule) -> Callable[..., Any]:
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        _, ids, weights = (*args, *kwargs.values())
        seen.append((ids, weights))

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            watching = experts.register_forward_pre_hook(watch, with_kwargs=True)
            out = forward(*args, **kwargs)
            watching.remove()
        if not seen:  # a router alone
            _, weights, ids = out
            seen.append((ids, weights))
        rule.own = seen.pop()
        return forward(*args, **kwargs)

    return run


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        pytest.param(*each, marks=() if each[0] in KINDS or each[1] in {"dmoe", "cover"} else pytest.mark.nightly)
        for each in itertools.product(NO_GROUPS, SETTINGS)
    ],
)
def test_equals_the_rule_in_eager(name: str, setting: str) -> None:
    model, inputs = zoo.build(name, num_layers=1), zoo.inputs(name)
    options = {**SETTINGS[setting], "block_length": L}
    batch = next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))
    with torch.no_grad():
        rewriting = Rewriting(**options)
        out = torch.compile(model, backend=rewriting, fullgraph=True)(**inputs)
        with EagerRule(zoo.expected(name).num_experts, batch, options) as rule:
            if "cover" in setting:
                show_own_choice(model, name, rule)
            expected = model(**inputs)
    assert [outcome.rewritten for outcome in rewriting.outcomes] == [True] * len(rewriting.outcomes)
    assert rule.changed  # the rule did change something
    assert_close(out[0], expected[0], **MODEL)
