"""The promise of `cover`, in compiled models: every token keeps its share of routing weight, or is counted.

B, S: sequences, tokens per sequence; E, k: experts, experts per token; H: model width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dmoe_compile.passes.cover import Options
from torch import Tensor

import dmoe_compile
from dmoe_compile import Config
from reference_model import Gate, MoeBlock, Rewriting
from tiny_moe import ATEN, TinyMoE

E, H, K, L = 24, 8, 4, 8
GROUPS = {"no groups": (1, 1), "groups": (4, 2)}


def routed(block: MoeBlock, hidden: Tensor, *mask: Tensor, **options: Any) -> tuple[dict[str, Tensor], Rewriting]:
    rewriting = Rewriting(**{"passes": ["cover"], "block_length": L, "stats": True, **options})
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(block, backend=rewriting, fullgraph=True)(hidden, *mask), rewriting


def shares(own: dict[str, Tensor], ours: dict[str, Tensor]) -> Tensor:
    """Return how much of its own routing weight each token still has, [B, S]."""
    still = (own["ids"].unsqueeze(-1) == ours["ids"].unsqueeze(-2)).any(-1)
    return torch.where(still, own["weights"], 0).sum(-1) / own["weights"].sum(-1)


def peaked(gate: Gate, spread: float) -> Gate:
    with torch.no_grad():
        gate.weight.mul_(spread)
    return gate


@pytest.mark.parametrize("scope", ["block", "batch"])
@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_promise_is_kept(groups: str, spread: float, mass: float, scope: str) -> None:
    block, hidden = MoeBlock(peaked(Gate(E, H, K, GROUPS[groups]), spread)), torch.randn(2, 20, H)
    with torch.no_grad():
        own = block(hidden)
    ours, rewriting = routed(block, hidden, scope=scope, **{"cover.mass": mass})
    assert (shares(own, ours) >= mass - 1e-5).all()
    assert rewriting.below is not None
    assert rewriting.below.tolist() == [0]


@pytest.mark.parametrize("groups", GROUPS)
def test_tokens_below_the_promise_are_counted(groups: str) -> None:
    block, hidden = MoeBlock(Gate(E, H, K, GROUPS[groups])), torch.randn(2, 20, H)
    with torch.no_grad():
        own = block(hidden)
    ours, rewriting = routed(block, hidden, **{"cover.mass": 0.9, "cover.max_experts": 6})
    below = (shares(own, ours) < 0.9 - 1e-5).sum().item()
    assert below > 0
    assert rewriting.below is not None
    assert rewriting.below.tolist() == [below]
    used = ours["ids"].view(2, 20, K)
    assert all(used[row, start : start + L].unique().numel() <= 6 for row in range(2) for start in (0, 8, 16))


@pytest.mark.parametrize("mass", [0.9, 1.0])
def test_the_largest_coreset_holds_whatever_is_promised(mass: float) -> None:
    ours, rewriting = routed(
        MoeBlock(Gate(E, H, K)), torch.randn(1, L, H), **{"cover.mass": mass, "cover.max_experts": 6}
    )
    assert ours["ids"].unique().numel() <= 6
    assert rewriting.below is not None
    assert rewriting.below.item() > 0


def test_a_largest_coreset_below_k_means_k() -> None:
    """Of the experts with most weight, as any other size."""
    block, hidden = MoeBlock(Gate(E, H, K)), torch.randn(2, 20, H)
    one, k = (routed(block, hidden, **{"cover.mass": 0.99, "cover.max_experts": n})[0]["ids"] for n in (1, K))
    assert torch.equal(one, k)


def test_padding_is_promised_nothing() -> None:
    block, hidden = MoeBlock(Gate(E, H, K)), torch.randn(2, 20, H)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :7] = 0
    with torch.no_grad():
        own = block(hidden, mask)
    ours, rewriting = routed(block, hidden, mask, **{"cover.mass": 0.9})
    assert (shares(own, ours)[mask.bool()] >= 0.9 - 1e-5).all()
    assert rewriting.below is not None
    assert rewriting.below.tolist() == [0]


def test_a_larger_promise_takes_more_experts() -> None:
    block, hidden = MoeBlock(Gate(E, H, K)), torch.randn(1, L, H)
    used = []
    for mass in (0.3, 0.6, 0.9, 1.0):
        ours, _ = routed(block, hidden, **{"cover.mass": mass})
        used.append(ours["ids"].unique().numel())
    assert used == sorted(used)
    assert used[0] < used[-1]


def test_through_inductor_with_gradients_and_without() -> None:
    torch.manual_seed(1)
    model, x = TinyMoE(num_experts=E, top_k=K), torch.randn(2, 16, 16)
    options = {"passes": ["cover"], "block_length": L, "cover.mass": 0.5, **ATEN}
    results = []
    for grad in (False, True):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            results.append(torch.compile(model, backend="dmoe", options=options, fullgraph=True)(x))
    torch.testing.assert_close(results[0], results[1].detach())
    assert not torch.allclose(results[0], model(x))


def test_reported() -> None:
    torch.manual_seed(1)
    model, x = TinyMoE(num_experts=E, top_k=K), torch.randn(2, 16, 16)
    config = Config(passes=("cover",), block_length=L, policies={"cover": Options(0.9, max_experts=K)}, inductor=ATEN)
    report = dmoe_compile.explain(model, x, config=config, verify=True)
    (site,) = report.sites
    assert report.verified
    assert any("tokens keep less than the policy promises" in note for note in site.notes)


def test_where_weights_cannot_be_read_the_site_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmoe_compile.passes.sites._Finder._weights", staticmethod(lambda *_: None))
    block = MoeBlock(Gate(E, H, K))
    _, rewriting = routed(block, torch.randn(1, L, H))
    (outcome,) = rewriting.outcomes
    assert outcome.reason == "the weights that its router gives the chosen experts can't be read"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0.0}, r"cover.mass=0.0 must be a number in \(0, 1\]"),
        ({"mass": True}, "cover.mass=True"),
        ({"mass": "0.9"}, "cover.mass='0.9'"),
        ({"max_experts": 0}, "cover.max_experts=0 must be an integer of at least 1"),
        ({"max_experts": 2.0}, "cover.max_experts=2.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)
