"""Config: every option of the backend, as a frozen dataclass and as the flat keys that torch.compile takes."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dmoe_compile.passes.policies import pass_names, pass_options, policy_names

log = logging.getLogger(__name__)

Scope = Literal["block", "batch"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite"]
_OWN = (
    "passes",
    "block_length",
    "max_block_tokens",
    "scope",
    "experts",
    "verify_experts",
    "huge_pages",
    "stats",
    "auto_prepare",
    "mode",
)


@dataclass(frozen=True)
class Config:
    """Options of ``torch.compile(model, backend="dmoe", options=...)``.

    Attributes:
        passes: names of the passes to run, each at most once. With none (the default) nothing is lossy. "auto" (lossy
            too) is `cover` at the sites where the cost model says that it pays.
        block_length: tokens of a sequence that are denoised together and share a coreset: the model's own
            denoising unit (32 in LLaDA2, 4 to 64 in SDAR's checkpoints, the canvas, 256, in DiffusionGemma).
        max_block_tokens: forwards with more tokens a sequence than this are left alone; None rewrites all.
        scope: "block": the tokens of a block share a coreset. "batch": all tokens of a forward share one, whatever
            its sequences, so that they read no more experts than it has.
        experts: the fused kernels, for experts and (on GPUs) routing, with or without a pass. "auto" uses them where
            they take the layer and are faster: on GPUs, in forwards of up to 1,024 tokens; on CPUs, wherever a C++
            compiler is there. True insists, and is an error where they can't be had, False never uses them. They
            choose the same experts and round otherwise.
        verify_experts: hold what was read of a layer's experts against what they compute, before a fused kernel takes
            their place.
        huge_pages: put the weights of experts on pages of 2 MiB when a model is compiled on a CPU with a pass or the
            kernel, see huge_pages.use().
        stats: record unique experts per site and forward, see routing_stats().
        auto_prepare: make experts in Python loops traceable, see prepare(), when a pass, `stats` or experts=True
            needs them.
        mode: torch.compile's mode; torch forbids its own `mode=` together with `options=`.
        policies: options of a pass by its name; passes that are not named here run with their defaults.
        inductor: Inductor options (``torch._inductor.list_options()``), handed on as they are.

    Raises:
        ValueError: for a value that is out of range, of a wrong type, or unknown; it names the rule.
    """

    passes: tuple[str, ...] | Literal["auto"] = ()
    block_length: int = 32
    max_block_tokens: int | None = None
    scope: str = "block"
    experts: bool | Literal["auto"] = "auto"
    verify_experts: bool = True
    huge_pages: bool = False
    stats: bool = False
    auto_prepare: bool = True
    mode: str | None = None
    policies: Mapping[str, Any] = field(default_factory=dict)
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", _passes(self.passes))
        check_int("block_length", self.block_length, "the tokens that are denoised together; 32 is usual")
        if self.max_block_tokens is not None:
            check_int("max_block_tokens", self.max_block_tokens, "the longest forward to rewrite; None rewrites all")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r} must be one of: {', '.join(get_args(Scope))}")
        if self.experts not in ("auto", True, False) or not isinstance(self.experts, bool | str):
            raise ValueError(f"experts={self.experts!r} must be 'auto', True or False")
        for name in ("verify_experts", "huge_pages", "stats", "auto_prepare"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.mode is not None and self.mode not in get_args(Mode):
            raise ValueError(
                f"mode={self.mode!r} is no mode of torch.compile; {_nearest(str(self.mode), get_args(Mode))}"
            )
        for name, given in (("policies", self.policies), ("inductor", self.inductor)):
            if not isinstance(given, Mapping):
                raise ValueError(f"{name}={given!r} must be a dict")
        for name, options in self.policies.items():
            if name not in pass_names() or not isinstance(options, pass_options(name)):
                known = ", ".join(pass_names())
                raise ValueError(f"policies[{name!r}]={options!r} must be the Options of one of: {known}")
        _check_inductor(self.inductor)

    @property
    def selected(self) -> dict[str, Any]:
        """Options of the selected passes by name; of "auto", those of the method it decides on."""
        names = ("cover" if name == "auto" else name for name in self.passes)
        return {name: self._options_of(name) for name in names}

    @property
    def auto(self) -> Any:
        """Options of "auto", None where it is not selected."""
        return self._options_of("auto") if "auto" in self.passes else None

    @property
    def wants_traceable(self) -> bool:
        """Whether something is asked for that experts in a Python loop can't have."""
        return bool(self.passes or self.stats or self.experts is True)

    def _options_of(self, name: str) -> Any:
        return self.policies.get(name) or pass_options(name)()

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Config:
        """Return the config of flat option keys: our own, ``<policy>.<field>``, and any Inductor option.

        Raises:
            ValueError: for a key that is none of these; it names the nearest ones.
        """
        check_options(options)
        own: dict[str, Any] = {}
        fields: dict[str, dict[str, Any]] = {}
        inductor: dict[str, Any] = {}
        for key, value in (options or {}).items():
            if not isinstance(key, str):
                raise ValueError(f"{key!r}={value!r}: option keys are strings; {_nearest(str(key), known_keys())}")
            policy, _, name = key.partition(".")
            if key in _OWN:
                own[key] = value
            elif policy in pass_names() and name:
                fields.setdefault(policy, {})[name] = value
            else:
                name = key.replace("-", "_")
                if name in _OWN:  # Inductor's keys alone have two spellings, torch's own
                    raise ValueError(f"{key}={value!r}: there is no such option; the nearest is {name}")
                inductor[name] = value
        policies = {policy: _policy_options(policy, values) for policy, values in fields.items()}
        config = cls(**own, policies=policies, inductor=inductor)
        for policy, values in fields.items():
            if policy not in config.passes and policy not in config.selected:
                first = next(iter(values))
                _say_unused(f"{policy}.{first}={values[first]!r}", policy, config.passes)
        return config

    def to_options(self) -> dict[str, Any]:
        """Return the flat option keys that differ from the defaults: what torch.compile's `options=` takes."""
        default = {f.name: f.default for f in dataclasses.fields(self)}
        flat: dict[str, Any] = {key: getattr(self, key) for key in _OWN if getattr(self, key) != default[key]}
        if "passes" in flat:
            flat["passes"] = list(self.passes)
        for policy, options in self.policies.items():
            flat |= {f"{policy}.{name}": value for name, value in dataclasses.asdict(options).items()}
        return flat | dict(self.inductor)


@functools.cache  # once: a config is read at every graph
def _say_unused(option: str, policy: str, passes: tuple[str, ...]) -> None:
    """Warn of an option that does nothing; no error, as options are often shared by runs with and without a pass."""
    log.warning(
        "%s is of the pass %r, which passes=%s does not run; add it to passes or leave the option out",
        option, policy, list(passes),
    )  # fmt: skip


def known_keys() -> list[str]:
    """Return every option key: our own, the policies', and Inductor's."""
    from torch._inductor import list_options

    fields = {name: dataclasses.fields(pass_options(name)) for name in pass_names()}
    return [*_OWN, *(f"{name}.{field.name}" for name in fields for field in fields[name]), *list_options()]


def _passes(passes: object) -> tuple[str, ...]:
    if (isinstance(passes, str) and passes != "auto") or not isinstance(passes, Iterable):
        raise ValueError(f"passes={passes!r} must be a list of names, such as ['dmoe'], or 'auto'")
    names = ("auto",) if passes == "auto" else tuple(passes)
    for name in names:
        if not isinstance(name, str) or name not in pass_names():
            raise ValueError(f"passes={list(names)!r}: there is no pass {name!r}; {_nearest(str(name), pass_names())}")
        if names.count(name) > 1:
            raise ValueError(f"passes={list(names)!r} names {name!r} twice; a pass runs once")
    if len(choosing := [name for name in names if name == "auto" or name in policy_names()]) > 1:
        both = " and ".join(map(repr, choosing))
        raise ValueError(
            f"passes={list(names)!r}: {both} each choose the coreset of a block, and there is one; take one"
        )
    return names


def _policy_options(policy: str, values: Mapping[str, Any]) -> Any:
    options = pass_options(policy)
    known = [f.name for f in dataclasses.fields(options)]
    for name, value in values.items():
        if name not in known:
            keys = [f"{policy}.{each}" for each in known]
            raise ValueError(
                f"{policy}.{name}={value!r}: there is no such option; {_nearest(f'{policy}.{name}', keys)}"
            )
    return options(**values)


def check_int(name: str, value: object, what: str, least: int = 1) -> None:
    """Raise ValueError unless a value is an integer of at least `least`; True and False are none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}: {what}")


def check_number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    """Raise ValueError unless a value is a number for which a rule holds; True and False are none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not holds(value):
        raise ValueError(f"{name}={value!r} must be a number {rule}")


def check_config(config: object) -> None:
    """Raise ValueError for what stands in place of a Config, None aside."""
    if not isinstance(config, Config | None):
        raise ValueError(f"config={config!r} must be a Config; Config.from_options({{...}}) makes one of a dict")


def check_options(options: object) -> None:
    """Raise ValueError for what stands in place of a dict of option keys, None aside."""
    if not isinstance(options, Mapping | None):
        raise ValueError(f"options={options!r} must be a dict of option keys, such as {{'passes': ['dmoe']}}")


def _check_inductor(options: Mapping[str, Any]) -> None:
    if not options:
        return
    from torch._inductor import config, list_options

    known = set(list_options())
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{key}={value!r}: there is no such option; {_nearest(str(key), known_keys())}")
        expected = config.get_type(key)  # type: ignore[attr-defined]  # installed by torch's config module patch
        if isinstance(expected, type) and not isinstance(value, expected):
            raise ValueError(f"{key}={value!r} must be of type {expected.__name__}, not {type(value).__name__}")


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)[:8]
    return f"the nearest are: {', '.join(close)}"
