"""What the graph-rewrite tests share: a prepared block through the passes, and the same rule in eager PyTorch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from dmoe_compile.passes import dmoe
from dmoe_compile.passes.coreset import Blocks, choose, restrict
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import forms
from dmoe_compile import prepare
from reference_model import Rewriting

B, S, L = 2, 24, 8  # three blocks a row
MIN_EXPERTS = 4  # of 12: 8 tokens of 3 experts each want about 9 of them
OPTIONS = {"block_length": L, "dmoe.min_experts": MIN_EXPERTS, "dmoe.top_p": 0.3}
# Stacked experts sum the same products in another order. bf16 rounds each of them once more than eager or once less.
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-5, "atol": 2**-5}}
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
    """The dMoE rule in eager PyTorch: every top-k over all experts is restricted to its block's coreset."""

    def __init__(self, num_experts: int, shape: Sequence[int] = (B, S), options: Mapping[str, Any] = OPTIONS) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.shape = tuple(shape)
        chosen = dmoe.Options(options["dmoe.top_p"], options["dmoe.min_experts"])
        self.rule = functools.partial(dmoe.coreset, options=chosen)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in {torch.topk, Tensor.topk} and args[0].shape == (prod(self.shape), self.num_experts):
            top_k = kwargs["k"] if "k" in kwargs else args[1]
            inside = choose(args[0], Blocks(*self.shape, L, None), top_k, self.rule)
            args = (restrict(args[0], inside), *args[1:])
        return func(*args, **kwargs)


@torch.no_grad()
def eager_with_rule(block: nn.Module, x: Tensor) -> Any:
    """Return what the block's own code gives under the dMoE rule; a router with groups is another matter."""
    with EagerRule(forms.CONFIG["num_experts"]):
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
