"""Models with Python loops over experts, compiled with no call of prepare(); and what happens where that is off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import counters
from torch.testing import assert_close

import dmoe_compile
import forms
from dmoe_compile import Config, auto_prepare, prepare
from tiny_moe import INDUCTOR

pytestmark = pytest.mark.usefixtures("aten")
ALL = {"passes": ["dmoe"], "block_length": 8, "dmoe.min_experts": 12}


class Model(nn.Module):
    def __init__(self, name: str = "softmax_loop") -> None:
        super().__init__()
        self.block = forms.build(name)
        self.norm = nn.LayerNorm(forms.CONFIG["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(self.norm(x))
        return x + (result[0] if isinstance(result, tuple) else result)


def as_module(model: nn.Module, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, **kwargs)


def as_bound_method(model: nn.Module, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model.forward, **kwargs)


def in_place(model: nn.Module, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    model.compile(**kwargs)
    return model


def in_a_function(model: nn.Module, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: model(x) * 1, **kwargs)


def as_argument(model: nn.Module, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        return module(x) * 1

    compiled = torch.compile(run, **kwargs)
    return lambda x: compiled(model, x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 16, forms.CONFIG["hidden_size"])


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("way", [as_module, as_bound_method, in_place, in_a_function, as_argument])
@torch.no_grad()
def test_prepared_when_compiled(way: Callable[..., Any], fullgraph: bool, x: Tensor) -> None:
    model = Model()
    own = model(x)
    counters.clear()
    got = way(model, backend="dmoe", options=ALL, fullgraph=fullgraph)(x)
    assert_close(got, own, **INDUCTOR)
    assert counters["dmoe"]["sites_rewritten"] == 1
    assert not counters["graph_break"]
    assert hasattr(model.block, "_dmoe_kind")


@torch.no_grad()
def test_survives_a_reset(x: Tensor) -> None:
    torch._dynamo.reset()
    torch._dynamo.reset()
    assert callback_handler.start_callbacks == [auto_prepare._on_compile]
    test_prepared_when_compiled(as_module, True, x)


def test_other_callbacks_are_kept_and_cleared_as_before() -> None:
    def other(_args: Any) -> None:
        """Another tool's."""

    callback_handler.register_start_callback(other)
    auto_prepare.install()
    assert callback_handler.start_callbacks == [auto_prepare._on_compile, other]
    torch._dynamo.reset()
    assert callback_handler.start_callbacks == [auto_prepare._on_compile]


@torch.no_grad()
def test_not_without_a_pass(x: Tensor) -> None:
    """Without a pass the model compiles as Inductor would compile it, bit for bit."""
    model = Model()
    stock = torch.compile(model)(x)
    for options in ({}, {"passes": []}, {"experts": False}):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="dmoe", options=options)(x), stock)
        assert not hasattr(model.block, "_dmoe_kind")


@torch.no_grad()
def test_not_for_another_backend(x: Tensor) -> None:
    model = Model()
    torch.compile(model, backend="eager")(x)
    assert not hasattr(model.block, "_dmoe_kind")


@torch.no_grad()
def test_off_names_prepare(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    own = model(x)
    with caplog.at_level(logging.WARNING, "dmoe_compile"):
        got = torch.compile(model, backend="dmoe", options={**ALL, "auto_prepare": False})(x)
    assert_close(got, own, **INDUCTOR)
    assert not hasattr(model.block, "_dmoe_kind")
    assert "dmoe_compile.prepare(model)" in caplog.text


@torch.no_grad()
def test_what_was_left_alone_is_prepared_when_it_may_be(x: Tensor) -> None:
    """By another torch.compile(), after a hook is gone or with other options."""
    model = Model()
    hook = model.block.experts[0].register_forward_hook(lambda _module, _args, out: out)
    torch.compile(model, backend="dmoe", options=ALL)(x)
    assert not hasattr(model.block, "_dmoe_kind")
    hook.remove()
    torch.compile(model, backend="dmoe", options={**ALL, "auto_prepare": False})(x)
    assert not hasattr(model.block, "_dmoe_kind")
    torch._dynamo.reset()
    torch.compile(model, backend="dmoe", options=dict(ALL))(x)
    assert hasattr(model.block, "_dmoe_kind")


@torch.no_grad()
def test_refusals_are_warned_about_once(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    model.block.experts[0].register_forward_hook(lambda _module, _args, out: out)
    own = model(x)
    with caplog.at_level(logging.WARNING, "dmoe_compile"):
        compiled = torch.compile(model, backend="dmoe", options=ALL)
        assert_close(compiled(x), own, **INDUCTOR)
        compiled(x[:, :8])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "the experts of block stay in a Python loop" in message
    assert "hook" in message


@torch.no_grad()
def test_a_part_that_is_compiled_on_its_own_does_not_compile_early(x: Tensor) -> None:
    model = Model("bailing")
    model.block.shared_experts.compile(backend="eager")
    own = model(x)
    assert_close(torch.compile(model, backend="dmoe", options=ALL)(x), own, **INDUCTOR)


@torch.no_grad()
def test_compile_does_both_steps(x: Tensor) -> None:
    model = Model()
    own = model(x)
    options = {"dmoe.min_experts": 4, "dmoe.top_p": 0.3}
    config = Config(passes=("dmoe",), block_length=8)
    compiled = dmoe_compile.compile(model, config, fullgraph=True, options=options)
    assert hasattr(model.block, "_dmoe_kind")  # at once, not at the first call
    assert not torch.allclose(compiled(x), own, **INDUCTOR)
    lossless = Model()
    dmoe_compile.compile(lossless)
    assert not hasattr(lossless.block, "_dmoe_kind")


@torch.no_grad()
def test_where_dynamo_has_changed_the_way_out_is_named(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert auto_prepare.is_available()
    monkeypatch.setattr(auto_prepare, "_WANTED", {"a local that _compile() does not have"})
    model = Model()
    own = model(x)
    with caplog.at_level(logging.WARNING, "dmoe_compile"):
        assert_close(torch.compile(model, backend="dmoe", options=ALL)(x), own, **INDUCTOR)
    assert not hasattr(model.block, "_dmoe_kind")
    (record,) = caplog.records
    assert "dmoe_compile.prepare(model)" in record.getMessage()


def test_a_bad_option_is_the_backends_to_report(x: Tensor) -> None:
    model = Model()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="there is no such option"), torch.no_grad():
        torch.compile(model, backend="dmoe", options={**ALL, "dmoe.topp": 1})(x)


@torch.no_grad()
def test_a_prepared_model_is_not_prepared_again(x: Tensor) -> None:
    model = Model()
    prepare(model)
    held = vars(model.block)["_dmoe"]
    torch.compile(model, backend="dmoe", options=ALL, fullgraph=True)(x)
    assert vars(model.block)["_dmoe"] is held
