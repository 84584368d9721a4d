"""The pass over the joint graph: gradients through the rewrite, and when Inductor may reuse what it compiled."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from dmoe_compile.passes import dmoe, pipeline, policies
from torch.testing import assert_close

from dmoe_compile import Config, joint
from dmoe_compile.joint import JointPass
from dmoe_compile.notices import Notices
from tiny_moe import DMOE, MODEL, TinyMoE, compiled, eager

pytestmark = pytest.mark.usefixtures("uncached")


@dataclass(frozen=True)
class _Source:
    """What Dynamo says of an input."""

    name: str


@pytest.fixture
def x():
    return torch.randn(2, 24, 16)


@pytest.mark.parametrize("groups", [None, (4, 2)], ids=["softmax", "groups"])
def test_gradients_are_the_eager_rules(x, groups):
    model = TinyMoE(groups=groups)
    upstream = torch.randn_like(x)
    gradients = []
    for function in (functools.partial(eager, model), compiled(model, DMOE, fullgraph=True)):
        given = x.clone().requires_grad_()
        trained = dict(model.named_parameters())
        wanted = [given, *(weight for name, weight in trained.items() if name != "bias")]  # a bias only selects
        out = function(given)
        gradients.append((out, *torch.autograd.grad(out, wanted, upstream)))
    # Sums over 48 tokens in another order; a token sent to another expert moves a gradient by 0.1 or more.
    assert_close(gradients[1], gradients[0], **MODEL)
    unrestricted = torch.autograd.grad(model(x), model.up, upstream)[0]
    assert (unrestricted - gradients[0][2]).abs().max() > 0.1


def test_uuid_says_all_that_the_joint_graph_depends_on(monkeypatch):
    def uuid(options=DMOE, path="L['x']"):
        graph = torch.fx.Graph()
        graph.placeholder("x")._dynamo_source = _Source(path)
        graph.output(())
        return JointPass(Config.from_options(options), torch.fx.GraphModule({}, graph), Notices()).uuid()

    one = uuid()
    assert uuid() == one
    others = [
        uuid({**DMOE, "dmoe.top_p": 0.31}),
        uuid({**DMOE, "dmoe.min_experts": 4}),
        uuid({**DMOE, "block_length": 9}),
        uuid({**DMOE, "max_block_tokens": 64}),
        uuid({**DMOE, "scope": "batch"}),
        uuid(path="L['y']"),
        uuid(path="L['self']._parameters['x']"),
    ]
    monkeypatch.setattr(joint, "_source_hash", lambda: "other sources")
    others.append(uuid())
    assert len({one, *others}) == 1 + len(others)


def test_a_policy_of_another_package_is_never_served_from_a_cache(monkeypatch):
    """What its rule depends on, other modules or its own state, nobody knows."""
    rule = SimpleNamespace(Options=dmoe.Options, coreset=dmoe.coreset)
    monkeypatch.setattr(policies, "_registered", {**policies._registered, "mine": rule})
    graph = torch.fx.Graph()
    graph.output(())
    made = JointPass(Config.from_options({"passes": ["mine"]}), torch.fx.GraphModule({}, graph), Notices())
    assert made.uuid() != made.uuid()


def test_source_hash_follows_a_changed_rule(monkeypatch, tmp_path):
    here = tmp_path / "pipeline.py"
    here.write_text("rule = 1")
    monkeypatch.setattr(pipeline, "__file__", str(here))
    before = joint._source_hash.__wrapped__()
    here.write_text("rule = 2")
    assert joint._source_hash.__wrapped__() != before
