"""Compare a module with what may replace it: on random weights, on inputs of several kinds, and in all that it changes.

Weights that are zero, alike or small let wrong mathematics pass, so parameters and buffers get random values
meanwhile. A module's result here is what it returns together with the buffers and attributes that it changed.

    T = B*S tokens, H = hidden, E = experts, k = experts a token
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_TOKENS = 8  # of a short sequence
_MANY_TOKENS = 512  # enough that a capacity, or one token in a hundred that is routed in another way, is seen
_LARGE = 30.0  # times normal values: enough that a clamp or a soft cap is seen, and no overflow in fp16
# Both sides round the same products, and sum them in another order: k terms, each off by at most half an eps. Over all
# tokens that averages to 0.4 eps on the published forms in bf16; one token may be several times as far off.
_MAX_ERROR_EPS = 1
_MAX_ERROR_FP32 = 1e-5  # products of thousands of terms, summed in another order
_ROW_FACTOR = 8  # how much farther off than the average one token may be
_SMALL_ROW = 0.05  # of the root mean square: rows below it are compared as if they were so large


@contextlib.contextmanager
def at_rest(module: nn.Module) -> Iterator[State]:
    """Run a module in eval mode, without gradients and autocast; put back all that it changes, random numbers too."""
    modes = [(each, each.training) for each in module.modules()]
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.inference_mode(mode=False), torch.no_grad(), torch._C._DisableAutocast():
        state = State(module)
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            for each, _ in modes:
                each.training = False  # not eval(), which a class may have overridden to do more
            try:
                yield state
            finally:
                state.restore()
                for each, training in modes:
                    each.training = training


class State:
    """What running a module may change: its buffers, and attributes of it and of the modules in it.

    Args:
        module: the module.
        without: a part of it that is left out.
    """

    def __init__(self, module: nn.Module, without: nn.Module | None = None) -> None:
        left_out = set() if without is None else set(without.modules())
        modules = {path: each for path, each in module.named_modules() if each not in left_out}
        self._held = {path: (each, dict(vars(each)), dict(each._buffers)) for path, each in modules.items()}
        self._values = {
            (path, name): value.detach().clone()
            for path, (_, attributes, buffers) in self._held.items()
            for name, value in (attributes | buffers).items()
            if isinstance(value, Tensor) and not value.is_meta
        }

    def restore(self) -> None:
        """Put everything back, except for the training flags, which stay as they are."""
        for path, (each, attributes, buffers) in self._held.items():
            training = each.training
            vars(each).clear()
            vars(each).update(attributes, training=training)
            each._buffers.clear()
            each._buffers.update(buffers)
            for name, value in (attributes | buffers).items():
                was = self._values.get((path, name))
                if was is not None and not torch.equal(value, was):
                    value.copy_(was)

    def changed(self) -> dict[str, Any]:
        """Return the buffers and plain attributes that are not what they were, by path."""
        found = {}
        for path, (each, attributes, buffers) in self._held.items():
            for name, value in (vars(each) | each._buffers).items():
                if name == "training" or not isinstance(value, Tensor | int | float | str | None):
                    continue
                was = self._values.get((path, name), (attributes | buffers).get(name, _ABSENT))
                if not _same(value, was):
                    found[f"{path}.{name}".lstrip(".")] = value.detach().clone() if isinstance(value, Tensor) else value
        return found


_ABSENT = object()


def _same(value: Any, was: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(was, Tensor):
        return value.shape == was.shape and value.dtype == was.dtype and (value.is_meta or torch.equal(value, was))
    return value is was or (type(value) is type(was) and value == was)


def random_normal(like: Tensor, *size: int, seed: int = 0) -> Tensor:
    """Return normal values in the dtype and on the device of a tensor, the same ones every time."""
    generator = torch.Generator("cpu").manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, device="cpu").to(like.device, like.dtype)


def fill_randomly(weight: Tensor, seed: int = 0) -> None:
    """Give a weight random values in place: stacked experts and matrices new ones, vectors some around their own."""
    if weight.dim() >= 3:  # [E, ., .]: one expert, and for each of them a factor on every row: a pass over memory
        weight.copy_(random_normal(weight, *weight.shape[1:], seed=seed) * weight.shape[-1] ** -0.5)
        weight.mul_(random_normal(weight, *weight.shape[:2], *[1] * (weight.dim() - 2), seed=seed + 1))
    elif weight.dim() == 2:  # twice as large: a router's scores have to differ
        weight.copy_(random_normal(weight, *weight.shape, seed=seed) * (2 * weight.shape[-1] ** -0.5))
    else:
        noise = random_normal(weight, *weight.shape, seed=seed)
        weight.copy_(weight * (1 + 0.2 * noise) + 0.1 * noise)


@contextlib.contextmanager
def random_weights(weights: Iterable[Tensor]) -> Iterator[None]:
    """Give floating-point weights random values, and put back what they were."""
    saved = [(weight, weight.detach().clone()) for weight in weights if weight.is_floating_point()]
    try:
        for seed, (weight, _) in enumerate(saved):
            fill_randomly(weight, seed)
        yield
    finally:
        for weight, was in saved:
            weight.copy_(was)


def hidden_states(like: Tensor, width: int) -> list[Tensor]:
    """Return hidden states [B, S, H]: two short sequences, one token, tokens all alike, large ones, and many."""
    short = random_normal(like, 2, _TOKENS, width)
    one = random_normal(like, 1, 1, width)
    alike = one.expand(1, _TOKENS, width).contiguous()  # the same k experts get every token, the others none
    return [short, one, alike, short * _LARGE, random_normal(like, 1, _MANY_TOKENS, width)]


def routed_rows(like: Tensor, width: int, num_experts: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (hidden [T, H], ids [T, 2], weights [T, 2]): experts in turn; all tokens on the same two; large values."""
    tokens = max(num_experts, _MANY_TOKENS)
    hidden, weights = random_normal(like, tokens, width), random_normal(like, tokens, 2).abs()
    first = torch.arange(tokens, device=like.device) % num_experts
    in_turn = torch.stack([first, (first + 1) % num_experts], dim=-1)
    on_two = in_turn[:1].expand(tokens, 2).contiguous()
    return [(hidden, in_turn, weights), (hidden, on_two, weights), (hidden * _LARGE, in_turn, weights)]


def distance(result: Any, expected: Any) -> float:
    """Return the largest relative difference of two results of one structure, infinity where they differ in kind.

    It is taken over all tokens, and for single tokens (rows), where it counts an eighth.
    """
    leaves, spec = pytree.tree_flatten(result)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    if spec != wanted_spec:
        return float("inf")
    return max((_leaf_distance(a, b) for a, b in zip(leaves, wanted, strict=True)), default=0.0)


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest distance() that rounding explains."""
    return max(_MAX_ERROR_EPS * torch.finfo(dtype).eps, _MAX_ERROR_FP32)


def is_telling(result: Any) -> bool:
    """Say whether a result can be compared at all: all of it finite, and not all zero."""
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return all(bool(leaf.isfinite().all()) for leaf in tensors) and any(bool(leaf.any()) for leaf in tensors)


def _leaf_distance(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if _same(a, b) else float("inf")
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return float("inf")
    if not a.is_floating_point() or a.numel() == 0:
        return 0.0 if torch.equal(a, b) else float("inf")
    rows, wanted = (x.double().reshape(-1, x.shape[-1] if x.dim() > 1 else 1) for x in (a, b))
    if not torch.equal(rows.isfinite(), wanted.isfinite()):
        return float("inf")
    off = (rows - wanted).nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    sizes = wanted.nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    usual = sizes.square().mean().sqrt().clamp_min(torch.finfo(b.dtype).tiny)
    overall = off.square().mean().sqrt() / usual
    worst = (off / torch.maximum(sizes, _SMALL_ROW * usual)).max()
    return max(overall.item(), worst.item() / _ROW_FACTOR)
