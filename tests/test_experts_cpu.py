"""dmoe::experts_cpu against its reference, on every instruction set of this machine, and what it promises beside.

T, H, I: tokens, hidden size, expert width; E, k: experts, experts a token
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import hypothesis.strategies as st
import pytest
import torch
from dmoe_compile.kernels import experts_cpu as module
from dmoe_compile.kernels import native
from dmoe_compile.kernels.experts_cpu import (
    Activation,
    Isa,
    Layout,
    Operands,
    available,
    best_isa,
    built,
    launch,
    reference,
)
from hypothesis import given
from torch import Tensor
from torch._inductor import config

from pairwise import covering

LAYOUTS, ACTIVATIONS, ISAS = get_args(Layout), get_args(Activation), get_args(Isa)
X86 = platform.machine() in ("x86_64", "AMD64")
HERE = ISAS[ISAS.index(best_isa()) :] if X86 else ["portable"]  # one that has a set has those behind it
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# mid and the result are rounded once each, by at most half this share of themselves; what is summed is smaller than the
# largest output. fp32 has no such rounding: there it is the sums' order, over up to 200 terms, and erf's 1.5e-7.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-18}


@pytest.fixture(scope="module", autouse=True)
def _build_two_at_a_time() -> None:
    """Most of this file's time in a fresh cache is the compiler, which is another process."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: built(*pair), itertools.product(DTYPES, HERE)))


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Return torch.set_num_threads, which is undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def on(isa: str) -> Callable[..., Tensor]:
    """Return launch() on an instruction set, for operands that fit."""

    def run(**args: Any) -> Tensor:
        dtype = args.pop("out_dtype", args["hidden"].dtype)
        return module.run(built(args["hidden"].dtype, isa), Operands(**args), dtype)

    return run


def operands(
    ids: Tensor,
    E: int,
    *,
    H: int = 72,  # whole steps of every instruction set, and a rest
    I: int = 40,  # noqa: E741
    dtype: torch.dtype = torch.float32,
    layout: str = "concatenated",
    transposed: bool = False,
    down_transposed: bool = False,
    activation: str = "silu",
    biases: bool = False,
) -> dict[str, Any]:
    """Return launch()'s arguments for these ids. Whatever no pair needs is NaN: tokens, weights, experts."""
    unrouted = (ids < 0) | (ids >= E)
    used = set(ids[~unrouted].tolist())
    unused = [e for e in range(E) if e not in used]

    def bank(rows: int, *columns: int, swapped: bool = False) -> Tensor:
        drawn = torch.randn(E, rows, *columns) / (columns[0] ** 0.5 if columns else 1)
        drawn[unused] = torch.nan
        return (drawn.mT.contiguous() if swapped else drawn).to(dtype)

    rows = 2 * I if layout in ("concatenated", "interleaved") else I
    separate = layout == "separate"
    return dict(
        hidden=torch.randn(len(ids), H).masked_fill(unrouted.all(1, keepdim=True), torch.nan).to(dtype),
        ids=ids,
        weights=torch.rand(ids.shape).masked_fill(unrouted, torch.nan),
        gate_up=bank(rows, H, swapped=transposed),
        up=bank(I, H, swapped=transposed) if separate else None,
        down=bank(H, I, swapped=down_transposed),
        gate_up_bias=bank(rows) if biases else None,
        up_bias=bank(I) if biases and separate else None,
        down_bias=bank(H) if biases else None,
        layout=layout,
        transposed=transposed,
        down_transposed=down_transposed,
        activation=activation,
        alpha=1.702,
        limit=1.5,  # some of the values of these tests are beyond it
    )


def routing(T: int, E: int, k: int) -> Tensor:
    """Return ids, [T, k], of the first two thirds of the experts; some pairs, and every fifth token, are unrouted."""
    ids = torch.rand(T, E)[:, : max(k, 2 * E // 3)].argsort(-1)[:, :k]
    ids = torch.where(torch.rand(T, k) < 0.1, E, ids)
    ids[4::5] = torch.tensor([-1, E, 10**10] * k)[:k]
    return ids


def check(isa: str, args: dict[str, Any]) -> Tensor:
    out = on(isa)(**args)
    truth = reference(Operands(**args))
    assert out.dtype == args["hidden"].dtype
    assert not truth.isnan().any()
    slots = (dict(ids=args["ids"][:, [k]], weights=args["weights"][:, [k]]) for k in range(args["ids"].shape[1]))
    summed = sum(reference(Operands(**args | slot)).abs() for slot in slots)  # may be more than is left of it
    # Where the terms of a projection cancel out, its error is that of the terms: what they come to with random signs.
    squares = {name: x.square() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in args.items()}
    squares["activation"] = "relu2" if args["activation"] == "relu2" else "relu"
    terms = reference(Operands(**squares)).sqrt()
    bound = ROUNDING[args["hidden"].dtype] * max(float(summed.max()), float(terms.max()), 1e-3)
    torch.testing.assert_close(out.float(), truth, rtol=0, atol=bound)
    return out


FORMS = dict(
    layout=LAYOUTS,
    activation=ACTIVATIONS,
    dtype=DTYPES,
    transposed=[False, True],
    down_transposed=[False, True],
    biases=[False, True],
)


def forms() -> list[dict[str, Any]]:
    every = [dict(zip(FORMS, values, strict=True)) for values in itertools.product(*FORMS.values())]
    return [form for form in every if (form["layout"], form["activation"]) != ("plain", "swigluoai")]


@pytest.mark.parametrize("isa", HERE)
def test_every_two_options_together(isa: str) -> None:
    for form in covering(forms()):
        check(isa, operands(routing(21, 6, 3), 6, **form))


@pytest.mark.nightly
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("T", "H", "I"), [(21, 72, 40), (64, 200, 72)])
def test_all_options_together(isa: str, T: int, H: int, I: int) -> None:  # noqa: E741
    for form in forms():
        check(isa, operands(routing(T, 6, 3), 6, H=H, I=I, **form))


SIZES = {  # T, E, k, H, I
    "one token": (1, 4, 2, 72, 40),
    "one expert": (20, 1, 1, 72, 40),
    "all experts": (7, 3, 3, 64, 64),
    "one row": (7, 4, 2, 33, 1),
    "one column": (5, 4, 2, 1, 3),
    "more rows than a block": (33, 4, 2, 100, 72),
    "every number of tokens of an expert": (33, 5, 5, 40, 33),
    "sums that are left for later": (40, 2, 1, 1100, 36),
    "more tokens than are multiplied at once": (500, 2, 1, 40, 24),
    "more columns than a block": (9, 2, 1, 600, 550),
}


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("T", "E", "k", "H", "I"), SIZES.values(), ids=SIZES)
def test_sizes(isa: str, T: int, E: int, k: int, H: int, I: int) -> None:  # noqa: E741
    for dtype, columns in itertools.product(DTYPES, (False, True)):
        sizes = dict(H=H, I=I, dtype=dtype, transposed=columns, down_transposed=columns)
        check(isa, operands(routing(T, E, k), E, biases=True, **sizes))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    T, E = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    # The largest of many outputs, to which check() refers, is not one whose terms cancel; fewer are in SIZES.
    form = draw(st.sampled_from(forms())) | dict(H=draw(st.integers(16, 140)), I=draw(st.integers(1, 90)))
    return operands(routing(T, E, draw(st.integers(1, E))), E, **form)


@pytest.mark.parametrize("isa", HERE)
@given(case=cases())
def test_any_size_and_form(isa: str, case: dict[str, Any]) -> None:
    check(isa, case)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_may_be_of_another_type(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    args = operands(routing(9, 6, 3), 6, dtype=dtype)
    whole = launch(**args, out_dtype=torch.float32)
    assert torch.equal(launch(**args, out_dtype=out_dtype), whole.to(out_dtype))
    assert torch.equal(launch(**args), whole.to(dtype))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nobody_is_routed(isa: str, dtype: torch.dtype) -> None:
    assert not on(isa)(**operands(torch.full((20, 2), 4), 4, biases=True, dtype=dtype)).any()


def test_nothing_to_do() -> None:
    assert launch(**operands(torch.zeros(0, 2).long(), 4)).shape == (0, 72)
    assert not launch(**operands(torch.zeros(3, 0).long(), 4) | dict(hidden=torch.ones(3, 72))).any()


def test_small_operands_may_be_views_and_of_other_types() -> None:
    args = operands(routing(21, 6, 3), 6, biases=True)
    expected = launch(**args)
    args["hidden"] = args["hidden"].T.contiguous().T
    args["ids"] = args["ids"].clamp(-1, 6).int().repeat(1, 2)[:, :3]
    args["weights"] = args["weights"].double()
    args["down_bias"] = args["down_bias"].T.contiguous().T
    assert torch.equal(launch(**args), expected)


def test_an_expert_twice_counts_twice() -> None:
    """Not promised, but it stays within its memory."""
    args = operands(torch.tensor([[1, 1]] * 300), 3)
    once = args | dict(ids=args["ids"][:, :1], weights=args["weights"].sum(1, keepdim=True))
    torch.testing.assert_close(launch(**args), launch(**once))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_huge_values_do_what_they_do_in_torch(isa: str, activation: str) -> None:
    layout = "concatenated" if activation == "swigluoai" else "plain"  # a product with up, NaN itself, would hide what
    args = operands(torch.tensor([[0], [0], [0], [2]]), 2, activation=activation, layout=layout)
    args["hidden"][1] *= 1e9  # past what exp takes
    args["hidden"][2, 0] = torch.nan
    out, truth = on(isa)(**args), reference(Operands(**args))
    assert truth[2].isnan().all()
    assert truth[[0, 1, 3]].isfinite().all()
    scale = truth.abs().amax(-1, keepdim=True).nan_to_num(1).clamp(1)  # the huge token's would hide the others
    torch.testing.assert_close(out / scale, truth / scale, rtol=0, atol=ROUNDING[torch.float32], equal_nan=True)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_every_magnitude(isa: str, activation: str) -> None:
    """Expert width 1 and weights of 1: what comes out is act(x), infinities and all."""
    x = torch.cat([torch.logspace(-30, 38, 400), torch.linspace(0, 120, 997), torch.tensor([torch.inf, torch.nan])])
    x = torch.cat([x, -x]).unsqueeze(1)
    one = torch.ones(1, 1, 1)
    form = dict(layout="plain", activation=activation)
    if activation == "swigluoai":
        form |= dict(layout="separate", up=one)
    args = operands(torch.zeros(len(x), 1).long(), 1, H=1, I=1, layout=form["layout"]) | form
    args |= dict(hidden=x, weights=torch.ones(len(x), 1), gate_up=one, down=one)
    out = on(isa)(**args).squeeze()
    wide = x.double().squeeze()
    truth = module.activated(wide, None if form["layout"] == "plain" else wide, activation, 1.702, 1.5)
    kept = wide.isfinite() | (
        activation != "gelu"
    )  # of infinity PyTorch's own erf makes NaN or not as it is vectorised
    close = partial(torch.testing.assert_close, rtol=2e-6, atol=4e-7, equal_nan=True)  # erf's error, times x of up to 6
    close(out[kept], truth[kept].float())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives(isa: str, dtype: torch.dtype) -> None:
    """Through an identity: read, widened, rounded twice, written. vdpbf16ps takes subnormal values for zero."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 1)
    one = torch.ones(1, 1, 1, dtype=dtype)
    args = operands(torch.zeros(len(x), 1).long(), 1, H=1, I=1, layout="separate", activation="relu", dtype=dtype)
    # relu(bias of 1) * x
    args |= dict(hidden=x, weights=torch.ones(len(x), 1), gate_up=one * 0, up=one, down=one, gate_up_bias=one[0])
    out, expected = on(isa)(**args), torch.where(x.isfinite(), x, torch.nan)  # 0 * infinity
    if isa == "avx512_bf16" and dtype == torch.bfloat16:
        expected = torch.where(x.abs() < torch.finfo(dtype).smallest_normal, 0, expected)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(isa: str, dtype: torch.dtype) -> None:
    """What is summed in fp32, and is between two 16-bit values, ties among them, goes where torch puts it."""
    x = torch.cat([torch.randn(4000) * scale for scale in (1e-7, 1e-5, 1, 6e4)])
    x = torch.cat([x, torch.arange(1, 4000, 2) / 2048 + 1, torch.tensor([65519.0, 65520, 65536, 1e30, 2**-25, 2**-24])])
    one = torch.ones(1, 1, 1, dtype=dtype)
    args = operands(torch.zeros(len(x), 1).long(), 1, H=1, I=1, layout="plain", activation="relu", dtype=dtype)
    args |= dict(hidden=torch.ones(len(x), 1, dtype=dtype), weights=x.unsqueeze(1), gate_up=one, down=one)
    assert torch.equal(on(isa)(**args).squeeze(1), x.to(dtype))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_goes_down_is_rounded_to_nearest(isa: str, dtype: torch.dtype) -> None:
    """Products of two 16-bit values, through an identity to fp32: of more than one vector of outputs, and a rest."""
    T, I = 64, 40  # noqa: E741
    x, one = torch.rand(T, I).add(1).to(dtype), torch.eye(I, dtype=dtype).unsqueeze(0)
    args = operands(torch.zeros(T, 1).long(), 1, H=I, I=I, layout="separate", activation="relu", dtype=dtype)
    args |= dict(hidden=x, weights=torch.ones(T, 1), gate_up=one, up=one, down=one, out_dtype=torch.float32)
    assert torch.equal(on(isa)(**args), (x.float() * x.float()).to(dtype).float())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_behind_the_weights_is_read(isa: str, dtype: torch.dtype) -> None:
    """They end where a page begins that nobody may read; rows are no multiple of a tile, nor their length of a step."""
    args = operands(torch.zeros(7, 1).long(), 1, H=73, I=41, layout="separate", dtype=dtype)
    expected = on(isa)(**args)
    with ExitStack() as stack:
        guarded = {name: stack.enter_context(at_the_end_of_memory(args[name])) for name in ("gate_up", "up", "down")}
        assert torch.equal(on(isa)(**args | guarded), expected)


@contextmanager
def at_the_end_of_memory(tensor: Tensor) -> Iterator[Tensor]:
    """Give a copy of a tensor that is followed by a page of which the process may read nothing: it would be killed."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    mprotect = ctypes.CDLL(None).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert mprotect(start + pages, mmap.PAGESIZE, 0) == 0
    copied = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=pages - tensor.nbytes)
    copied = copied.view(tensor.dtype).view(tensor.shape)
    yield copied.copy_(tensor)
    assert mprotect(start + pages, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


# Bits: a large routed batch, of widths at which rows are cut into slices (of 8 KiB) and copied, and not.
PROMISES = {
    "rows": dict(H=4200, I=136),
    "columns": dict(H=560, I=136, transposed=True, down_transposed=True),
    "mixed": dict(H=72, I=40, layout="interleaved", down_transposed=True, biases=True),
}


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", PROMISES.values(), ids=PROMISES)
def test_bits_are_the_same_whatever_else_is_there(isa: str, dtype: torch.dtype, form: Any, threads: Any) -> None:
    scores = torch.rand(70, 8)
    scores[:25, 7] = -1  # an expert with many tokens
    ids = scores.argsort(-1)[:, :3]
    args = operands(ids, 8, dtype=dtype, **form)
    run = on(isa)
    whole = run(**args)
    assert torch.equal(run(**args), whole)
    for number in (1, 2, 3, 5):
        threads(number)
        assert torch.equal(run(**args), whole), f"{number} threads"
    for some in (slice(0, 1), slice(3, 5), slice(20, 27), slice(10, 70), slice(69, 70)):
        part = {name: args[name][some] for name in ("hidden", "ids", "weights")}
        assert torch.equal(run(**args | part), whole[some]), some
    order = torch.randperm(70)
    shuffled = {name: args[name][order] for name in ("hidden", "ids", "weights")}
    assert torch.equal(run(**args | shuffled), whole[order])
    assert torch.equal(run(**args | dict(ids=ids.flip(1), weights=args["weights"].flip(1))), whole)


def test_more_tokens_than_scratch_memory_holds() -> None:
    """64 MiB hold some 1200 tokens of this width; the others wait for their turn."""
    T = 3000
    args = operands(torch.arange(T).unsqueeze(1) % 2, 2, H=8, I=12000)
    whole = launch(**args)
    for some in (slice(0, 3), slice(1000, 1500), slice(T - 1, T)):
        part = {name: args[name][some] for name in ("hidden", "ids", "weights")}
        assert torch.equal(launch(**args | part), whole[some])


def test_several_python_threads_at_once() -> None:
    every = [operands(routing(20 + 7 * i, 6, 3), 6, H=200, I=72, dtype=DTYPES[i % 3]) for i in range(6)]
    expected = [launch(**args) for args in every]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: launch(**every[i % 6]), range(60)))
    assert all(torch.equal(result, expected[i % 6]) for i, result in enumerate(results))


def in_own_process(code: str) -> Any:
    """Run Python code that can import this file, in an interpreter of its own."""
    code = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{code}"
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def _in_child(queue: Any) -> None:
    torch.manual_seed(0)
    queue.put(launch(**operands(routing(21, 6, 3), 6)).tolist())


_FORKED = """
import os, sys, torch
from test_experts_cpu import _in_child
class Queue:
    put = staticmethod(print)
if os.fork() == 0:
    torch.set_num_threads(2)
    _in_child(Queue)
    sys.stdout.flush()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_in_a_spawned_process() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    result = queue.get(timeout=120)
    child.join()
    assert result == launch(**_seeded()).tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_in_a_fork_before_first_use() -> None:
    """In a fresh process, as nothing may have run in parallel before; that child would hang in torch's own ops too."""
    done = in_own_process(_FORKED)
    assert eval(done.stdout.splitlines()[-1]) == launch(**_seeded()).tolist()


def _seeded() -> dict[str, Any]:
    torch.manual_seed(0)
    return operands(routing(21, 6, 3), 6)


def grouped_mm(hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return what transformers computes with experts_implementation="grouped_mm", the same operations in turn."""
    order = ids.flatten().argsort()
    tokens = order // ids.shape[1]
    ends = torch.histc(ids.flatten().float(), len(gate_up), 0, len(gate_up) - 1).cumsum(0).int()
    gate, up = torch._grouped_mm(hidden[tokens], gate_up.mT, offs=ends).chunk(2, -1)
    out = torch._grouped_mm(torch.nn.functional.silu(gate) * up, down.mT, offs=ends)
    weighted = out * weights.flatten()[order].unsqueeze(1)
    sums = torch.empty_like(weighted).index_copy_(0, order, weighted).view(*ids.shape, -1).sum(1)
    return sums.to(hidden.dtype)


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).square().mean().sqrt())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_more_than_that_of_grouped_mm(isa: str, dtype: torch.dtype) -> None:
    """Root mean square against fp64, over widths and numbers of tokens.

    The portable path of x86 has no fused multiply-add: in fp32 every product is rounded too, as often as a sum is.
    """
    more = 2**0.5 if isa == "portable" and dtype == torch.float32 else 1.05
    for T, E, k, H, I in ((32, 8, 4, 256, 128), (64, 4, 2, 512, 64), (8, 16, 8, 128, 192)):  # noqa: E741
        ids = torch.rand(T, E).argsort(-1)[:, :k]
        args = operands(ids, E, H=H, I=I, dtype=dtype)
        args = {
            name: x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in args.items()
        }
        args["weights"] = args["weights"].to(dtype)
        wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args.values()]
        truth = fp64(*wide[:4], wide[5])
        other = grouped_mm(*(args[name] for name in ("hidden", "ids", "weights", "gate_up", "down")))
        assert error(on(isa)(**args), truth) <= more * error(other, truth)


def fp64(hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = torch.einsum("th,tkih->tki", hidden, gate_up[ids]).chunk(2, -1)
    return torch.einsum("tki,tkhi,tk->th", torch.nn.functional.silu(gate) * up, down[ids], weights)


def disassembly(isa: Isa, dtype: torch.dtype) -> str:
    flags = (*module.FLAGS[isa], f"-DELEMENT={module._ELEMENTS[dtype]}")
    library = native.library("experts", flags)
    return subprocess.run(["objdump", "-d", library._name], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not X86, reason="instructions of x86")
@pytest.mark.parametrize(
    ("isa", "dtype", "has", "has_not"),
    [
        ("avx512_bf16", torch.bfloat16, ["vdpbf16ps", "zmm"], []),
        ("avx512", torch.bfloat16, ["vfmadd", "zmm", "prefetcht1"], ["vdpbf16ps"]),
        ("avx512", torch.float16, ["vcvtph2ps"], []),
        ("avx2", torch.float32, ["vfmadd", "ymm", "prefetcht1"], ["zmm"]),
        ("portable", torch.float32, ["mulps", "xmm", "prefetcht1"], ["ymm", "zmm", "vfmadd"]),
    ],
)
def test_what_is_built_for_an_instruction_set_has_its_instructions(
    isa: Isa, dtype: torch.dtype, has: list[str], has_not: list[str]
) -> None:
    code = disassembly(isa, dtype)
    assert [word for word in has if word not in code] == []
    assert [word for word in has_not if word in code] == []


@pytest.mark.skipif(not X86, reason="registers of x86")
@pytest.mark.parametrize(("isa", "dtype"), [("avx512_bf16", torch.bfloat16), ("avx512", torch.float32)])
def test_the_widest_tile_keeps_its_sums_in_registers(isa: Isa, dtype: torch.dtype) -> None:
    """Between the first and the last multiplication of the loop nothing is spilled; 24 sums and 5 more are live."""
    code = disassembly(isa, dtype)
    (tile,) = re.findall(r"Tile\w+multiplyILi6E\w+>:\n(.*?)\n\n", code, re.DOTALL)
    loops = [part for part in re.split(r"\bj\w+ ", tile) if len(re.findall("vfmadd|vdpbf16ps", part)) >= 24]
    assert any(not re.search(r"zmm\d+,-?0x\w+\(%r[sb]p\)|\(%r[sb]p\),%zmm", loop) for loop in loops)


@pytest.mark.parametrize("change", [dict(), dict(down_transposed=True, biases=True)])
def test_without_a_compiler_pytorch_runs_instead(change: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    args = operands(routing(21, 6, 3), 6, **change)
    caches = native.library, native._warn, module.built
    for cache in caches:
        cache.cache_clear()
    try:
        with config.patch({"cpp.cxx": ("/nowhere/g++",)}):
            for dtype in DTYPES:
                assert not available(dtype)
            torch.testing.assert_close(launch(**args), reference(Operands(**args)))
    finally:
        for cache in caches:
            cache.cache_clear()
    (record,) = caplog.records
    assert "kernels/experts.cpp can't be built (InvalidCxxCompiler" in record.message
    assert available(torch.float32)


def test_without_memory_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "built", lambda _: lambda *_: 1)
    with pytest.raises(MemoryError, match=r"no memory to work in for T, k = \(21, 3\)"):
        launch(**operands(routing(21, 6, 3), 6))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_the_kernel_says_so_when_it_gets_no_memory() -> None:
    code = """
import resource, torch
from test_experts_cpu import launch, operands, routing
torch.set_num_threads(1)
launch(**operands(routing(2, 6, 3), 6))
args = operands(torch.zeros(1200, 1).long(), 1, H=8, I=12000)
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 2**23, pages + 2**23))
try:
    launch(**args)
except MemoryError:
    print("said so")
"""
    done = in_own_process(code)
    assert done.stdout == "said so\n", done.stderr


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "names": (dict(layout="twisted"), r"layout 'twisted'"),
    "two projections": (dict(layout="plain", activation="swigluoai"), r"'swigluoai' multiplies two projections"),
    "hidden": (
        dict(hidden=torch.zeros(21, 72).double()),
        r"hidden is float64\[21, 72\], but must be fp32, bf16 or fp16",
    ),
    "ids": (dict(ids=torch.zeros(21, 2).long()), r"ids int64\[21, 2\] and weights"),
    "down": (dict(down=torch.zeros(6, 40, 72)), r"do not fit H=72"),
    "up": (dict(layout="separate", gate_up=torch.zeros(6, 40, 72)), r"up is None; with layout 'separate'"),
    "bias": (dict(down_bias=torch.zeros(6, 71)), r"down_bias is float32\[6, 71\], but must be \[6, 72\]"),
    "view": (dict(down=torch.zeros(6, 40, 72).mT), r"must be contiguous"),
    "out": (dict(out_dtype=torch.float64), r"out_dtype is torch.float64, but must be fp32, bf16 or fp16"),
    "device": (dict(ids=torch.zeros(21, 3, device="meta").long()), r"operands are on cpu, meta, .* one device"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        launch(**operands(routing(21, 6, 3), 6) | change)


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_as_an_operator(out_dtype: torch.dtype | None) -> None:
    args = operands(routing(21, 6, 3), 6, dtype=torch.bfloat16, biases=True)
    args = {name: x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in args.items()}
    before = {name: x.clone() for name, x in args.items() if isinstance(x, Tensor)}
    torch.library.opcheck(module.experts_cpu, tuple(args.values()), dict(out_dtype=out_dtype))
    compiled = torch.compile(partial(module.experts_cpu, out_dtype=out_dtype), fullgraph=True)
    assert torch.equal(compiled(*args.values()), launch(**args, out_dtype=out_dtype))
    assert all(torch.equal(args[name], x) for name, x in before.items())
