"""What every coreset method keeps, and methods that others add.

N: blocks; L: tokens of a block; E, k: experts, experts a token; T = B*S.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from dmoe_compile.passes import cover, des, dmoe, policies
from dmoe_compile.passes.coreset import Blocks, choose, restrict
from dmoe_compile.passes.policies import find_policy, policy_names
from dmoe_compile.passes.votes import best, count_votes
from hypothesis import assume, given
from torch import Tensor

import dmoe_compile
from dmoe_compile import Config
from reference_model import Rewriting
from tiny_moe import ATEN, BLOCK, TinyMoE

DOCS = Path(__file__).parents[1] / "docs" / "policies.md"


@dataclass(frozen=True)
class Case:
    """One block whose scores float32 sums exactly; no two of a token are equal."""

    scores: Tensor
    ids: Tensor
    voting: Tensor

    @property
    def top_k(self) -> int:
        return self.ids.shape[-1]

    @property
    def num_experts(self) -> int:
        return self.scores.shape[-1]

    @property
    def votes(self) -> Tensor:
        return count_votes(self.scores, self.ids, self.voting)

    def coreset(self, rule: ModuleType, options: Any) -> Tensor:
        weights = {"weights": self.scores.gather(-1, self.ids)} if hasattr(rule, "needs_weights") else {}
        (inside,) = rule.coreset(self.scores, self.ids, self.voting, options, **weights)
        return inside


def case_of(scores: Tensor, top_k: int, voting: Tensor) -> Case:
    return Case(scores, scores.topk(top_k).indices, voting)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts, tokens = draw(st.integers(2, 24)), draw(st.integers(1, 12))
    top_k = draw(st.integers(1, min(6, num_experts)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.stack([torch.randperm(4096, generator=generator)[:num_experts] for _ in range(tokens)]) / 4096
    voting = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    return case_of(scores.unsqueeze(0), top_k, voting.unsqueeze(0))


RULES: dict[str, tuple[ModuleType, st.SearchStrategy[Any]]] = {
    "dmoe": (dmoe, st.builds(dmoe.Options, st.floats(0.01, 1), st.integers(1, 20))),
    "des seq": (des, st.builds(des.Options, st.just("seq"), keep=st.none() | st.integers(1, 26))),
    "des vote": (des, st.builds(des.Options, st.just("vote"), coreset_size=st.none() | st.integers(1, 26))),
    "cover": (cover, st.builds(cover.Options, st.floats(0.05, 1), st.none() | st.integers(1, 26))),
}
TIGHT: dict[str, Any] = {
    "dmoe": dmoe.Options(0.3, 1),
    "des seq": des.Options(keep=1),
    "des vote": des.Options("vote", coreset_size=4),
    "cover": cover.Options(0.3),
}
every_rule = pytest.mark.parametrize("name", RULES)


# What every rule keeps.


@every_rule
@given(cases(), st.data())
def test_at_least_k_experts(name: str, case: Case, data: st.DataObject) -> None:
    rule, options = RULES[name]
    inside = case.coreset(rule, data.draw(options))
    assert inside.shape == (case.num_experts,)
    assert inside.dtype == torch.bool
    assert inside.sum() >= case.top_k


@every_rule
@given(cases(), st.data(), st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
def test_tokens_that_do_not_vote_change_nothing(name: str, case: Case, data: st.DataObject, garbage: float) -> None:
    rule, options = RULES[name][0], data.draw(RULES[name][1])
    inside = case.coreset(rule, options)
    silent = ~case.voting[0]
    scores, ids = case.scores.clone(), case.ids.clone()
    scores[0, silent], ids[0, silent] = garbage, torch.arange(case.top_k)
    assert torch.equal(Case(scores, ids, case.voting).coreset(rule, options), inside)
    assume(not silent.all())
    kept = Case(case.scores[:, ~silent], case.ids[:, ~silent], case.voting[:, ~silent])
    assert torch.equal(kept.coreset(rule, options), inside)


@every_rule
@given(cases(), st.data())
def test_the_order_of_tokens_does_not_matter(name: str, case: Case, data: st.DataObject) -> None:
    rule, options = RULES[name][0], data.draw(RULES[name][1])
    order = torch.tensor(data.draw(st.permutations(range(case.scores.shape[1]))))
    other = Case(case.scores[:, order], case.ids[:, order], case.voting[:, order])
    assert torch.equal(other.coreset(rule, options), case.coreset(rule, options))


@every_rule
@given(cases(), st.data())
def test_permuted_experts_give_a_permuted_coreset(name: str, case: Case, data: st.DataObject) -> None:
    rule, options = RULES[name][0], data.draw(RULES[name][1])
    inside = case.coreset(rule, options)
    assume(case.votes.unique().numel() == case.num_experts or not inside[case.votes[0] == 0].any())
    assume(case.votes[case.votes > 0].unique().numel() == (case.votes > 0).sum())  # ties go to the lower index
    order = torch.tensor(data.draw(st.permutations(range(case.num_experts))))
    other = case_of(case.scores[..., order], case.top_k, case.voting)
    assert torch.equal(other.coreset(rule, options), inside[order])


@every_rule
@given(cases(), st.data())
def test_every_routed_expert_is_in_the_coreset(name: str, case: Case, data: st.DataObject) -> None:
    rule, options = RULES[name][0], data.draw(RULES[name][1])
    inside = case.coreset(rule, options)
    routed = restrict(case.scores, inside).topk(case.top_k).indices
    assert inside[routed].all()


@every_rule
@given(cases(), st.data())
def test_all_experts_change_nothing(name: str, case: Case, data: st.DataObject) -> None:
    rule, options = RULES[name][0], data.draw(RULES[name][1]).all_experts()
    inside = case.coreset(rule, options)
    voting = case.voting.unsqueeze(-1)
    routed = restrict(case.scores, inside).topk(case.top_k).indices
    assert torch.equal(torch.where(voting, routed, 0), torch.where(voting, case.ids, 0))


@every_rule
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("whole", [False, True])
def test_scores_that_are_no_numbers_do_not_spread(name: str, garbage: float, whole: bool) -> None:
    """Not to other blocks, not to other sequences, and not to the other tokens of their own block."""
    rule, options = RULES[name][0], TIGHT[name]
    scores = torch.rand(2 * 8, 12)
    broken = scores.clone()
    broken[5, 7] = garbage  # one score of a token in the second block of the first row

    def inside_of(scores: Tensor, voting: Tensor | None = None) -> Tensor:
        weights, ids = scores.topk(3)
        own = (ids, weights) if hasattr(rule, "needs_weights") else None
        return choose(scores, Blocks(2, 8, 4, voting, whole=whole), 3, partial(rule.coreset, options=options), own)

    inside = inside_of(broken)
    assert torch.equal(inside, inside_of(scores, (torch.arange(16) != 5).view(2, 8)))
    ids = restrict(broken, inside).topk(3).indices
    assert inside.gather(1, ids).all()  # that token stays in its coreset too


# Nested in their options.


@given(cases(), st.integers(1, 26), st.integers(0, 5))
def test_a_larger_vote_holds_a_smaller_one(case: Case, size: int, more: int) -> None:
    small, large = (case.coreset(des, des.Options("vote", coreset_size=n)) for n in (size, size + more))
    assert not (small & ~large).any()


@given(cases(), st.integers(1, 26))
def test_a_vote_has_the_size_asked_for(case: Case, size: int) -> None:
    inside = case.coreset(des, des.Options("vote", coreset_size=size))
    assert inside.sum() == min(max(size, case.top_k), case.num_experts)


@given(cases(), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 20))
def test_a_larger_share_holds_a_smaller_one(case: Case, one: float, other: float, least: int) -> None:
    small, large = (case.coreset(dmoe, dmoe.Options(p, least)) for p in sorted((one, other)))
    assert not (small & ~large).any()


@given(cases(), st.integers(1, 6))
def test_keeping_more_holds_keeping_fewer_before_the_top_up(case: Case, keep: int) -> None:
    small, large = (case.coreset(des, des.Options("seq", keep=n)) for n in (keep, keep + 1))
    union = {e for row in case.ids[case.voting].tolist() for e in row[:keep]}
    if len(union) >= case.top_k:
        assert set(small.nonzero().flatten().tolist()) == union or keep > case.top_k
        assert not (small & ~large).any()


def test_best_takes_the_lower_index_of_equals() -> None:
    assert best(torch.tensor([[1.0, 2, 2, 1]]), 3).tolist() == [[True, True, True, False]]


# Policies of others.


@pytest.fixture
def most_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The policy of the documentation, as a module that is not part of this package."""
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)[0]
    (tmp_path / "most_wanted.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module("most_wanted")
    sys.modules.pop("most_wanted")
    policies._registered.pop("most_wanted", None)
    policies._installed.cache_clear()


def check_it_runs() -> None:
    model, x = TinyMoE(), torch.randn(2, 24, 16)
    options = {"passes": ["most_wanted"], "block_length": BLOCK, "most_wanted.size": 3}
    backend = Rewriting(**options)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
        (ranked,) = backend.ranked
        used = ranked.view(2 * 24 // BLOCK, BLOCK, -1).isfinite().any(1)
        assert used.sum(-1).tolist() == [3] * len(used)
        torch._dynamo.reset()
        torch.compile(model, backend="dmoe", options={**options, **ATEN})(x)
    report = dmoe_compile.explain(model, x, config=Config(passes=("most_wanted",), inductor=ATEN), verify=True)
    assert report.verified


def test_the_documented_policy_runs_when_registered(most_wanted: ModuleType) -> None:
    assert len(DOCS.read_text().split("```python")[1].splitlines()) < 40
    dmoe_compile.register_policy("most_wanted", most_wanted)
    assert "most_wanted" in policy_names()
    check_it_runs()


def test_the_documented_policy_runs_from_an_entry_point(most_wanted: ModuleType, tmp_path: Path) -> None:
    info = tmp_path / "most_wanted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: most-wanted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{policies.GROUP}]\nmost_wanted = most_wanted\n")
    invalidate_caches()
    policies._installed.cache_clear()
    assert "most_wanted" in policy_names()
    check_it_runs()


def test_its_options_are_checked_like_ours(most_wanted: ModuleType) -> None:
    dmoe_compile.register_policy("most_wanted", most_wanted)
    config = Config.from_options({"passes": ["most_wanted"], "most_wanted.size": 3})
    assert config.selected == {"most_wanted": most_wanted.Options(3)}
    assert config.to_options() == {"passes": ["most_wanted"], "most_wanted.size": 3}
    with pytest.raises(ValueError, match=r"most_wanted\.size=0 must be an integer"):
        Config.from_options({"most_wanted.size": 0})
    with pytest.raises(ValueError, match=r"most_wanted\.sise=3: there is no such option; .* most_wanted\.size"):
        Config.from_options({"most_wanted.sise": 3})


def test_an_entry_point_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(name="broken", value="no_such_module", load=lambda: import_module("no_such_module"))
    monkeypatch.setattr(policies, "_installed", lambda: {"broken": entry})
    with pytest.raises(
        ValueError, match=r"entry point broken = no_such_module of dmoe_compile\.policies can't be loaded"
    ):
        Config.from_options({"passes": ["broken"], "broken.x": 1})


@dataclass
class Thawed:
    size: int = 1


REFUSED = {
    "dmoe": (dmoe, "'dmoe' is a pass already"),
    "a.b": (dmoe, "must be an identifier"),
    "no_options": (SimpleNamespace(coreset=dmoe.coreset), "has no dataclass called Options"),
    "thawed": (SimpleNamespace(Options=Thawed, coreset=dmoe.coreset), "must be frozen"),
    "no_coreset": (SimpleNamespace(Options=dmoe.Options), "has no function coreset"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_policy_is_refused(name: str) -> None:
    policy, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        dmoe_compile.register_policy(name, policy)
    assert name == "dmoe" or name not in policy_names()


def test_a_policys_name_is_text() -> None:
    with pytest.raises(ValueError, match="5 can't name a policy"):
        dmoe_compile.register_policy(5, dmoe)


def test_two_coreset_methods_are_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"'dmoe' and 'des' each choose the coreset of a block"):
        Config(passes=("dmoe", "des"))


def test_policies_are_found_by_name() -> None:
    assert find_policy("dmoe") is dmoe
    assert find_policy("des") is des
