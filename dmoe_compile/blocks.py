"""What a mixture-of-experts block does when it runs, and templates of whole blocks that may do the same.

A block's experts can be cut out where one of its methods or children is called with (hidden, ids, weights).
Where router and loop are one function there is no such call, and a template of the whole block is tried; its
options (score function, renormalisation, scale, shared experts) are found by comparing results.

    T = B*S tokens, H = hidden, E = experts, k = experts a token
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROLES = ("hidden", "ids", "weights")  # what experts are called with


@dataclass(frozen=True)
class Seam:
    """A method that was called with (hidden, ids, weights) and returned [T, H].

    Attributes:
        owner: the module.
        method: the method's name.
        parameters: names of its parameters.
        roles: which of them is "hidden", "ids" and "weights".
        constants: what it was given besides.
    """

    owner: nn.Module
    method: str
    parameters: tuple[str, ...]
    roles: dict[str, str]
    constants: dict[str, Any]


@dataclass
class Seen:
    """What a block did on one input."""

    hidden: Tensor
    num_experts: int
    output: Any = None
    seams: list[Seam] = field(default_factory=list)
    children: dict[str, tuple[tuple[Any, ...], Any]] = field(default_factory=dict)  # arguments, output
    selected: list[int] = field(default_factory=list)  # k of every top-k over E scores


def observe(block: nn.Module, experts: nn.Module, hidden: Tensor) -> Seen:
    """Run a block and write down what its methods and children were called with."""
    seen = Seen(hidden, len(list(experts.children())))
    with contextlib.ExitStack() as stack:
        for path, child in block.named_children():
            if child is not experts:
                stack.enter_context(_watched(child, "forward", seen, path))
        for name in _own_methods(type(block)):
            stack.enter_context(_watched(block, name, seen))
        stack.enter_context(_Selections(seen))
        seen.output = block.forward(hidden)  # not its hooks, which are the user's
    return seen


def _own_methods(kind: type) -> list[str]:
    """Return the methods that a class adds to nn.Module's."""
    ours = itertools.takewhile(lambda each: each is not nn.Module, kind.__mro__)
    names = {name for each in ours for name, value in vars(each).items() if inspect.isfunction(value)}
    return sorted(name for name in names if not hasattr(nn.Module, name))


@contextlib.contextmanager
def _watched(module: nn.Module, name: str, seen: Seen, path: str = "") -> Iterator[None]:
    """Note a child's calls, and calls of any method that hand over (hidden, ids, weights) and get [T, H] back."""
    original = getattr(module, name)
    parameters = tuple(inspect.signature(original).parameters)

    def watch(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if len(args) <= len(parameters) and (roles := _roles(given, output)):
            constants = {each: value for each, value in given.items() if each not in roles.values()}
            seen.seams.append(Seam(module, name, parameters, roles, constants))
        if path:
            seen.children.setdefault(path, (args, output))
        return output

    before = vars(module).get(name)
    vars(module)[name] = watch
    try:
        yield
    finally:
        if before is None:
            del vars(module)[name]
        else:
            vars(module)[name] = before


def _roles(given: dict[str, Any], output: Any) -> dict[str, str] | None:
    """Say which argument is hidden, ids and weights; None for a call that is not one of experts."""
    if any(not isinstance(value, Tensor | bool | int | float | str | None) for value in given.values()):
        return None
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if not isinstance(output, Tensor) or len(tensors) != 3 or any(t.dim() != 2 for t in (*tensors.values(), output)):
        return None
    ids = [name for name, value in tensors.items() if not value.is_floating_point()]
    if len(ids) != 1:
        return None
    weights = [n for n, v in tensors.items() if n != ids[0] and v.shape == tensors[ids[0]].shape]
    hidden = [n for n, v in tensors.items() if n not in {*ids, *weights} and v.shape == output.shape]
    if len(weights) != 1 or len(hidden) != 1:
        return None
    return {"hidden": hidden[0], "ids": ids[0], "weights": weights[0]}


class _Selections(TorchFunctionMode):
    """Notes k of every top-k over the experts."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in {torch.topk, Tensor.topk} and args[0].shape[-1] == self.seen.num_experts:
            self.seen.selected.append(args[1] if len(args) > 1 else kwargs["k"])
        return func(*args, **kwargs)


# Templates.


@dataclass(frozen=True)
class Template:
    """The forward of a whole block.

    Attributes:
        gate: the name of the router, a child of the block.
        takes_rows: the router is given [T, H], else [B, S, H].
        gives: what the router returns: of "logits", "ids", "weights" and "" for each of its results.
        top_k, score, in_float, renormalise, scale, cast: how ids and weights follow from logits, if the router gives
            these: k; softmax, sigmoid or, over the k chosen, "top-k softmax"; in fp32 or in the logits' dtype; weights
            that sum to 1; a factor; weights in the hidden states' dtype.
        shared, shared_gate: names of experts that every token runs through, and of their sigmoid gate; "" for none.
        returns: the block's result: "out" and the names above in place of tensors, None where it returns None.
    """

    gate: str
    takes_rows: bool
    gives: tuple[str, ...]
    top_k: int
    score: str = ""
    in_float: bool = True
    renormalise: bool = False
    scale: float = 1.0
    cast: bool = False
    shared: str = ""
    shared_gate: str = ""
    returns: Any = "out"

    def __call__(self, block: nn.Module, run: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor) -> Any:
        rows = hidden.reshape(-1, hidden.shape[-1])
        given = getattr(block, self.gate)(rows if self.takes_rows else hidden)
        values = dict(zip(self.gives, given if isinstance(given, tuple) else (given,), strict=True))
        if "ids" not in values:
            values["weights"], values["ids"] = self._select(values["logits"].view(len(rows), -1), rows.dtype)
        out = run(rows, values["ids"], values["weights"]).view(hidden.shape)
        if self.shared:
            shared = getattr(block, self.shared)(hidden)
            if self.shared_gate:
                shared = torch.sigmoid(getattr(block, self.shared_gate)(hidden)) * shared
            out = out + shared
        return _filled(self.returns, {**values, "out": out}, hidden)

    def _select(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return weights and ids [T, k] for logits [T, E]."""
        logits = logits.float() if self.in_float else logits
        if self.score == "top-k softmax":
            values, ids = torch.topk(logits, self.top_k, dim=-1)
            weights = F.softmax(values, dim=-1)
        else:
            scores = F.softmax(logits, dim=-1) if self.score == "softmax" else logits.sigmoid()
            weights, ids = torch.topk(scores, self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights * self.scale
        return weights.to(dtype) if self.cast else weights, ids

    def __str__(self) -> str:
        how = [self.score] if self.score else [f"ids and weights of {self.gate}"]
        how += ["in the logits' dtype"] if self.score and not self.in_float else []
        how += ["renormalised"] if self.renormalise else []
        how += [f"times {self.scale:g}"] if self.scale != 1 else []
        how += [f"plus {self.shared}"] if self.shared else []
        return f"the whole block ({', '.join(how)})"


def _filled(returns: Any, values: dict[str, Tensor], hidden: Tensor) -> Any:
    """Return a block's result: `returns` with tensors for names; "name:" gives [T, .] the hidden states' [B, S, .]."""
    if isinstance(returns, tuple):
        return tuple(_filled(each, values, hidden) for each in returns)
    if returns is None:
        return None
    name, per_sequence, _ = returns.partition(":")
    value = values[name]
    return value.view(*hidden.shape[:-1], -1) if per_sequence else value


def templates(block: nn.Module, seen: Seen) -> Iterator[Template]:
    """Yield every template that fits what was seen."""
    tokens = seen.hidden.numel() // seen.hidden.shape[-1]
    for path, (args, output) in seen.children.items():
        results = output if isinstance(output, tuple) else (output,)
        gives = tuple(_kind(each, tokens, seen.num_experts) for each in results)
        if not {"ids", "weights"} <= set(gives) and gives != ("logits",):
            continue
        ids = results[gives.index("ids")] if "ids" in gives else None
        for top_k in [ids.shape[-1]] if ids is not None else dict.fromkeys(seen.selected):
            base = Template(path, args[0].dim() == 2, gives, top_k)
            if (returns := _returned(base, seen)) is None:
                continue
            base = replace(base, returns=returns)
            for routed in [base] if ids is not None else _selecting(base, block, seen):
                yield from _sharing(routed, seen)


def _kind(value: Any, tokens: int, num_experts: int) -> str:
    if not isinstance(value, Tensor) or value.numel() % tokens or value.dim() < 2:
        return ""
    if not value.is_floating_point():
        return "ids"
    return "logits" if value.shape[-1] == num_experts else "weights"


def _selecting(base: Template, block: nn.Module, seen: Seen) -> Iterator[Template]:
    """Add how a router's logits become ids and weights."""
    factors = dict.fromkeys((1.0, float(getattr(block, "routed_scaling_factor", 1.0))))
    truth = (True, False)
    logits = seen.children[base.gate][1]
    logits = logits[base.gives.index("logits")] if isinstance(logits, tuple) else logits
    precisions = (True,) if logits.dtype == torch.float32 else truth
    casts = (False,) if seen.hidden.dtype == torch.float32 else truth
    for in_float, cast in itertools.product(precisions, casts):
        for score, renormalise, scale in itertools.product(("softmax", "sigmoid"), truth, factors):
            yield replace(base, score=score, in_float=in_float, renormalise=renormalise, cast=cast, scale=scale)
        yield replace(base, score="top-k softmax", in_float=in_float, cast=cast)


def _sharing(base: Template, seen: Seen) -> Iterator[Template]:
    """Add the experts that every token runs through, if the block has some."""
    shared = [path for path, (_, out) in seen.children.items() if isinstance(out, Tensor) and _like(out, seen.hidden)]
    gates = [path for path, (_, out) in seen.children.items() if isinstance(out, Tensor) and out.shape[-1] == 1]
    if not shared:
        yield base
    for path in shared:
        yield replace(base, shared=path)
        for gate in gates:
            yield replace(base, shared=path, shared_gate=gate)


def _like(value: Tensor, hidden: Tensor) -> bool:
    return value.numel() == hidden.numel() and value.shape[-1] == hidden.shape[-1]


def _returned(template: Template, seen: Seen) -> Any:
    """Return the structure of a block's result with names for tensors, None where something in it is not known."""
    given = seen.children[template.gate][1]
    values = dict(zip(template.gives, given if isinstance(given, tuple) else (given,), strict=True))

    def named(value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise LookupError
        if value.shape == seen.hidden.shape:
            return "out"
        for name, known in values.items():
            alike = name and known.dtype == value.dtype and known.numel() == value.numel()
            if alike and torch.equal(known.reshape(-1), value.reshape(-1)):
                return name if known.shape == value.shape else f"{name}:"
        raise LookupError

    def walk(value: Any) -> Any:
        return tuple(map(walk, value)) if isinstance(value, tuple) else named(value)

    try:
        return walk(seen.output)
    except LookupError:
        return None
