"""The torch.compile backend: normalise the graph, run the passes, hand it to Inductor.

    no gradient needed:  Dynamo graph -> functional aten -> passes -> compile_fx
    gradient needed:     Dynamo graph -> compile_fx, the passes run on AOTAutograd's joint graph

Where nothing was rewritten, Inductor gets Dynamo's own graph: same code, same caches, same numbers as
without this backend. A graph that can't be read is no error either: it compiles as Inductor would
compile it, with one warning that says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.eval_frame import innermost_backend
from torch._inductor.custom_graph_pass import get_custom_graph_passes
from torch._logging import trace_structured

from dmoe_compile import auto_prepare, calibrate, experts, huge_pages, loading
from dmoe_compile.config import Config, check_config, check_options
from dmoe_compile.joint import JointPass
from dmoe_compile.normalise import normalise
from dmoe_compile.notices import Notices, forget, notices_of, say_how_to_select, unreadable
from dmoe_compile.passes import fuse_experts, pipeline
from dmoe_compile.passes.constrain import Settings
from dmoe_compile.passes.cost import Verdict
from dmoe_compile.passes.lower import Lowering, NotFusedError
from dmoe_compile.passes.nodes import Sources
from dmoe_compile.passes.pipeline import Findings
from dmoe_compile.passes.policies import policy_names
from dmoe_compile.passes.team import Denoised
from dmoe_compile.runtime import recording
from dmoe_compile.stepwise import Stepwise

log = logging.getLogger(__name__)

_JOINT = {"use_joint_graph_passes": True, "selective_decompose": False}  # mode "lite" would skip the pass
_SELECTING = {"topk", "sort", "argmax", "max"}  # what every router does by one of; see passes/selections.py


def dmoe(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph; `torch.compile(model, backend="dmoe")` calls this.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, real tensors and sizes.
        mode: torch.compile's `mode=`.
        options: torch.compile's `options=`, see Config.

    Raises:
        ValueError: for an option that Config refuses.
    """
    config = Config.from_options(options)
    config = dataclasses.replace(config, mode=mode or config.mode)
    patches = {**_mode_options(config.mode), **config.inductor}
    if not config.passes and not config.stats:
        say_how_to_select()
        if not _may_fuse(gm, example_inputs, config):
            return _inductor(gm, example_inputs, patches)
    if _needs_gradient(example_inputs):
        if config.experts is True:
            raise ValueError(
                "experts=True, but gradients are required, which the fused experts do not compute; call the model "
                "under torch.no_grad(), or use experts='auto'"
            )
        return _compile_joint(gm, example_inputs, config, patches, notices_of(options))
    if "team" in config.passes or set(policy_names()).intersection(config.selected):
        return _compile_stepwise(gm, example_inputs, config, patches, notices_of(options))
    return _compile_inference(gm, example_inputs, config, patches, notices_of(options))


def compile(model: Any, config: Config | None = None, **torch_compile_kwargs: Any) -> Any:
    """Prepare a model and return ``torch.compile(model, backend="dmoe")``; options are checked now, not at a call.

    Args:
        model: a module or a function.
        config: options; the default selects no pass.
        **torch_compile_kwargs: `fullgraph`, `dynamic`, `mode`, and `options` as a dict of flat keys, which
            add to `config`. `isolate_recompiles` is True: else Dynamo counts what it compiles of a model's code with
            any options, and at the ninth (torch._dynamo.config.recompile_limit) runs it uncompiled.

    Raises:
        ValueError: for an option that Config refuses, or one given twice; for what is no model.
    """
    loading.check_model(model)
    check_config(config)
    options = torch_compile_kwargs.pop("options", None)
    check_options(options)
    given = dict(options or {})
    mode = torch_compile_kwargs.pop("mode", None)
    if mode is not None:
        if "mode" in given:
            raise ValueError("mode: given in options and as an argument; give each once")
        given["mode"] = mode
    base = (config or Config()).to_options()
    if twice := sorted(base.keys() & given.keys()):
        raise ValueError(f"{', '.join(twice)}: given in config and as an argument; give each once")
    merged = Config.from_options({**base, **given})
    if merged.wants_traceable and isinstance(model, torch.nn.Module):
        for message in auto_prepare.prepare_or_say(model, merged):
            log.warning("%s", message)
    how = {"isolate_recompiles": True, **torch_compile_kwargs}
    return torch.compile(model, backend="dmoe", options=merged.to_options() or None, **how)


class _Compiled(dict[str, Any]):
    """What a model was compiled to, by options; a copy of the model has none of it."""

    def __deepcopy__(self, memo: object) -> _Compiled:
        return _Compiled()

    def __reduce__(self) -> tuple[type[_Compiled], tuple[()]]:
        return _Compiled, ()


def compiled(model: Any, config: Config) -> Any:
    """Return a model compiled with these options: what an earlier call compiled, where there was one."""
    if not isinstance(model, torch.nn.Module):
        return compile(model, config)
    known: _Compiled = model.__dict__.setdefault("_dmoe_compiled", _Compiled())
    key = repr(sorted(config.to_options().items()))
    if key not in known:
        known[key] = compile(model, config)
    return known[key]


def config_of(model: Any) -> Config | None:
    """Return the config that a module was compiled with, None where that was another backend or can't be seen."""
    context = getattr(model, "dynamo_ctx", None)
    compiler = innermost_backend(context.callback) if context is not None else None
    if getattr(compiler, "compiler_fn", None) is not dmoe:
        return None
    return Config.from_options(getattr(compiler, "kwargs", {}).get("options"))


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    notices: Notices,
    step: Denoised | None = None,
    said: list[Verdict] | None = None,
    known: dict[str, int | str] | None = None,
) -> tuple[fx.GraphModule, Findings] | None:
    """Return Dynamo's graph normalised and rewritten by the selected passes, with what they found.

    None where the graph can't be read; that, and passes that changed nothing, goes to `notices`.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        config: what to run.
        notices: what takes the findings.
        step: the rows that a decoding context describes, with the inputs that this takes; a denoising step of TEAM's is
            counted in any case.
        said: whether a coreset pays at each site, where that is known.
        known: what was read of experts in other graphs of the same model, see passes/fuse_experts.py.

    Raises:
        ValueError: where experts=True asks for what can't be had.
    """
    try:
        aten, sources = normalise(gm, example_inputs)
        _trace_artifact("dmoe_graph_before", aten)
        settings = Settings(config.block_length, config.max_block_tokens, config.scope)
        if config.auto and said is None:
            said = calibrate.verdicts(aten, sources, example_inputs, config)
        findings = pipeline.run(
            aten.graph,
            sources,
            config.selected,
            settings,
            stats=config.stats or (step is not None and step.reuses),
            verdicts=said,
            step=step,
            lowering=_lowering(aten, sources, example_inputs, config, {} if known is None else known),
        )
    except NotFusedError:
        raise
    except Exception as error:
        notices.warn(unreadable(error))
        return None
    aten.recompile()
    _trace_artifact("dmoe_graph_after", aten)
    if config.huge_pages:
        values = _seen(aten, example_inputs)
        weights = {node.name for outcome in findings.outcomes for node in outcome.site.expert_weights}
        huge_pages.use(values[name] for name in sorted(weights & values.keys()))
    if config.passes:
        notices.take(gm, findings, config)
    if config.experts is True and not findings.outcomes:
        notices.warn("experts=True, but there is no mixture-of-experts layer in a graph, which stays as it is")
    return aten, findings


def _lowering(
    aten: fx.GraphModule, sources: Sources, example_inputs: Sequence[Any], config: Config, known: dict[str, int | str]
) -> Lowering | None:
    """Return what puts fused kernels into a graph, None where none are wanted."""
    if config.experts is False:
        return None
    reader = fuse_experts.Reader(sources, _seen(aten, example_inputs), config.verify_experts, known)
    return Lowering(reader, config.experts, _autotunes(config))


def _seen(aten: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the real tensors among a graph's inputs, by name."""
    names = [node.name for node in aten.graph.find_nodes(op="placeholder")]
    return fuse_experts.seen(dict(zip(names[: len(example_inputs)], example_inputs, strict=True)))


def _compile_inference(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, patches: dict[str, Any], notices: Notices
) -> Callable[..., Any]:
    rewritten = rewrite(gm, example_inputs, config, notices)
    if rewritten is None:
        return _inductor(gm, example_inputs, patches)
    aten, findings = rewritten
    if not findings.changed:
        return _inductor(gm, example_inputs, patches)
    with torch._C._DisableAutocast():  # its casts are in the graph already
        compiled = _inductor(aten, example_inputs, patches)
    return recording(compiled, [each.site.name for each in findings.outcomes]) if findings.num_outputs else compiled


def _compile_stepwise(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, patches: dict[str, Any], notices: Notices
) -> Callable[..., Any]:
    try:
        said = _verdicts(gm, example_inputs, config)
    except Exception as error:
        notices.warn(unreadable(error))
        return _inductor(gm, example_inputs, patches)
    inputs, known = list(example_inputs), dict[str, int | str]()

    def lower(graph: fx.GraphModule, fakes: Sequence[Any]) -> Callable[..., Any]:
        with torch._C._DisableAutocast() if graph is not gm else contextlib.nullcontext():
            return _inductor(graph, fakes, patches)

    def rewritten(step: Denoised | None) -> tuple[fx.GraphModule, Findings] | None:
        return rewrite(gm, inputs, config, notices, step, said, known)

    stepwise = Stepwise(gm, inputs, rewritten, lower, config.stats, config.selected.get("team"))
    inputs[:] = stepwise.fakes or inputs  # a later step is traced on these; the real ones are not held
    return stepwise.alone or stepwise


def _compile_joint(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, patches: dict[str, Any], notices: Notices
) -> Callable[..., Any]:
    if config.stats:
        notices.warn("stats=True records nothing where gradients are required; call the model under torch.no_grad()")
    if "team" in config.passes:
        notices.warn("team reuses, limits and speculates nothing where gradients are required; use torch.no_grad()")
    if not config.passes:
        return _inductor(gm, example_inputs, patches)
    from torch._inductor import config as inductor_config

    theirs = patches.get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass)
    try:
        said = _verdicts(gm, example_inputs, config)
    except Exception as error:
        notices.warn(unreadable(error))
        return _inductor(gm, example_inputs, patches)
    ours = JointPass(config, gm, notices, said)
    patches = {**patches, **_JOINT, "joint_custom_pre_pass": [ours, *get_custom_graph_passes(theirs)]}
    return _inductor(gm, example_inputs, patches)


def _verdicts(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> list[Verdict] | None:
    """Return whether a coreset pays at each site of Dynamo's graph, None where that is not asked."""
    return calibrate.verdicts(*normalise(gm, example_inputs), example_inputs, config) if config.auto else None


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs, config_patches=patches)  # type: ignore[return-value]


def _autotunes(config: Config) -> bool:
    """Say whether Inductor is asked to time what it chooses: our kernels follow it."""
    from torch._inductor import config as inductor_config

    options = {**_mode_options(config.mode), **config.inductor}
    return bool(options.get("max_autotune", inductor_config.max_autotune))


def _may_fuse(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> bool:
    """Say whether a graph may get fused kernels where no pass is selected; one without a router is not looked at."""
    if config.experts != "auto":
        return config.experts
    if _needs_gradient(example_inputs):
        return False
    names = {
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "") for node in gm.graph.nodes
    }
    return not names.isdisjoint(_SELECTING)


def _needs_gradient(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


def _mode_options(mode: str | None) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode and mode != "default" else {}


def _trace_artifact(name: str, gm: fx.GraphModule) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
    )


def _reset() -> None:
    """What torch._dynamo.reset() calls: CUDA graphs of a dropped compile must not be replayed."""
    forget()
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


dmoe.reset = _reset  # type: ignore[attr-defined]
auto_prepare.install()
experts.register()
