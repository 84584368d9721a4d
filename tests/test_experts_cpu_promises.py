"""What dmoe::experts_cpu promises beside its result: memory, bits, processes, instructions, failures.

T, H, F: tokens, hidden size, expert width; E, k: experts, experts a token
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dmoe_compile.kernels import experts_cpu as module
from dmoe_compile.kernels import native
from dmoe_compile.kernels.experts_cpu import Isa, Operands, available, launch, reference
from torch import Tensor
from torch._inductor import config

from cpu_operands import HERE, X86, build_two_at_a_time, on
from expert_operands import DTYPES, operands, routing

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_two_at_a_time()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "F"), [(73, 41), (96, 41), (73, 64)])
def test_nothing_behind_the_weights_is_read(isa: str, dtype: torch.dtype, H: int, F: int) -> None:
    """They end where a page begins that nobody may read; rows are no multiple of a tile, nor their length of a step."""
    args = operands(torch.zeros(7, 1).long(), 1, H=H, F=F, layout="separate", dtype=dtype)
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


@pytest.fixture
def threads():
    """Return torch.set_num_threads, which is undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Bits: a large routed batch, of widths at which rows are cut into slices (of 8 KiB) and copied, and not.
PROMISES = {
    "rows": dict(H=4200, F=136),
    "columns": dict(H=560, F=136, transposed=True, down_transposed=True),
    "mixed": dict(H=72, F=40, layout="interleaved", down_transposed=True, biases=True),
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
    args = operands(torch.arange(T).unsqueeze(1) % 2, 2, H=8, F=12000)
    whole = launch(**args)
    for some in (slice(0, 3), slice(1000, 1500), slice(T - 1, T)):
        part = {name: args[name][some] for name in ("hidden", "ids", "weights")}
        assert torch.equal(launch(**args | part), whole[some])


def test_several_python_threads_at_once() -> None:
    every = [operands(routing(20 + 7 * i, 6, 3), 6, H=200, F=72, dtype=DTYPES[i % 3]) for i in range(6)]
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
from test_experts_cpu_promises import _in_child
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


def disassembly(isa: Isa, dtype: torch.dtype) -> str:
    flags = (*module.FLAGS[isa], f"-DELEMENT={module._ELEMENTS[dtype]}")
    library = native.library("experts", flags)
    return subprocess.run(["objdump", "-d", library._name], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not X86, reason="instructions of x86")
@pytest.mark.parametrize(
    ("isa", "dtype", "has", "has_not"),
    [
        ("amx_bf16", torch.bfloat16, ["tdpbf16ps", "tileloadd", "ldtilecfg", "tilerelease", "prefetcht1"], []),
        ("avx512_bf16", torch.bfloat16, ["vdpbf16ps", "zmm"], ["tile"]),
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
from expert_operands import operands, routing
from dmoe_compile.kernels.experts_cpu import launch
torch.set_num_threads(1)
launch(**operands(routing(2, 6, 3), 6))
args = operands(torch.zeros(1200, 1).long(), 1, H=8, F=12000)
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 2**23, pages + 2**23))
try:
    launch(**args)
except MemoryError:
    print("said so")
"""
    done = in_own_process(code)
    assert done.stdout == "said so\n", done.stderr
