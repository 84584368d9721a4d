"""What is said of the graphs of one torch.compile(): each warning once, with its reason and a way out."""

from __future__ import annotations

import functools
import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import fx
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX

from dmoe_compile import auto_prepare
from dmoe_compile.config import Config
from dmoe_compile.normalise import source
from dmoe_compile.passes.pipeline import Findings

log = logging.getLogger(__name__)

_MAX_NOTICES = 256  # torch.compile() calls whose warnings are remembered
_notices: OrderedDict[int, Notices] = OrderedDict()


@dataclass
class Notices:
    """What the graphs of one torch.compile() have shown so far, so that each warning comes once, and none too many.

    A model falls into several graphs where Dynamo breaks it; most of them rightly hold no router.
    """

    of: object = None  # the options of the torch.compile(), held so that no other dict takes their id
    in_pieces: bool = False  # broken graphs have come by
    in_loops: bool = False  # experts in Python loops were warned about, which is where graphs break
    left: WeakSet[torch.nn.Module] = field(default_factory=WeakSet)  # experts in loops, of parts compiled one by one
    said: set[str] = field(default_factory=set)

    def take(self, gm: fx.GraphModule, findings: Findings, config: Config) -> None:
        """Warn where the passes changed nothing in a graph: which module is why, and what to do."""
        reason = getattr(gm, "compile_subgraph_reason", None)
        broken = str(reason.reason) if reason is not None and reason.graph_break else ""
        self.in_pieces |= _is_piece()
        waits = "team" in config.passes and findings.outcomes  # for a decoding context
        message = "" if waits else _complaint(gm, findings, broken)
        nothing_here = not findings.outcomes and not findings.refusals
        if message and not (broken and self.in_loops) and not (self.in_pieces and nothing_here):
            so = "Its routing is the model's own." if findings.changed else "Compiled as plain Inductor would."
            self.warn(f"{', '.join(config.passes)}: {message} {so}")
        self.in_pieces |= bool(broken or findings.outcomes)

    def loops(self, messages: Sequence[str]) -> None:
        """Warn of experts in Python loops, which Dynamo will break the model at."""
        for message in messages:
            self.warn(message)
            self.in_loops = self.in_pieces = True

    def warn(self, message: str) -> None:
        """Log a warning unless it has been said."""
        if message not in self.said:
            self.said.add(message)
            log.warning("%s", message)


def notices_of(options: Mapping[str, Any] | None) -> Notices:
    """Return the notices of the torch.compile() that these options were given to; Dynamo hands on the same dict."""
    notices = _notices.pop(id(options), None) or Notices(options)
    _notices[id(options)] = notices
    while len(_notices) > _MAX_NOTICES:
        _notices.popitem(last=False)
    return notices


@functools.cache
def say_how_to_select() -> None:
    """Say once that the backend runs no pass by itself."""
    log.info('no pass is selected: routing is the model\'s own. Select one: options={"passes": ["dmoe"]}')


def forget() -> None:
    """Forget what was said."""
    _notices.clear()


def unreadable(error: Exception) -> str:
    """Return the warning for a graph that some step of ours failed on; call it while the error is handled."""
    log.debug("why the graph can't be read", exc_info=True)
    return f"the graph can't be read ({type(error).__name__}: {error}). Compiled as plain Inductor would."


def _complaint(gm: fx.GraphModule, findings: Findings, broken: str) -> str:
    """Return why the passes changed nothing, "" where they did; `broken` is Dynamo's reason to end the graph."""
    if findings.rewritten:
        return ""
    left = [outcome for outcome in findings.outcomes if not outcome.rewritten]
    if left and all(outcome.verdict and not outcome.verdict.pays for outcome in left):
        return ""  # as asked: where it does not pay
    if left:
        return f"{left[0].site.name} was left alone: {left[0].reason}."
    routers = [refusal.name for refusal in findings.refusals if refusal.is_router]
    if broken and routers:
        return (
            f"the experts of {routers[0]} are not in the same graph as their router: Dynamo broke the graph there "
            f"({broken.strip().splitlines()[0]}). Way out: print(dmoe_compile.prepare(model)) makes the experts "
            "traceable, or says why not; fullgraph=True shows where a graph breaks."
        )
    matrices = [source(each)[0] for each in gm.graph.find_nodes(op="placeholder") if _is_matrix(each)]
    if routers and len(matrices) == 1 and "._modules[" not in matrices[0]:  # the router's own forward, not its caller's
        return (
            f"the experts of {routers[0]} are not in the same graph as their router, which Dynamo compiled by itself. "
            "Way out: TORCH_LOGS=graph_breaks or fullgraph=True shows why. A forward hook is a usual cause, and "
            "transformers leaves some after output_router_logits=True: compile the whole model, not its layers."
        )
    if findings.refusals:
        name, reason = findings.refusals[0].name, findings.refusals[0].reason
        return f"no site was found; {name} was refused: {reason}. dmoe_compile.explain(model, ...) lists every refusal."
    if broken and not auto_prepare.is_available():
        return (
            f"Dynamo broke the graph ({broken.strip().splitlines()[0]}). If the model's experts are in a Python loop, "
            "dmoe_compile.prepare(model) makes them traceable."
        )
    if broken or not matrices:
        return ""  # a piece of a model, or a helper of its own that makes masks or positions
    return (
        f"no mixture-of-experts router in the graph of {_root_name(gm)}. Drop the pass for this model, or compile "
        "the module that holds its experts."
    )


def _is_piece() -> bool:
    """Say whether what is being compiled was called by the rest of a function whose graph was broken."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX):
        frame = frame.f_back
    return frame is not None


def _is_matrix(placeholder: fx.Node) -> bool:
    """Say whether an input of Dynamo's graph is a weight that something is multiplied by."""
    value = placeholder.meta.get("example_value")
    return source(placeholder)[1] and isinstance(value, torch.Tensor) and value.dim() >= 2


def _root_name(gm: fx.GraphModule) -> str:
    """Name what was compiled: the first module or function in the graph's stack."""
    for node in gm.graph.nodes:
        for path, owner in (node.meta.get("nn_module_stack") or {}).values():
            return f"{getattr(owner, '__name__', owner)} ({path})"
    return "the compiled function"
