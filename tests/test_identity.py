"""The self-check that ships: a coreset of all experts changes no bit of what Inductor computes.

The rule runs in full, votes, sorts and masks, and must come out where it began. A wrong axis, a lost token
or a rounding on the way shows as one flipped expert.
"""

import dataclasses
import functools
import itertools

import pytest
import torch
from dmoe_compile.passes import dmoe

import dmoe_compile
import zoo
from dmoe_compile import Config
from pairwise import covering
from reference_model import Rewriting
from tiny_moe import ATEN, TinyMoE

CONFIG = Config(passes=("dmoe",), block_length=16)
# Every method under options that choose all experts. auto is told of figures with which a coreset pays.
PAYS = {"auto.unique_experts": 16, "auto.coreset_experts": 8, "auto.gb_per_s": 1, "auto.tflop_per_s": 1000}
METHODS = {
    "dmoe": {"passes": ["dmoe"], "dmoe.min_experts": 2**31},
    "dmoe, batch": {"passes": ["dmoe"], "dmoe.min_experts": 2**31, "scope": "batch"},
    "des seq": {"passes": ["des"], "des.keep": 2**31},
    "des vote": {"passes": ["des"], "des.variant": "vote", "des.coreset_size": 2**31},
    "cover": {"passes": ["cover"], "cover.mass": 1.0},
    "cover, batch": {"passes": ["cover"], "cover.mass": 1.0, "scope": "batch"},
    "top_any": {"passes": ["top_any"], "top_any.ratio": 0.0},
    "dmoe and top_any": {"passes": ["dmoe", "top_any"], "dmoe.min_experts": 2**31, "top_any.ratio": 0.0},
    "auto": {"passes": "auto", "cover.mass": 1.0, **PAYS},
}
DTYPES = (torch.float32, torch.bfloat16)
SETTINGS = list(itertools.product(zoo.EXPERTS, DTYPES))
IN_CODE = ("qwen3_moe", "deepseek_v3", "gpt_oss")  # softmax; sigmoid, bias and groups; bare logits
FIRST_ROUTED = {"deepseek_v3": 2}  # its first layer is dense
# Every method on one model of each kind of router, dmoe and cover on all of them; nightly every method on every model.
OFTEN = {
    *itertools.product(("diffusion_gemma", *IN_CODE), METHODS),
    *itertools.product(zoo.ROUTABLE, ("dmoe", "cover")),
}


def holds(name, experts, dtype, *, config=CONFIG, dynamic=False):
    num_layers = FIRST_ROUTED.get(name, 1)
    model = zoo.build(name, experts, dtype, num_layers=num_layers)
    inputs = zoo.inputs(name)  # two blocks and a half
    if dynamic:
        for tensor in inputs.values():
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
    report = dmoe_compile.explain(model, config=config, verify=True, **inputs)
    assert [site.name for site in report.sites if site.rewritten] == list(zoo.expected(name, num_layers).names)
    return report.verified


@pytest.mark.parametrize(
    ("name", "experts", "dtype"),
    [(name, *SETTINGS[i % len(SETTINGS)]) for i, name in enumerate(zoo.ROUTABLE)],
)
def test_all_experts_identity(name, experts, dtype):
    """Every model once; forms of experts and dtypes take turns.

    Three models, one for each kind of router, go through Inductor's own code; the others call ATen, in a fifth
    of the time.
    """
    config = CONFIG if name in IN_CODE else dataclasses.replace(CONFIG, inductor=ATEN)
    assert holds(name, experts, dtype, config=config)


EVERY = [
    {"name": name, "experts": experts, "dtype": dtype, "dynamic": dynamic}
    for name, experts, dtype, dynamic in itertools.product(zoo.ROUTABLE, zoo.EXPERTS, DTYPES, (False, True))
]
IN_OWN_CODE = covering(EVERY)


@pytest.mark.nightly
@pytest.mark.parametrize("setting", EVERY, ids=lambda setting: "-".join(map(str, setting.values())))
def test_all_experts_identity_in_every_setting(setting):
    """In Inductor's own code as many as have any two of a model, a form, a dtype and a kind of sizes together."""
    config = CONFIG if setting in IN_OWN_CODE else dataclasses.replace(CONFIG, inductor=ATEN)
    assert holds(**setting, config=config)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*each, marks=() if each in OFTEN else pytest.mark.nightly)
        for each in itertools.product(zoo.ROUTABLE, METHODS)
    ],
)
def test_all_experts_identity_of_every_method(name, method):
    """The rewritten graph, run operation by operation, beside the graph as it was."""
    result, rewritten = operation_by_operation(name, **METHODS[method])
    assert rewritten == list(zoo.expected(name, FIRST_ROUTED.get(name, 1)).names)
    assert torch.equal(result, as_it_was(name))


def operation_by_operation(name, **options):
    """Return what the first output is, and the names of the sites that were rewritten."""
    model = zoo.build(name, num_layers=FIRST_ROUTED.get(name, 1))
    rewriting = Rewriting(**options, block_length=16)
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model, backend=rewriting, fullgraph=True)(**zoo.inputs(name))[0]
    return result, [outcome.site.name for outcome in rewriting.outcomes if outcome.rewritten]


@functools.cache
def as_it_was(name):
    result, rewritten = operation_by_operation(name, passes=[])
    assert not rewritten
    return result


@pytest.mark.nightly
@pytest.mark.parametrize("method", [method for method in METHODS if method != "dmoe" and "top_any" not in method])
@pytest.mark.parametrize("name", zoo.ROUTABLE)
def test_all_experts_identity_of_every_method_through_inductor(name, method):
    """Forms of experts and dtypes take turns. top_any adds to what Inductor fuses, and so to where it rounds."""
    experts, dtype = SETTINGS[(zoo.ROUTABLE.index(name) + list(METHODS).index(method)) % len(SETTINGS)]
    code = {} if name in IN_CODE else ATEN
    assert holds(name, experts, dtype, config=Config.from_options({**METHODS[method], "block_length": 16, **code}))


def _without_the_last(scores, ids, voting, options):
    inside = _coreset(scores, ids, voting, options)
    return inside & (torch.arange(inside.shape[-1], device=inside.device) < inside.shape[-1] - 1)


_coreset = dmoe.coreset


def test_a_wrong_rule_is_found(monkeypatch):
    model, x, config = TinyMoE(), torch.randn(2, 24, 16), dataclasses.replace(CONFIG, inductor=ATEN)
    assert dmoe_compile.explain(model, x, config=config, verify=True).verified
    torch._dynamo.reset()
    monkeypatch.setattr(dmoe, "coreset", _without_the_last)
    report = dmoe_compile.explain(model, x, config=config, verify=True)
    assert [site.rewritten for site in report.sites] == [True]
    assert report.verified is False
    assert "all-experts identity: BROKEN" in str(report)


def test_what_was_never_run_is_not_verified(monkeypatch):
    """A rule that can't be traced leaves the model alone: equal bits, but no proof of anything."""

    def fail(*args, **kwargs):
        raise RuntimeError("no such rule")

    monkeypatch.setattr(dmoe, "coreset", fail)
    config = dataclasses.replace(CONFIG, inductor=ATEN)
    report = dmoe_compile.explain(TinyMoE(), torch.randn(2, 24, 16), config=config, verify=True)
    assert "RuntimeError: no such rule" in report.warnings[0]
    assert not report.verified
