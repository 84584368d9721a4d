"""A GPU that is not there, for all of torch, Inductor and Triton that looks for one without launching anything.

with fake_gpu(capability=90):
found = generated(torch.compile(model, backend="dmoe"), *cpu_args)  # see generated.py
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch._inductor.utils as inductor_utils
import torch.utils._triton as triton_utils
from torch import Tensor
from torch._inductor.codecache import CacheBase
from torch._inductor.runtime import hints, triton_helpers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

Capability = Literal[80, 90, 100]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
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
    lazy_init(CPU)
    post_grad.lazy_init()
    with contextlib.ExitStack() as stack:
        patch = functools.partial(put, stack)
        patch(torch.version, "cuda", "13.0")
        for name, answer in answers.items():
            patch(torch.cuda, name, always(answer))
            if name.removeprefix("_") in vars(interface) and name != "is_available":
                patch(interface, name.removeprefix("_"), staticmethod(always(answer)))
        patch(interface, "get_raw_stream", staticmethod(always(0)))
        patch(torch._C, "_cuda_getCurrentRawStream", always(0))
        patch(torch._C, "_cuda_cudaCachingAllocator_is_enabled", always(True))
        patch(triton_helpers, "set_driver_to_gpu", always(None))  # called by every generated kernel
        patch(joint_graph, "UniformValueConstantFolder", _Folder)
        patch(torch, "tensor", functools.partial(_tensor, torch.tensor))
        # It traces its patterns on real tensors of the device that it is given.
        patch(joint_graph, "lazy_init", lambda device=None, *args, **kwargs: lazy_init(CPU, *args, **kwargs))
        patch(driver, "_active", Driver(capability))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_device_properties, cuda=[properties]))
        stack.enter_context(_device_guard())
        stack.enter_context(histc_of_integers())
        _forget()
        try:
            yield
        finally:
            stack.close()
            _forget()


class Driver:
    """What Triton asks its driver without launching anything."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        properties = {
            "max_shared_mem": _PROPERTIES[capability]["shared_memory_per_block_optin"],
            "multiprocessor_count": _PROPERTIES[capability]["multi_processor_count"],
        }
        self.utils = types.SimpleNamespace(get_device_properties=always(properties))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

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
        with OnCPU():
            super().__init__(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with OnCPU():
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
def histc_of_integers() -> Iterator[None]:
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


def put(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, value, create=not hasattr(owner, name)))


def always(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _forget() -> None:
    """Clear what torch remembers of the machine's devices."""
    remembered = [*vars(inductor_utils).values(), *vars(triton_utils).values()]
    for each in (*remembered, CacheBase.get_system, hints.DeviceProperties.create):
        clear = getattr(getattr(each, "__func__", each), "cache_clear", None)
        if clear is not None:
            clear()


class OnCPU(TorchDispatchMode):
    """Runs on the CPU what was meant for the GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = tree_map_only(torch.device, always(CPU), (args, dict(kwargs or {})))
        return func(*args, **kwargs)
