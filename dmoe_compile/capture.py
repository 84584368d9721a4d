"""prepare(): make experts in Python loops traceable, in place, and keep only what gives the same results.

Published mixture-of-experts diffusion LMs loop over their experts. Dynamo unrolls such a loop (22 s for a layer
of 128 experts) or breaks the graph in it. prepare() stacks the experts' weights (dmoe_compile.stacking) and cuts
the loop out where the block hands over (hidden, ids, weights):

    a method      block.moe_infer(hidden, ids, weights)    LLaDA2, Bailing, DeepSeek
    a module      block.experts(hidden, ids, weights)      transformers' eager experts and their copies
    the block     router and loop are one forward: a template of the whole block   SDAR, LLaDA-MoE, RND1

Everything before the cut stays the model's own code. What is kept was compared with the original in the block's own
dtype (choosing.py, verify.py); a block with no match is given back as it was, and the report says why.

    T = B*S tokens, H = hidden, E = experts, k = experts a token
"""

from __future__ import annotations

import ctypes
import dis
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from dmoe_compile import auto_prepare, stacked_loops
from dmoe_compile.blocks import observe, templates
from dmoe_compile.choosing import Prepared, Way, choose, confirm
from dmoe_compile.replacement import KEY, Cut, cut_of, follow, install, let_go, uninstall, why_stale
from dmoe_compile.stacking import NotStackableError, Stack, is_offloaded, why_meta
from dmoe_compile.verify import (
    State,
    at_rest,
    distance,
    hidden_states,
    random_weights,
    routed_rows,
    tolerance,
)

if TYPE_CHECKING:
    from rich.table import Table

_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class PrepareReport:
    """What prepare() did, block by block."""

    blocks: tuple[Prepared, ...] = ()

    @property
    def prepared(self) -> tuple[Prepared, ...]:
        """The blocks that are traceable now."""
        return tuple(block for block in self.blocks if not block.reason)

    @property
    def refused(self) -> tuple[Prepared, ...]:
        """The blocks that were left as they are."""
        return tuple(block for block in self.blocks if block.reason)

    def table(self) -> Table:
        """Return the report as a rich table."""
        from rich.table import Table

        out = Table("block", "experts", "replaced", "error", "left alone because", title="Prepared experts")
        for block in self.blocks:
            error = f"{block.error:.1e}" if block.how else ""
            out.add_row(block.name or "(the model)", str(block.num_experts), block.how, error, block.reason)
        return out

    def __str__(self) -> str:
        from rich.console import Console

        if not self.blocks:
            return "No block of experts in a Python loop was found."
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def prepare(model: nn.Module) -> PrepareReport:
    """Make every Python loop over experts in a model traceable, in place; call it again at any time.

    Weights keep their names, their values and their Parameter objects; at no time is there a second copy of more
    than one layer's. In training mode a block runs its own code, and whenever something it was compared with changes
    (an expert is wrapped, hooked or replaced, a plain attribute of the block is set), with one warning.

    Args:
        model: a module, or what torch.compile() returned for one.

    Returns:
        What was replaced in which block, or why not.
    """
    auto_prepare.install()  # compiling with any backend then looks at what has happened to the experts since
    blocks: list[Prepared] = []
    for name, module in list(_own(model).named_modules()):
        for experts in _expert_lists(module):
            blocks.append(_prepare_block(name, module, experts))
            _give_back_freed_memory()
        if (stacked := _prepare_stacked(name, module)) is not None:
            blocks.append(stacked)
        blocks += _unknown_loops(name, module)
    return PrepareReport(tuple(blocks))


def loops(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path that prepare() would look at, and has not replaced yet.

    Args:
        model: what would be given to prepare().
    """
    found = {}
    for name, module in _own(model).named_modules():
        lists = [experts for experts in _expert_lists(module) if not _is_replaced(module, experts)]
        if lists or (cut_of(module) is None and stacked_loops.calls(module)):
            found[name] = module
    return found


def refresh(model: nn.Module) -> None:
    """Follow what happened to prepared experts since: stack them again, or let their blocks' own code run.

    Args:
        model: what was given to prepare().
    """
    for module in _own(model).modules():
        if (cut := cut_of(module)) is not None:
            why_stale(module, cut)


def unprepare(model: nn.Module) -> None:
    """Undo prepare(): every block has its own forward again, and every expert weights of its own.

    Args:
        model: what was given to prepare().
    """
    for module in _own(model).modules():
        if (cut := cut_of(module)) is not None:
            uninstall(module)
            if cut.experts is not None and isinstance(vars(cut.experts).get(KEY), Stack):
                let_go(cut.experts)
        elif isinstance(vars(module).get(KEY), Stack):
            let_go(module)


def _give_back_freed_memory() -> None:
    """Have glibc return what the experts had before: it keeps pieces of that size, and stacks need larger ones."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _own(model: nn.Module) -> nn.Module:
    if not isinstance(own := getattr(model, "_orig_mod", model), nn.Module):
        raise ValueError(f"{model!r} is no module: give the model itself, or what torch.compile() returned for it")
    return own


# Experts in a list.


def _expert_lists(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the lists of experts that a module holds beside a router, itself or in a child that is nothing else."""
    for child in module.children():
        inner = list(child.children())
        if len(inner) == 1 and not child._parameters and not isinstance(child, _LISTS):
            (child,) = inner
        if isinstance(child, _LISTS) and len(list(child.children())) > 1 and _router_width(module, child):
            yield child


def _router_width(block: nn.Module, experts: nn.Module) -> int | None:
    """Return H of a router weight [E, H] that lies in the block and outside its experts."""
    num_experts = len(list(experts.children()))
    for parameter in _outside(block, experts):
        if parameter.dim() == 2 and parameter.shape[0] == num_experts:
            return parameter.shape[1]
    return None


def _outside(block: nn.Module, experts: nn.Module) -> list[nn.Parameter]:
    inside = set(experts.parameters())
    return [parameter for parameter in block.parameters() if parameter not in inside]


def _unknown_loops(name: str, block: nn.Module) -> Iterator[Prepared]:
    """Yield a refusal for each child that holds experts in no known form and loops over something in its forward."""
    for child_name, child in block.named_children():
        children = list(child.children())
        if isinstance(child, _LISTS) and children:
            sizes = {sum(type(each) is type(children[0]) for each in children)}
        else:
            sizes = {p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()}
        routed = sizes & {p.shape[0] for p in block.parameters() if p.dim() == 2 and p.shape[0] > 1}
        if not routed or child in _expert_lists(block) or stacked_loops.weight_names(child) or not _has_loop(child):
            continue
        held = "a dict or list of experts" if isinstance(child, _LISTS) else "stacked weights"
        reason = f"{type(child).__name__}.forward() loops over {held} in a form that is not known, see docs/forms.md"
        yield Prepared(f"{name}.{child_name}" if name else child_name, max(routed), reason=reason)


def _has_loop(module: nn.Module) -> bool:
    """Say whether the forward of a module has a `for` in it; the containers of torch have none of their own."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any(each.opname == "FOR_ITER" for each in dis.get_instructions(code))


def _is_replaced(block: nn.Module, experts: nn.Module) -> bool:
    """Say whether a loop over these experts is replaced, in the block or a child of it, and has not gone stale."""
    cuts = [cut for module in (block, *block.children()) if (cut := cut_of(module)) is not None]
    return any(cut.experts is experts and not cut.stale for cut in cuts)


def _prepare_block(name: str, block: nn.Module, experts: nn.Module) -> Prepared:
    report = Prepared(name, len(list(experts.children())))
    for module in (block, *block.children()):
        cut = cut_of(module)
        if cut is None or cut.experts is None:
            continue
        if why_stale(module, cut):
            uninstall(module)
        elif cut.experts is experts:
            return replace(report, how="prepared before")
        else:
            return replace(report, reason="another list of experts in it was replaced")
    try:
        with _stacked(experts) as stack:
            with at_rest(block):
                done, way = _replace_loop(block, experts, stack, report)
            if way is not None:
                owner, cut, _ = way
                install(owner, cut)
                stack.keep()
        return done
    except NotStackableError as error:
        return replace(report, reason=f"its experts {error}")
    except Exception as error:
        return replace(report, reason=_failed(error))


def _failed(error: Exception) -> str:
    return f"it can't be compared with what would replace it ({type(error).__name__}: {error})"


@contextmanager
def _stacked(experts: nn.Module) -> Iterator[Stack]:
    """Yield a list's experts stacked; leave them so if the stack is kept."""
    held = vars(experts).get(KEY)
    if held is not None and held.refresh(list(experts.children())):
        let_go(experts)
        held = None
    if held is None:
        follow(experts, Stack(list(experts.children())))
    stack: Stack = vars(experts)[KEY]
    try:
        yield stack
    finally:
        if not stack.is_kept:
            let_go(experts)


def _replace_loop(block: nn.Module, experts: nn.Module, stack: Stack, report: Prepared) -> tuple[Prepared, Way | None]:
    """Find what the loop may be replaced by, or say why nothing may."""
    width, like = _router_width(block, experts), next(experts.parameters())
    assert width is not None
    inputs = hidden_states(like, width)

    def ways() -> Iterator[Way]:
        """Yield the calls that are seen, else templates of the whole block."""
        seen = observe(block, experts, inputs[0])
        for seam in seen.seams:
            cut = Cut(seam.method, stack, seam.parameters, seam.roles, seam.constants, experts=experts)
            yield seam.owner, cut, f"{type(seam.owner).__name__}.{seam.method}()"
        if seen.seams:
            return
        parameters = tuple(inspect.signature(block.forward).parameters)
        for template in templates(block, seen):
            yield block, Cut("forward", stack, parameters, template=template, experts=experts), str(template)

    with _randomised(block, experts, stack):
        state = State(experts)
        of_experts = _error_of_stack(experts, stack, width)
        if changed := ", ".join(state.changed()):
            return replace(report, reason=f"its experts change {changed} when they run"), None
        if of_experts > tolerance(like.dtype):
            return replace(report, reason=f"its experts, stacked, are off by {of_experts:.1e}"), None
        done, way = choose(block, ways, [(each,) for each in inputs], report, State(block, without=experts))
    done = replace(done, error=max(done.error, of_experts))
    return confirm(block, done, way, (inputs[0],), State(block, without=experts))


@contextmanager
def _randomised(block: nn.Module, experts: nn.Module, stack: Stack) -> Iterator[None]:
    """Give a block random weights; experts that were stacked for good before keep theirs, which have no copy."""
    buffers = [buffer for buffer in block.buffers() if buffer.is_floating_point()]
    with ExitStack() as contexts:
        contexts.enter_context(random_weights([*_outside(block, experts), *buffers]))
        if not stack.is_kept:
            contexts.enter_context(stack.random_values())
        yield


def _error_of_stack(experts: nn.Module, stack: Stack, width: int) -> float:
    """Compare every stacked expert with the module it was."""
    each_expert = list(experts.children())
    worst = 0.0
    for hidden, ids, weights in routed_rows(next(experts.parameters()), width, len(each_expert)):
        expected = torch.zeros_like(hidden, dtype=torch.float)
        for e, expert in enumerate(each_expert):
            tokens, places = torch.where(ids == e)
            if len(tokens):
                expected.index_add_(0, tokens, (expert(hidden[tokens]) * weights[tokens, places, None]).float())
        worst = max(worst, distance(stack(hidden, ids, weights), expected.to(hidden.dtype)))
    return worst


# Stacked experts whose forward loops over those that were hit.


def _prepare_stacked(name: str, module: nn.Module) -> Prepared | None:
    """Replace the forward of stacked experts; None for a module that is none, or that is traceable as it is."""
    names = stacked_loops.weight_names(module)
    if not names:
        return None
    report = Prepared(name, getattr(module, names[0]).shape[0])
    cut = cut_of(module)
    if cut is not None and not cut.stale:
        return replace(report, how="prepared before")
    if cut is not None:
        uninstall(module)
    calls = stacked_loops.calls(module)
    if not calls and not is_offloaded(module):
        return None
    if getattr(module, names[0]).is_meta:
        return replace(report, reason=f"its experts {why_meta(module)}")
    refused = []
    for call in calls:
        try:
            with at_rest(module):
                done, way = _replace_stacked(module, call, report)
        except Exception as error:  # it may not be called like this
            refused.append(replace(report, reason=_failed(error)))
            continue
        if way is not None:
            install(module, way[1])
            return done
        refused.insert(0, done)
    return refused[0]


def _replace_stacked(module: nn.Module, call: stacked_loops.Call, report: Prepared) -> tuple[Prepared, Way | None]:
    inputs = stacked_loops.inputs(module, call)
    parameters = tuple(inspect.signature(module.forward).parameters)
    roles = dict(zip(call.order, parameters, strict=True))

    def ways() -> Iterator[Way]:
        for run in stacked_loops.implementations(module):
            yield module, Cut("forward", run, parameters, roles), f"{type(module).__name__}.forward()"

    weights = [*module.parameters(), *module.buffers()]
    with random_weights(weights):
        done, way = choose(module, ways, inputs, report, State(module))
    return confirm(module, done, way, inputs[0], State(module))
