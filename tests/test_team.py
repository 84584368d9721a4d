"""The `team` pass inside a graph, against the released block (tests/reference/case3_*) and composed with coresets.

R: rows; S: tokens of a row; H: hidden; E, k: experts, experts a token
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dmoe_compile.passes.layouts import Layout
from dmoe_compile.passes.team import Denoised, Options, add_step
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import dmoe_compile
import forms
import zoo
from dmoe_compile import backend, prepare
from reference_model import Gate, MoeBlock
from tiny_moe import ATEN, INDUCTOR, MODEL, TinyMoE

REFERENCE = Path(__file__).parent / "reference"
CASE = load_file(REFERENCE / "case3_team_moe_block.safetensors")
ABOUT = json.loads((REFERENCE / "case3_team_moe_block.json").read_text())
MASKED = sorted({case["id"].partition(".")[0] for case in ABOUT["cases"] if case["decoded_given"]})
NO_HOT_TOKEN = {"all_limited": "plain", "some_decoded_rest_limited": "some_decoded"}  # where the released one gives NaN


def released_block(norm_topk_prob: bool) -> nn.Module:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4}
    block = forms.build("softmax_loop", **sizes, norm_topk_prob=norm_topk_prob)
    block.load_state_dict({name[2:]: tensor for name, tensor in CASE.items() if name.startswith("w.")})
    prepare(block)
    return block


def test_a_model_over_several_gpus_has_the_step_on_each() -> None:
    """A kernel reads what it is given as memory of its own GPU."""
    graph, mode, layouts = fx.Graph(), FakeTensorMode(), []
    for device in ("cuda:0", "cuda:1", "cuda:1"):
        node = graph.placeholder("x")
        with mode:
            node.meta["val"] = torch.empty(2, 8, 4, device=device)
        layouts.append(Layout(node, 2, 8, None))
    graph.output(None)
    steps = [layout.step for layout in add_step(graph, layouts, Denoised(0, candidates=1))]
    for layout, step in zip(layouts, steps, strict=True):
        assert layout.rows is not None
        assert step is not None
        for given, dtype in ((step.roles, torch.int8), (step.rows, torch.int64)):
            value = given.meta["val"]
            assert (value.device, value.dtype) == (layout.rows.meta["val"].device, dtype)
    assert steps[1] is steps[2]
    ops = [node.op for node in graph.nodes]
    assert ops == sorted(ops, key=["placeholder", "call_function", "output"].index)
    graph.lint()


@pytest.mark.parametrize("norm", [True, False], ids=["renormalised", "not renormalised"])
def test_every_mask_of_the_released_block(norm: bool) -> None:
    """Its router logits are compared on computed tokens: ours keep their values for decoded ones."""
    block, hidden = released_block(norm), CASE["hidden_states"]
    compiled = torch.compile(block, backend="dmoe", options={"passes": ["team"], **ATEN}, fullgraph=True)
    for mask in MASKED:
        decoded, cold = (CASE[f"{mask}.{name}"].bool() for name in ("decoded_index", "expert_limit_index"))
        with torch.no_grad(), dmoe_compile.denoising() as context:
            context.step(shape=(1, 128))
            compiled(hidden)
            for stored in context._store.now.values():
                stored.buffer.copy_(CASE["past_hidden_states"])
            context.step(decoded, cold)
            out, logits = compiled(hidden)
            unique = list(context.stats[-1].unique_experts.values())
        case = f"{NO_HOT_TOKEN.get(mask, mask)}.norm{int(norm)}"
        expected = CASE[f"{case}.output"]
        assert_close(out, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        computed = ~decoded.flatten()
        assert_close(logits[computed], CASE[f"{mask}.router_logits"][computed], rtol=1e-5, atol=1e-5)
        (about,) = [each for each in ABOUT["cases"] if each["id"] == case]
        assert unique == [about["unique_experts"]], mask


def test_no_hot_token_gives_nan_in_the_released_block() -> None:
    assert CASE["all_limited.norm1.output"].isnan().any()
    assert CASE["some_decoded_rest_limited.norm1.output"].isnan().any()


B, S, H, C = 2, 8, 16, 4


def build(**sizes: Any) -> TinyMoE:
    torch.manual_seed(0)
    return TinyMoE(**{"num_experts": 24, "top_k": 4, **sizes})


class Teacher(TinyMoE):
    """TinyMoE that follows TEAM's rules in plain PyTorch: what is decoded, cold and stored is set from outside."""

    decoded: Tensor
    cold: Tensor
    stored: Tensor | None = None
    candidates = 1

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return super().forward(x)

    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(logits, batch, seq)
        cold, hot = self.cold & ~self.decoded, ~self.cold & ~self.decoded
        scores = logits.softmax(-1)
        for sequence in range(batch // self.candidates):
            rows = slice(sequence * self.candidates * seq, (sequence + 1) * self.candidates * seq)
            here = torch.zeros(batch * seq, dtype=torch.bool)
            here[rows] = True
            necessary = ids[here & hot.flatten()].unique()
            if len(necessary):
                limited = torch.full_like(scores, -torch.inf)
                limited[:, necessary] = scores[:, necessary]
                chosen = limited.topk(self.top_k, dim=-1)
                which = (here & cold.flatten()).unsqueeze(-1)
                new = chosen.values / chosen.values.sum(-1, keepdim=True)
                weights, ids = torch.where(which, new, weights), torch.where(which, chosen.indices, ids)
        self.used = ids[~self.decoded.flatten()].unique().numel()
        return weights, ids

    def experts(self, rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = super().experts(rows, weights, ids)
        if self.stored is not None:
            out = torch.where(self.decoded.reshape(-1, 1), self.stored.reshape(out.shape), out)
        self.out = out.view(*self.x.shape)
        return out


def masks(generator: torch.Generator, decoded: float, cold: float) -> tuple[Tensor, Tensor]:
    return torch.rand(B, S, generator=generator) < decoded, torch.rand(B, S, generator=generator) < cold


@pytest.mark.parametrize("candidates", [1, C])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_follows_the_rules_step_by_step(candidates: int, dynamic: bool) -> None:
    """Sequences decode at different speeds, candidates are accepted, and every step goes on from the last."""
    model, teacher = build(), Teacher(num_experts=24, top_k=4)
    teacher.load_state_dict(model.state_dict())
    options = {"passes": ["team"], **ATEN}
    compiled = torch.compile(model, backend="dmoe", options=options, fullgraph=True, dynamic=dynamic)
    generator = torch.Generator().manual_seed(0)
    stored = None
    with torch.no_grad(), dmoe_compile.denoising() as context:
        for i in range(5):
            rows = 1 if i == 0 else candidates
            decoded, cold = masks(generator, 0.0 if i == 0 else 0.4, 0.4)
            x = torch.randn(B * rows, S, H, generator=generator)
            teacher.decoded, teacher.cold = (each.repeat_interleave(rows, 0) for each in (decoded, cold))
            teacher.candidates, teacher.stored = rows, None if stored is None else stored.repeat_interleave(rows, 0)
            context.step(decoded, cold, candidates=rows)
            assert_close(compiled(x), teacher(x), **INDUCTOR)
            assert context.stats[-1].unique_experts == {"gate": teacher.used}
            choice = torch.randint(rows, (B,), generator=generator)
            context.accept(choice)
            stored = teacher.out.view(B, rows, S, H)[torch.arange(B), choice]


def test_decoded_tokens_activate_no_expert_of_their_own() -> None:
    """Each token would use experts of its own; with all but one decoded, its four are all that is used."""
    model = build(num_experts=64)
    compiled = torch.compile(model, backend="dmoe", options={"passes": ["team"], **ATEN}, fullgraph=True)
    x, decoded = torch.randn(B, S, H), torch.ones(B, S, dtype=torch.bool)
    decoded[1, 3] = False
    with torch.no_grad(), dmoe_compile.denoising() as context:
        context.step(shape=(B, S))
        compiled(x)
        context.step(decoded)
        compiled(x)
        context.step(finished=torch.tensor([True, False]), shape=(B, S))
        compiled(x)
    before, after, one_row = (step.unique_experts["gate"] for step in context.stats)
    assert after == 4
    assert after < one_row < before


@pytest.mark.parametrize(("cache", "limit"), [(False, True), (True, False), (False, False)])
def test_each_rule_alone(cache: bool, limit: bool) -> None:
    model, teacher = build(), Teacher(num_experts=24, top_k=4)
    teacher.load_state_dict(model.state_dict())
    options = {"passes": ["team"], "team.cache": cache, "team.limit": limit, **ATEN}
    compiled = torch.compile(model, backend="dmoe", options=options, fullgraph=True)
    generator, none = torch.Generator().manual_seed(0), torch.zeros(B, S, dtype=torch.bool)
    with torch.no_grad(), dmoe_compile.denoising() as context:
        for i in range(3):
            decoded, cold = masks(generator, 0.0 if i == 0 else 0.4, 0.4)
            x = torch.randn(B, S, H, generator=generator)
            teacher.decoded, teacher.cold = decoded if cache else none, cold & ~decoded if limit else none
            context.step(decoded, cold)
            assert_close(compiled(x), teacher(x), **INDUCTOR)
            teacher.stored = teacher.out
        assert (context.nbytes > 0) is cache


TIGHT = {"dmoe.min_experts": 5, "dmoe.top_p": 0.3, "des.keep": 1, "cover.mass": 0.5}


@pytest.mark.parametrize("name", ["dmoe", "des", "cover"])
@pytest.mark.parametrize("groups", [None, (4, 2)], ids=["no groups", "groups"])
def test_composes_with_coresets(name: str, groups: tuple[int, int] | None) -> None:
    """Hot tokens stay in the coreset that they vote, cold ones in what hot ones choose, and no vote is cast else."""
    model = build(groups=groups)
    options = {"passes": ["team", name], "block_length": S, **TIGHT, **ATEN}
    compiled = torch.compile(model, backend="dmoe", options=options, fullgraph=True)
    x, hot = torch.randn(1, S, H), torch.zeros(1, S, dtype=torch.bool)
    hot[0, :3] = True
    alone = torch.compile(model, backend="dmoe", options={**options, "passes": [name]}, fullgraph=True)
    with torch.no_grad(), dmoe_compile.denoising() as context:
        context.step(shape=(1, S))
        assert_close(compiled(x), alone(x), **INDUCTOR)
        context.step(cold=~hot)
        out = compiled(x)
        used = context.stats[-1].unique_experts["gate"]
        context.plain()
        assert_close(out[hot], alone(x[:, :3])[0], **INDUCTOR)  # as if the block were the hot tokens alone
        context.step(shape=(1, 3))
        compiled(x[:, :3])
        assert used == context.stats[-1].unique_experts["gate"]


@pytest.mark.parametrize("name", ["dmoe", "des", "cover"])
def test_candidates_share_a_coreset(name: str) -> None:
    """As if their rows were one block; rows on their own have other coresets."""
    model, x = build(), torch.randn(2, S, H)
    options = {"block_length": S, **TIGHT, **ATEN}
    compiled = torch.compile(model, backend="dmoe", options={**options, "passes": ["team", name]}, fullgraph=True)
    alone = torch.compile(model, backend="dmoe", options={**options, "passes": [name]}, fullgraph=True)
    options["block_length"] = 2 * S
    as_one = torch.compile(model, backend="dmoe", options={**options, "passes": [name]}, fullgraph=True)
    with torch.no_grad(), dmoe_compile.denoising() as context:
        context.step(shape=(1, S), candidates=2)
        out = compiled(x)
        context.accept(torch.tensor([0]))
        context.plain()
        assert_close(out, as_one(x.view(1, 2 * S, H)).view_as(x), **INDUCTOR)
        assert not torch.allclose(out, alone(x), **INDUCTOR)


@pytest.mark.parametrize(
    "beside",
    [
        {"passes": ["team", "auto"], "auto.gb_per_s": 1000.0, "auto.tflop_per_s": 0.001},
        {"passes": ["team", "dmoe"], "max_block_tokens": S - 1},
    ],
    ids=["a coreset does not pay", "too long"],
)
def test_its_rules_hold_where_no_coreset_is_chosen(beside: dict[str, Any]) -> None:
    model, x, generator = build(), torch.randn(2, B, S, H), torch.Generator().manual_seed(0)
    decoded, cold = masks(generator, 0.4, 0.4)
    found = []
    for options in ({"passes": ["team"]}, beside):
        compiled = torch.compile(model, backend="dmoe", options={**options, **ATEN}, fullgraph=True)
        with torch.no_grad(), dmoe_compile.denoising() as context:
            context.step(shape=(B, S))
            compiled(x[0])
            context.step(decoded, cold)
            found.append((compiled(x[1]), context.stats[-1].unique_experts))
    assert_close(found[1][0], found[0][0], **INDUCTOR)
    assert found[1][1] == found[0][1]


def test_padding_activates_no_expert_and_widens_no_limit() -> None:
    block = MoeBlock(Gate(24, H, 2))
    block.gate.weight.data.normal_()
    compiled = torch.compile(block, backend="dmoe", options={"passes": ["team"], **ATEN}, fullgraph=True)
    x, mask = torch.randn(B, S, H), torch.ones(B, S, dtype=torch.int64)
    mask[1, :5] = 0
    there, cold = mask.bool(), torch.zeros(B, S, dtype=torch.bool)
    cold[:, 5:7] = True
    with torch.no_grad(), dmoe_compile.denoising() as context:
        context.step(shape=(B, S))
        ids = compiled(x, mask)["ids"]
        context.step(cold=cold)
        limited = compiled(x, mask)["ids"]
        unique = [list(step.unique_experts.values()) for step in context.stats]
    assert torch.equal(ids[there], block(x, mask)["ids"][there])
    assert set(ids[~there].tolist()[0]) <= set(ids[there].flatten().tolist())
    assert unique[0] == [ids[there].unique().numel()]
    hot = limited[1, 7:].flatten().tolist()  # the one of its sequence that is neither cold nor padding
    assert set(limited[1, 5:7].flatten().tolist()) == set(hot)
    assert unique[1] == [limited[there].unique().numel()]


def test_sites_of_other_rows_are_left_alone() -> None:
    """DiffusionGemma's encoder in the graph of its decoder: of other tokens than those that are denoised."""
    model, inputs = zoo.build("diffusion_gemma", num_layers=1), zoo.inputs("diffusion_gemma")
    rows, canvas = inputs["decoder_input_ids"].shape
    assert inputs["input_ids"].shape[1] != canvas
    compiled = torch.compile(model, backend="dmoe", options={"passes": ["team"], **ATEN}, fullgraph=True)
    with torch.no_grad(), dmoe_compile.denoising() as context:
        expected = model(**inputs).logits
        context.step(shape=(rows, canvas))
        assert_close(compiled(**inputs).logits, expected, **MODEL)
        context.step(torch.ones(rows, canvas, dtype=torch.bool))
        assert_close(compiled(**inputs).logits, expected, **MODEL)  # what was stored is what it computed
        assert context.nbytes == rows * canvas * zoo.HIDDEN * 4
        encoder, decoder = (step for step in context.stats[-1].unique_experts.values())
    assert decoder < encoder


def test_each_kind_of_forward_is_compiled_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, own = [], backend._inductor
    monkeypatch.setattr(backend, "_inductor", lambda *args: made.append(args) or own(*args))
    compiled = torch.compile(build(), backend="dmoe", options={"passes": ["team"], **ATEN}, fullgraph=True)
    counts = []
    with torch.no_grad(), dmoe_compile.denoising() as context:
        for is_step in (True, False, True, False):
            context.step(shape=(B, S)) if is_step else context.plain()
            compiled(torch.randn(B, S, H))
            counts.append(len(made))
    assert counts == [1, 2, 2, 2]


@pytest.mark.parametrize("passes", [["team"], ["team", "dmoe"]], ids=str)
def test_without_a_context_it_does_nothing(passes: list[str]) -> None:
    model, x = build(), torch.randn(B, S, H)
    options = {"block_length": S, "dmoe.min_experts": 5, "dmoe.top_p": 0.3, **ATEN}
    with torch.no_grad():
        expected = torch.compile(model, backend="dmoe", options={**options, "passes": passes[1:]}, fullgraph=True)(x)
        ours = torch.compile(model, backend="dmoe", options={**options, "passes": passes}, fullgraph=True)(x)
    assert torch.equal(ours, expected)


def test_gradients_refuse_it_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model, x = build(), torch.randn(B, S, H)
    with dmoe_compile.denoising() as context:
        context.step(shape=(B, S))
        out = torch.compile(model, backend="dmoe", options={"passes": ["team"], **ATEN}, fullgraph=True)(x)
    assert_close(out, model(x), **INDUCTOR)
    assert "team reuses, limits and speculates nothing where gradients are required" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": 1}, "team.cache=1 must be True or False"),
        ({"distance": -1}, "team.distance=-1 must be an integer of at least 0"),
        ({"distance": True}, "team.distance=True"),
        ({"confidence": 1.5}, r"team.confidence=1.5 must be a probability, in \[0, 1\]"),
        ({"candidates": 3}, "team.candidates=3 must be 1 or 2"),
        ({"candidates": True}, "team.candidates=True"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)
