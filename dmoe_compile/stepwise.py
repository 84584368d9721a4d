"""One Dynamo graph, compiled for plain forwards and for what a decoding context says of others, as they come.

A plain forward is what it would be without a context: no state, no masks. A denoising step of the `team` pass, and a
forward in which a coreset method must not hear all tokens, run graphs with more inputs, which the context (context.py)
gives: roles, rows, and with TEAM the stored expert outputs of every site. Each is compiled when it is first needed, in
the tracing context that Dynamo left, so that sizes are the same symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.convert_frame import compile_lock
from torch._guards import TracingContext, tracing

from dmoe_compile import context as contexts
from dmoe_compile.passes.layouts import Layout
from dmoe_compile.passes.pipeline import Findings
from dmoe_compile.passes.team import Denoised, Options
from dmoe_compile.runtime import recorder, recording

T = TypeVar("T")
Compiled = Callable[..., Any]
Rewrite = Callable[[Denoised | None], "tuple[fx.GraphModule, Findings] | None"]
Lower = Callable[[fx.GraphModule, Sequence[Any]], Compiled]


class Stepwise:
    """What the backend returns for a graph with TEAM or a coreset method; call it with the graph's inputs.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        rewrite: makes the rewritten graph, plain or as a context describes it; None where the graph can't be read.
        lower: compiles a graph for inputs that may be fake.
        stats: whether described forwards are recorded for routing_stats(), as plain forwards that count are.
        options: of TEAM, None without it.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        rewrite: Rewrite,
        lower: Lower,
        stats: bool,
        options: Options | None,
    ) -> None:
        self._rewrite, self._lower, self._stats, self._options = rewrite, lower, stats, options
        self._tracing = TracingContext.get()
        self._steps: dict[Denoised, _StepGraph] = {}
        self._sizes: list[tuple[Any, Any]] = []
        self._symbols: dict[Any, int] = {}
        self._plain: Compiled | None = None
        self._lower_plain: Callable[[Sequence[Any]], Compiled]
        plain = rewrite(None)
        if plain is None:
            self.fakes, self._plain = [], lower(gm, example_inputs)
            return
        aten, findings = plain
        values = [node.meta.get("val") for node in aten.graph.find_nodes(op="placeholder")]
        self.fakes = [real if value is None else value for value, real in zip(values, example_inputs, strict=True)]
        self._symbols = {x.node.expr: i for i, x in enumerate(values) if isinstance(x, torch.SymInt)}
        self._sizes = [_size(layout) for layout in findings.layouts]
        graph, names = aten if findings.changed else gm, [outcome.site.name for outcome in findings.outcomes]

        def lower_plain(inputs: Sequence[Any]) -> Compiled:
            compiled = lower(graph, inputs)
            return recording(compiled, names) if findings.num_outputs else compiled

        self._lower_plain = lower_plain
        wanted = self._wanted(example_inputs)
        # What this call needs, while Dynamo still takes guards; many rows are never plain, a prompt is nothing else.
        if wanted is None:
            self._plain = lower_plain(example_inputs)
        else:
            self._step(wanted)

    def __call__(self, *args: Any) -> Any:
        if contexts.innermost.get() is not None and self._sizes:  # asked first: most models never see a context
            wanted = self._wanted(args)
            if wanted is not None:
                return self._step(wanted)(*args)
        return (self._plain or self._lowered_plain())(*args)

    @property
    def alone(self) -> Compiled | None:
        """The plain graph where it holds no layer that a context could say something of."""
        return None if self._sizes else self._plain

    def _wanted(self, args: Sequence[Any]) -> Denoised | None:
        """Return which rows of the graph the current context describes, None where the forward is plain."""
        context = contexts.current(strict=self._options is not None)
        said = None if context is None else context.rows()
        if said is None:
            return None
        reuses = said.denoises and self._options is not None
        if not reuses and not said.has_idle:
            return None
        for i, dims in enumerate(self._sizes):
            if [self._number(dim, args) for dim in dims] == [said.rows, said.seq]:
                return Denoised(i, said.candidates, reuses)
        return None

    def _number(self, dim: Any, args: Sequence[Any]) -> int | None:
        """Return a size of this call."""
        if not isinstance(dim, torch.SymInt):
            return dim
        known = {symbol: sympy.Integer(int(args[i])) for symbol, i in self._symbols.items()}
        value = sympy.sympify(dim.node.expr).xreplace(known)
        return int(value) if value.is_number else None

    def _step(self, wanted: Denoised) -> _StepGraph:
        if wanted not in self._steps:
            with compile_lock:  # as Dynamo holds it: one thread compiles at a time
                if wanted not in self._steps:
                    self._steps[wanted] = self._traced(lambda: self._lower_step(wanted))
        return self._steps[wanted]

    def _lowered_plain(self) -> Compiled:
        with compile_lock:
            if self._plain is None:
                self._plain = self._traced(lambda: self._lower_plain(self.fakes))
            return self._plain

    def _lower_step(self, wanted: Denoised) -> _StepGraph:
        rewritten = self._rewrite(wanted)
        assert rewritten is not None, "the plain graph could be read"
        aten, findings = rewritten
        inputs = [node.meta["val"] for node in aten.graph.find_nodes(op="placeholder")[len(self.fakes) :]]
        compiled = self._lower(aten, [*self.fakes, *inputs])
        return _StepGraph(compiled, findings, inputs, self._stats, self._options)

    def _traced(self, lower: Callable[[], T]) -> T:
        """Run what compiles a graph as if Dynamo had just left it."""
        env = self._tracing.fake_mode.shape_env if self._tracing.fake_mode else None
        guards = len(env.guards) if env else 0
        with tracing(self._tracing):
            compiled = lower()
        if TracingContext.try_get() is None and env is not None and len(env.guards) > guards:
            raise AssertionError("a guard was added that Dynamo does not check any more")
        return compiled


class _StepGraph:
    """A compiled forward with the inputs that a context gives."""

    def __init__(
        self, compiled: Compiled, findings: Findings, inputs: Sequence[Tensor], stats: bool, options: Options | None
    ) -> None:
        self.compiled, self.stats, self.options = compiled, stats, options
        self.names = [outcome.site.name for outcome in findings.outcomes] if findings.num_outputs else []
        self.states = [(state.site, state.weights) for state in findings.states]
        self.device, self.likes = inputs[0].device, inputs[2:]

    def __call__(self, *args: Any) -> Any:
        context = contexts.current()
        assert context is not None
        sites = [(name, args[weights]) for name, weights in self.states]
        cache, limit = (False, False) if self.options is None else (self.options.cache, self.options.limit)
        roles = context.roles(cache=cache, limit=limit).to(self.device)
        outputs = list(self.compiled(*args, *context.inputs(sites, self.likes, roles)))
        context.done(sites)
        if self.names:
            counts = outputs.pop()
            context.count(self.names, counts)
            if self.stats:
                recorder.add(self.names, counts)
        return outputs


def _size(layout: Layout) -> tuple[Any, Any]:
    return (layout.batch, layout.seq) if layout.rows is not None else (None, None)
