"""Write Dynamo's graph as functional aten: what the matcher reads, and Inductor compiles once it is rewritten."""

from __future__ import annotations

import contextlib
import gc
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._C import _functorch
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import predispatch
from torch._guards import TracingContext
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe_compile.passes.nodes import Sources

_SELECTIONS = {"topk", "sort", "argsort", "argmax", "max"}
_INPUT_META = ("tensor_dict", "grapharg")  # what AOTAutograd reads off Dynamo's placeholders: static inputs, sources
_LITERALS = {bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format}
_LEVELS = {  # where a call of torch.func's names the transform that it belongs to, by its depth
    predispatch._add_batch_dim: 2,
    predispatch._remove_batch_dim: 1,
    predispatch._unwrap_for_grad: 1,
    _functorch._wrap_for_grad: 1,
}
_ORIGIN_META = ("nn_module_stack", "stack_trace")  # what a recorded operation keeps of the node it comes from


def normalise(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, Sources]:
    """Return Dynamo's graph as functional aten with the same inputs and outputs, and where the inputs come from.

    Traced without gradients, under the fake mode that AOTAutograd will use, so that sizes are the same
    symbols. An input that the model writes to (a static KV cache) is written by a `copy_` at the end.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, real or fake tensors and sizes.
    """
    fake_mode = TracingContext.get().fake_mode
    assert fake_mode is not None, "Dynamo left no fake mode"
    fakes = [_fake(fake_mode, x) for x in example_inputs]
    shape_env = fake_mode.shape_env
    quiet = shape_env.ignore_fresh_unbacked_symbols() if shape_env else contextlib.nullcontext()
    with fake_mode, enable_python_dispatcher(), quiet, torch.no_grad(), _no_garbage_collection():
        try:
            aten = record(gm, fakes)
        except NotPlainError:
            aten = trace(gm, fakes)
    paths, parameters = {}, set()
    origins = gm.graph.find_nodes(op="placeholder")
    for node, origin in zip(aten.graph.find_nodes(op="placeholder"), origins, strict=True):
        node.meta |= {key: origin.meta[key] for key in _INPUT_META if key in origin.meta}
        node._dynamo_source = getattr(origin, "_dynamo_source", None)
        paths[node.name], is_parameter = source(origin)
        if is_parameter:
            parameters.add(node.name)
    aten.meta.update(gm.meta)
    aten._param_name_to_source = getattr(gm, "_param_name_to_source", {})  # type: ignore[assignment]
    return aten, Sources(paths, frozenset(parameters))


def source(placeholder: fx.Node) -> tuple[str, bool]:
    """Return Dynamo's expression for an input, and whether that is a module's weight or buffer."""
    origin = getattr(placeholder, "_dynamo_source", None)
    path = origin.name if origin is not None else ""
    in_module = "._parameters[" in path or "._buffers[" in path
    return path, in_module or bool(placeholder.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def _fake(fake_mode: FakeTensorMode, x: Any) -> Any:
    """Return the fake tensor of an input, as dynamic as Dynamo decided it to be."""
    if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
        return x
    context = TracingContext.get().tensor_to_context.get(x)
    if context is None:
        return fake_mode.from_tensor(x)
    return fake_mode.from_tensor(x, symbolic_context=context, source=context.tensor_source)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes a million objects that all live on; to look for garbage among them is a fifth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class NotPlainError(Exception):
    """A graph holds what `record` can't write down."""


def record(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    """Return what `trace` returns, in half the time, of a graph with plain operators on tensors of fixed sizes.

    A warm start is where that shows: all that follows comes out of Inductor's caches.

    Raises:
        NotPlainError: for any other graph: symbolic sizes, foreign objects, higher-order operators.
    """
    if any(isinstance(node.target, HigherOrderOperator) for node in gm.graph.nodes):
        raise NotPlainError("a higher-order operator")
    recorder = _Recorder(fakes)
    with recorder:
        outputs = torch.func.functionalize(_Following(gm, recorder).run)(*fakes)
    recorder.graph.output(recorder.written(outputs))
    return _make_graph_module(torch.nn.Module(), recorder.graph)  # compiles the code when it is called, not before


class _Recorder(TorchDispatchMode):
    """Writes aten operations into a graph whose inputs have the given fake values."""

    def __init__(self, fakes: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.meta: dict[str, Any] = {}  # what the next nodes keep of Dynamo's
        self._known: dict[int, tuple[fx.Node, torch.Tensor]] = {}  # by id; held, so that no other value takes it
        for i, fake in enumerate(fakes):
            self._remember(self.graph.placeholder(f"arg{i}_1"), fake)  # as make_fx names them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.ops.aten.detach.default and type(args[0]) is torch.Tensor
        ):  # torch.tensor(2.0) begins with a real one
            return args[0]
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # a tensor's device
            return out
        if func is torch.ops.aten.lift_fresh.default:  # ... and ends so
            func, args = torch.ops.aten.lift_fresh_copy.default, (self._literal(args[0], out),)
        name = func.overloadpacket.__name__
        node = self._create(func, self.written(args), self.written(kwargs), name)
        if isinstance(out, (tuple, list)):
            node.meta["val"] = out
            for i, each in enumerate(out):
                self._remember(self._create(operator.getitem, (node, i), {}, "getitem"), each)
        else:
            self._remember(node, out)
        return out

    def _create(self, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta.update(self.meta)
        return node

    def _literal(self, constant: torch.Tensor, fake: FakeTensor) -> fx.Node:
        """Write a constant as code, for the reasons of _inline_constants."""
        kwargs = {"dtype": constant.dtype, "device": constant.device}
        with unset_fake_temporarily():
            value = constant.tolist()
        node = self._create(torch.tensor, (value,), kwargs, "tensor")
        node.meta["val"] = fake
        return node

    def written(self, values: Any) -> Any:
        """Return arguments or outputs with the node of each tensor in its place."""
        return fx.node.map_aggregate(values, self._written)

    def _written(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and id(value) in self._known:
            return self._known[id(value)][0]
        if value is None or type(value) in _LITERALS or isinstance(value, fx.Node):
            return value
        raise NotPlainError(f"{type(value).__name__} {value}")

    def _remember(self, node: fx.Node, value: Any) -> None:
        if not isinstance(value, FakeTensor) or value._has_symbolic_sizes_strides:
            raise NotPlainError(f"{type(value).__name__} {value}")
        node.meta["val"] = value
        self._known[id(value)] = node, value


class _Running(fx.Interpreter):
    """Runs Dynamo's graph inside of functionalize, which is a transform too: it puts vmap and grad a level deeper.

    Made outside of it.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._outside = _functorch.get_dynamic_layer_stack_depth()
        self._deeper = 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        inside = _functorch.get_dynamic_layer_stack_depth()
        self._deeper = inside - self._outside
        try:
            return super().run(*args, **kwargs)
        except Exception:  # a vmap that was begun would stay on for all that this thread runs afterwards
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(inside)
            raise

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if (at := _LEVELS.get(target)) is not None:
            args = (*args[:at], args[at] + self._deeper, *args[at + 1 :])
        return super().call_function(target, args, kwargs)


class _Following(_Running):
    """Runs Dynamo's graph and tells a recorder where each operation comes from."""

    def __init__(self, gm: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(gm)
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.meta = {key: n.meta[key] for key in _ORIGIN_META if key in n.meta}
        return super().run_node(n)


def trace(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    """Return Dynamo's graph as functional aten, run on fake inputs under whatever modes are on."""
    aten = make_fx(torch.func.functionalize(_Tracing(gm).run), tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    _inline_constants(aten)
    return aten


class _Tracing(_Running):
    """Runs Dynamo's graph; what selects experts keeps its module stack, which names sites that share weights.

    For every node that would cost a third of the trace.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(_linear if target is torch._C._nn.linear else target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if getattr(n.target, "__name__", n.target) not in _SELECTIONS:
            return super().run_node(n)
        with fx_traceback.preserve_node_meta(), fx_traceback.set_current_meta(n):
            return super().run_node(n)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What ATen makes of it; with a bias, ATen reads the input's sizes as ints and so makes constants of symbols."""
    if bias is None or input.dim() < 3 or all(isinstance(size, int) for size in input.shape):
        return torch.nn.functional.linear(input, weight, bias)
    rows = torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight.t())
    return rows.view(*input.shape[:-1], weight.shape[0])


def _inline_constants(gm: fx.GraphModule) -> None:
    """Write tensor constants (torch.tensor(2.0) in the model) back into the code as literals.

    As attributes they would be taken for parameters that Dynamo does not know, and their values would be
    no part of the key of AOTAutograd's cache.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        constant = gm._buffers.get(str(node.target))
        if constant is None:
            continue
        with gm.graph.inserting_before(node):
            kwargs: dict[str, Any] = {"dtype": constant.dtype, "device": constant.device}
            literal = gm.graph.call_function(torch.tensor, (constant.tolist(),), kwargs)
        literal.meta = node.meta
        node.replace_all_uses_with(literal)
        gm.graph.erase_node(node)
    gm._buffers.clear()
    gm.recompile()
