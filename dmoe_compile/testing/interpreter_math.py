"""Arithmetic of the interpreter in numpy: bf16, which is held as uint16, reductions and scans along an axis at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """Return bf16 values, held as uint16, in fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Return numbers of any dtype as bf16 in uint16: rounded once, to the nearest, ties to even."""
    if values.dtype != np.float32:
        exact = values.astype(np.float64)
        single = exact.astype(np.float32)
        values = to_odd(single, exact - single)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def to_odd(value: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Return value + rest rounded to odd in value's dtype: rounded again, to fewer bits, it is rounded as if once.

    Source: Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums", IEEE Trans. Computers 57:462.
    """
    bits: Any = value.view(np.uint32 if value.dtype == np.float32 else np.uint64)
    even = bits & 1 == 0
    neighbour = np.nextafter(value, np.copysign(np.inf, rest).astype(value.dtype))
    return np.where(even & (rest != 0) & np.isfinite(value), neighbour, value)


def reduce(input: Any, axis: int | None, combine_fn: JITFunction, keep_dims: bool = False, **_: Any) -> Any:
    """Like tl.reduce, along an axis at once where numpy can, else step by step for all other axes at once."""
    inputs = input if isinstance(input, tuple) else (input,)
    _refuse_bf16(inputs)
    arrays = [each.handle.data for each in inputs]
    shape = arrays[0].shape
    if axis is None:
        arrays, at = [array.reshape(-1) for array in arrays], 0
    else:
        at = axis % len(shape)
    results = _fold(combine_fn, arrays, inputs, at)
    if keep_dims:
        kept = [1 if axis is None or i == at else size for i, size in enumerate(shape)]
        results = [array.reshape(kept) for array in results]
    tensors = tuple(as_tensor(array, each.dtype) for array, each in zip(results, inputs, strict=True))
    return tensors if isinstance(input, tuple) else tensors[0]


def _fold(combine: JITFunction, arrays: list[np.ndarray], inputs: Sequence[Any], axis: int) -> list[np.ndarray]:
    values, floating = arrays[0], inputs[0].dtype.is_floating()
    standard = tl.standard
    if combine is standard._sum_combine:
        return [values.sum(axis)]
    if combine is standard._elementwise_max:
        return [(np.fmax if floating else np.maximum).reduce(values, axis)]
    if combine is standard._elementwise_min:
        return [(np.fmin if floating else np.minimum).reduce(values, axis)]
    if combine in (standard._argmax_combine_tie_break_left, standard._argmin_combine_tie_break_left):
        if floating and np.isnan(values).any():
            raise TypeError("argmax and argmin of NaN depend on the order of a GPU's comparisons: replace NaN first")
        find = np.argmax if combine is standard._argmax_combine_tie_break_left else np.argmin
        best = np.expand_dims(find(values, axis), axis)  # the first: indices ascend along the axis
        return [np.take_along_axis(array, best, axis).squeeze(axis) for array in arrays]
    return [array.take(-1, axis) for array in _scanned(combine, arrays, inputs, axis)]


def scan(input: Any, axis: int, combine_fn: JITFunction, reverse: bool = False, **_: Any) -> Any:
    """Like tl.associative_scan, for all other axes at once."""
    inputs = input if isinstance(input, tuple) else (input,)
    _refuse_bf16(inputs)
    at = axis % len(inputs[0].shape)
    arrays = [np.flip(each.handle.data, at) if reverse else each.handle.data for each in inputs]
    if combine_fn is tl.standard._sum_combine:
        results = [arrays[0].cumsum(at)]
    else:
        results = _scanned(combine_fn, arrays, inputs, at)
    results = [np.flip(array, at) if reverse else array for array in results]
    tensors = tuple(as_tensor(array, each.dtype) for array, each in zip(results, inputs, strict=True))
    return tensors if isinstance(input, tuple) else tensors[0]


def _scanned(combine: JITFunction, arrays: list[np.ndarray], inputs: Sequence[Any], axis: int) -> list[np.ndarray]:
    """Return every prefix's combination along an axis."""

    def at(i: int) -> tuple[Any, ...]:
        return tuple(as_tensor(array.take(i, axis), each.dtype) for array, each in zip(arrays, inputs, strict=True))

    steps = [at(0)]
    for i in range(1, arrays[0].shape[axis]):
        combined = combine(*steps[-1], *at(i))
        steps.append(combined if isinstance(combined, tuple) else (combined,))
    rest = arrays[0].shape[:axis] + arrays[0].shape[axis + 1 :]
    columns = zip(*steps, strict=True)
    return [
        np.stack([np.broadcast_to(each.handle.data.reshape(rest), rest) for each in column], axis) for column in columns
    ]


def _refuse_bf16(inputs: Sequence[Any]) -> None:
    if any(each.dtype == tl.bfloat16 for each in inputs):
        raise TypeError("a reduction in bf16 depends on the order in which a GPU rounds: take it in fp32")


def as_tensor(array: np.ndarray, dtype: tl.dtype) -> Any:
    array = np.asarray(array).astype(stock._get_np_dtype(dtype))
    if not array.shape:
        return tl.tensor(TensorHandle(array.reshape(1), dtype), dtype)
    return tl.tensor(TensorHandle(array, dtype), tl.block_type(dtype, list(array.shape)))
