"""Every coreset method on every model of the zoo: real settings give what the rule gives in eager PyTorch.

The rule is applied to the model's own code by replacing the one top-k over its experts; routers with groups are
compared in tests/test_dmoe.py (with the released tensors) and tests/test_cover.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from dmoe_compile.passes.coreset import Blocks, choose, restrict
from dmoe_compile.passes.policies import find_policy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import zoo
from dmoe_compile import Config
from reference_model import Rewriting

L = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "dmoe": {"passes": ["dmoe"], "dmoe.top_p": 0.3, "dmoe.min_experts": 2},
    "des seq": {"passes": ["des"], "des.keep": 1},
    "des vote": {"passes": ["des"], "des.variant": "vote", "des.coreset_size": 3},
    "des vote, batch": {"passes": ["des"], "des.variant": "vote", "des.coreset_size": 3, "scope": "batch"},
}
NO_GROUPS = [name for name in zoo.ROUTABLE if not zoo.expected(name).groups]


class EagerRule(TorchFunctionMode):
    """Restricts every top-k over E scores to its block's coreset."""

    def __init__(self, num_experts: int, batch: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.num_experts, self.batch = num_experts, batch
        config = Config.from_options({**options, "block_length": L})
        ((name, chosen),) = config.selected.items()
        self.rule = functools.partial(find_policy(name).coreset, options=chosen)
        self.whole = config.scope == "batch"
        self.changed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in {torch.topk, Tensor.topk} and args[0].shape[-1] == self.num_experts:
            top_k = kwargs["k"] if "k" in kwargs else args[1]
            scores = args[0].reshape(-1, self.num_experts)
            blocks = Blocks(self.batch, len(scores) // self.batch, L, None, whole=self.whole)
            ranked = restrict(scores, choose(scores, blocks, top_k, self.rule)).reshape(args[0].shape)
            own = func(*args, **kwargs)
            args = (ranked, *args[1:])
            self.changed += int((own[1] != func(*args, **kwargs)[1]).any())
        return func(*args, **kwargs)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NO_GROUPS)
def test_equals_the_rule_in_eager(name: str, setting: str) -> None:
    model, inputs = zoo.build(name, num_layers=1), zoo.inputs(name)
    inputs = {key: value for key, value in inputs.items() if "mask" not in key}
    options = SETTINGS[setting]
    batch = next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))
    with torch.no_grad():
        with EagerRule(zoo.expected(name).num_experts, batch, options) as rule:
            expected = model(**inputs)
        rewriting = Rewriting(**options, block_length=L)
        out = torch.compile(model, backend=rewriting, fullgraph=True)(**inputs)
    assert [outcome.rewritten for outcome in rewriting.outcomes] == [True] * len(rewriting.outcomes)
    assert rule.changed  # the rule did change something
    assert_close(out[0], expected[0], rtol=1e-4, atol=1e-4)  # fp32 sums in another order, through a layer and a head
