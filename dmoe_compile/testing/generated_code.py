"""What a module that Inductor generated for a GPU launches, reads and writes: read off its text."""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._inductor.graph import GraphLowering

_COPYING = ("aten.clone", "aten._to_copy", "aten.index", "aten.gather", "aten.constant_pad", "aten.permute_copy")


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
        nbytes: likewise their bytes.
    """

    code: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    host_syncs: list[str] = field(default_factory=list)
    cudagraph_reasons: list[str] = field(default_factory=list)
    numel: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

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


def read(graph: Graph, lowering: GraphLowering, origins: Sequence[tuple[str, bool]]) -> None:
    """Fill in what the text of a generated module says."""
    on_host = set()
    module: Any = lowering.module
    for node in module.graph.find_nodes(op="placeholder"):
        index, example = getattr(node.meta.get("desc"), "idx", -1), node.meta.get("val")
        origin, is_parameter = origins[index] if 0 <= index < len(origins) else ("", False)
        sizes: Sequence[Any] = example.shape if isinstance(example, Tensor) else ()
        dtype = example.dtype if isinstance(example, Tensor) else None
        hints = tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes)
        graph.inputs.append(Input(node.name, origin, is_parameter, hints, dtype))
        graph.numel[node.name] = math.prod(hints)
        graph.nbytes[node.name] = math.prod(hints) * (dtype.itemsize if dtype else 0)
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
            for sizes in (self.graph.numel, self.graph.nbytes):
                sizes.setdefault(target, sizes.get(base, 0))
            self.on_host |= {target} if base in self.on_host else set()
        elif isinstance(value, ast.Call) and (allocator := ast.unparse(value.func)).startswith("empty_strided"):
            self.graph.numel[target] = _numel(value.args[0])
            dtype = getattr(torch, ast.unparse(value.args[2]).removeprefix("torch."))
            self.graph.nbytes[target] = self.graph.numel[target] * dtype.itemsize
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
    pairs = [(name, arg) for name, arg in zip(passed(kernel.tuner), args, strict=False) if name in pointers]
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


def passed(tuner: Any) -> list[str]:
    """Return the arguments that a launch passes: all but the constexprs, also those whose value Inductor knows."""
    return [param.name for param in tuner.fn.params if not param.is_constexpr]
