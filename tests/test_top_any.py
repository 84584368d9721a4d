"""top_any: what a token drops, what is left of its weights, and that nothing is read for what was dropped.

T = B*S tokens; E, k: experts, experts a token
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dmoe_compile.passes import des, dmoe
from dmoe_compile.passes.policies import find_policy
from dmoe_compile.passes.top_any import Options
from torch import Tensor
from torch.testing import assert_close
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

import dmoe_compile
import forms
import rewriting
import zoo
from dmoe_compile import Config
from reference_model import Rewriting
from tiny_moe import ATEN, BLOCK, INDUCTOR, MODEL, TinyMoE

RATIO = 0.8


def dropped(weights: Tensor, scale: Tensor | None, ratio: float, renormalised: bool) -> Tensor:
    """Return the weights [T, k] that are left; `scale` is what they were multiplied by after renormalisation."""
    kept = weights * (weights >= ratio * weights.amax(-1, keepdim=True))
    if not renormalised:
        return kept
    unscaled = weights if scale is None else weights / scale
    left = torch.where(kept > 0, unscaled, 0)
    left = left * unscaled.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)
    return left if scale is None else left * scale


@pytest.fixture
def watched(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """An experts implementation "watched" of transformers, which drops by this file's rule and says what it saw."""
    seen: dict[str, Any] = {"calls": [], "ratio": RATIO, "name": ""}

    def forward(self: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        scale = seen["scale"].pop(0)[ids] if seen.get("scale") else None
        left = dropped(weights.float(), scale, seen["ratio"], zoo.expected(seen["name"]).renormalised)
        seen["calls"].append((ids, weights, left))
        return grouped_mm_experts_forward(self, hidden, ids, left.to(weights.dtype))

    ALL_EXPERTS_FUNCTIONS["watched"] = forward
    yield seen
    del ALL_EXPERTS_FUNCTIONS["watched"]


@pytest.mark.parametrize("name", zoo.ROUTABLE)
def test_equals_the_rule_in_eager(name: str, watched: dict[str, Any]) -> None:
    """Real routers, with renormalisation, scale, bias, groups and softmax after the selection."""
    num_layers = 2 if name == "deepseek_v3" else 1
    model, inputs = zoo.build(name, num_layers=num_layers), zoo.inputs(name)
    backend = Rewriting(passes=["top_any"], stats=True, **{"top_any.ratio": RATIO})
    with torch.no_grad():
        ours = torch.compile(model, backend=backend, fullgraph=True)(**inputs)
        own = model(**inputs)
        watched["name"] = name
        watched["scale"] = [m.per_expert_scale for m in model.modules() if hasattr(m, "per_expert_scale")]
        model.set_experts_implementation("watched")
        expected = model(**inputs)
    assert [outcome.rewritten for outcome in backend.outcomes] == [True] * len(watched["calls"])
    assert_close(ours[0], expected[0], **MODEL)
    assert not torch.allclose(ours[0], own[0], rtol=1e-3, atol=1e-3)
    used = [ids[left > 0].unique().numel() for ids, _, left in watched["calls"]]
    assert backend.counts is not None
    assert backend.counts.tolist() == used


class Dropping(TinyMoE):
    """TinyMoE whose router drops by this file's rule, as its own code would."""

    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(logits, batch, seq)
        return dropped(weights, None, RATIO, renormalised=True), ids


def build(cls: type[TinyMoE] = TinyMoE, **sizes: Any) -> TinyMoE:
    torch.manual_seed(0)
    return cls(num_experts=24, top_k=4, **sizes)


X = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("groups", [None, (4, 2)], ids=["no groups", "groups"])
@pytest.mark.parametrize(
    ("policy", "coreset"),
    [
        ({"dmoe.top_p": 0.3, "dmoe.min_experts": 4}, dmoe.Options(0.3, 4)),
        ({"des.variant": "vote", "des.coreset_size": 6}, des.Options("vote", coreset_size=6)),
    ],
    ids=["dmoe", "des"],
)
@pytest.mark.parametrize("top_any_first", [False, True])
def test_composes_with_a_coreset(
    groups: tuple[int, int] | None, policy: dict[str, Any], coreset: Any, top_any_first: bool
) -> None:
    """The coreset is voted by the model's own choice, and a token's experts in it are then fewer."""
    name = next(iter(policy)).partition(".")[0]
    eager = build(Dropping, groups=groups)
    eager.eager_rule = functools.partial(find_policy(name).coreset, options=coreset)
    passes = ["top_any", name] if top_any_first else [name, "top_any"]
    options = {"passes": passes, "block_length": BLOCK, "top_any.ratio": RATIO, **policy, **ATEN}
    with torch.no_grad():
        ours = torch.compile(build(groups=groups), backend="dmoe", options=options, fullgraph=True)(X)
        assert_close(ours, eager(X), **INDUCTOR)
        eager.eager_rule = None
        assert not torch.allclose(ours, eager(X), **INDUCTOR)


@pytest.mark.parametrize("name", ["dmoe", "des", "cover"])
def test_reads_no_more_experts_than_the_coreset_alone(name: str) -> None:
    unique = []
    for passes in ([name], [name, "top_any"]):
        backend = Rewriting(passes=passes, stats=True, **{"top_any.ratio": RATIO})
        with torch.no_grad():
            torch.compile(build(), backend=backend, fullgraph=True)(X[:1, :BLOCK])
        assert backend.counts is not None
        unique += backend.counts.tolist()
    assert unique[1] < unique[0]


@pytest.mark.parametrize("name", ["softmax_loop", "expert_hit", "deepseek", "hit_loop", "fused"])
def test_a_ratio_of_one_leaves_the_best(name: str) -> None:
    """Which is what these forms do with one expert a token."""
    x = rewriting.inputs()
    options = {"passes": ["top_any"], "top_any.ratio": 1.0}
    ours = rewriting.Rewritten(forms.build(name), x, prepared=forms.FORMS[name].prepared, **options).result
    with torch.no_grad():
        best = forms.build(name, num_experts_per_tok=1)(x)
    ours, best = (each[0] if isinstance(each, tuple | list) else each for each in (ours, best))
    assert_close(ours, best, **INDUCTOR)


@pytest.mark.parametrize("name", ["bailing", "masked_loop"])
def test_published_sigmoid_routers(name: str) -> None:
    """The ids that these return are those that run; their weights sum to the routed scaling factor as before."""
    x, block = rewriting.inputs(), forms.build(name)
    rewritten = rewriting.Rewritten(block, x, passes=["top_any"], **{"top_any.ratio": RATIO})
    with torch.no_grad():
        _, (_, own) = forms.build(name)(x)
    _, (_, ids) = rewritten.result
    assert not torch.equal(own, ids)
    assert (own.unsqueeze(-1) == ids.unsqueeze(-2)).any(-2).all()  # only experts that the token had chosen


def test_experts_that_all_run_are_left_alone() -> None:
    block = forms.build("dense")
    rewritten = rewriting.Rewritten(block, rewriting.inputs(), prepared=False, passes=["top_any"])
    (outcome,) = rewritten.backend.outcomes
    assert (outcome.rewritten, outcome.reason) == (False, "its experts all run on every token")
    rewritten = rewriting.Rewritten(block, rewriting.inputs(), prepared=False, passes=["dmoe", "top_any"])
    (outcome,) = rewritten.backend.outcomes
    assert outcome.rewritten
    assert outcome.notes[-1] == "top_any leaves it alone: its experts all run on every token"


class SoftmaxThenScale(TinyMoE):
    """Raw logits are ranked, softmaxed after the selection, and each weight is multiplied by its expert's scale."""

    drops = False

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.scale = torch.nn.Parameter(torch.rand(sizes["num_experts"]) + 0.5)

    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        values, ids = logits.topk(self.top_k, dim=-1)
        weights, scale = values.softmax(-1), self.scale[ids]
        if self.drops:
            return dropped(weights * scale, scale, RATIO, renormalised=True), ids
        return weights * scale, ids


def test_a_scale_of_each_expert_is_no_score() -> None:
    """It stays as it is: minus infinity there, times a weight of zero, would be NaN."""
    model = build(SoftmaxThenScale)
    options = {"passes": ["top_any"], "top_any.ratio": RATIO, **ATEN}
    with torch.no_grad():
        ours, own = torch.compile(model, backend="dmoe", options=options, fullgraph=True)(X), model(X)
        model.drops = True
        assert_close(ours, model(X), **INDUCTOR)
    assert not torch.allclose(ours, own, **INDUCTOR)


class Scattering(TinyMoE):
    """Weights go through [T, E] before the experts gather them: a repeated index would overwrite one."""

    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(logits, batch, seq)
        return torch.zeros_like(logits).scatter(1, ids, weights).gather(1, ids), ids


class Putting(TinyMoE):
    """The same by an assignment."""

    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(logits, batch, seq)
        spread = torch.zeros_like(logits)
        spread[torch.arange(len(ids)).unsqueeze(1), ids] = weights
        return spread.gather(1, ids), ids


class Raised(TinyMoE):
    """A weight of nothing would be something again."""

    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(logits, batch, seq)
        return weights + 0.1, ids


class Floored(TinyMoE):
    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(logits, batch, seq)
        return weights.clamp(min=0.1), ids


class TwoBanks(TinyMoE):
    """A second bank runs on the same choice, whose weights it does not renormalise."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.other = TinyMoE(**sizes)

    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        self.raw, ids = logits.softmax(-1).topk(self.top_k, dim=-1)
        return self.raw / self.raw.sum(-1, keepdim=True), ids

    def experts(self, rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        rows = rows + super().experts(rows, weights, ids)
        return rows + self.other.experts(rows, self.raw, ids)


class Logarithmic(TinyMoE):
    def route(self, logits: Tensor, batch: int, seq: int) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(logits, batch, seq)
        return weights.log1p(), ids


class OneExpert(TinyMoE):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**{**sizes, "top_k": 1})


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Scattering, "its routing weights are scattered over all experts"),
        (Putting, "its routing weights are scattered over all experts"),
        (Logarithmic, "its routing weights are made by aten.log1p"),
        (Raised, "its routing weights are made by aten.add"),
        (Floored, "its routing weights are made by aten.clamp"),
        (TwoBanks, "its banks of experts weigh the same choice in different ways"),
        (OneExpert, "a token has one expert"),
    ],
)
def test_what_it_does_not_understand_is_left_alone(
    cls: type[TinyMoE], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(cls)
    options = {"passes": ["top_any"], **ATEN}
    with torch.no_grad():
        assert_close(torch.compile(model, backend="dmoe", options=options)(X), model(X), **INDUCTOR)
    assert reason in caplog.text
    assert caplog.text.count("WARNING") == 1


def test_gradients_drop_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, options = build(), {"passes": ["top_any"], **ATEN}
    assert_close(torch.compile(model, backend="dmoe", options=options)(X), model(X), **INDUCTOR)
    assert "no expert is dropped where gradients are required" in caplog.text


def test_a_token_that_is_no_number_keeps_to_itself() -> None:
    x = X.clone()
    x[0, 3] = float("nan")
    model = build()
    options = {"passes": ["top_any"], "top_any.ratio": RATIO, **ATEN}
    with torch.no_grad():
        compiled = torch.compile(model, backend="dmoe", options=options, fullgraph=True)
        clean, out = compiled(X), compiled(x)
    assert out[0, 3].isnan().all()
    others = torch.ones(2, 24, dtype=torch.bool)
    others[0, 3] = False
    assert_close(out[others], clean[others], **INDUCTOR)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, True, "0.5", float("nan")])
def test_bad_options_are_refused(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"top_any.ratio=.* must be a number in \[0, 1\]"):
        Options(ratio)


def test_verifying_is_about_coresets() -> None:
    model, config = build(), Config.from_options({"passes": ["top_any"], **ATEN})
    assert dmoe_compile.explain(model, X, config=config, verify=True).verified is None
    config = Config.from_options({"passes": ["top_any", "dmoe"], **ATEN})
    assert dmoe_compile.explain(model, X, config=config, verify=True).verified
