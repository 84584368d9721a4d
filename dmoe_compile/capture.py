"""prepare(): make experts in Python loops traceable, in place, and keep only what gives the same results.

Published mixture-of-experts diffusion LMs loop over their experts. Dynamo unrolls such a loop (22 s for a layer
of 128 experts) or breaks the graph in it. prepare() stacks the experts' weights (dmoe_compile.stacking) and cuts
the loop out where the block hands over (hidden, ids, weights):

    a method      block.moe_infer(hidden, ids, weights)    LLaDA2, Bailing, DeepSeek
    a module      block.experts(hidden, ids, weights)      transformers' eager experts and their copies
    the block     router and loop are one forward: a template of the whole block   SDAR, LLaDA-MoE, RND1

Everything before the cut stays the model's own code. What is kept was compared with the original on several
inputs in the block's own dtype; a block with no match is given back as it was, and the report says why.

    T = B*S tokens, H = hidden, E = experts, k = experts a token
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

from dmoe_compile.blocks import ROLES, Seen, Template, observe, templates
from dmoe_compile.experts import experts_forward
from dmoe_compile.stacking import NotStackableError, Stack

if TYPE_CHECKING:
    from rich.table import Table

_KEY = "_dmoe"  # in the __dict__ of a module whose method was replaced, and of the list whose experts were stacked
_TOKENS = 8  # a sequence of the inputs that are compared
# Both sides round the same products, but sum them in another order: of k terms, each off by at most half an eps.
# Wrong mathematics (another activation, weights not renormalised) is a tenth or more apart.
_MAX_ERROR_EPS = 4
_MAX_ERROR_FP32 = 1e-5  # products of thousands of terms, summed in another order


@dataclass(frozen=True)
class Prepared:
    """What became of one mixture-of-experts block.

    Attributes:
        name: the module's path in the model.
        num_experts: E.
        how: what was replaced, "" where nothing was.
        reason: why it was left as it is, "" where something was replaced.
        error: largest difference from the original, relative to its norm, over all that was compared.
    """

    name: str
    num_experts: int
    how: str = ""
    reason: str = ""
    error: float = 0.0


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
    than one layer's. In training mode a block runs its original code.

    Args:
        model: a module, or what torch.compile() returned for one.

    Returns:
        What was replaced in which block, or why not.
    """
    blocks = []
    for name, module in list(getattr(model, "_orig_mod", model).named_modules()):
        blocks += [_prepare_block(name, module, experts) for experts in _expert_lists(module)]
        if (stacked := _prepare_stacked(name, module)) is not None:
            blocks.append(stacked)
    return PrepareReport(tuple(blocks))


def loops(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path that prepare() would look at, and has not replaced yet.

    Args:
        model: what would be given to prepare().
    """
    found = {}
    for name, module in model.named_modules():
        lists = [experts for experts in _expert_lists(module) if _KEY not in experts.__dict__]
        if lists or _loop_order(module) is not None:
            found[name] = module
    return found


def refresh(model: nn.Module) -> None:
    """Stack again every list of prepared experts that something has given other memory.

    Args:
        model: what was given to prepare().
    """
    for module in model.modules():
        if isinstance(held := module.__dict__.get(_KEY), Stack):
            held.refresh()


def unprepare(model: nn.Module) -> None:
    """Undo prepare(): every block has its own forward again, and every expert weights of its own.

    Args:
        model: what was given to prepare().
    """
    for module in getattr(model, "_orig_mod", model).modules():
        held = module.__dict__.pop(_KEY, None)
        if isinstance(held, _Cut):
            del module.__dict__[held.method]
        elif isinstance(held, Stack):
            del module.__dict__["_apply"]
            assert held.follower is not None
            held.follower.remove()
            held.restore()


# What is installed.


@dataclass(frozen=True)
class _Cut:
    """How a replaced method reads its arguments and runs the experts; it lies in its module's __dict__.

    Attributes:
        method: the name of the method.
        run: the experts: (hidden, ids, weights) -> [T, H].
        parameters: names of the method's parameters.
        roles: which of them is "hidden", "ids" and "weights".
        template: the whole block's, if the method is the forward of one.
    """

    method: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    template: Template | None = None


def _install(module: nn.Module, cut: _Cut) -> None:
    module.__dict__[_KEY] = cut
    module.__dict__[cut.method] = MethodType(_run_block if cut.template else _run_experts, module)


def _uninstall(module: nn.Module) -> None:
    del module.__dict__[module.__dict__.pop(_KEY).method]


def _run_experts(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for a method that runs the experts."""
    cut = self.__dict__[_KEY]
    given = {**dict(zip(cut.parameters, args, strict=False)), **kwargs}
    out: Tensor = cut.run(*(given[cut.roles[role]] for role in ROLES))
    return out


def _run_block(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stand in for the forward of a whole block."""
    if self.training or args or kwargs:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    cut = self.__dict__[_KEY]
    return cut.template(self, cut.run, hidden_states)


def _follow(experts: nn.ModuleList, stack: Stack) -> None:
    """Stack the experts again whenever .to() or load_state_dict() has given them other memory."""
    experts.__dict__[_KEY] = stack
    experts.__dict__["_apply"] = MethodType(_apply, experts)
    stack.follower = experts.register_load_state_dict_post_hook(_loaded)


def _apply(self: nn.ModuleList, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.ModuleList:
    nn.ModuleList._apply(self, fn, recurse)
    self.__dict__[_KEY].refresh()
    return self


def _loaded(experts: nn.Module, _keys: Any) -> None:
    experts.__dict__[_KEY].refresh()


# Finding blocks.


def _expert_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Yield the lists of experts that a module holds beside a router."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and _router_width(module, child):
            yield child


def _router_width(block: nn.Module, experts: nn.ModuleList) -> int | None:
    """Return H of a router weight [E, H] that lies in the block and outside its experts."""
    inside = set(experts.parameters())
    for parameter in block.parameters():
        if parameter not in inside and parameter.dim() == 2 and parameter.shape[0] == len(experts):
            return parameter.shape[1]
    return None


def _prepare_block(name: str, block: nn.Module, experts: nn.ModuleList) -> Prepared:
    report = Prepared(name, len(experts))
    if _KEY in experts.__dict__:
        experts.__dict__[_KEY].refresh()
        return replace(report, how="prepared before")
    try:
        stack = Stack(list(experts))
    except NotStackableError as error:
        return replace(report, reason=f"its experts {error}")
    try:
        with _at_rest(block):
            done = _replace_loop(block, experts, stack, report)
    except Exception as error:
        done = replace(report, reason=f"it can't be run on random hidden states ({type(error).__name__}: {error})")
    if done.reason:
        stack.restore()
        return done
    stack.keep()
    _follow(experts, stack)
    return done


def _replace_loop(block: nn.Module, experts: nn.ModuleList, stack: Stack, report: Prepared) -> Prepared:
    """Replace the loop in one way or another, or say why none is right."""
    width = _router_width(block, experts)
    assert width is not None
    of_experts = _error_of_stack(experts, stack, width)
    if of_experts > _tolerance(experts):
        return replace(report, reason=f"its experts, stacked, are off by {of_experts:.1e}")
    inputs = _inputs(next(experts.parameters()), width)
    seen = observe(block, experts, inputs[0])
    expected = [seen.output, *(block(each) for each in inputs[1:])]
    ways = [
        (_error_of(block, cut, [(each,) for each in inputs], expected, owner), owner, cut, how)
        for owner, cut, how in _candidates(block, seen, stack)
    ]
    done = _keep_nearest(ways, _tolerance(experts), report)
    return replace(done, error=max(done.error, of_experts))


# What a loop may be replaced by.


def _candidates(block: nn.Module, seen: Seen, run: Stack) -> Iterator[tuple[nn.Module, _Cut, str]]:
    """Yield replacements, and words for each: the calls that were seen, else templates of the whole block."""
    for owner, method, parameters, roles in seen.seams:
        yield owner, _Cut(method, run, parameters, roles), f"{type(owner).__name__}.{method}()"
    if seen.seams:
        return
    for template in templates(block, seen):
        yield block, _Cut("forward", run, template=template), str(template)


# Stacked weights, and a loop over the experts that were hit.


class _StackedWeights:
    """Experts whose module holds [E, ., .] weights, under the names that transformers' implementations read.

    Args:
        module: it owns the weights, which are read at every call.
        up, down: names of its parameters.
        is_transposed: the weights are [E, in, out].
        gating: how up becomes the input of down: "concatenated" (gate above up), "interleaved" or "none".
        act_fn: the activation.
    """

    has_gate = True  # gate_up_proj, then _apply_gate, then down_proj
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(self, module: nn.Module, up: str, down: str, is_transposed: bool, gating: str, act_fn: Any) -> None:
        self.module, self.up, self.down = module, up, down
        self.is_transposed, self.gating, self.act_fn = is_transposed, gating, act_fn
        self.num_experts = getattr(module, up).shape[0]
        self.has_bias = isinstance(getattr(module, f"{up}_bias", None), nn.Parameter)

    @property
    def gate_up_proj(self) -> Tensor:
        return getattr(self.module, self.up)

    @property
    def down_proj(self) -> Tensor:
        return getattr(self.module, self.down)

    @property
    def gate_up_proj_bias(self) -> Tensor:
        return getattr(self.module, f"{self.up}_bias")

    @property
    def down_proj_bias(self) -> Tensor:
        return getattr(self.module, f"{self.down}_bias")

    def _apply_gate(self, projected: Tensor) -> Tensor:
        """[S, rows of up] -> [S, I]; transformers calls it between the projections."""
        if self.gating == "none":
            return self.act_fn(projected)
        halves = (
            projected.chunk(2, dim=-1) if self.gating == "concatenated" else (projected[..., ::2], projected[..., 1::2])
        )
        return self.act_fn(halves[0]) * halves[1]


def _stacked_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters [E, ., .] of one E."""
    found = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()}
    return list(found) if len({p.shape[0] for p in found.values()}) == 1 else []


def _prepare_stacked(name: str, module: nn.Module) -> Prepared | None:
    """Replace the forward of stacked experts; None for a module that is none, or that is traceable as it is."""
    names = _stacked_parameters(module)
    if len(names) < 2:
        return None
    report = Prepared(name, getattr(module, names[0]).shape[0])
    if _KEY in module.__dict__:
        return replace(report, how="prepared before")
    order = _loop_order(module)
    if order is None:
        return None
    if getattr(module, names[0]).is_meta:
        return replace(report, reason="its experts are on the meta device; load their weights first")
    with _at_rest(module):
        inputs = [_ordered(order, each) for each in _routed_inputs(module, names)]
        expected = [module(*each) for each in inputs]
        parameters = tuple(inspect.signature(module.forward).parameters)
        roles = dict(zip(order, parameters, strict=True))
        cuts = [(_Cut("forward", run, parameters, roles), how) for run, how in _implementations(module, names)]
        ways = [(_error_of(module, cut, inputs, expected), module, cut, how) for cut, how in cuts]
    return _keep_nearest(ways, _tolerance(module), report)


def _keep_nearest(ways: list[tuple[float, nn.Module, _Cut, str]], tolerance: float, report: Prepared) -> Prepared:
    """Install the replacement with the smallest error, or say that none is right."""
    error, owner, cut, how = min(ways, key=lambda way: way[0], default=(float("inf"), None, None, ""))
    if owner is None or cut is None or error > tolerance:
        off = f"; the nearest is off by {error:.1e}" if error < float("inf") else ""
        return replace(report, reason=f"its forward is of no known form{off}")
    _install(owner, cut)
    return replace(report, how=how, error=error)


def _is_transformers_own(module: nn.Module) -> bool:
    """Say whether a class was made by transformers' use_experts_implementation."""
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_bias", "config"))


def _implementation_of(module: nn.Module) -> str:
    return getattr(module.config, "_experts_implementation", None) or "eager"


_ORDERS = (ROLES, ("hidden", "weights", "ids"))


def _loop_order(module: nn.Module) -> tuple[str, ...] | None:
    """Return the order of the arguments of stacked experts whose forward needs their values; None for any other."""
    names = _stacked_parameters(module)
    if len(names) < 2 or _KEY in module.__dict__ or len(inspect.signature(module.forward).parameters) != len(ROLES):
        return None
    if _is_transformers_own(module) and _implementation_of(module) != "eager":
        return None
    (routed, *_) = _routed_inputs(module, names)
    with _at_rest(module), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = tuple(mode.from_tensor(each) for each in routed)
        for order in _ORDERS:
            try:
                module(*_ordered(order, fakes))
            except (DynamicOutputShapeException, DataDependentOutputException):
                return order
            except Exception:  # not these arguments
                continue
            return None
    return None


def _ordered(order: tuple[str, ...], routed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    by_role = dict(zip(ROLES, routed, strict=True))
    return tuple(by_role[role] for role in order)


def _routed_inputs(module: nn.Module, names: list[str]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (hidden, ids, weights) for stacked experts: all experts in turn, and all tokens on the same ones."""
    like = getattr(module, names[0])
    sizes = [set(getattr(module, name).shape[1:]) for name in names]
    width = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    width = width if isinstance(width, int) else min(set.intersection(*sizes), default=min(sizes[0]))
    return [_routed(like, width, like.shape[0], spread) for spread in (True, False)]


def _implementations(module: nn.Module, names: list[str]) -> Iterator[tuple[Callable[..., Tensor], str]]:
    """Yield functions that may compute what a module of stacked experts does, and words for them."""
    if _is_transformers_own(module):
        yield functools.partial(experts_forward, module), f"{type(module).__name__}.forward()"
        return
    if len(names) != 2:
        return
    acts: list[Callable[[Tensor], Tensor]] = [
        child for child in module.children() if not any(True for _ in child.parameters())
    ]
    acts += [F.silu, F.gelu, functools.partial(F.gelu, approximate="tanh"), F.relu]
    for up, down in itertools.permutations(names):
        for is_transposed, gating, act in itertools.product(
            (False, True), ("concatenated", "interleaved", "none"), acts
        ):
            experts = _StackedWeights(module, up, down, is_transposed, gating, act)
            yield functools.partial(experts_forward, experts), f"{type(module).__name__}.forward()"


# Comparing.


@contextlib.contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """Run a module in eval mode, without gradients and without autocast; put back what was."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch._C._DisableAutocast():
            yield
    finally:
        for each, training in modes:
            each.training = training


def _random(like: Tensor, *size: int) -> Tensor:
    """Return normal values in the dtype and on the device of a tensor, the same ones every time."""
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator).to(like.device, like.dtype)


def _inputs(like: Tensor, width: int) -> list[Tensor]:
    """Return hidden states [B, S, H]: two blocks, one token, and tokens all alike, whose k experts get all of them."""
    return [
        _random(like, 2, _TOKENS, width),
        _random(like, 1, 4 * _TOKENS, width),
        _random(like, 1, 1, width),
        _random(like, 1, 1, width).expand(1, _TOKENS, width).contiguous(),
    ]


def _routed(like: Tensor, width: int, num_experts: int, spread: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden [E, H], ids and weights [E, 2]: each expert gets two tokens, or the first two get all."""
    first = torch.arange(num_experts, device=like.device) if spread else torch.zeros(num_experts, device=like.device)
    ids = torch.stack([first, first + 1], dim=-1).long() % num_experts
    return _random(like, num_experts, width), ids, _random(like, num_experts, 2).abs()


def _error_of_stack(experts: nn.ModuleList, stack: Stack, width: int) -> float:
    """Compare every stacked expert with the module it was."""
    like, worst = next(experts.parameters()), 0.0
    for spread in (True, False):
        hidden, ids, weights = _routed(like, width, len(experts), spread)
        expected = torch.zeros_like(hidden, dtype=torch.float)
        for e, expert in enumerate(experts):
            tokens, places = torch.where(ids == e)
            if len(tokens):
                expected.index_add_(0, tokens, (expert(hidden[tokens]) * weights[tokens, places, None]).float())
        worst = max(worst, _distance(stack(hidden, ids, weights), expected.to(hidden.dtype)))
    return worst


def _error_of(
    module: nn.Module,
    cut: _Cut,
    inputs: Sequence[tuple[Tensor, ...]],
    expected: Sequence[Any],
    owner: nn.Module | None = None,
) -> float:
    """Return how far a module is from what it returned before, with a replacement installed in it or in `owner`."""
    owner = owner or module
    _install(owner, cut)
    try:
        return max(_distance(module(*args), was) for args, was in zip(inputs, expected, strict=True))
    except Exception:  # a replacement that does not fit: it was a guess
        return float("inf")
    finally:
        _uninstall(owner)


def _distance(result: Any, expected: Any) -> float:
    """Return the largest relative difference of two results of one structure, infinity where they differ in kind."""
    leaves, spec = pytree.tree_flatten(result)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    if spec != wanted_spec:
        return float("inf")
    return max((_leaf_distance(a, b) for a, b in zip(leaves, wanted, strict=True)), default=0.0)


def _leaf_distance(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if type(a) is type(b) and a == b else float("inf")
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    norm = b.double().norm()
    error = ((a.double() - b.double()).norm() / norm.clamp_min(torch.finfo(b.dtype).tiny)).item()
    return error if error == error else float("inf")


def _tolerance(module: nn.Module) -> float:
    """Return the largest error that rounding explains, relative to the norm of what is compared."""
    return max(_MAX_ERROR_EPS * torch.finfo(next(module.parameters()).dtype).eps, _MAX_ERROR_FP32)
