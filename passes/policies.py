"""Coreset methods by name: the ones of this package, and what others add to them.

A policy is a module or an object with

    Options     a frozen dataclass, whose fields become the option keys `<name>.<field>`; it checks its values itself
    coreset     (scores, ids, voting, options) -> [N, E] bool: which experts each block may use

        scores: [N, L, E] fp32, selection scores of N blocks of L tokens: what the model's own top-k ranks
        ids:    [N, L, k] int64, every token's own top-k, best first
        voting: [N, L] bool, the tokens that count: not padding, not served from a cache, no NaN or infinite scores

It is a pure function of tensors: it is traced once and compiled into the graph. At least k experts are expected of
it. Optional are

    needs_weights   True: coreset() gets a keyword `weights`, [N, L, k] fp32, what the model would weigh `ids` by, and
                    `ids` are what the model itself would choose, in its own groups
    promise         (options) -> share of its routing weight that every voting token keeps; those that don't are counted
    all_experts     a method of Options: options under which the rule runs in full and changes nothing (for explain)

Others are added by register_policy(), or by an entry point of the group "dmoe_compile.policies" whose name is the
policy's and whose object is the policy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from dmoe_compile.passes import auto, cover, des, dmoe, team, top_any
from torch import Tensor

GROUP = "dmoe_compile.policies"


class Policy(Protocol):
    """A coreset method, as this module's docstring describes it."""

    Options: type[Any]
    coreset: Callable[..., Tensor]


_OWN: Mapping[str, Policy] = {"dmoe": dmoe, "des": des, "cover": cover}
_OTHERS: Mapping[str, Any] = {
    "auto": auto,
    "team": team,
    "top_any": top_any,
}  # passes that have no coreset rule of their own
_registered: dict[str, Policy] = {}


def register_policy(name: str, policy: Policy) -> None:
    """Add a coreset method; `passes=[name]` then selects it, and `<name>.<field>` sets its options.

    Args:
        name: a Python identifier that no other pass has.
        policy: what this module's docstring describes.

    Raises:
        ValueError: for a name that is taken or no identifier, or an object that is no policy.
    """
    if name in pass_names():
        raise ValueError(f"{name!r} is a pass already; register the policy under another name")
    _registered[name] = _checked(name, policy)


def policy_names() -> list[str]:
    """Return the names of all policies; nothing is imported for it."""
    return list(dict.fromkeys([*_OWN, *_registered, *_installed()]))


def pass_names() -> list[str]:
    """Return the names of all passes: the policies, "auto" which decides on one, and those that run beside one."""
    return [*policy_names(), *_OTHERS]


def pass_options(name: str) -> type[Any]:
    """Return the dataclass of a pass's options; raises what find_policy() does."""
    options: type[Any] = _OTHERS[name].Options if name in _OTHERS else find_policy(name).Options
    return options


def find_policy(name: str) -> Policy:
    """Return a policy by its name.

    Raises:
        ValueError: if an installed package names it in an entry point that can't be loaded or holds no policy.
    """
    if name in _OWN:
        return _OWN[name]
    if name not in _registered:
        entry = _installed()[name]
        try:
            policy = entry.load()
        except Exception as error:
            where = f"the entry point {name} = {entry.value} of {GROUP}"
            raise ValueError(f"{where} can't be loaded ({type(error).__name__}: {error})") from error
        _registered[name] = _checked(name, policy)
    return _registered[name]


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _checked(name: Any, policy: Any) -> Policy:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{name!r} can't name a policy: option keys are <name>.<field>, so it must be an identifier")
    options = getattr(policy, "Options", None)
    if not isinstance(options, type) or not dataclasses.is_dataclass(options):
        raise ValueError(f"policy {name!r}: {policy!r} has no dataclass called Options")
    if not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(f"policy {name!r}: {options.__qualname__} must be frozen: it is part of what is cached")
    if not callable(getattr(policy, "coreset", None)):
        raise ValueError(f"policy {name!r}: {policy!r} has no function coreset(scores, ids, voting, options)")
    return policy
