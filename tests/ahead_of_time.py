"""Compile Triton kernels for GPUs that are not here, and read what became of them.

    compiled = compile(kernel, {"x_ptr": "*bf16", "numel": "i32"}, {"BLOCK": 1024}, "sm_90", num_warps=4)
    assert compiled.stats.spills == 0 and compiled.count(LOAD_128)
    check_budget("reuse", compiled)

Triton's wheel brings all that NVIDIA's and AMD's targets need, disassemblers included; no driver is asked.

Budgets: tests/reference/gpu_budgets.json holds registers, shared bytes and instructions of each kernel and target, and
check_budget fails where one has grown by more than a tenth. To record what the tests that run need now:

    DMOE_RECORD_BUDGETS=1 pytest tests/test_reuse.py

Then look at the diff. Entries that nothing checks any more are taken out by hand.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_GPU = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TARGETS = tuple(_GPU)
# Bytes of shared memory that one block can have: NVIDIA's after opting in, and AMD's LDS.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
_TENSOR_MEMORY_COLUMNS = 512  # sm_100's, of a multiprocessor

# Instructions to count, on every target that has such.
LOAD_128 = r"LDG\.\S*128|(global|buffer)_load_dwordx4"
STORE_128 = r"STG\.\S*128|(global|buffer)_store_dwordx4"
ASYNC_COPY_128 = r"LDGSTS\S*\.128"  # global to shared memory, past the registers; sm_80 and later
TENSOR_CORE = {"sm_80": r"HMMA", "sm_90": r"HGMMA", "sm_100": r"UTC\w*MMA", "gfx942": r"v_mfma"}

BUDGETS = Path(__file__).parent / "reference" / "gpu_budgets.json"
_GROWTH = 1.1  # another release of a compiler moves an instruction or two; what doubles the work moves more


@dataclass(frozen=True)
class Stats:
    """What a compiled kernel needs."""

    registers: int  # of a thread
    stack: int  # bytes of a thread
    spills: int  # loads from and stores to the stack; on AMD the registers that were spilled
    shared_bytes: int  # of a block
    instructions: int


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target."""

    target: str
    stats: Stats
    code: tuple[str, ...]  # its instructions: SASS, or AMDGCN
    asm: dict[str, Any]  # of each stage: "ttgir", "ptx" and so on

    def count(self, pattern: str) -> int:
        """Return the number of instructions whose name matches a regular expression, from the start of the name."""
        return sum(re.match(rf"(@!?U?P\w+ +)?({pattern})", line) is not None for line in self.code)


_compiled: dict[tuple[Any, ...], Compiled] = {}  # a second or two each, and several tests look at the same


def compile(
    kernel: JITFunction,
    signature: dict[str, str],
    constants: dict[str, Any],
    target: str,
    *,
    divisible: Collection[str] | None = None,
    **options: Any,
) -> Compiled:
    """Compile a kernel as a launch on a GPU would.

    Args:
        kernel: a @triton.jit function.
        signature: the type of each argument that is known at the launch only: "*bf16", "*i64", "i32".
        constants: the value of each other one, None for a pointer that is not given.
        target: one of TARGETS.
        divisible: arguments that are multiples of 16, as Triton finds at a launch; every pointer unless given.
        options: num_warps, num_stages and so on.

    Raises:
        ValueError: for arguments that are neither or both, and for a kernel that no such GPU could launch.
    """
    if target not in _GPU:
        raise ValueError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    if signature.keys() & constants.keys() or signature.keys() | constants.keys() != set(kernel.arg_names):
        got = f"{', '.join(signature)} and {', '.join(constants)}"
        raise ValueError(f"{kernel.__name__} takes {', '.join(kernel.arg_names)}; signature and constants are {got}")
    if divisible is None:
        divisible = [name for name, kind in signature.items() if kind.startswith("*")]
    parts = signature, constants, dict.fromkeys(divisible), options
    key = kernel, target, *(repr(sorted(part.items())) for part in parts)
    if key not in _compiled:
        at = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
        types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, signature=types, constexprs=constants, attrs=at)
        binary = triton.compile(source, target=_GPU[target], options=options)
        code, stats = (_nvidia if "cubin" in binary.asm else _amd)(binary)
        _refuse(kernel.__name__, target, stats, getattr(binary.metadata, "tmem_size", None) or 0)
        _compiled[key] = Compiled(target, stats, code, binary.asm)
    return _compiled[key]


def _refuse(name: str, target: str, stats: Stats, columns: int) -> None:
    if stats.shared_bytes > SHARED_LIMIT[target]:
        shared = f"{stats.shared_bytes} bytes of shared memory, {target} has {SHARED_LIMIT[target]}"
        raise ValueError(f"{name} needs {shared}: take smaller tiles or fewer stages")
    if columns > _TENSOR_MEMORY_COLUMNS:
        memory = f"{columns} columns of tensor memory, {target} has {_TENSOR_MEMORY_COLUMNS}"
        raise ValueError(f"{name} needs {memory}: take a smaller accumulator")


def _nvidia(binary: Any) -> tuple[tuple[str, ...], Stats]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    (registers, stack) = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?) *;", sass)
    code = tuple(line for line in lines if line != "NOP")  # what fills the last cache line
    spills = sum(re.search(r"\b(STL|LDL)\b", line) is not None for line in code)
    return code, Stats(registers, stack, spills, binary.metadata.shared, len(code))


def _amd(binary: Any) -> tuple[tuple[str, ...], Stats]:
    text = binary.asm["amdgcn"]
    code = tuple(
        line.strip() for line in text.splitlines() if re.match(r"\s+(s|v|ds|global|buffer|flat|scratch)_", line)
    )

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    stack = field("private_segment_fixed_size")
    return code, Stats(field("vgpr_count"), stack, spills, binary.metadata.shared, len(code))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check_budget(name: str, compiled: Compiled) -> None:
    """Compare a kernel with what was recorded for that name and target, or record it, see above.

    Raises:
        AssertionError: when it needs over a tenth more, or nothing was recorded.
    """
    fields = ("registers", "shared_bytes", "instructions")
    needs = {field: value for field, value in asdict(compiled.stats).items() if field in fields}
    if os.environ.get("DMOE_RECORD_BUDGETS"):
        _record(name, compiled.target, needs)
        return
    budgets = json.loads(BUDGETS.read_text())
    how = f"to record it run its test with DMOE_RECORD_BUDGETS=1, then look at the diff of {BUDGETS.name}"
    budget = budgets.get(name, {}).get(compiled.target)
    if budget is None:
        raise AssertionError(f"{name} has no budget for {compiled.target}: {how}")
    grown = [f"{field} {budget[field]} -> {value}" for field, value in needs.items() if value > _GROWTH * budget[field]]
    if grown:
        raise AssertionError(f"{name} on {compiled.target} has grown: {', '.join(grown)}. If it is worth it: {how}")


def _record(name: str, target: str, needs: dict[str, int]) -> None:
    with BUDGETS.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # tests run in several processes
        file.seek(0)
        budgets = json.loads(file.read() or "{}")
        budgets.setdefault(name, {})[target] = needs
        file.truncate(0)
        file.write(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
