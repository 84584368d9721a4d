"""Something else in place of a module's method: a class of the module's own, made from the one it had.

The module keeps its type for isinstance(), its name, its attributes and its other methods, and it can be copied and
pickled. Nothing refers back to it, so that it is freed when its last user lets go. The method's own code still runs in
training mode, for arguments that were not verified, and from the moment that something it was verified with changes.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmoe_compile.blocks import ROLES, Template
from dmoe_compile.stacking import Stack

log = logging.getLogger(__name__)

KEY = "_dmoe"  # in the __dict__ of a replaced module, and of a list whose experts are stacked
_SETTING = bool | int | float | str | None
_CLASSES: dict[tuple[Any, str], Any] = {}


@dataclass(eq=False)
class Cut:
    """What a replaced method reads and runs; it lies in its module's __dict__.

    Attributes:
        method: the name of the method.
        run: the experts: (hidden, ids, weights) -> [T, H].
        parameters: names of the method's parameters.
        roles: which of them is "hidden", "ids" and "weights".
        constants: what the others were when it was verified.
        template: the whole block's, if the method is the forward of one.
        experts: the list whose experts `run` has stacked, None where it reads the module's own weights.
        settings: plain attributes of the module as it was verified.
        stale: why the method's own code runs again, "" while it does not.
    """

    method: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    template: Template | None = None
    experts: nn.Module | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    stale: str = ""

    def fits(self, given: Mapping[str, Any]) -> bool:
        """Say whether a call has the arguments that were verified."""
        if self.template is not None:
            return len(given) == 1 and all(isinstance(each, Tensor) and each.numel() > 0 for each in given.values())
        return given.keys() == {*self.roles.values(), *self.constants} and all(
            given[name] is value or given[name] == value for name, value in self.constants.items()
        )

    def agrees(self, name: str, value: Any) -> bool:
        """Say whether a plain attribute is what it was."""
        was = self.settings.get(name, value)
        return was is value or (type(was) is type(value) and was == value)


def cut_of(module: nn.Module) -> Cut | None:
    """Return what replaces a method of a module, None where nothing does."""
    cut = vars(module).get(KEY)
    return cut if isinstance(cut, Cut) else None


def install(module: nn.Module, cut: Cut) -> None:
    """Replace a method of a module."""
    module.__class__ = _derived(type(module), cut.method)
    vars(module)[KEY] = cut


def uninstall(module: nn.Module) -> None:
    """Give a module its own class back."""
    module.__class__ = _kind(module)
    vars(module).pop(KEY)


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's plain attributes: what its code may read besides tensors and modules."""
    torchs_own = vars(nn.Module())
    return {n: value for n, value in vars(module).items() if n not in torchs_own and isinstance(value, _SETTING)}


def why_stale(module: nn.Module, cut: Cut) -> str:
    """Follow what happened to a module's experts; return why its own code has to run again, "" where it has not."""
    if not cut.stale and isinstance(cut.run, Stack) and cut.experts is not None:
        if vars(cut.experts).get(KEY) is not cut.run:
            cut.stale = "its experts were given back"
        elif cut.run.dirty and all(each is not cut.experts for each in _holders(module)):
            cut.stale = "its experts were replaced"
        else:
            cut.stale = cut.run.refresh(list(cut.experts.children()))
    return cut.stale


def _holders(module: nn.Module) -> list[nn.Module]:
    """Return the places where a list of experts lies: a child, or a child's child."""
    children = list(module.children())
    return [*children, *(each for child in children for each in child.children())]


def _kind(module: nn.Module) -> Any:
    """Return the class that a module had; a bound method of ours may outlive what it was taken from."""
    return getattr(type(module), "_dmoe_kind", type(module))


def follow(experts: nn.Module, stack: Stack) -> None:
    """Stack experts again whenever .to() or load_state_dict() has given them other memory."""
    vars(experts)[KEY] = stack
    experts.__class__ = _derived(type(experts), "_apply")
    stack.follower = experts.register_load_state_dict_post_hook(_loaded)


def let_go(experts: nn.Module) -> None:
    """Give a list's experts weights of their own, and the list its own class."""
    stack = vars(experts).pop(KEY)
    experts.__class__ = _kind(experts)
    stack.follower.remove()
    stack.restore()


def _loaded(experts: nn.Module, _keys: Any) -> None:
    vars(experts)[KEY].refresh(list(experts.children()))


def _derived(kind: Any, method: str) -> Any:
    """Return a class like `kind`, a module's, with one method replaced."""
    if (kind, method) in _CLASSES:
        return _CLASSES[kind, method]

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        kind.__setattr__(self, name, value)
        held = vars(self).get(KEY)
        if isinstance(held, Cut) and (isinstance(value, nn.Module) or not held.agrees(name, value)):
            held.stale = f"its {name} has changed"
        elif isinstance(held, Stack) and isinstance(value, nn.Module):
            held.dirty = True

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _remade, (kind, method), *super(made, self).__reduce_ex__(protocol)[2:]

    function = functools.wraps(getattr(kind, method))(_apply if method == "_apply" else _stand_in(method))
    members = {method: function, "__setattr__": set_attribute, "__reduce_ex__": reduce, "_dmoe_kind": kind}
    members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made: Any = types.new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(members))
    return _CLASSES.setdefault((kind, method), made)


def _remade(kind: type[nn.Module], method: str) -> nn.Module:
    """Make the shell of a replaced module that is being copied or unpickled."""
    return _derived(kind, method).__new__(_derived(kind, method))


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    _kind(self)._apply(self, fn, recurse)
    vars(self)[KEY].dirty = True  # between kinds of devices, parameters are replaced and nothing is told
    _loaded(self, None)
    return self


def _stand_in(method: str) -> Callable[..., Any]:
    """Return what stands in for a method of this name."""

    def stand_in(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cut = self.__dict__.get(KEY)
        if cut is not None and not self.training and len(args) <= len(cut.parameters) and _is_current(self, cut):
            given = {**dict(zip(cut.parameters, args, strict=False)), **kwargs}
            if cut.fits(given):
                if cut.template is not None:
                    return cut.template(self, cut.run, *given.values())
                return cut.run(*(given[cut.roles[role]] for role in ROLES))
        return getattr(_kind(self), method)(self, *args, **kwargs)

    return stand_in


def _is_current(module: nn.Module, cut: Cut) -> bool:
    """Say whether a replacement still does what its module's own code would do."""
    if torch.compiler.is_compiling():  # the rest was looked at when compilation began
        return not cut.stale and not (isinstance(cut.run, Stack) and cut.run.dirty)
    if cut.stale or (isinstance(cut.run, Stack) and cut.run.is_swapped()):
        return False  # swapped: torch.func.functional_call() lends the experts other parameters for one call
    if reason := why_stale(module, cut):
        log.warning(
            "%s: since prepare(), %s; so its own code runs again. dmoe_compile.prepare(model) looks at it once more",
            type(module).__name__,
            reason,
        )
    return not reason
