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

import ast
import contextlib
import copy
import ctypes
import functools
import math
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch._inductor.utils as inductor_utils
import torch.utils._triton as triton_utils
import triton
import triton.language as tl
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import innermost_fn
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CacheBase, PyCodeCache
from torch._inductor.cudagraph_utils import WrappedFunction, check_for_mutation
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime import hints, triton_helpers
from torch._inductor.scheduler import Scheduler
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra import libdevice
from triton.runtime import driver
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction

from interpreter import interpreted

Capability = Literal[80, 90, 100]
_CPU, _CUDA = torch.device("cpu"), torch.device("cuda", 0)
_CUDA_TYPE, _META_TYPE = 1, 14  # c10::DeviceType
_COMMON = dict(
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    uuid="none",
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
)
_PROPERTIES: dict[int, dict[str, Any]] = {  # of the A100, H100 and B200
    80: dict(multi_processor_count=108, shared_memory_per_block_optin=166912, total_memory=80 << 30),
    90: dict(multi_processor_count=132, shared_memory_per_block_optin=232448, total_memory=80 << 30),
    100: dict(multi_processor_count=148, shared_memory_per_block_optin=232448, total_memory=180 << 30),
}
_CONFIG = {  # of Inductor, while it generates
    "force_disable_caches": True,  # code for a device that is not there must not be found by anybody
    "triton.cudagraphs": True,  # so that their checks run
    "shape_padding": False,  # times matmuls on the device
}
_COPYING = ("aten.clone", "aten._to_copy", "aten.index", "aten.gather", "aten.constant_pad", "aten.permute_copy")
_WIDEST = 2**16  # elements of an interpreted tile


@contextlib.contextmanager
def fake_gpu(capability: Capability = 90) -> Iterator[None]:
    """Make torch, Inductor and Triton believe in one NVIDIA GPU of this compute capability."""
    properties = types.SimpleNamespace(
        major=capability // 10, minor=capability % 10, name="no GPU", **_COMMON, **_PROPERTIES[capability]
    )
    memory = properties.total_memory
    answers: dict[str, Any] = {  # of torch.cuda's functions, and of Dynamo's interface to them
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": properties.name,
        "get_arch_list": [f"sm_{capability}"],
        "is_bf16_supported": True,
        "mem_get_info": (memory, memory),
        "memory_allocated": 0,
        "is_current_stream_capturing": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
        "set_device": None,
        "current_stream": types.SimpleNamespace(cuda_stream=0),
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    interface, lazy_init = device_interface.CudaInterface, joint_graph.lazy_init
    # Inductor makes its patterns once in a process: by what it sees then, which must be that there is no GPU.
    lazy_init(_CPU)
    post_grad.lazy_init()
    with contextlib.ExitStack() as stack:
        put = functools.partial(_put, stack)
        put(torch.version, "cuda", "13.0")
        for name, answer in answers.items():
            put(torch.cuda, name, _always(answer))
            if name.removeprefix("_") in vars(interface) and name != "is_available":
                put(interface, name.removeprefix("_"), staticmethod(_always(answer)))
        put(interface, "get_raw_stream", staticmethod(_always(0)))
        put(torch._C, "_cuda_getCurrentRawStream", _always(0))
        put(torch._C, "_cuda_cudaCachingAllocator_is_enabled", _always(True))
        put(triton_helpers, "set_driver_to_gpu", _always(None))  # called by every generated kernel
        put(joint_graph, "UniformValueConstantFolder", _Folder)
        put(torch, "tensor", functools.partial(_tensor, torch.tensor))
        # It traces its patterns on real tensors of the device that it is given.
        put(joint_graph, "lazy_init", lambda device=None, *args, **kwargs: lazy_init(_CPU, *args, **kwargs))
        put(driver, "_active", _Driver(capability))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_device_properties, cuda=[properties]))
        stack.enter_context(_device_guard())
        stack.enter_context(_histc_of_integers())
        _forget()
        try:
            yield
        finally:
            stack.close()
            _forget()


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
    if not isinstance(driver._active, _Driver):
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
    places = [
        (place, name, value)
        for module in everything
        for place in (module._parameters, module._buffers, vars(module), *_stacks(module))
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


def _stacks(module: nn.Module) -> list[dict[str, Any]]:
    """Return the attributes of what prepare() has left on a module, whose stacked weights are no parameters of it."""
    return [vars(value) for value in vars(module).values() if type(value).__module__ == "dmoe_compile.stacking"]


@dataclass(frozen=True)
class Launch:
    """One kernel of a graph.

    Attributes:
        name: the kernel's variable in the generated code, or the op: extern_kernels.mm, aten._grouped_mm.default.
        kind: "inductor" (its own Triton), "user" (Triton, through wrap_triton), "extern" (ATen, cuBLAS, a custom op) or
            "cpp" (a kernel for the CPU, which has no place in a GPU's graph).
        reads: buffers and graph inputs that go in, as the generated code names them.
        writes: those that it fills or changes, as far as the code tells.
        line: of the generated code.
    """

    name: str
    kind: Literal["inductor", "user", "extern", "cpp"]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Input:
    """An input of a graph.

    Attributes:
        name: in the generated code.
        origin: the path of a parameter or buffer, the name of an argument; what a backend called its own input.
        is_parameter: of a module.
        shape: with example numbers for symbols; () for numbers.
        dtype: None for numbers.
        is_static: a parameter, a buffer, or marked as such: CUDA graphs take its address for granted.
        is_mutated: the graph writes to it.
    """

    name: str
    origin: str
    is_parameter: bool
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    is_static: bool = False
    is_mutated: bool = False


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel of a graph: `source` is a whole module, `tuner` the CachingAutotuner that it defines."""

    name: str
    source: str
    tuner: Any

    @property
    def is_user(self) -> bool:
        return "@triton_heuristics.user_autotune(" in self.source

    @property
    def signature(self) -> dict[str, str]:
        """Types of the arguments by name: "*bf16", "i32", "constexpr" ..."""
        return dict(self.tuner.triton_meta["signature"])


@dataclass
class Graph:
    """One generated module, and what it says.

    Attributes:
        code: its source.
        kernels: its Triton kernels, by variable.
        inputs: of its `call`.
        launches: in their order.
        host_syncs: the lines where the host waits for the device.
        cudagraph_reasons: why not all of it goes into one CUDA graph; none where it does.
        numel: elements of inputs and buffers, 0 where that is symbolic.
    """

    code: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    host_syncs: list[str] = field(default_factory=list)
    cudagraph_reasons: list[str] = field(default_factory=list)
    numel: dict[str, int] = field(default_factory=dict)

    @property
    def mutated(self) -> list[Input]:
        return [each for each in self.inputs if each.is_mutated]

    @property
    def fp64(self) -> list[str]:
        """Where double precision appears: arguments and lines of kernels, lines of the module."""
        found = []
        for kernel in self.kernels.values():
            found += [f"{kernel.name}: {name} is {kind}" for name, kind in kernel.signature.items() if "fp64" in kind]
            found += [f"{kernel.name}: {line.strip()}" for line in kernel.source.splitlines() if "tl.float64" in line]
        lines = [line.strip() for line in self.code.split("def get_args", 1)[0].splitlines()]
        return found + [line for line in lines if "torch.float64" in line and not line.startswith("#")]

    def copies(self, *origins: str) -> list[Launch]:
        """Return the launches that read a weight and write something as large: clones, casts, gathers, paddings.

        Matmuls and the user's kernels are no copies, however many tokens there are.

        Args:
            *origins: of the inputs that are weights; by default every parameter with two or more dimensions.
        """
        weights = {
            each.name
            for each in self.inputs
            if (each.origin in origins if origins else each.is_parameter) and len(each.shape) > 1
        }
        found = []
        for launch in self.launches:
            largest = max((self.numel.get(name, 0) for name in set(launch.writes) - weights), default=0)
            smallest = min((self.numel[name] for name in weights & set(launch.reads)), default=math.inf)
            by_name = launch.kind == "extern" and launch.name.startswith(_COPYING)
            if (by_name and smallest < math.inf) or (launch.kind in {"inductor", "cpp"} and smallest <= largest):
                found.append(launch)
        return found


@dataclass
class Generated:
    """What `generated` found.

    Attributes:
        capability: of the GPU.
        graphs: every module that Inductor generated, in the order of compilation. With the team pass in a decoding
            context these are two of one Dynamo graph: the denoising step's, then the plain forward's.
        graph_breaks: why Dynamo ended a graph early; Python runs between two graphs.
        stopped: what ended the forward between two graphs, because it needs a value from the device.
    """

    capability: int
    _function: Callable[..., Any] = field(repr=False)
    graphs: list[Graph] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    stopped: str = ""
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

    def run(self, *args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        """Return what the compiled function returns, on CPU tensors of the shapes that the code was generated for.

        Args:
            *args: real CPU arguments; no guard looks at them, or at what else the function reads.
            seed: run the programs of a kernel in a random order.
            **kwargs: likewise.

        Raises:
            ValueError: where Dynamo broke the graph.
            OutOfBounds: where a kernel reads or writes outside of its arguments.
        """
        if self.graph_breaks or self.stopped or len(self._frames) != 1:
            why = self.graph_breaks or self.stopped or f"{len(self._frames)} frames"
            raise ValueError(f"only one whole graph can be run, not pieces ({why}); compile with fullgraph=True")
        call = self._frames[0].function(self._function)
        with torch.no_grad(), _running(seed):
            return call(*args, **kwargs)

    def compile_kernels(self) -> dict[str, Any]:
        """Compile every Triton kernel ahead of time, in its first configuration; return the binaries by name."""
        return {kernel.name: _compile(kernel.tuner) for kernel in self.kernels}


# The GPU that is not there.


class _Driver:
    """What Triton asks its driver without launching anything."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        properties = {
            "max_shared_mem": _PROPERTIES[capability]["shared_memory_per_block_optin"],
            "multiprocessor_count": _PROPERTIES[capability]["multi_processor_count"],
        }
        self.utils = types.SimpleNamespace(get_device_properties=_always(properties))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return _CUDA

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_current_stream(self, device: int) -> int:
        return 0

    @staticmethod
    def is_active() -> bool:
        return True


class _Folder(joint_graph.UniformValueConstantFolder):
    """Folds constants on the CPU, where Inductor would on their device."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _OnCPU():
            super().__init__(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with _OnCPU():
            return super().run(*args, **kwargs)


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Give cuda tensors the C++ device guard of meta tensors, which does nothing.

    Indexing and autograd look for a device's guard even where tensors are fake, and a CPU build has none for cuda.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META_TYPE + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[_CUDA_TYPE]
    guards[_CUDA_TYPE] = before or guards[_META_TYPE]
    try:
        yield
    finally:
        guards[_CUDA_TYPE] = before


@contextlib.contextmanager
def _histc_of_integers() -> Iterator[None]:
    """Let the CPU take histc of integers, as only GPUs do: transformers' grouped experts count their tokens by it."""

    def histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
        out = torch.empty(bins, dtype=x.dtype if x.dtype.is_floating_point else torch.float32)
        return torch.ops.aten.histc.out(x.to(out.dtype), bins, min, max, out=out).to(x.dtype)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced
        library.impl("histc", histc, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _tensor(own: Callable[..., Tensor], data: Any, **how: Any) -> Tensor:
    """Return torch.tensor(data), of the device that is not there where it is empty: an empty cache is made so."""
    if isinstance(data, list) and not data:
        return torch.empty(0, **how)
    return own(data, **how)


def _put(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, value, create=not hasattr(owner, name)))


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _forget() -> None:
    """Clear what torch remembers of the machine's devices."""
    remembered = [*vars(inductor_utils).values(), *vars(triton_utils).values()]
    for each in (*remembered, CacheBase.get_system, hints.DeviceProperties.create):
        clear = getattr(getattr(each, "__func__", each), "cache_clear", None)
        if clear is not None:
            clear()


# Generating.


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
        plain = getattr(original, "__func__", original)
        if getattr(plain, "__code__", None) is not self.before:
            return made
        made.__defaults__, made.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
        return made if plain is original else functools.partial(made, original.__self__)


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    """Return a tensor, or a tree of them, as FakeTensors of cuda:0."""

    def one(real: Tensor) -> Tensor:
        with mode:
            fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=_CUDA)
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
            with _OnCPU():
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
        for name, value in {"empty_strided_cuda": _unwritten, "get_raw_stream": _always(0)}.items():
            if hasattr(module, name):
                setattr(module, name, value)
        graph.code = Path(module.__file__).read_text()
        for name, value in vars(module).items():
            if isinstance(value, _Interpreted):
                graph.kernels[name] = Kernel(name, value.source, value.tuner)
        _read(graph, self, origins)
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
            mock.patch.object(AsyncCompile, "triton", _load_kernel),
            torch._inductor.config.patch(_CONFIG),
        ):
            yield
    finally:
        handle.remove()
    found._frames = [_Frame(code, codes[code], *rest) for code, rest in frames.items() if code in codes]


def _cudagraphify(graph: Graph, model: Any, static_input_idxs: Sequence[int] = (), **given: Any) -> Any:
    """Check, as the first call would, what CUDA graphs may not change: inputs whose address can be another one."""
    mutated = given["mutated_input_idxs"]
    function = WrappedFunction(model, static_input_idxs, None, given["constants"], given["placeholders"], mutated)
    unseen = [None] * len(given["placeholders"])
    if reason := check_for_mutation(function, unseen, _always(False)):
        graph.cudagraph_reasons.append(reason)
    return model


def _origin(placeholder: fx.Node) -> tuple[str, bool]:
    """Return where an input of Dynamo's graph comes from, and whether it is a parameter."""
    source = getattr(placeholder, "_dynamo_source", None)
    text = source.name if source is not None else ""
    path = re.findall(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", text) or re.findall(r"\['(\w+)'\]", text)
    return ".".join(path) or text or placeholder.name, "._parameters[" in text


# Reading the generated code.


def _read(graph: Graph, lowering: GraphLowering, origins: Sequence[tuple[str, bool]]) -> None:
    """Fill in what the text of a generated module says."""
    on_host = set()
    for node in lowering.module.graph.find_nodes(op="placeholder"):
        index, example = getattr(node.meta.get("desc"), "idx", -1), node.meta.get("val")
        origin, is_parameter = origins[index] if 0 <= index < len(origins) else ("", False)
        shape, dtype = (example.shape, example.dtype) if isinstance(example, Tensor) else ((), None)
        hints = tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in shape)
        graph.inputs.append(Input(node.name, origin, is_parameter, hints, dtype))
        graph.numel[node.name] = math.prod(hints)
        if isinstance(example, Tensor) and example.device.type == "cpu":
            on_host.add(node.name)
    functions = {node.name: node for node in ast.walk(ast.parse(graph.code)) if isinstance(node, ast.FunctionDef)}
    partitions = [node for name, node in functions.items() if name.startswith("partition_")]
    _Reader(graph, partitions, on_host).visit(functions["call"])


class _Reader(ast.NodeVisitor):
    """Walks through the `call` of a generated module in the order of execution."""

    def __init__(self, graph: Graph, partitions: Sequence[ast.FunctionDef], on_host: set[str]) -> None:
        self.graph, self.partitions, self.on_host = graph, partitions, on_host
        self.lines = graph.code.splitlines()
        self.target = ""

    def visit_Assign(self, node: ast.Assign) -> None:
        target, value = ast.unparse(node.targets[0]), node.value
        self.target = target
        self.generic_visit(node)
        self.target = ""
        if base := _buffer(value):
            self.graph.numel.setdefault(target, self.graph.numel.get(base, 0))
            self.on_host |= {target} if base in self.on_host else set()
        elif isinstance(value, ast.Call) and (allocator := ast.unparse(value.func)).startswith("empty_strided"):
            self.graph.numel[target] = _numel(value.args[0])
            self.on_host |= {target} if "cpu" in allocator else set()

    def visit_Call(self, node: ast.Call) -> None:
        name, launches = ast.unparse(node.func), self.graph.launches
        args = [_buffer(arg) for arg in node.args]
        buffers = tuple(filter(None, args))
        if name.startswith("self.partitions["):
            self.visit(self.partitions[ast.literal_eval(node.func.slice)])  # type: ignore[attr-defined]
        elif kernel := self.graph.kernels.get(name.removesuffix(".run")):
            launches.append(_launch(kernel, args, node.lineno))
        elif name.startswith("cpp_fused"):
            launches.append(Launch(name, "cpp", buffers, buffers, node.lineno))
        elif name.startswith(("extern_kernels.", "torch.ops.", "aten.")):
            out = next((_buffer(each.value) for each in node.keywords if each.arg == "out"), self.target)
            is_inplace = re.search(r"\w_(\.\w+)?$", name) is not None
            writes = buffers[:1] if is_inplace else (out,) if out else ()
            launches.append(Launch(name.removeprefix("torch.ops."), "extern", buffers, writes, node.lineno))
        is_transfer = name.endswith(".copy_") and self.on_host & {name.removesuffix(".copy_"), *args}
        if name.endswith((".item", ".cpu", ".tolist")) or is_transfer or _depends_on_data(name):
            self.graph.host_syncs.append(self.lines[node.lineno - 1].strip())
        self.generic_visit(node)


def _launch(kernel: Kernel, args: Sequence[str], line: int) -> Launch:
    changed = set(kernel.tuner.inductor_meta.get("mutated_arg_names", ()))
    pointers = {name for name, kind in kernel.signature.items() if kind.startswith("*")}
    pairs = [(name, arg) for name, arg in zip(_passed(kernel.tuner), args, strict=False) if name in pointers]
    writes = tuple(arg for name, arg in pairs if name in changed or name.startswith(("out_ptr", "in_out_ptr")))
    reads = tuple(arg for name, arg in pairs if not name.startswith("out_ptr"))
    return Launch(kernel.name, "user" if kernel.is_user else "inductor", reads, writes, line)


def _buffer(node: ast.expr) -> str:
    """Return the buffer that an expression is, or is a view of; "" where it's neither."""
    if isinstance(node, ast.Name):
        return node.id
    is_view = isinstance(node, ast.Call) and ast.unparse(node.func) in {"reinterpret_tensor", "copy_if_misaligned"}
    return _buffer(node.args[0]) if is_view else ""  # type: ignore[attr-defined]


def _numel(sizes: ast.expr) -> int:
    try:
        return math.prod(ast.literal_eval(sizes))
    except ValueError:  # a symbol
        return 0


def _depends_on_data(name: str) -> bool:
    """Say whether the shape or the number that an op returns depends on data, which the host then waits for."""
    parts = name.removeprefix("torch.").split(".")
    op = functools.reduce(lambda owner, part: getattr(owner, part, None), parts, torch if parts[0] == "ops" else None)
    waiting = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return bool(waiting & set(getattr(op, "tags", ())))


# Running the generated code.


class _OnCPU(TorchDispatchMode):
    """Runs on the CPU what was meant for the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = tree_map_only(torch.device, _always(_CPU), (args, dict(kwargs or {})))
        return func(*args, **kwargs)


class _Interpreted:
    """Stands in a generated module for a kernel, whose `run` launches it."""

    def __init__(self, source: str, tuner: Any) -> None:
        self.source, self.tuner = source, tuner

    def run(self, *args: Any, stream: int, **kwargs: Any) -> None:
        tuner, config = self.tuner, _wide(self.tuner)
        given, grid = tuner._interpret_args_grid(args, config)
        constants = tuner.triton_meta["constants"] | config.kwargs
        bound = dict(zip(_passed(tuner), given, strict=True))
        # What a kernel was compiled for counts, not what is passed: for None, Inductor passes -1.
        bound |= {name: constants[name] for name in tuner.fn.arg_names if name in constants}
        JITFunction.run(tuner.fn, grid=tuple(grid), warmup=False, **bound, **kwargs)


def _passed(tuner: Any) -> list[str]:
    """Return the arguments that a launch passes: all but the constexprs, also those whose value Inductor knows."""
    return [param.name for param in tuner.fn.params if not param.is_constexpr]


def _load_kernel(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> _Interpreted:
    return _Interpreted(source, getattr(PyCodeCache.load(source), name))


def _wide(tuner: Any) -> triton.Config:
    """Return a kernel's first configuration; one of Inductor's own with as few programs as can be.

    An interpreted program takes as long however wide it is, and neighbouring rows don't change each other's sums. Up to
    the largest block that Inductor knows: where a size is a multiple of that, it leaves out the mask.
    """
    config = tuner.configs[0]
    if tuner.inductor_meta.get("grid_type") != "Grid1D" or "XBLOCK" not in config.kwargs:
        return config
    per_row = math.prod(size for name, size in tuner.size_hints.items() if name != "x")
    most = min(max(_WIDEST // per_row, 1), hints.TRITON_MAX_BLOCK["X"])
    rows = min(triton.next_power_of_2(tuner.size_hints["x"]), most)
    kwargs = {**config.kwargs, "XBLOCK": max(rows, config.kwargs["XBLOCK"])}
    return triton.Config(kwargs, config.num_warps, config.num_stages)


_UNLIKELY = {torch.bool: True, torch.int16: 0x5555, torch.int32: 0x55555555, torch.int64: 0x55555555}


def _unwritten(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return new memory whose values show wherever they are read before they are written."""
    new = torch.empty_strided(size, stride, dtype=dtype)
    return new.fill_(float("nan") if dtype.is_floating_point else _UNLIKELY.get(dtype, 0x55))


@contextlib.contextmanager
def _running(seed: int | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        put = functools.partial(_put, stack)
        put(torch.cuda, "_DeviceGuard", lambda device: contextlib.nullcontext())
        put(torch.cuda, "set_device", _always(None))
        put(torch.cuda, "_lazy_init", _always(None))
        for name, function in _LIBDEVICE.items():
            put(libdevice, name, _elementwise(function))
        stack.enter_context(_histc_of_integers())
        stack.enter_context(interpreted(seed=seed))
        yield


# libdevice's functions have no body in Python. These are the ones that Inductor calls.
_SAME_NAME = (
    "abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf erfc exp exp2 expm1 floor fmod hypot"
)
_SAME_NAME += " isinf isnan log log10 log1p log2 pow rsqrt signbit sin sinh sqrt tan tanh trunc"
_LIBDEVICE = {name: getattr(torch, name) for name in _SAME_NAME.split()}
_LIBDEVICE |= {"nearbyint": torch.round, "rint": torch.round}


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return an elementwise function of torch as one of interpreted Triton tensors."""

    def call(*args: Any, **_: Any) -> tl.tensor:
        out = function(*(torch.from_numpy(np.array(each.handle.data)) for each in args)).numpy()
        dtype = tl.int1 if out.dtype == bool else args[0].dtype.scalar
        kind = args[0].type
        kind = tl.block_type(dtype, kind.get_block_shapes()) if kind.is_block() else dtype
        return tl.tensor(TensorHandle(out, dtype), kind)

    return call


def _compile(tuner: Any) -> Any:
    """Compile a kernel of Inductor's ahead of time."""
    config = tuner.configs[0]
    meta = tuner._create_compile_meta(config)
    source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    target = GPUTarget(meta["device_type"], meta["cc"], 32)
    return triton.compile(source, target=target, options=tuner._create_compile_options(config, meta))
