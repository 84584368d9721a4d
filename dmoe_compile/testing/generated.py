"""Inductor's code for a GPU, generated and run where there is none.

    with fake_gpu(capability=90):
        found = generated(torch.compile(model, backend="dmoe", options=...), *cpu_args)
    found.launches, found.copies(), found.host_syncs, found.cudagraph_reasons  # what the code says
    assert_close(found.run(*cpu_args), model(*cpu_args))                       # what it computes

Nothing is ever launched. `generated` shows Dynamo a model whose tensors are FakeTensors on cuda:0, so that every pass,
decomposition and lowering is the one that a GPU gets. `Generated.run` calls the generated modules on CPU tensors: every
Triton kernel is interpreted, ATen's kernels are the CPU's, and new memory is full of NaN. All that a backend keeps
between calls (a decoding context, statistics) works as ever, on the CPU.

What this can't show:
- Speed, what autotuning would choose (every kernel has its first configuration), and races between programs.
- Attention as a GPU runs it: a CPU build has no flash or memory-efficient kernel to choose, so scaled dot products are
  decomposed. Nor padded matmuls, which Inductor tries out on the device, and TF32.
- What happens between two graphs, where Dynamo breaks one: it is reported, not run.
- Code that a device's random numbers matter to.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import innermost_fn
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cudagraph_utils import WrappedFunction, check_for_mutation
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.scheduler import Scheduler
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_any, tree_map_only
from triton.runtime import driver

from dmoe_compile.testing import interpreter
from dmoe_compile.testing.fake_gpu import CUDA, Driver, OnCPU, always
from dmoe_compile.testing.generated_code import Graph, Input, Kernel, Launch, read
from dmoe_compile.testing.interpreted_kernels import Interpreted, compile_ahead, load_kernel, running, unwritten

_CONFIG = {  # of Inductor, while it generates
    "force_disable_caches": True,  # code for a device that is not there must not be found by anybody
    "triton.cudagraphs": True,  # so that their checks run
    "shape_padding": False,  # times matmuls on the device
}


def generated(compiled: Callable[..., Any], *args: Any, modules: Sequence[nn.Module] = (), **kwargs: Any) -> Generated:
    """Return the code that Inductor generates for a GPU when `compiled` is called; call it inside `fake_gpu`.

    Parameters, buffers and tensor arguments are taken for ones of cuda:0 while Dynamo looks, and are as before
    afterwards. Gradients are off, no cache is read or written, CUDA graphs are asked for so that their checks run, and
    Dynamo forgets what it compiled before.

    Args:
        compiled: what torch.compile returned, with any backend that ends in Inductor's compile_fx.
        *args: its arguments: CPU tensors, of which shape, strides and dtype matter, or anything else. Tensors are
            found in lists, tuples and dicts, not in other objects.
        modules: modules that it uses, where it isn't a module, or a method of one, itself.
        **kwargs: its keyword arguments.

    Raises:
        ValueError: outside of fake_gpu, or where no graph was compiled.
    """
    if not isinstance(driver._active, Driver):
        raise ValueError("there is no GPU to generate code for: call generated() inside `with fake_gpu():`")
    function = innermost_fn(compiled)
    found = Generated(driver._active.capability, function)
    owners = [each for each in (compiled, function, getattr(function, "__self__", None)) if isinstance(each, nn.Module)]
    mode, breaks = FakeTensorMode(), counters["graph_break"].copy()
    with torch.no_grad(), on_fake_device([*owners, *modules], mode), _observed(found, mode), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled|TensorFloat32 tensor cores")
        torch._dynamo.reset()  # else what was compiled before may be called
        try:
            compiled(*_fake(list(args), mode), **_fake(kwargs, mode))
        except _NoValueError:
            pass  # a whole graph returns something that depends on data
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            found.stopped = f"between two graphs: {error.func}"
        finally:
            torch._dynamo.reset()  # nobody shall call this
    found.graph_breaks = list(counters["graph_break"] - breaks)
    if not found.graphs and not found.stopped:
        raise ValueError(f"{compiled} compiled no graph with Inductor: give what torch.compile returned")
    return found


@contextlib.contextmanager
def on_fake_device(modules: Sequence[nn.Module], mode: FakeTensorMode) -> Iterator[None]:
    """Put FakeTensors of cuda:0 in place of the parameters, buffers and tensor attributes of `modules`, for a while."""
    everything = {id(module): module for root in modules for module in root.modules()}.values()
    places: list[tuple[dict[str, Any], str, Any]] = [
        (place, name, value)
        for module in everything
        for place in _places(module)
        for name, value in place.items()
        if isinstance(value, Tensor) or (isinstance(value, tuple) and value and isinstance(value[0], Tensor))
    ]
    tensors = [each for _, _, value in places for each in (value if isinstance(value, tuple) else (value,))]
    fakes = {id(each): _fake(each, mode) for each in tensors}  # tied weights stay tied
    try:
        for place, name, value in places:
            place[name] = tuple(fakes[id(each)] for each in value) if isinstance(value, tuple) else fakes[id(value)]
        yield
    finally:
        for place, name, value in places:
            place[name] = value


def _places(module: nn.Module) -> list[dict[str, Any]]:
    """Return where a module keeps tensors, or prepare() has left stacked weights, which are no parameters."""
    stacks = [vars(value) for value in vars(module).values() if type(value).__module__ == "dmoe_compile.stacking"]
    parameters: dict[str, Any] = module._parameters
    buffers: dict[str, Any] = module._buffers
    return [parameters, buffers, vars(module), *stacks]


@dataclass
class Generated:
    """What `generated` found.

    Attributes:
        capability: of the GPU.
        graphs: every module that Inductor generated, in the order of compilation. With the team pass in a decoding
            context these are two of one Dynamo graph: the denoising step's, then the plain forward's.
        graph_breaks: why Dynamo ended a graph early; Python runs between two graphs.
        stopped: what ended the forward between two graphs, because it needs a value from the device.
        ran: the Triton kernels that the last run() launched.
    """

    capability: int
    _function: Callable[..., Any] = field(repr=False)
    graphs: list[Graph] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    stopped: str = ""
    ran: list[interpreter.Launch] = field(default_factory=list, repr=False)
    _frames: list[_Frame] = field(default_factory=list, repr=False)

    @property
    def code(self) -> str:
        return "\n".join(graph.code for graph in self.graphs)

    @property
    def kernels(self) -> list[Kernel]:
        return [kernel for graph in self.graphs for kernel in graph.kernels.values()]

    @property
    def launches(self) -> list[Launch]:
        return [launch for graph in self.graphs for launch in graph.launches]

    @property
    def mutated(self) -> list[Input]:
        return [each for graph in self.graphs for each in graph.mutated]

    @property
    def fp64(self) -> list[str]:
        return [line for graph in self.graphs for line in graph.fp64]

    @property
    def host_syncs(self) -> list[str]:
        found = [line for graph in self.graphs for line in graph.host_syncs]
        return [*found, self.stopped] if self.stopped else found

    @property
    def cudagraph_reasons(self) -> list[str]:
        return [reason for graph in self.graphs for reason in graph.cudagraph_reasons]

    def copies(self, *origins: str) -> list[Launch]:
        return [launch for graph in self.graphs for launch in graph.copies(*origins)]

    def run(self, *args: Any, seed: int | None = None, wave: int | None = None, **kwargs: Any) -> Any:
        """Return what the compiled function returns, on CPU tensors of the shapes that the code was generated for.

        Args:
            *args: real CPU arguments; no guard looks at them, or at what else the function reads.
            seed: run the programs of a kernel in a random order.
            wave: count the traffic, see interpreted(); what was counted is in `ran`.
            **kwargs: likewise.

        Raises:
            ValueError: where Dynamo broke the graph.
            OutOfBounds: where a kernel reads or writes outside of its arguments.
        """
        if self.graph_breaks or self.stopped or len(self._frames) != 1:
            why = self.graph_breaks or self.stopped or f"{len(self._frames)} frames"
            raise ValueError(f"only one whole graph can be run, not pieces ({why}); compile with fullgraph=True")
        call = self._frames[0].function(self._function)
        with torch.no_grad(), running(seed, wave) as self.ran:
            return call(*args, **kwargs)

    def compile_kernels(self) -> dict[str, Any]:
        """Compile every Triton kernel ahead of time, in its first configuration; return the binaries by name."""
        return {kernel.name: compile_ahead(kernel.tuner) for kernel in self.kernels}


class _NoValueError(Exception):
    """A graph can't be evaluated on FakeTensors."""


@dataclass
class _Frame:
    """A frame that Dynamo compiled: its code before and after, and what it takes to call that as a function."""

    before: types.CodeType
    after: types.CodeType
    namespace: dict[str, Any]
    closure: Any

    def function(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the compiled frame of `original` as a function, without guards.

        A module's frame is that of a helper of Dynamo's with the module in its closure.
        """
        made = types.FunctionType(self.after, self.namespace, self.after.co_name, None, self.closure)
        method: Any = original
        plain = getattr(method, "__func__", method)
        if getattr(plain, "__code__", None) is not self.before:
            return made
        made.__defaults__, made.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
        return made if plain is method else functools.partial(made, method.__self__)


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    """Return a tensor, or a tree of them, as FakeTensors of cuda:0."""

    def one(real: Tensor) -> Tensor:
        with mode:
            fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=CUDA)
        return nn.Parameter(fake, requires_grad=real.requires_grad) if isinstance(real, nn.Parameter) else fake

    return tree_map_only(Tensor, one, value)


def _in_mode(mode: FakeTensorMode, gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Return a graph's FakeTensors as ones of the tracing mode, as dynamic as Dynamo decided.

    A backend is handed real tensors and makes these of them; it can't make them of another mode's.
    """

    def one(given: Any, placeholder: fx.Node) -> Any:
        like = placeholder.meta.get("example_value")
        if not isinstance(given, FakeTensor) or not isinstance(like, Tensor):
            return given
        with mode:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)

    return [one(*each) for each in zip(inputs, gm.graph.find_nodes(op="placeholder"), strict=True)]


def _either(compiled: Callable[..., Any], eager: Callable[..., Any], mode: FakeTensorMode) -> Callable[..., Any]:
    """Return what evaluates Dynamo's graph on FakeTensors, and calls the compiled one on real tensors."""

    def call(*args: Any) -> Any:
        if not tree_any(lambda each: isinstance(each, FakeTensor), args):
            with OnCPU():
                return compiled(*args)
        try:
            with mode:
                return eager(*args)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _NoValueError from error

    return torch._dynamo.disable(call, recursive=False)


@contextlib.contextmanager
def _observed(found: Generated, mode: FakeTensorMode) -> Iterator[None]:
    """Collect what Dynamo and Inductor produce in this context."""
    codes: dict[types.CodeType, types.CodeType] = {}
    frames: dict[types.CodeType, tuple[dict[str, Any], Any]] = {}
    origins: list[tuple[str, bool]] = []
    call_user_compiler, lower = OutputGraph.call_user_compiler, compile_fx.compile_fx
    load, should_partition = GraphLowering.compile_to_module, Scheduler.should_partition
    post_compile = CompiledFxGraph.post_compile

    def on_dynamo_graph(self: OutputGraph, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        frames[self.root_tx.f_code] = self.root_tx.f_globals, self.root_tx.closure
        eager = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        return _either(call_user_compiler(self, gm, _in_mode(self.fake_mode, gm, inputs)), eager, mode)

    def on_compile_fx(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        origins[:] = [_origin(node) for node in gm.graph.find_nodes(op="placeholder")]
        return lower(gm, *args, **kwargs)

    def on_lowered(self: GraphLowering) -> Any:
        graph = Graph()
        found.graphs.append(graph)
        module = load(self)
        for name, value in {"empty_strided_cuda": unwritten, "get_raw_stream": always(0)}.items():
            if hasattr(module, name):
                setattr(module, name, value)
        graph.code = Path(str(module.__file__)).read_text()
        for name, value in vars(module).items():
            if isinstance(value, Interpreted):
                graph.kernels[name] = Kernel(name, value.source, value.tuner)
        read(graph, self, origins)
        return module

    def on_partition(self: Scheduler, node: Any) -> str | None:
        reason = should_partition(self, node)
        reasons = found.graphs[-1].cudagraph_reasons
        if reason and (line := f"{reason}: {node.get_name()}") not in reasons:
            reasons.append(line)
        return reason

    def on_compiled(self: CompiledFxGraph, *args: Any) -> None:
        graph, mutated = found.graphs[-1], self.mutated_input_idxs
        static = set(self.fx_kwargs["static_input_idxs"] or ())
        graph.inputs = [
            replace(each, is_static=i in static, is_mutated=i in mutated) for i, each in enumerate(graph.inputs)
        ]
        later = self.cudagraph_info.cudagraph_fail_reasons if self.cudagraph_info else ["CUDA graphs are switched off"]
        graph.cudagraph_reasons += filter(None, [self.disabled_cudagraphs_reason, *later])
        with mock.patch.object(compile_fx, "cudagraphify", functools.partial(_cudagraphify, graph)):
            post_compile(self, *args)

    handle = register_bytecode_hook(lambda before, after: codes.update({before: after}))
    try:
        with (
            mock.patch.object(OutputGraph, "call_user_compiler", on_dynamo_graph),
            mock.patch.object(compile_fx, "compile_fx", on_compile_fx),
            mock.patch.object(GraphLowering, "compile_to_module", on_lowered),
            mock.patch.object(Scheduler, "should_partition", on_partition),
            mock.patch.object(CompiledFxGraph, "post_compile", on_compiled),
            mock.patch.object(AsyncCompile, "triton", load_kernel),
            torch._inductor.config.patch(_CONFIG),
        ):
            yield
    finally:
        handle.remove()
    found._frames = [_Frame(code, codes[code], *rest) for code, rest in frames.items() if code in codes]


def _cudagraphify(graph: Graph, model: Any, static_input_idxs: Sequence[int] = (), **given: Any) -> Any:
    """Check, as the first call would, what CUDA graphs may not change: inputs whose address can be another one."""
    mutated, no_id = given["mutated_input_idxs"], cast(Any, None)
    function = WrappedFunction(model, static_input_idxs, no_id, given["constants"], given["placeholders"], mutated)
    unseen: list[Any] = [None] * len(given["placeholders"])
    if reason := check_for_mutation(function, unseen, always(False)):
        graph.cudagraph_reasons.append(reason)
    return model


def _origin(placeholder: fx.Node) -> tuple[str, bool]:
    """Return where an input of Dynamo's graph comes from, and whether it is a parameter."""
    source = getattr(placeholder, "_dynamo_source", None)
    text = source.name if source is not None else ""
    path = re.findall(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", text) or re.findall(r"\['(\w+)'\]", text)
    return ".".join(path) or text or placeholder.name, "._parameters[" in text
