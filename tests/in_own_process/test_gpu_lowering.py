"""Whole models on a GPU that is not there: what is launched, and that it computes what the model does.

Every model is a tiny one of a published kind, with every kind of pass; see fake_gpu.py for what this can't show.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import dmoe_compile
import zoo
from dmoe_compile import prepare
from dmoe_compile.testing.fake_gpu import fake_gpu
from dmoe_compile.testing.generated import Generated, generated
from llada2 import tiny
from tiny_moe import ATEN

S = 16
TIGHT = {"dmoe.min_experts": 5, "dmoe.top_p": 0.3, "block_length": S}
PASSES: dict[str, dict[str, Any]] = {
    "no pass": {"passes": []},
    "dmoe": {"passes": ["dmoe"], **TIGHT},
    "dmoe, two blocks": {"passes": ["dmoe"], **TIGHT, "block_length": S // 2},
    "dmoe, rows share": {"passes": ["dmoe"], **TIGHT, "scope": "batch"},
    "dmoe, absent rows": {"passes": ["dmoe"], **TIGHT},
    "des": {"passes": ["des"], "des.variant": "vote", "des.coreset_size": 6, "block_length": S},
    "cover": {"passes": ["cover"], "cover.mass": 0.6, "block_length": S},
    "dmoe and top_any": {"passes": ["dmoe", "top_any"], "top_any.ratio": 0.8, **TIGHT},
    "team": {"passes": ["team"], "block_length": S},
    "team and dmoe": {"passes": ["team", "dmoe"], **TIGHT},
    "team and dmoe, candidates": {"passes": ["team", "dmoe"], **TIGHT},
}
ROWS = {"dmoe, rows share": 2, "dmoe, absent rows": 2, "team and dmoe, candidates": 2}  # else 1
# Sums in another order; a coreset's votes are sums too, but no two experts are that close here.
TOLERANCE = dict(rtol=1e-3, atol=1e-4)


def qwen3_moe(rows: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    return zoo.build("qwen3_moe", num_layers=1), zoo.inputs("qwen3_moe", rows, S)


def diffusion_gemma(rows: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    return zoo.build("diffusion_gemma", num_layers=1), zoo.inputs("diffusion_gemma", rows, S)


def llada2(rows: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    """Experts in a Python loop, a sigmoid gate with bias and groups, a shared expert, a dense first layer: prepared."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = tiny(num_hidden_layers=2, first_k_dense_replace=1)
        for layer in model.model.layers[1:]:
            nn.init.normal_(layer.mlp.gate.weight, std=0.4)
    prepare(model)
    ids = torch.randint(0, 64, (rows, S), generator=torch.Generator().manual_seed(1))
    mask, positions = torch.zeros(rows, 1, S, S), torch.arange(S).expand(rows, S)
    return model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


MODELS: dict[str, Callable[..., tuple[nn.Module, dict[str, Any]]]] = {
    "qwen3_moe": qwen3_moe, "diffusion_gemma": diffusion_gemma, "llada2": llada2,
}  # fmt: skip


SITES = {"qwen3_moe": 1, "diffusion_gemma": 2, "llada2": 1}  # DiffusionGemma's: its encoder's and its decoder's


OFTEN = {
    "qwen3_moe": set(PASSES) - {"no pass", "dmoe", "des", "team", "team and dmoe"},
    "diffusion_gemma": {"no pass", "team"},
    "llada2": {"des", "team and dmoe"},
}


@pytest.mark.parametrize(
    ("model", "passes"),
    [
        pytest.param(model, passes, marks=() if passes in OFTEN[model] else pytest.mark.nightly)
        for model in MODELS
        for passes in PASSES
    ],
)
def test_a_model(model: str, passes: str) -> None:
    """What is generated for it; and that, interpreted, it computes and counts what the same passes do on a CPU."""
    rows, options = ROWS.get(passes, 1), PASSES[passes]
    module, inputs = MODELS[model](rows)
    team = "team" in options["passes"]
    absent = torch.tensor([[False] * S, [True] * S]) if passes == "dmoe, absent rows" else None
    decoded = torch.arange(S).unsqueeze(0) % 2 == 0
    step = {"shape": (1, S), "candidates": rows}
    compiled = torch.compile(module, backend="dmoe", options=options, fullgraph=True)
    with fake_gpu(), dmoe_compile.denoising() as context:
        if team:
            context.step(**step)
        else:
            context.plain(absent)
        found = generated(compiled, **inputs)
    routed = not {"cover", "top_any"} & set(options["passes"])
    blocks = rows * S // options["block_length"] if {"dmoe", "des"} & set(options["passes"]) else 1
    one_list = routed and (blocks == 1 or options.get("scope") == "batch")
    check_code(found, SITES[model], team, routed=routed, one_list=one_list)

    def steps(call: Callable[[], Any]) -> tuple[list[Tensor], list[Any]]:
        """The first step of a block, and with TEAM one in which half of the tokens are decoded."""
        with torch.no_grad(), dmoe_compile.denoising() as context:
            outs = []
            for mask in (None, decoded) if team else (None,):
                if team:
                    context.step(mask, **step)
                else:
                    context.plain(absent)
                outs.append(call().logits)
                if team and rows > 1:
                    context.accept(torch.tensor([1]))
            return outs, [each.unique_experts for each in context.stats]

    own = torch.compile(module, backend="dmoe", options={**options, "experts": False, **ATEN}, fullgraph=True)
    wanted, counted = steps(lambda: own(**inputs))
    outs, counts = steps(lambda: found.run(**inputs, seed=1))
    for out, want in zip(outs, wanted, strict=True):
        assert out.isfinite().all()
        present = torch.ones_like(decoded.expand(rows, S)) if absent is None else ~absent
        assert_close(out[present], want[present], **TOLERANCE)
    assert counts == counted
    assert len(counts) == 2 * team


def check_code(found: Generated, sites: int, team: bool, *, routed: bool = True, one_list: bool = True) -> None:
    """Three launches a layer (two where Inductor routes), and one more in TEAM's steps, which write to what is stored.

    The last half of the experts goes over a list of those in use, where one coreset is all tokens' (candidates' too).

    No weight is copied, nothing is in double precision, nothing waits for the host, and all of it is one CUDA graph.
    """
    (graph,) = found.graphs
    user = [re.sub(r"_\d+$", "", launch.name) for launch in graph.launches if launch.kind == "user"]
    down = "_down_dense_kernel" if one_list or team else "_down_routed_kernel"
    wanted = [*["_route_kernel"] * routed, "_gate_up_kernel", down, *["_reuse_kernel"] * team]
    assert user == wanted * sites
    assert not [launch.name for launch in graph.launches if "grouped" in launch.name or launch.kind == "cpp"]
    assert [each.origin for each in graph.mutated] == [f"dmoe_stored_{i}" for i in range(sites)] * team
    assert not found.copies()
    assert not found.fp64
    assert not found.host_syncs
    assert not found.cudagraph_reasons


@pytest.mark.parametrize("capability", [80, 100])
def test_other_gpus(capability: Any) -> None:
    module, inputs = qwen3_moe()
    with fake_gpu(capability):
        found = generated(torch.compile(module, backend="dmoe", fullgraph=True), **inputs)
    check_code(found, 1, team=False)


def test_the_sum_of_partials_is_fused_with_what_follows() -> None:
    """One kernel between the experts' last launch and the next matmul: sum, residual and norm."""
    module, inputs = qwen3_moe()
    with fake_gpu():
        found = generated(torch.compile(module, backend="dmoe", fullgraph=True), **inputs)
    names = [launch.name for launch in found.launches]
    (last,) = (i for i, name in enumerate(names) if "_down_dense_kernel" in name)
    assert [launch.kind for launch in found.launches[last + 1 : last + 3]] == ["inductor", "extern"]


def test_long_forwards_keep_the_models_own_experts() -> None:
    module, _ = qwen3_moe()
    with fake_gpu():
        found = generated(torch.compile(module.model.layers[0].mlp, backend="dmoe"), torch.zeros(1, 1032, zoo.HIDDEN))
    assert not [launch for launch in found.launches if launch.kind == "user"]


def test_experts_false_leaves_the_gpu_to_inductor() -> None:
    module, inputs = qwen3_moe()
    with fake_gpu():
        found = generated(torch.compile(module, backend="dmoe", options={"experts": False}), **inputs)
    assert not [launch for launch in found.launches if launch.kind == "user"]


@pytest.mark.parametrize(("passes", "kernel"), [([], "_down_routed_kernel"), (["dmoe"], "_down_dense_kernel")])
def test_where_few_experts_are_in_use_a_long_block_has_no_partial_for_each(passes: list[str], kernel: str) -> None:
    module, _ = qwen3_moe()
    x = torch.randn(1, 128, zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
    options = {"passes": passes, "block_length": 128}
    block = module.model.layers[0].mlp
    with fake_gpu():
        found = generated(torch.compile(block, backend="dmoe", options=options), x)
    user = [re.sub(r"_\d+$", "", launch.name) for launch in found.launches if launch.kind == "user"]
    assert user == ["_route_kernel", "_gate_up_kernel", kernel]
    own = torch.compile(block, backend="dmoe", options={**options, "experts": False, **ATEN})
    with torch.no_grad():
        assert_close(found.run(x), own(x), **TOLERANCE)
