"""The weights of a list of experts in one tensor, of which each expert's parameters become views.

transformers' experts implementations (grouped_mm, batched_mm) read weights [E, ., .]; published files keep a
Linear for each expert and projection. Parameters stay the same objects under the same names and share memory
with the stacked tensor, so state_dict, safetensors and optimizers see what they saw before.

    E = experts, H = hidden, I = expert width; gate and up are both "up": whatever reads the expert's input
    up:   [E, sum of widths, H]    the projections of the input, one below the other
    down: [E, H, I]                the last projection
"""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from dmoe_compile.experts import experts_forward
from dmoe_compile.verify import State, fill_randomly


class NotStackableError(Exception):
    """Experts that can't be stacked; the message is the reason, to be read after "its experts"."""


@dataclass(frozen=True)
class ExpertForm:
    """What one expert computes: down(between(cat(up_0(x), up_1(x), ...))).

    Attributes:
        ups: paths of the Linears that read the input, in the order in which their results lie side by side.
        down: path of the Linear that makes the output.
        between: the elementwise part, [S, sum of widths] -> [S, I], with no parameters.
    """

    ups: tuple[str, ...]
    down: str
    between: fx.GraphModule


def read_form(expert: nn.Module) -> ExpertForm:
    """Return what an expert computes, read from its forward.

    Raises:
        NotStackableError: if it is not Linears, an elementwise function, and a Linear.
    """
    for path, module in expert.named_modules():
        here = f"{type(expert).__name__}{'.' if path else ''}{path}"
        if type(module) is not nn.Linear and any(True for _ in (*module._parameters, *module._buffers)):
            raise NotStackableError(f"hold a {_kind(module)} ({here}); only torch.nn.Linear can be stacked")
    state = State(expert)
    try:
        graph = fx.Tracer().trace(expert)  # which keeps Linears whole
    except Exception as error:
        raise NotStackableError(f"can't be traced ({type(error).__name__}: {error})") from error
    finally:
        state.restore()
    inputs = [node for node in graph.find_nodes(op="placeholder") if node.users]
    linears = {n: str(n.target) for n in graph.find_nodes(op="call_module") if _is_linear(expert, n)}
    output = graph.output_node().args[0]
    if len(inputs) != 1 or output not in linears:
        held = ", ".join(dict.fromkeys(_kind(module) for module in expert.children()))
        raise NotStackableError(f"({held}) are not functions of one input that end in a Linear")
    assert isinstance(output, fx.Node)
    if len(set(linears.values())) < len(linears):
        raise NotStackableError("use a Linear twice")
    if len({expert.get_submodule(path).bias is None for path in linears.values()}) > 1:
        raise NotStackableError("have a bias on some Linears only")
    ups = [node for node in linears if node is not output]
    if not ups or any(node.args != (inputs[0],) for node in ups) or set(inputs[0].users) != set(ups):
        held = ", ".join(dict.fromkeys(_kind(module) for module in expert.children()))
        raise NotStackableError(f"({held}) are not Linears on the input, an elementwise function, and one Linear")
    return ExpertForm(tuple(linears[up] for up in ups), linears[output], _between(expert, graph, ups, output))


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_plain(module: nn.Module) -> bool:
    """Say whether calling a module does what its class does, and nothing else."""
    held = module.__dict__
    hooks = (
        held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]
    )
    return not hooks and "forward" not in held


def _is_linear(expert: nn.Module, node: fx.Node) -> bool:
    return isinstance(expert.get_submodule(str(node.target)), nn.Linear)


def _between(expert: nn.Module, graph: fx.Graph, ups: Sequence[fx.Node], down: fx.Node) -> fx.GraphModule:
    """Return the part of an expert's graph that lies between its Linears, as a function of the first ones' results."""
    part = fx.Graph()
    projected = part.placeholder("projected")
    widths = [_linear(expert, str(up.target)).out_features for up in ups]
    results = part.call_method("split", (projected, widths, -1))
    env = {up: part.call_function(operator.getitem, (results, i)) for i, up in enumerate(ups)}
    for node in graph.nodes:
        if node in env or node is down or node.op in {"placeholder", "output"}:
            continue
        if any(argument not in env for argument in node.all_input_nodes):
            raise NotStackableError("read their input beside the Linears")
        env[node] = part.node_copy(node, env.__getitem__)
    part.output(env[down.all_input_nodes[0]])
    return fx.GraphModule(expert, part)


class Experts:
    """The weights of E experts under the names that transformers' experts implementations read. No module, no owner.

    Args:
        between: what lies between the projections, see ExpertForm.
        weights: gate_up_proj [E, sum of widths, H] and down_proj [E, H, I], then their biases or nothing.
    """

    has_gate = True  # gate_up_proj, then _apply_gate, then down_proj
    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True
    _is_expert_parallel = False

    def __init__(self, between: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> None:
        self._apply_gate = between
        self.num_experts = weights[0].shape[0]
        self.gate_up_proj, self.down_proj = weights[:2]
        self.has_bias = len(weights) > 2
        if self.has_bias:
            self.gate_up_proj_bias, self.down_proj_bias = weights[2:]


class Stack:
    """Experts stacked in place; call it to run them.

    Args:
        experts: experts of one form on one device. Their parameters become views of the stacked tensors.

    Attributes:
        form: what each of them computes.
        weights: up and down, [E, ., .], and their biases [E, .] if they have some. Parameters, which nobody lists,
            because Dynamo guards on the memory of plain tensors at every call.
        dirty: whether an expert was given another module or parameter since refresh().

    Raises:
        NotStackableError: for experts that differ, share weights, or are of another form.
    """

    dirty: bool

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        _check_alike(experts)
        self.form = read_form(experts[0])
        self.follower: RemovableHandle | None = None  # what stacks again after load_state_dict()
        self._take(experts)
        if any(_stack_of(linear) for each in self._linears for linear in each):
            raise NotStackableError("are stacked in another list already")
        self._originals: dict[nn.Parameter, Tensor] | None = {p: p.data for p in self._parameters}
        try:
            self._fill()
        except BaseException:
            self.restore()
            raise
        self._register()

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of each token's experts: hidden [T, H], ids and weights [T, k] -> [T, H] in hidden's dtype.

        Where a gradient is required, the experts' parameters are stacked anew, so that it reaches them.
        """
        stacked = self._stacked_anew() if self._wants_gradients() else self.weights
        return experts_forward(Experts(self.form.between, stacked), hidden, ids, weights)

    def is_swapped(self) -> bool:
        """Say whether the experts hold other parameters, without having been given them."""
        return not self.dirty and list(map(id, self._read())) != list(map(id, self._parameters))

    def refresh(self, experts: Sequence[nn.Module]) -> str:
        """Stack again if the experts were given other parameters or other memory.

        Args:
            experts: what is in the list now.

        Returns:
            Why they can't be stacked any more, "" where they are.
        """
        if len(experts) != len(self._experts) or any(a is not b for a, b in zip(experts, self._experts, strict=True)):
            return "other experts took the place of its experts"
        self.requires_grad = any(parameter.requires_grad for parameter in self._parameters)
        self.dirty |= self._pointers != [parameter.data_ptr() for parameter in self._parameters]
        if not self.dirty:
            return (
                "" if all(map(_is_plain, self._modules)) else "its experts were given hooks or a forward of their own"
            )
        try:
            _check_alike(experts)
            self.form = read_form(experts[0])
        except NotStackableError as error:
            return f"its experts {error}"
        self._take(experts)
        self._register()
        self._fill()
        return ""

    @property
    def is_kept(self) -> bool:
        """Whether the memory that the parameters had before is gone."""
        return self._originals is None

    def keep(self) -> None:
        """Let go of the memory that the parameters had before."""
        self._originals = None

    @contextlib.contextmanager
    def random_values(self) -> Iterator[None]:
        """Give the experts random weights; only before keep(), which lets go of their own."""
        assert self._originals is not None
        try:
            for seed, weight in enumerate(self.weights):
                fill_randomly(weight, seed)
            yield
        finally:
            for parameter, was in self._originals.items():
                parameter.data.copy_(was)

    @torch.no_grad()
    @torch.inference_mode(mode=False)
    def restore(self) -> None:
        """Give every parameter the memory it had before, or where that is gone some of its own."""
        originals = self._originals or {}
        for parameter in self._parameters:
            parameter.data = originals[parameter] if parameter in originals else parameter.data.clone()
        self._originals = None
        for module in self._modules:
            _STACKS.pop(module, None)

    @torch.no_grad()
    @torch.inference_mode(mode=False)
    def _fill(self) -> None:
        """Copy every parameter into the stacked tensors and make it a view of its place there."""
        gathered = [_gathered(each) for each in self._sources()]
        self.weights = tuple(nn.Parameter(each, requires_grad=False) for each in gathered)
        for weight in self.weights:
            torch._dynamo.mark_static_address(weight)  # for CUDA graphs and for the matcher
        self._pointers = [parameter.data_ptr() for parameter in self._parameters]

    def _take(self, experts: Sequence[nn.Module]) -> None:
        """Read modules and parameters from the experts."""
        paths = (*self.form.ups, self.form.down)
        self._experts = list(experts)
        self._modules = [module for expert in experts for module in expert.modules()]
        self._linears = [[_linear(expert, path) for path in paths] for expert in experts]  # of every expert, down last
        self._parameters = self._read()
        self.requires_grad = any(parameter.requires_grad for parameter in self._parameters)
        self.dirty = False

    def _read(self) -> list[nn.Parameter]:
        """Return the parameters that lie in the experts now."""
        found = []
        for each in self._linears:
            for linear in each:
                held = linear._parameters
                found += [p for p in (held.get("weight"), held.get("bias")) if p is not None]
        return found

    def _register(self) -> None:
        """Have the experts' modules tell when they are given another parameter or module."""
        _listen()
        for module in self._modules:
            _STACKS[module] = weakref.ref(self)

    def _wants_gradients(self) -> bool:
        return torch.is_grad_enabled() and (self.requires_grad or any(x.weight.requires_grad for x in self._linears[0]))

    def _stacked_anew(self) -> tuple[Tensor, ...]:
        """Return weights that a gradient flows through, at the price of a copy."""
        return tuple(torch.stack([torch.cat(tuple(each)) for each in source]) for source in self._sources())

    def _sources(self) -> list[list[list[nn.Parameter]]]:
        """Return what lies in each of `weights`: for every expert, the parameters one below the other."""
        names = [name for name in ("weight", "bias") if getattr(self._linears[0][0], name) is not None]
        parts = (slice(None, -1), slice(-1, None))  # up, down
        return [
            [[getattr(linear, name) for linear in each[part]] for each in self._linears]
            for name in names
            for part in parts
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in {"weights", "_originals", "_pointers"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Stack the experts that come with it: unpickled or copied, they have memory of their own."""
        vars(self).update(state, _originals=None)
        self._fill()
        self._register()


_STACKS: WeakKeyDictionary[nn.Module, weakref.ref[Stack]] = WeakKeyDictionary()  # by the modules in their experts


def _stack_of(module: nn.Module) -> Stack | None:
    held = _STACKS.get(module)
    return held() if held is not None else None


@functools.cache
def _listen() -> None:
    """Learn of every module and parameter that a module is given from now on."""
    torch.nn.modules.module.register_module_module_registration_hook(_told)
    torch.nn.modules.module.register_module_parameter_registration_hook(_told)


def _told(module: nn.Module, _name: str, _value: Any) -> None:
    if torch.compiler.is_compiling():  # transformers slices its list of layers in every forward: a new module
        return
    if (stack := _stack_of(module)) is not None:
        stack.dirty = True


def _check_alike(experts: Sequence[nn.Module]) -> None:
    first, owners, places = experts[0], dict[nn.Parameter, str](), dict[int, str]()
    described = _described(first)
    for i, expert in enumerate(experts):
        if _described(expert) != described:
            raise NotStackableError(f"differ: experts 0 and {i} are not of one shape, dtype, device and structure")
        if any(parameter.is_meta for parameter in expert.parameters()):
            raise NotStackableError(why_meta(expert))
        for path, parameter in expert.named_parameters(remove_duplicate=False):
            here = f"{i}.{path}"
            if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
                raise NotStackableError(
                    f"hold a {type(parameter.data).__name__} ({here}); only plain tensors can be stacked"
                )
            if owners.setdefault(parameter, here) != here:
                raise NotStackableError(f"share a weight: {owners[parameter]} is {here}")
            if places.setdefault(parameter.data_ptr(), here) != here and parameter.numel():
                raise NotStackableError(f"share memory: {places[parameter.data_ptr()]} and {here}")
        if not all(map(_is_plain, expert.modules())):
            raise NotStackableError(f"have a forward of their own or hooks (expert {i}), which stacked weights bypass")


def why_meta(experts: nn.Module) -> str:
    """Return why weights of experts are on the meta device, and the way out."""
    if any(map(is_offloaded, experts.modules())):
        return "are offloaded by accelerate; load the model without offloading"
    return "are on the meta device; load their weights first"


def is_offloaded(module: nn.Module) -> bool:
    """Say whether accelerate brings a module's weights when it is called; where that fails, they stay."""
    return "_hf_hook" in vars(module) and any(parameter.is_meta for parameter in module.parameters(recurse=False))


def _described(expert: nn.Module) -> tuple[Any, ...]:
    parameters = [(path, p.shape, p.dtype, p.device) for path, p in expert.named_parameters()]
    return type(expert), repr(expert), parameters


def _linear(expert: nn.Module, path: str) -> nn.Linear:
    linear = expert.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _gathered(parameters: list[list[nn.Parameter]]) -> Tensor:
    """Return [E, rows, ...] with the parameters of each expert one below the other, and make them views of it."""
    like, rows = parameters[0][0], [len(parameter) for parameter in parameters[0]]
    stacked = like.new_empty((len(parameters), sum(rows), *like.shape[1:]))
    for place, each in zip(stacked, parameters, strict=True):
        for parameter, part in zip(each, place.split(rows), strict=True):
            part.copy_(parameter.data)
            parameter.data = _in_a_storage_of_its_own(part)
    return stacked


def _in_a_storage_of_its_own(part: Tensor) -> Tensor:
    """Return a tensor over the same memory whose storage ends where it does: what saves weights looks at storages."""
    try:
        return torch.from_dlpack(part)
    except (BufferError, RuntimeError, TypeError):  # a dtype or a device that DLPack does not know
        return part
