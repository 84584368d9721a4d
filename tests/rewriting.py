"""What the rewrite tests share: a prepared block through the passes, and a coreset method in eager PyTorch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from dmoe_compile.passes.coreset import Blocks, choose, restrict
from dmoe_compile.passes.policies import find_policy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import forms
from dmoe_compile import Config, prepare
from reference_model import Rewriting
from tiny_moe import TOLERANCE

B, S, L = 2, 24, 8  # three blocks a row
MIN_EXPERTS = 4  # of 12: 8 tokens of 3 experts each want about 9 of them
OPTIONS = {"block_length": L, "dmoe.min_experts": MIN_EXPERTS, "dmoe.top_p": 0.3}
DTYPES = list(TOLERANCE)


def inputs(dtype: torch.dtype = torch.float32, hidden: int = forms.CONFIG["hidden_size"]) -> Tensor:
    return torch.randn(B, S, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)


class Rewritten:
    """A block after prepare() and the passes; call it. Its graph is readable, its weights are still the block's."""

    def __init__(self, block: nn.Module, x: Tensor, prepared: bool = True, **options: Any) -> None:
        counters.clear()
        if prepared:
            (entry,) = prepare(block).blocks
            assert not entry.reason, entry.reason
        self.backend = Rewriting(**{**OPTIONS, **options})
        self.compiled = torch.compile(block, backend=self.backend, fullgraph=True)
        self.result = self(x)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:
        return self.compiled(x)

    @property
    def graph(self) -> str:
        """The rewritten graph, one operation a line."""
        (gm,) = self.backend.graphs
        return str(gm.graph)

    @property
    def experts_of_blocks(self) -> list[int]:
        """How many experts each block of L tokens uses."""
        (ranked,) = self.backend.ranked
        used = ranked.view(B, S // L, L, -1).isfinite().any(2)
        return used.sum(-1).flatten().tolist()


class EagerRule(TorchFunctionMode):
    """A coreset method in eager PyTorch: every top-k over all experts is restricted to its block's coreset.

    Attributes:
        own: what the model itself would choose, ids and weights [T, k], for a method that needs it.
        changed: top-k calls whose result the method changed.
    """

    def __init__(self, num_experts: int, batch: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        config = Config.from_options(dict(options))
        ((name, chosen),) = config.selected.items()
        self.rule = functools.partial(find_policy(name).coreset, options=chosen)
        self.num_experts, self.batch, self.config = num_experts, batch, config
        self.own: tuple[Tensor, Tensor] | None = None
        self.changed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in {torch.topk, Tensor.topk} and args[0].shape[-1] == self.num_experts:
            top_k = kwargs["k"] if "k" in kwargs else args[1]
            scores = args[0].reshape(-1, self.num_experts)
            length, whole = self.config.block_length, self.config.scope == "batch"
            blocks = Blocks(self.batch, len(scores) // self.batch, length, None, whole=whole)
            ranked = restrict(scores, choose(scores, blocks, top_k, self.rule, self.own)).reshape(args[0].shape)
            own = func(*args, **kwargs)
            args = (ranked, *args[1:])
            self.changed += int((own[1] != func(*args, **kwargs)[1]).any())
        return func(*args, **kwargs)


@torch.no_grad()
def eager_with_rule(block: nn.Module, x: Tensor) -> Any:
    """Return what the block's own code gives under the dMoE rule; a router with groups is another matter."""
    with EagerRule(forms.CONFIG["num_experts"], B, {"passes": ["dmoe"], **OPTIONS}):
        return block(x)


def check_numerics(name: str, dtype: torch.dtype, prepared: bool = True) -> None:
    """The rewritten graph is the published code with restricted routing; all experts give the published code."""
    x, block = inputs(dtype), forms.build(name, dtype)
    with torch.no_grad():
        own = block(x)
    with_rule = eager_with_rule(block, x)
    assert_close(Rewritten(copy.deepcopy(block), x, prepared).result, with_rule, **TOLERANCE[dtype])
    all_experts = {"dmoe.min_experts": forms.CONFIG["num_experts"]}
    assert_close(Rewritten(copy.deepcopy(block), x, prepared, **all_experts).result, own, **TOLERANCE[dtype])
    out, changed = (each[0] if isinstance(each, tuple) else each for each in (own, with_rule))
    assert not torch.allclose(out, changed, **TOLERANCE[dtype])  # the rule did change something


def check_counters(rewritten: Rewritten) -> None:
    assert counters["dmoe"] == {"sites": 1, "sites_rewritten": 1, "refused": 0}
    assert not counters["graph_break"]
