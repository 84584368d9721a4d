"""Prepare a model when Dynamo starts to compile it for this backend, so that the user need not call prepare().

Dynamo tells start callbacks nothing about what it compiles; the frame that called them holds it. That is private
to torch: where it is not found, nothing happens, and a model that needs it is warned about when its graph breaks.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from types import FrameType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.convert_frame import _compile

if TYPE_CHECKING:
    from dmoe_compile.config import Config

log = logging.getLogger(__name__)

_WANTED = {"compiler_fn", "locals", "globals", "code"}
_MAX_DEPTH = 3  # functions around functions that are searched for a module


class _Kept(list[Any]):
    """Start callbacks; torch._dynamo.reset() clears them all but ours."""

    def clear(self) -> None:
        self[:] = [_on_compile]


def install() -> None:
    """Register the callback for this process; once is enough."""
    if not isinstance(callback_handler.start_callbacks, _Kept):
        callback_handler.start_callbacks = _Kept([*callback_handler.start_callbacks, _on_compile])


def is_available() -> bool:
    """Say whether this torch's Dynamo holds what it compiles where we look for it."""
    return inspect.signature(_compile).parameters.keys() >= _WANTED


def _on_compile(_args: Any) -> None:
    """Prepare the modules of the frame that is about to be compiled where that is asked for; follow them elsewhere."""
    compiling = _compiling(sys._getframe(1))
    if compiling is None:
        return
    backend, options = _backend(compiling["compiler_fn"])
    modules = dict.fromkeys(_modules_of(compiling))
    ours = sys.modules.get(f"{__package__}.backend")
    if ours is not None and backend is ours.dmoe and (config := _asks_for_prepared(options)):
        from dmoe_compile.notices import notices_of  # which imports this module

        notices = notices_of(options)
        for module in modules:
            notices.loops(prepare_or_say(module, config, notices.left))
    elif capture := sys.modules.get(f"{__package__}.capture"):  # else nothing was ever prepared
        for module in modules:
            capture.refresh(module)


def _asks_for_prepared(options: Mapping[str, Any] | None) -> Config | None:
    """Return the config of options for which experts in loops matter."""
    from dmoe_compile.config import Config

    try:
        config = Config.from_options(options)
    except ValueError:
        return None  # which the backend raises where the user sees it
    return config if config.wants_traceable else None


def prepare_or_say(model: nn.Module, config: Config, known: WeakSet[nn.Module] | None = None) -> list[str]:
    """Prepare a model as its options ask; return messages for the blocks that stay in a Python loop.

    Args:
        model: what to prepare.
        config: the options.
        known: blocks that were left alone before, which are skipped; those of this call are added.
    """
    known = WeakSet() if known is None else known
    from dmoe_compile.capture import PrepareReport, loops, prepare, refresh

    with torch.compiler.set_stance("force_eager"):  # a part that was compiled on its own must not compile now
        refresh(model)
        found = {name: module for name, module in loops(model).items() if module not in known}
        if not found:
            return []
        report = prepare(model) if config.auto_prepare else PrepareReport()
    if report.prepared:
        log.info("prepared %d blocks of %s", len(report.prepared), type(model).__name__)
    left = {block.name: block.reason for block in report.refused}
    if not config.auto_prepare:
        left = dict.fromkeys(found, "auto_prepare is off; dmoe_compile.prepare(model) makes them traceable")
    known.update(found[name] for name in left if name in found)
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name or type(model).__name__)
    return [f"the experts of {', '.join(names)} stay in a Python loop: {why}." for why, names in by_reason.items()]


def _compiling(frame: FrameType | None) -> dict[str, Any] | None:
    """Return the locals of Dynamo's _compile()."""
    while frame is not None:
        if frame.f_code.co_name == "_compile" and frame.f_locals.keys() >= _WANTED:
            return dict(frame.f_locals)
        frame = frame.f_back
    return None


def _backend(compiler: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """Return the backend's function and options from what Dynamo wrapped around them."""
    while (inner := getattr(compiler, "_torchdynamo_orig_backend", None)) is not None:
        compiler = inner
    return getattr(compiler, "compiler_fn", compiler), getattr(compiler, "kwargs", {}).get("options")


def _modules_of(compiling: Mapping[str, Any]) -> Iterator[nn.Module]:
    """Yield the modules that a frame can reach by its arguments, its closure and its globals."""
    for value in compiling["locals"].values():
        yield from _modules_in(value)
    for name in compiling["code"].co_names:
        value = compiling["globals"].get(name)
        if isinstance(value, nn.Module):
            yield value


def _modules_in(value: Any, depth: int = 0) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth == _MAX_DEPTH:
        return
    elif isinstance(value, MethodType):
        yield from _modules_in(value.__self__, depth + 1)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield from _modules_in(cell.cell_contents, depth + 1)
            except ValueError:  # empty
                continue
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _modules_in(each, depth + 1)
