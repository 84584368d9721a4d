"""dmoe::experts compiled for GPUs that aren't here, at the shapes of released models.

T, H, F: tokens, hidden size, expert width; E, k: experts, experts a token
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from dmoe_compile.kernels import experts as module
from dmoe_compile.kernels.experts import launch
from dmoe_compile.kernels.limits import DENSE_TOKENS, LISTED_TOKENS
from dmoe_compile.kernels.tiles import TARGETS, default_config
from torch import Tensor

from ahead_of_time import ASYNC_COPY_128, LOAD_128, TENSOR_CORE, Compiled, check_budget, compile

Args = dict[str, Any]

# The shapes of released models, and what is particular about each.
MODELS: dict[str, Args] = {
    "SDAR-30B": dict(T=32, E=128, k=8, H=2048, F=768),
    "LLaDA2-mini": dict(T=32, E=256, k=8, H=2048, F=512),
    "DiffusionGemma-26B": dict(T=256, E=128, k=8, H=2816, F=704, activation="gelu_tanh"),
    "DiffusionGemma-26B, own routing": dict(T=256, E=128, k=8, H=2816, F=704, activation="gelu_tanh", listed=False),
    "gpt-oss": dict(T=32, E=32, k=4, H=2880, F=2880, activation="swigluoai", layout="interleaved", biases=True,
                    transposed=True, down_transposed=True),
}  # fmt: skip


@dataclass
class Launch:
    """What launch() gives a kernel."""

    kernel: Any
    configs: list[Any]
    given: Args

    def compiled(self, target: str, config: Any) -> Compiled:
        pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
        signature = {name: pointers[x.dtype] for name, x in self.given.items() if isinstance(x, Tensor)}
        if self.given["T"] != 1:  # which Triton makes a constant of
            signature["T"] = "i32"
        constants = {name: x for name, x in self.given.items() if name not in signature} | config.kwargs
        options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
        return compile(self.kernel, signature, constants, target, **options)


def launches(model: str, target: str, *, dtype: torch.dtype = torch.bfloat16, **change: Any) -> list[Launch]:
    """Return both launches of a model's layer on a GPU; nothing is launched, and its tensors have no memory."""
    form = dict(listed=True, activation="silu", layout="concatenated", biases=False, transposed=False,
                down_transposed=False, autotune=False) | MODELS[model] | change  # fmt: skip
    T, E, k, H, F, listed, biases = (form.pop(name) for name in ("T", "E", "k", "H", "F", "listed", "biases"))
    found = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, _: Any) -> Callable[..., None]:
            return lambda **given: found.append(Launch(self.kernel.fn, self.kernel.configs, given))

    def empty(*shape: int, dtype: torch.dtype = dtype, swapped: bool = False) -> Tensor:
        return torch.empty(*shape[:-2], *(shape[:-3:-1] if swapped else shape[-2:]), dtype=dtype, device="meta")

    with mock.patch.multiple(module, wrap_triton=Recorded, target_of=lambda _: TARGETS[target]):
        launch(
            hidden=empty(T, H), ids=empty(T, k, dtype=torch.int64), weights=empty(T, k, dtype=torch.float32),
            gate_up=empty(E, 2 * F, H, swapped=form["transposed"]), up=None,
            down=empty(E, H, F, swapped=form["down_transposed"]), gate_up_bias=empty(E, 2 * F) if biases else None,
            up_bias=None, down_bias=empty(E, H) if biases else None,
            active=empty(1, E, dtype=torch.int32) if listed else None,
            counts=torch.empty(1, dtype=torch.int32, device="meta") if listed else None,
            **form, alpha=1.702, limit=7.0,
        )  # fmt: skip
    return found


def models_and_targets() -> Iterator[Any]:
    """Yield every pair; where kernels are much like another model's, one target shows every day what differs."""
    for model, target in itertools.product(MODELS, TARGETS):
        rare = model in ("LLaDA2-mini", "DiffusionGemma-26B, own routing") and target != "sm_90"
        yield pytest.param(model, target, marks=pytest.mark.nightly if rare else ())


@pytest.mark.parametrize(("model", "target"), list(models_and_targets()))
def test_compiled_for_gpus(model: str, target: str) -> None:
    for found in launches(model, target):
        (config,) = found.configs
        compiled = found.compiled(target, config)
        assert (compiled.stats.stack, compiled.stats.spills) == (0, 0)
        assert compiled.count(TENSOR_CORE[target])
        # The pipeline is there if the loads of all its stages are: those of the loop, and those ahead of it.
        first = found.kernel.__name__ == "_gate_up_kernel"
        step = ((2 if first else 1) * config.kwargs["BN"] + found.given["BT"]) * config.kwargs["BK"] * 2
        loads = config.num_stages * step // (16 * config.num_warps * (64 if target == "gfx942" else 32))
        if target == "gfx942":
            assert compiled.count(LOAD_128) >= loads
        else:
            assert compiled.count(ASYNC_COPY_128) >= loads
            assert compiled.count(ASYNC_COPY_128) == compiled.count("LDGSTS")
        # Dense over T there is one loop, fused of two or left of two, and one for the bias of down.
        loops = 1 + (found.given.get("down_bias_ptr") is not None)
        routed = found.given["ROUTED"] if first else found.kernel.__name__ == "_down_routed_kernel"
        assert routed or compiled.asm["ttgir"].count("scf.for ") == loops
        check_budget(f"experts {model} {found.kernel.__name__.strip('_')}", compiled)


WIDE = dict(transposed=True, down_transposed=True, biases=True)
OTHERS: dict[str, Args] = {
    "fp32": dict(dtype=torch.float32),
    "many tokens": dict(T=1000, layout="interleaved", **WIDE),
    "most tokens of the dense variant": dict(T=DENSE_TOKENS, **WIDE),
    "most tokens with a list": dict(T=LISTED_TOKENS, **WIDE),
    "one token": dict(T=1),
    "one routed token": dict(T=1, listed=False),
    "masked, and no row at a multiple of 16 bytes": dict(H=2050, F=700),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    "target", [pytest.param(target, marks=pytest.mark.nightly if target != "sm_90" else ()) for target in TARGETS]
)
def test_other_forms_do_not_spill_either(target: str, other: Args) -> None:
    for found in launches("SDAR-30B", target, **other):
        stats = found.compiled(target, found.configs[0]).stats
        assert (stats.stack, stats.spills) == (0, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_shares_cover_everything_once(target: str) -> None:
    for H, F, T in itertools.product((64, 512, 2048, 2880), (40, 256, 512, 704, 768, 2880), (1, 20, 40, 200)):
        config = default_config(TARGETS[target], T, H, F, 128, 8, 2, True, True)
        assert config.split % config.cuts == 0
        assert F % config.cuts == 0
        assert config.cuts == 1 or F // config.cuts >= 2 * config.down.depth  # the pipeline's two steps
        assert config.tokens * config.tiles >= T
        assert min(config.gate_up.stages, config.down.stages) >= 3


def test_tuning_has_a_short_list_that_starts_with_the_default() -> None:
    for model, target in itertools.product(MODELS, TARGETS):
        for tuned, default in zip(launches(model, target, autotune=True), launches(model, target), strict=True):
            assert str(tuned.configs[0]) == str(default.configs[0])
            assert 3 <= len(tuned.configs) <= 8
            assert len({str(config) for config in tuned.configs}) == len(tuned.configs)


@pytest.mark.nightly
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_whatever_tuning_tries_fits(model: str, target: str) -> None:
    for found in launches(model, target, autotune=True):
        for config in found.configs:
            stats = found.compiled(target, config).stats
            assert (stats.stack, stats.spills) == (0, 0)
