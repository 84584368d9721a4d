"""Kernels of generated code, interpreted on CPU tensors or compiled ahead of time: they are never launched."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import hints
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra import libdevice
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction

from dmoe_compile.testing import interpreter
from dmoe_compile.testing.fake_gpu import always, histc_of_integers, put
from dmoe_compile.testing.generated_code import passed

_WIDEST = 2**16  # elements of an interpreted tile
_UNLIKELY = {torch.bool: True, torch.int16: 0x5555, torch.int32: 0x55555555, torch.int64: 0x55555555}
# libdevice's functions have no body in Python. These are the ones that Inductor calls.
_SAME_NAME = (
    "abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf erfc exp exp2 expm1 floor fmod hypot"
)
_SAME_NAME += " isinf isnan log log10 log1p log2 pow rsqrt signbit sin sinh sqrt tan tanh trunc"
_LIBDEVICE = {name: getattr(torch, name) for name in _SAME_NAME.split()}
_LIBDEVICE |= {"nearbyint": torch.round, "rint": torch.round}


class Interpreted:
    """Stands in a generated module for a kernel, whose `run` launches it."""

    def __init__(self, source: str, tuner: Any) -> None:
        self.source, self.tuner = source, tuner

    def run(self, *args: Any, stream: int, **kwargs: Any) -> None:
        tuner, config = self.tuner, _wide(self.tuner)
        given, grid = tuner._interpret_args_grid(args, config)
        constants = tuner.triton_meta["constants"] | config.kwargs
        bound = dict(zip(passed(tuner), given, strict=True))
        # What a kernel was compiled for counts, not what is passed: for None, Inductor passes -1.
        bound |= {name: constants[name] for name in tuner.fn.arg_names if name in constants}
        JITFunction.run(tuner.fn, grid=tuple(grid), warmup=False, **bound, **kwargs)


def load_kernel(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Interpreted:
    return Interpreted(source, getattr(PyCodeCache.load(source), name))


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


def unwritten(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return new memory whose values show wherever they are read before they are written."""
    new = torch.empty_strided(size, stride, dtype=dtype)
    return new.fill_(float("nan") if dtype.is_floating_point else _UNLIKELY.get(dtype, 0x55))


@contextlib.contextmanager
def running(seed: int | None, wave: int | None) -> Iterator[list[interpreter.Launch]]:
    with contextlib.ExitStack() as stack:
        patch = functools.partial(put, stack)
        patch(torch.cuda, "_DeviceGuard", lambda device: contextlib.nullcontext())
        patch(torch.cuda, "set_device", always(None))
        patch(torch.cuda, "_lazy_init", always(None))
        for name, function in _LIBDEVICE.items():
            patch(libdevice, name, _elementwise(function))
        stack.enter_context(histc_of_integers())
        yield stack.enter_context(interpreter.interpreted(seed=seed, wave=wave))


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return an elementwise function of torch as one of interpreted Triton tensors."""

    def call(*args: Any, **_: Any) -> tl.tensor:
        out = function(*(torch.from_numpy(np.array(each.handle.data)) for each in args)).numpy()
        dtype = tl.int1 if out.dtype == bool else args[0].dtype.scalar
        kind = args[0].type
        kind = tl.block_type(dtype, kind.get_block_shapes()) if kind.is_block() else dtype
        return tl.tensor(TensorHandle(out, dtype), kind)

    return call


def compile_ahead(tuner: Any) -> Any:
    """Compile a kernel of Inductor's ahead of time."""
    config = tuner.configs[0]
    meta = tuner._create_compile_meta(config)
    source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    target = GPUTarget(meta["device_type"], meta["cc"], 32)
    return triton.compile(source, target=target, options=tuner._create_compile_options(config, meta))
