"""The matcher on real models, in all the forms that they compile in, and on code made to mislead it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dmoe_compile.passes.nodes import shape
from dmoe_compile.passes.sites import Refusal, Site, find_sites
from torch import Tensor, fx, nn
from torch.testing import assert_close
from transformers import (
    InklingForCausalLM,
    InklingTextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MuseSparkTextConfig,
    MuseSparkTextModel,
    NemotronHConfig,
    NemotronHForCausalLM,
    ZayaConfig,
    ZayaForCausalLM,
)

import capture
import zoo
from dmoe_compile.normalise import normalise
from moe_forms import (
    WIDTH,
    Argmax,
    Broken,
    ById,
    Codebook,
    E,
    ExpertChoice,
    H,
    K,
    Masked,
    Max,
    Moe,
    NoResidual,
    Rows,
    SharedRouter,
    SideOutputs,
    Smallest,
    Soft,
    Sorted,
    SparseAttention,
    StablySorted,
    Summed,
    TopOne,
    TurnedChoice,
    TwoBanks,
    TwoBanksSummed,
    Vocabulary,
)
from pairwise import covering

DTYPES = (torch.float32, torch.bfloat16)
DYNAMIC = (False, True)
FIRST_ROUTED = {"deepseek_v3": 2}  # its first layer is dense


def forms() -> Iterator[Any]:
    """Yield every form: on every change enough for all pairs; DiffusionGemma of symbolic sizes takes a minute each."""
    every = [
        {"name": name, "experts": experts, "dtype": dtype, "dynamic": dynamic}
        for name, experts, dtype, dynamic in itertools.product(zoo.ROUTABLE, zoo.EXPERTS, DTYPES, DYNAMIC)
    ]
    slow = {"name": "diffusion_gemma", "dynamic": True}
    often = covering([form for form in every if not slow.items() <= form.items()])
    often.append({"experts": "grouped_mm", "dtype": torch.float32, **slow})
    for form in every:
        name, experts, dtype, dynamic = form.values()
        words = f"{name}-{experts}-{dtype}-{'dynamic' if dynamic else 'static'}"
        yield pytest.param(*form.values(), marks=() if form in often else pytest.mark.nightly, id=words)


@pytest.mark.parametrize(("name", "experts", "dtype", "dynamic"), list(forms()))
def test_reads_every_router_of_a_model(name: str, experts: zoo.Experts, dtype: torch.dtype, dynamic: bool) -> None:
    """All layers of graphs of fixed sizes; of symbolic ones, which take several times as long to trace, the first."""
    num_layers = FIRST_ROUTED.get(name, 1) if dynamic else 2
    model, inputs = zoo.build(name, experts, dtype, num_layers), zoo.inputs(name)
    (found, refused), _ = capture.inference(model, **inputs, dynamic=dynamic)
    with_gradients, _ = capture.joint(model, **inputs, dynamic=dynamic)
    for sites in (found, with_gradients):
        check_facts(sites, zoo.expected(name, num_layers), experts)
    assert refused == []


def check_facts(sites: list[Site], expected: zoo.Expected, experts: str) -> None:
    assert [site.name for site in sites] == list(expected.names)  # all layers, in order, none twice
    for site in sites:
        groups = (site.groups.count, site.groups.top_k) if site.groups else None
        read = (site.num_experts, site.top_k, site.score_function, site.bias, groups, site.renormalised)
        e = expected
        assert read == (e.num_experts, e.top_k, e.score_function, e.bias, e.groups, e.renormalised)
        assert site.form == experts
        assert len(site.expert_weights) == 2  # gate and up in one, down
        assert site.escapes == ()
        assert site.weights is not None


@pytest.mark.parametrize("size", [(2, 40), (1, 1)], ids=["some tokens", "one token"])
@pytest.mark.parametrize("experts", zoo.EXPERTS)
@pytest.mark.parametrize("name", zoo.ROUTABLE)
def test_weights_and_combine_are_what_the_experts_get_and_give(
    name: str, experts: zoo.Experts, size: tuple[int, int]
) -> None:
    """Of one token, k weights in a row may also be its experts' in another order."""
    model, inputs, own = zoo.build(name, experts), zoo.inputs(name, *size), []
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _module, args, output: own.append((args[2], output)))
        for path in zoo.expected(name).experts
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()  # Dynamo would trace it
    found = run_to_sites(model, inputs)
    assert len(found) == len(own) > 0
    for (weights, combine), (given, returned) in zip(found, own, strict=True):
        assert_close(weights.reshape(given.shape).to(given.dtype), given)
        assert_close(combine.reshape(returned.shape), returned, rtol=1e-4, atol=1e-5)  # fp32 sums in another order


def run_to_sites(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return what the weights and the combine of every site hold when the graph runs on `inputs`."""
    kept: list[tuple[Tensor, Tensor]] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        aten, sources = normalise(gm, example_inputs)
        sites, _ = find_sites(aten.graph, sources)
        interpreter = fx.Interpreter(aten, garbage_collect_values=False)

        def run(*args: Any) -> Any:
            outputs = interpreter.run(*args)
            kept.extend((interpreter.env[site.weights], interpreter.env[site.combine]) for site in sites)
            return outputs

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    return kept


def test_refuses_phimoe() -> None:
    (sites, refused), _ = capture.inference(zoo.build("phimoe"), **zoo.inputs("phimoe"))
    assert sites == []
    assert [refusal.name for refusal in refused] == list(zoo.expected("phimoe").names)
    assert all("2 separate selections" in refusal.reason for refusal in refused)


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}


def nemotron_h() -> nn.Module:
    return NemotronHForCausalLM(
        NemotronHConfig(**SIZES, layers_block_type=["moe"], n_routed_experts=8, moe_latent_size=16)
    )


def muse_spark() -> nn.Module:
    return MuseSparkTextModel(
        MuseSparkTextConfig(**SIZES, mlp_layer_types=["sparse"], num_local_experts=8, moe_hidden_size=16)
    )


@pytest.mark.parametrize(("make", "matrices"), [(nemotron_h, 2), (muse_spark, 3)], ids=["nemotron_h", "muse_spark"])
def test_experts_may_work_in_another_width_than_their_router(make: Callable[[], nn.Module], matrices: int) -> None:
    model, inputs = make().eval(), {"input_ids": torch.randint(0, 64, (2, 5)), "use_cache": False}
    (found, refused), _ = capture.inference(model, **inputs)
    for (site,) in (found, capture.joint(model, **inputs)[0]):
        assert (shape(site.hidden) or ())[-1] == 32
        assert site.combine.meta["val"].shape == (10, 16)
        assert site.expert_bytes == 4 * matrices * 24 * 16
    assert refused == []


MISFITS = {
    "zaya": (
        lambda: ZayaForCausalLM(ZayaConfig(**{**SIZES, "num_experts_per_tok": 1}, num_experts=8)),
        "its router scores 9, its experts are 8: some scores stand for no expert",
    ),
    "llama4": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(**SIZES, intermediate_size=24, num_local_experts=8, moe_layers=[0], pad_token_id=0)
        ),
        "its routing weights are applied before its experts, all of which run on every token",
    ),
    "inkling": (
        lambda: InklingForCausalLM(InklingTextConfig(**SIZES, n_routed_experts=8, mlp_layer_types=["sparse"])),
        "its router makes 10 numbers for 8 experts, not one for each",
    ),
}


@pytest.mark.parametrize(("make", "reason"), MISFITS.values(), ids=MISFITS)
def test_experts_that_do_not_fit_their_router_are_refused_once(make: Callable[[], nn.Module], reason: str) -> None:
    inputs = {"input_ids": torch.randint(0, 64, (2, 5)), "use_cache": False}
    (sites, refused), _ = capture.inference(make().eval(), **inputs)
    assert sites == []
    assert [refusal.reason for refusal in refused] == [reason]


FORMS = {Sorted: K, StablySorted: K, Argmax: 1, Max: 1, TopOne: 1, Rows: K, Moe: K}


@pytest.mark.parametrize(("form", "k"), FORMS.items(), ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("dynamic", DYNAMIC, ids=["static", "dynamic"])
def test_finds_selections_that_are_no_topk_of_rows(form: type[Moe], k: int, dynamic: bool) -> None:
    model, x = form(), torch.randn(2, 5, H)
    (sites, refused), _ = capture.inference(model, x, dynamic=dynamic)
    with_gradients, _ = capture.joint(model, x, dynamic=dynamic)
    for (site,) in (sites, with_gradients):
        assert (site.num_experts, site.top_k, site.score_function, site.bias, site.groups) == (
            E,
            k,
            "softmax",
            False,
            None,
        )
        assert site.combine.meta["val"].numel() == x.numel()
        assert site.expert_bytes == 4 * (WIDTH * H + H * WIDTH)
    assert refused == []


def test_layers_without_a_residual_keep_their_own_experts() -> None:
    (sites, _), _ = capture.inference(NoResidual(), torch.randn(2, 5, H))
    assert [len(site.experts) for site in sites] == [2, 2]
    assert not set(sites[0].experts) & set(sites[1].experts)
    assert sites[1].name == "second"


def test_one_router_may_drive_two_banks() -> None:
    (sites, refused), _ = capture.inference(TwoBanks(), torch.randn(2, 5, H))
    assert len(sites) == 2
    assert sites[0].select is sites[1].select
    assert set(sites[0].expert_weights).isdisjoint(sites[1].expert_weights)
    assert sites[0].combine is not sites[1].combine
    assert refused == []


def test_two_banks_that_are_summed_first_have_their_own_combine() -> None:
    (sites, _), _ = capture.inference(TwoBanksSummed(), torch.randn(2, 5, H))
    assert len(sites) == 2
    assert len({site.combine for site in sites}) == 2


def test_two_selections_may_share_a_router() -> None:
    (sites, refused), _ = capture.inference(SharedRouter(), torch.randn(2, 5, H))
    assert [site.top_k for site in sites] == [K, K + 1]
    assert sites[0].logits is sites[1].logits
    assert refused == []


def test_lists_what_leaves_and_changes() -> None:
    model, x = SideOutputs(), torch.randn(2, 5, H)
    for sites, _ in (capture.inference(model, x)[0], capture.joint(model, x)):
        (site,) = sites
        returned = [escape for escape in site.escapes if "returned" in escape]
        assert len(returned) == 2  # ids and weights; neither logits nor probs
        assert any("int64[10, 2]" in escape for escape in returned)
        assert any("float32[10, 2]" in escape for escape in returned)
        assert any("reads the routing" in escape for escape in site.escapes)  # the load of the auxiliary loss


REFUSED = {
    Vocabulary: "select no expert weights",
    Codebook: "select no expert weights",
    Soft: "run on every token",
}


@pytest.mark.parametrize(("form", "reason"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_refuses_with_a_reason(form: type[Moe], reason: str) -> None:
    model, x = form(), torch.randn(2, 5, H)
    for sites, refused in (capture.inference(model, x)[0], capture.joint(model, x)):
        assert sites == []
        assert any(reason in refusal.reason for refusal in refused)


@pytest.mark.parametrize("form", [Masked, Summed])
def test_a_selection_that_masks_dense_experts_is_a_site(form: type[Moe]) -> None:
    """All experts are computed, but what a token gets of them follows from its selection."""
    model, x = form(), torch.randn(2, 5, H)
    for sites, refused in (capture.inference(model, x)[0], capture.joint(model, x)):
        assert [(site.name, site.form, site.num_experts, site.top_k) for site in sites] == [("gate", "dense", E, K)]
        assert refused == []


def test_refuses_sparse_attention_and_finds_the_layer_after_it() -> None:
    (sites, refused), _ = capture.inference(SparseAttention(), torch.randn(2, 5, H))
    assert len(sites) == 1
    reason = "what it ranks does not come from one linear router"
    assert refused == [Refusal(f"topk over {E}", reason, has_experts=False)]


@pytest.mark.parametrize("form", [Smallest, ExpertChoice])
def test_other_choices_are_no_routing(form: type[Moe]) -> None:
    (sites, _), _ = capture.inference(form(), torch.randn(2, 5, H))
    assert sites == []


def test_experts_that_choose_among_as_many_tokens_are_no_routing() -> None:
    model, x = TurnedChoice(), torch.randn(1, E, H)
    for sites, refused in (capture.inference(model, x)[0], capture.joint(model, x)):
        assert sites == []
        (refusal,) = refused
        assert "between its router and its selection: experts may choose tokens" in refusal.reason


def test_weights_in_another_order_than_the_ids_are_not_read() -> None:
    (sites, _), _ = capture.inference(ById(), torch.randn(2, 5, H))
    assert [site.weights for site in sites] == [None]


@pytest.mark.parametrize("experts", zoo.EXPERTS)
def test_one_weight_has_no_order(experts: zoo.Experts) -> None:
    """Top-1 of one token: what is sorted for grouped_mm, and back, is a single pair."""
    block = zoo.build("olmoe", experts).model.layers[0].mlp
    block.gate.top_k = 1
    x = torch.randn(1, 1, zoo.HIDDEN)
    (sites, _), _ = capture.inference(block, x)
    assert [site.top_k for site in sites] == [1]
    assert None not in [site.weights for site in sites]


def test_a_router_whose_experts_are_in_another_graph_is_named() -> None:
    (_, (router,)), _ = capture.inference(Broken(), torch.randn(2, 5, H))
    assert router.is_router
    assert router.name == "gate"


def test_names_are_unique_and_the_graph_is_untouched() -> None:
    model, inputs, found = zoo.build("deepseek_v3", num_layers=3), zoo.inputs("deepseek_v3"), []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        aten, sources = normalise(gm, example_inputs)
        before = str(aten.graph)
        found.append((find_sites(aten.graph, sources)[0], before, str(aten.graph)))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    ((sites, before, after),) = found
    assert [site.name for site in sites] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert after == before
    assert all(a.select is not b.select for a, b in itertools.combinations(sites, 2))
