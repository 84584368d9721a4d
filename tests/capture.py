"""The graphs that the passes see, without lowering them: of inference, and of AOTAutograd with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dmoe_compile.passes.sites import Refusal, Site, find_sites
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx

from dmoe_compile.config import Config
from dmoe_compile.joint import JointPass
from dmoe_compile.normalise import normalise
from dmoe_compile.notices import Notices

Found = tuple[list[Site], list[Refusal]]


def inference(model: Any, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> tuple[Found, fx.GraphModule]:
    """Return what is found in the one graph of a forward without gradients, and the graph."""
    found: list[tuple[Found, fx.GraphModule]] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        aten, sources = normalise(gm, example_inputs)
        found.append((find_sites(aten.graph, sources), aten))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    (result,) = found
    return result


def joint(model: Any, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Found:
    """Return what is found in the joint graph of forward and gradients, decomposed as Inductor asks."""
    found: list[Found] = []

    class Stop(Exception):
        """There is nothing to learn from what Inductor would do next."""

    class Look(JointPass):
        def __call__(self, graph: fx.Graph) -> None:
            found.append(find_sites(graph, self.sources(graph)))
            raise Stop

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return compile_fx(gm, example_inputs, config_patches={"joint_custom_pre_pass": Look(Config(), gm, Notices())})

    torch._dynamo.reset()
    with torch.enable_grad(), torch._inductor.config.patch(force_disable_caches=True):
        try:
            torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, Stop):
                raise
    (result,) = found
    return result
