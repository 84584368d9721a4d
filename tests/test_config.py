"""Config and the flat keys of `options=`: they say the same, and what is wrong is named where it was said."""

import re

import pytest
import torch
from dmoe_compile.passes.dmoe import Options
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import dmoe_compile
from dmoe_compile import Config, evaluation
from dmoe_compile.config import _say_unused, known_keys

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")

POLICY_OPTIONS = st.builds(
    Options,
    top_p=st.floats(0, 1, exclude_min=True, allow_subnormal=False),
    min_experts=st.integers(1, 2**40),
)
INDUCTOR = st.fixed_dictionaries(
    {},
    optional={
        "max_autotune": st.booleans(),
        "triton.cudagraphs": st.booleans(),
        "cpp.threads": st.integers(1, 8),
        "joint_custom_pre_pass": st.none(),
    },
)
CONFIGS = st.builds(
    Config,
    passes=st.sampled_from([(), ("dmoe",), ("des",)]),
    block_length=st.integers(1, 2**20),
    max_block_tokens=st.none() | st.integers(1, 2**20),
    scope=st.sampled_from(["block", "batch"]),
    experts=st.sampled_from(["auto", False]),
    stats=st.booleans(),
    mode=st.none() | st.sampled_from(MODES),
    policies=st.dictionaries(st.just("dmoe"), POLICY_OPTIONS),
    inductor=INDUCTOR,
)


@given(CONFIGS)
def test_flat_keys_say_all_that_a_config_says(config):
    assert Config.from_options(config.to_options()) == config


@given(CONFIGS)
def test_flat_keys_are_known_and_flat(config):
    options = config.to_options()
    assert options.keys() <= set(known_keys())
    assert not any(isinstance(value, dict | Options) for value in options.values())


def test_only_what_differs_from_the_defaults_is_said():
    assert Config().to_options() == {}
    assert Config(passes=["dmoe"]).to_options() == {"passes": ["dmoe"]}
    assert Config.from_options(None) == Config.from_options({}) == Config()


def test_a_selected_pass_without_options_runs_with_its_defaults():
    assert Config(passes=["dmoe"]).selected == {"dmoe": Options()}
    chosen = Config.from_options({"passes": ["dmoe"], "dmoe.top_p": 0.8}).selected
    assert chosen == {"dmoe": Options(top_p=0.8)}
    assert Config.from_options({"dmoe.top_p": 0.8}).selected == {}  # options alone select nothing


@pytest.mark.parametrize("passes", [[], ["cover"]], ids=repr)
def test_options_of_a_pass_that_does_not_run_are_said_once(caplog, passes):
    _say_unused.cache_clear()
    for _ in range(2):
        Config.from_options({"passes": passes, "dmoe.top_p": 0.25, "dmoe.min_experts": 3})
    (record,) = caplog.records
    words = "dmoe.top_p=0.25 is of the pass 'dmoe', which passes={!r} does not run; add it to passes or leave"
    assert words.format(passes) in record.getMessage()


@pytest.mark.parametrize("passes", ["auto", ["auto"], ["team", "cover"]], ids=repr)
def test_options_of_a_pass_that_runs_are_not_spoken_of(caplog, passes):
    _say_unused.cache_clear()
    Config.from_options({"passes": passes, "cover.mass": 0.5})
    assert caplog.records == []


def test_inductor_options_are_handed_on_in_either_spelling():
    given = {"max-autotune": True, "triton.cudagraphs": False}
    assert Config.from_options(given).inductor == {"max_autotune": True, "triton.cudagraphs": False}


# What is wrong, and what the message must hold: the value as it was given, and the rule or the nearest names.
WRONG = {
    "unknown key": ({"pases": ["dmoe"]}, "pases=['dmoe']", "nearest", "passes"),
    "a key of ours with a dash": ({"block-length": 8}, "block-length=8", "nearest is block_length"),
    "unknown Inductor key": ({"max_autotunee": True}, "max_autotunee=True", "nearest", "max_autotune"),
    "unknown policy": ({"dmoee.top_p": 0.5}, "dmoee.top_p=0.5", "nearest", "dmoe.top_p"),
    "unknown policy field": ({"dmoe.topp": 0.5}, "dmoe.topp=0.5", "nearest", "dmoe.top_p"),
    "a policy is no key": ({"dmoe": 0.5}, "dmoe=0.5", "nearest"),
    "unknown pass": ({"passes": ["dmeo"]}, "'dmeo'", "nearest", "dmoe"),
    "pass named twice": ({"passes": ["dmoe", "dmoe"]}, "['dmoe', 'dmoe']", "twice"),
    "one name for a list": ({"passes": "dmoe"}, "passes='dmoe'", "list of names"),
    "list of lists": ({"passes": [["dmoe"]]}, "['dmoe']", "nearest", "dmoe"),
    "mode int": ({"mode": 3}, "mode=3", "nearest", "max-autotune"),
    "key is no text": ({3: True}, "3=True", "nearest"),
    "top_p zero": ({"dmoe.top_p": 0.0}, "dmoe.top_p=0.0", "(0, 1]"),
    "top_p negative": ({"dmoe.top_p": -0.5}, "dmoe.top_p=-0.5", "(0, 1]"),
    "top_p above 1": ({"dmoe.top_p": 1.5}, "dmoe.top_p=1.5", "(0, 1]"),
    "top_p nan": ({"dmoe.top_p": float("nan")}, "dmoe.top_p=nan", "(0, 1]"),
    "top_p text": ({"dmoe.top_p": "0.6"}, "dmoe.top_p='0.6'", "number"),
    "top_p bool": ({"dmoe.top_p": True}, "dmoe.top_p=True", "number"),
    "min_experts zero": ({"dmoe.min_experts": 0}, "dmoe.min_experts=0", "at least 1"),
    "min_experts float": ({"dmoe.min_experts": 2.0}, "dmoe.min_experts=2.0", "int"),
    "scope": ({"scope": "sequence"}, "scope='sequence'", "block, batch"),
    "block_length zero": ({"block_length": 0}, "block_length=0", "at least 1"),
    "block_length bool": ({"block_length": True}, "block_length=True", "integer"),
    "block_length text": ({"block_length": "32"}, "block_length='32'", "integer"),
    "max_block_tokens zero": ({"max_block_tokens": 0}, "max_block_tokens=0", "at least 1"),
    "experts text": ({"experts": "yes"}, "experts='yes'", "'auto'", "False"),
    "experts int": ({"experts": 1}, "experts=1", "'auto'", "False"),
    "a check that is no flag": ({"verify_experts": 1}, "verify_experts=1", "True or False"),
    "stats int": ({"stats": 1}, "stats=1", "True or False"),
    "mode unknown": ({"mode": "max_autotune"}, "mode='max_autotune'", "nearest", "max-autotune"),
    "Inductor type": ({"max_autotune": 1}, "max_autotune=1", "bool"),
}


@pytest.mark.parametrize(("options", "parts"), [(o, p) for o, *p in WRONG.values()], ids=WRONG)
def test_what_is_wrong_is_named_with_value_and_rule(options, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as raised:
        Config.from_options(options)
    for part in parts[1:]:
        assert part in str(raised.value)


FIELDS = {"passes", "block_length", "max_block_tokens", "experts", "stats", "mode"}


@pytest.mark.parametrize("options", [o for o, *_ in WRONG.values() if o.keys() <= FIELDS], ids=repr)
def test_config_itself_refuses_what_from_options_refuses(options):
    with pytest.raises(ValueError, match=re.escape(repr(next(iter(options.values()))).strip("[]"))):
        Config(**options)


@pytest.mark.parametrize("policies", [{"dmoe": {"top_p": 0.5}}, {"des": Options()}, {"dmoe": None}], ids=repr)
def test_policies_are_the_options_of_a_pass(policies):
    with pytest.raises(ValueError, match=r"policies\['\w+'\]=.* must be the Options of one of: dmoe"):
        Config(policies=policies)


@pytest.mark.parametrize("wrong", [{"min_experts": 2.5}, {"min_experts": True}, {"top_p": "0.6"}], ids=repr)
def test_policy_options_check_their_types_themselves(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"dmoe.{name}={value!r}")):
        Options(**wrong)


def test_compile_refuses_before_any_call():
    with pytest.raises(ValueError, match=re.escape("dmoe.top_p=1.5 must be a number in (0, 1]")):
        dmoe_compile.compile(nn.Linear(2, 2), options={"passes": ["dmoe"], "dmoe.top_p": 1.5})
    with pytest.raises(ValueError, match="mode='bad' is no mode"):
        dmoe_compile.compile(nn.Linear(2, 2), mode="bad")


@pytest.mark.parametrize(
    ("config", "given"),
    [(Config(passes=["dmoe"]), {"options": {"passes": []}}), (Config(mode="lite"), {"mode": "default"})],
    ids=["passes", "mode"],
)
def test_compile_refuses_an_option_given_twice(config, given):
    with pytest.raises(ValueError, match=r"(passes|mode): given in config and as an argument; give each once"):
        dmoe_compile.compile(nn.Linear(2, 2), config, **given)


def test_compile_refuses_a_mode_given_twice():
    with pytest.raises(ValueError, match="mode: given in options and as an argument; give each once"):
        dmoe_compile.compile(nn.Linear(2, 2), mode="default", options={"mode": "max-autotune"})


NO_MODELS = {
    "compile None": lambda: dmoe_compile.compile(None),
    "explain None": lambda: dmoe_compile.explain(None),
    "explain a name": lambda: dmoe_compile.explain("qwen3_moe"),
    "generate None": lambda: dmoe_compile.generate(None, torch.ones(1, 2, dtype=torch.int64)),
    "prepare None": lambda: dmoe_compile.prepare(None),
    "prepare a name": lambda: dmoe_compile.prepare("qwen3_moe"),
    "unprepare None": lambda: dmoe_compile.unprepare(None),
}


@pytest.mark.parametrize("call", NO_MODELS.values(), ids=NO_MODELS)
def test_what_is_no_model_is_refused(call):
    with pytest.raises(ValueError, match=r"^(None|'qwen3_moe') is no (model|module): give"):
        call()


@pytest.mark.parametrize("options", [5, ["passes"], "dmoe"], ids=repr)
def test_options_are_a_dict(options):
    for call in (Config.from_options, lambda options: dmoe_compile.compile(nn.Linear(2, 2), options=options)):
        with pytest.raises(ValueError, match=re.escape(f"options={options!r} must be a dict")):
            call(options)


def test_a_key_of_inductor_is_text():
    with pytest.raises(ValueError, match="1=2: there is no such option"):
        Config(inductor={1: 2})


@pytest.mark.parametrize("config", [{"passes": ["dmoe"]}, {}, "dmoe"], ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        dmoe_compile.compile,
        lambda model, config: dmoe_compile.explain(model, torch.randn(1, 2), config=config),
        lambda model, config: dmoe_compile.generate(model, torch.ones(1, 2, dtype=torch.int64), config=config),
        lambda model, config: evaluation.evaluate("demo", config, evaluation.Settings()),
    ],
    ids=["compile", "explain", "generate", "evaluate"],
)
def test_a_dict_in_place_of_a_config_is_refused(call, config):
    with pytest.raises(
        ValueError, match=re.escape(f"config={config!r} must be a Config; Config.from_options({{...}})")
    ):
        call(nn.Linear(2, 2), config)


@pytest.mark.parametrize("options", [{"passes": ["dmeo"]}, {"dmoe.top_p": 7.0}, {"max_autotune": 1}], ids=repr)
def test_plain_torch_compile_tells_at_the_first_call_in_the_same_words(options):
    with pytest.raises(ValueError, match="=") as expected:
        Config.from_options(options)
    compiled = torch.compile(nn.Linear(2, 2), backend="dmoe", options=options)  # torch hands options over unread
    with pytest.raises(BackendCompilerFailed, match=re.escape(str(expected.value))) as raised:
        compiled(torch.randn(1, 2))
    assert isinstance(raised.value.inner_exception, ValueError)
    assert str(raised.value.inner_exception) == str(expected.value)
