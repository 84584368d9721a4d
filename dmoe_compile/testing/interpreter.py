"""Run ordinary @triton.jit kernels on CPU tensors, in this process and in numpy: what they compute, without a GPU.

    with interpreted(seed=1):
        out = torch.ops.dmoe.reuse(...)  # every launch inside, also through wrap_triton and inside generated modules

Triton has an interpreter of its own. What is added here:
- The process is not started with TRITON_INTERPRET, so the same kernels can be compiled (tests/ahead_of_time.py).
- bf16 is right: stock, it is held as uint16, which adds, multiplies and compares its bits as integers.
- fma rounds once, minimum and maximum drop a NaN as the hardware does, and reductions run along an axis at once.
- Programs run in a shuffled order, so that one that needs another's results is seen.
- Every load, store and atomic must lie in one of the kernel's tensor arguments, not just in its storage.
What has no defined result, or none that numpy gives, raises TypeError: sums in bf16, argmax of NaN, dots in tf32.

What it can't show: speed, races inside a program, int32 overflow of a loop's variable (a Python int here), which
products a compiler fuses with which sums, and how a GPU approximates exp. For the rest of a GPU's rules (tile sizes
that dot takes, powers of two) compile the kernel.
"""

from __future__ import annotations

import ast
import itertools
import random
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor, nn
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction, get_jit_fn_file_line

from dmoe_compile.testing.interpreter_math import reduce, scan, to_bf16, to_fp32, to_odd

# Everything of Triton's that the interpreter changes while a kernel runs.
_PATCHED = (JITFunction, tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base, tl.dtype)
# Addresses have 47 bits. Above them a pointer carries the number of the tensor that it was made from, through all
# arithmetic: an access that leaves its tensor is seen also where it meets another one.
_TAG = 48
_SECTOR_BITS = 5
_SECTOR = 1 << _SECTOR_BITS  # bytes


class OutOfBounds(AssertionError):
    """A load, store or atomic outside the tensors that a kernel was given."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        name: of the kernel.
        grid: its programs.
        traffic: what it moves, by the name of the argument; empty unless that was asked for.
        flops: multiplications and additions of its dots; 0 unless that was asked for.
    """

    name: str
    grid: tuple[int, int, int]
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    flops: int = 0


@dataclass
class Traffic:
    """Bytes that a launch moves between one of its tensors and its programs.

    Attributes:
        requested: by all loads, stores and atomics that are not masked out, each time.
        touched: 32-byte sectors, the least that a GPU's memory moves, that are requested at all.
        moved: likewise, once for each wave of programs that requests it: in between a cache may have lost it.
    """

    requested: int = 0
    touched: int = 0
    moved: int = 0


@contextmanager
def interpreted(
    *, seed: int | None = None, check_bounds: bool = True, wave: int | None = None
) -> Iterator[list[Launch]]:
    """Interpret every launch of a @triton.jit function, and yield the list of launches so far.

    Args:
        seed: run the programs of each launch in an order drawn from it; None is the order of the grid.
        check_bounds: raise OutOfBounds for an access outside the kernel's tensor arguments.
        wave: programs that run at once; given, the bytes that each launch moves and the operations of its dots are
            counted. Takes check_bounds, and no seed.

    Raises:
        ValueError: for a wave that can't be counted; at a launch with a tensor that has no data on the CPU.
    """
    if wave is not None and (wave < 1 or seed is not None or not check_bounds):
        got = f"wave={wave}, seed={seed}, check_bounds={check_bounds}"
        raise ValueError(f"{got}: traffic is counted for waves of 1 or more programs in order, with check_bounds")
    interpreter = _Interpreter(None if seed is None else random.Random(seed), check_bounds, wave)

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not warmup:
            interpreter.launch(self, grid, args, kwargs)

    with _restored(JITFunction):
        JITFunction.run = run
        yield interpreter.launches


class _Interpreter:
    """Rewrites kernels to Python functions over numpy arrays, and runs them program by program."""

    def __init__(self, shuffle: random.Random | None, check_bounds: bool, wave: int | None) -> None:
        self.shuffle, self.check_bounds, self.wave = shuffle, check_bounds, wave
        self.launches: list[Launch] = []
        self.functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def launch(self, kernel: JITFunction, grid: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        bound = kernel.signature.bind(*args, **{name: x for name, x in kwargs.items() if name in kernel.arg_names})
        bound.apply_defaults()  # what is left out are options: num_warps, num_stages and the like
        given = [int(size) for size in (grid(bound.arguments) if callable(grid) else grid)]
        x, y, z = given + [1] * (3 - len(given))
        sizes = x, y, z
        programs = [(i, j, k) for k, j, i in itertools.product(range(z), range(y), range(x))]  # as a GPU starts them
        if self.shuffle:
            self.shuffle.shuffle(programs)
        builder = _Builder(kernel.__name__, self.check_bounds, self.wave is not None)
        builder.set_grid_dim(*sizes)
        constants = {param.name for param in kernel.params if param.is_constexpr}
        with self._language(builder):
            values = {
                name: x if name in constants else builder.argument(name, x) for name, x in bound.arguments.items()
            }
            for number, program in enumerate(programs):
                if self.wave and number % self.wave == 0:
                    builder.start_wave()
                builder.set_grid_idx(*program)
                self._function(kernel)(**values)
        self.launches.append(Launch(kernel.__name__, sizes, builder.traffic(), builder.flops))

    @contextmanager
    def _language(self, builder: _Builder) -> Iterator[None]:
        """Make triton.language compute; while one kernel runs only, so that others can be compiled in between."""

        def call(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
            return self._function(function)(*args, **kwargs)

        def bind(function: JITFunction, tensor: Any, _: type) -> Any:  # x.sum(): these are JITFunctions as well
            return function if tensor is None else types.MethodType(function, tensor)

        with ExitStack() as stack:
            stack.enter_context(_restored(*_PATCHED))
            stack.callback(setattr, stock.interpreter_semantic, "builder", stock.interpreter_semantic.builder)
            stack.enter_context(np.errstate(all="ignore"))  # inf and NaN come out as on a GPU, where nobody warns
            stock.interpreter_semantic.builder = builder
            stock._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            for language in (tl, tl.core):
                language.reduce, language.associative_scan = reduce, scan
            JITFunction.__call__, JITFunction.__get__ = call, bind
            yield

    def _function(self, kernel: JITFunction) -> Callable[..., Any]:
        """Return a kernel, or a function that it calls, as a Python function."""
        # Not by the kernel itself: its hash is its source and all that it calls, and it would keep what is patched now.
        if (function := self.functions.get(kernel.fn)) is None:
            file, line = get_jit_fn_file_line(kernel)
            tree = ast.fix_missing_locations(stock.ASTTransformer().visit(kernel.parse()))
            # A copy of its names: the stock rewriter leaves its own in the kernel's module, where they hide NameErrors.
            names = dict(kernel.get_capture_scope()) | {"interpreter_semantic": stock.interpreter_semantic}
            exec(compile(ast.increment_lineno(tree, line - 1), file, "exec"), names)
            function = self.functions[kernel.fn] = names[kernel.fn.__name__]
        return function


class _Builder(stock.InterpreterBuilder):  # type: ignore[misc]
    """Triton's builder over numpy arrays, with the arithmetic and the checks that it lacks."""

    def __init__(self, kernel: str, check_bounds: bool, counts_traffic: bool) -> None:
        super().__init__()
        self.kernel, self.check_bounds, self.counts_traffic = kernel, check_bounds, counts_traffic
        self.tensors: list[tuple[str, int, int]] = [("no tensor", 0, 0)]  # name, first address, the one behind the last
        self.counts: dict[int, Traffic] = {}  # by number of the tensor
        # Of the sectors of each tensor: whether the present wave has requested it, and whether any has.
        self.requests: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.flops = 0

    def start_wave(self) -> None:
        """Count what the wave before has moved."""
        for number, (present, ever) in self.requests.items():
            self.counts[number].moved += int(present.sum()) * _SECTOR
            ever |= present
            present[:] = False

    def traffic(self) -> dict[str, Traffic]:
        """Return what was moved, by the name of the argument."""
        self.start_wave()
        for number, (_, ever) in self.requests.items():
            self.counts[number].touched = int(ever.sum()) * _SECTOR
        return {self.tensors[number][0]: counted for number, counted in self.counts.items()}

    def argument(self, name: str, value: Any) -> Any:
        """Return what a kernel sees of an argument. The pointer to a tensor carries the tensor's number, see _TAG."""
        if isinstance(value, Tensor) and (value.device.type != "cpu" or type(value) not in (Tensor, nn.Parameter)):
            got = f"a {type(value).__name__} on {value.device}"
            raise ValueError(f"{name} is {got}: only launches on CPU tensors with data can be interpreted")
        converted = stock._implicit_cvt(value)
        if isinstance(value, Tensor) and self.check_bounds:
            converted.handle.data += np.uint64(len(self.tensors) << _TAG)
            self.tensors.append((name, *_addresses(value)))
        return converted

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(to_bf16(np.array([value])), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return super().cast_impl(src, dst_type)
        if target == tl.bfloat16:
            return TensorHandle(to_bf16(src.data), target)
        return TensorHandle(to_fp32(src.data).astype(stock._get_np_dtype(target)), target)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any) -> TensorHandle:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):  # with fp8, or another rounding than to nearest even
            raise TypeError(f"a cast of {src.dtype} to {dst_type} with rounding {rounding_mode} isn't modelled")
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if lhs.dtype.scalar != tl.bfloat16:
            return super().binary_op(lhs, rhs, op)
        # fp32 has more than twice the bits of bf16, so rounding to it first changes no result of + - * / (Figueroa).
        result = op(to_fp32(lhs.data), to_fp32(rhs.data))
        return TensorHandle(result, tl.int1) if result.dtype == bool else TensorHandle(to_bf16(result), tl.bfloat16)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, nan: Any) -> TensorHandle:
        if nan == tl.PropagateNan.ALL:
            return self.create_minimumf(self.create_maximumf(arg, lo), hi)
        return self.create_minnumf(self.create_maxnumf(arg, lo), hi)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if z.dtype.scalar not in (tl.bfloat16, tl.float16, tl.float32):
            raise TypeError(f"fma of {z.dtype} isn't modelled: numpy has none that rounds once")
        x64, y64, z64 = (
            to_fp32(each.data).astype(np.float64) if each.dtype.scalar == tl.bfloat16 else each.data.astype(np.float64)
            for each in (x, y, z)
        )
        product = x64 * y64  # exact
        rounded = product + z64
        carried = rounded - product
        rest = (product - (rounded - carried)) + (z64 - carried)  # Knuth's two-sum: rounded + rest is exact
        return self.cast_impl(TensorHandle(to_odd(rounded, rest), tl.float64), z.dtype.scalar)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, _: int) -> TensorHandle:
        kind = a.dtype.scalar
        if self.counts_traffic:
            self.flops += 2 * a.data.size * b.data.shape[-1]
        if kind not in (tl.bfloat16, tl.float16, tl.float32):
            return super().create_dot(a, b, d, precision, _)
        if kind == tl.float32 and precision != ir.INPUT_PRECISION.IEEE:
            raise TypeError(f"an fp32 dot in {precision} isn't modelled: pass input_precision='ieee'")
        a32, b32 = (to_fp32(each.data) if kind == tl.bfloat16 else each.data.astype(np.float32) for each in (a, b))
        return TensorHandle((a32 @ b32 + d.data).astype(d.data.dtype), d.dtype.scalar)

    def create_masked_load(self, ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        return super().create_masked_load(self._checked("load", ptrs, mask), mask, *rest)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        return super().create_masked_store(self._checked("store", ptrs, mask), value, mask, *rest)

    def create_atomic_rmw(
        self, op: Any, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any
    ) -> Any:
        return super().create_atomic_rmw(op, self._checked("atomic", ptrs, mask), value, mask, *rest)

    def create_atomic_cas(self, ptrs: TensorHandle, *rest: Any) -> TensorHandle:
        everywhere = TensorHandle(np.ones_like(ptrs.data, dtype=bool), tl.int1)
        return super().create_atomic_cas(self._checked("atomic", ptrs, everywhere), *rest)

    def _checked(self, what: str, ptrs: TensorHandle, mask: TensorHandle) -> TensorHandle:
        """Return the pointers without their tags; raise OutOfBounds if one leaves its tensor."""
        if not self.check_bounds:
            return ptrs
        address = (ptrs.data & np.uint64((1 << _TAG) - 1)).view(np.int64)
        number = (ptrs.data >> np.uint64(_TAG)).view(np.int64)
        bounds = np.array([each[1:] for each in self.tensors])
        # An access is to one tensor nearly always: its lanes are compared with two numbers then, and counted at once.
        own = int(number.flat[0])
        owners = [own] if (number == own).all() else np.unique(number).tolist()
        first, end = bounds[own] if len(owners) == 1 else np.moveaxis(bounds[number], -1, 0)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        outside = ((address < first) | (address + size > end)) & mask.data
        if not outside.any():
            if self.counts_traffic:
                for owner in owners:
                    self._count(owner, address, mask.data if len(owners) == 1 else mask.data & (number == owner), size)
            return TensorHandle(address.astype(np.uint64), ptrs.dtype)
        lane = np.flatnonzero(outside)[0]
        at, (first, end) = int(address.flat[lane]), bounds[number.flat[lane]].tolist()
        far = f"{first - at} bytes before" if at < first else f"{at + size - end} bytes past the end of"
        tensor = self.tensors[number.flat[lane]][0]
        frames = reversed(traceback.extract_stack())
        code = next(frame for frame in frames if frame.filename != __file__ and "/triton/" not in frame.filename)
        raise OutOfBounds(
            f"{self.kernel}, program {self.grid_idx}: {what} of {size} bytes, {far} {tensor}, "
            f"{outside.sum()} of {outside.size} lanes; {code.filename}:{code.lineno}: {code.line}"
        )

    def _count(self, tensor: int, address: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Note which sectors of a tensor are requested; most tiles have no lane masked out, and copy nothing here."""
        mine = address if mask.all() else np.broadcast_to(address, mask.shape)[mask]
        if not mine.size:
            return
        _, begin, end = self.tensors[tensor]
        start = begin // _SECTOR
        if tensor not in self.requests:
            sectors = -(-end // _SECTOR) - start
            self.requests[tensor] = np.zeros(sectors, bool), np.zeros(sectors, bool)
            self.counts[tensor] = Traffic()
        self.counts[tensor].requested += mine.size * size
        self.requests[tensor][0][(mine >> _SECTOR_BITS) - start] = True


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's elements and the one behind the last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def _restored(*namespaces: Any) -> Iterator[None]:
    """Put back every attribute of modules and classes as it was, and remove those that were added."""
    before = [(namespace, dict(vars(namespace))) for namespace in namespaces]
    try:
        yield
    finally:
        for namespace, attributes in before:
            now = dict(vars(namespace))
            for name in now.keys() - attributes.keys():
                delattr(namespace, name)
            for name, value in attributes.items():
                if now.get(name) is not value:
                    setattr(namespace, name, value)
