"""A replaced method: whose class a module then has, when its own code runs, and what it takes to notice a change."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmoe_compile.replacement import Cut, cut_of, install, settings_of, uninstall, why_stale


class Adding(nn.Module):
    """Its experts add 1; what replaces them adds 100."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.name = 2, "a"
        self.child = nn.Linear(1, 1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, scale: float = 1.0) -> Tensor:
        """Add."""
        return scale * (x + 1)


def plus_100(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return hidden + 100


ARGS = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
ROLES = {"hidden": "x", "ids": "ids", "weights": "weights"}


def replaced(constants: dict[str, Any] | None = None) -> Adding:
    module = Adding().eval()
    parameters = ("x", "ids", "weights", "scale")
    cut = Cut("forward", plus_100, parameters, ROLES, constants or {}, settings=settings_of(module))
    install(module, cut)
    return module


def added(module: Adding, **kwargs: Any) -> float:
    return module(*ARGS, **kwargs)[0, 0].item()


def test_a_replaced_module_is_what_it_was() -> None:
    module = replaced()
    assert added(module) == 100
    assert isinstance(module, Adding)
    assert (type(module).__name__, type(module).__qualname__) == ("Adding", "Adding")
    assert type(module).__module__ == __name__
    assert list(inspect.signature(module.forward).parameters) == ["x", "ids", "weights", "scale"]
    assert module.forward.__doc__ == "Add."
    uninstall(module)
    assert type(module) is Adding
    assert cut_of(module) is None
    assert added(module) == 1


def test_modules_of_one_class_share_a_class() -> None:
    assert type(replaced()) is type(replaced())  # which Dynamo guards on


def test_its_own_code_runs_in_training_mode() -> None:
    module = replaced().train()
    assert added(module) == 1
    assert added(module.eval()) == 100


def test_its_own_code_runs_for_other_arguments() -> None:
    module = replaced()
    assert added(module, scale=2.0) == 2  # verified without
    with_scale = replaced({"scale": 1.0})
    assert added(with_scale, scale=1.0) == 100
    assert added(with_scale, scale=2.0) == 2
    assert added(with_scale) == 1
    with pytest.raises(TypeError):
        module(*ARGS, 1.0, None)


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 3), ("top_k", 2.0), ("name", "b"), ("name", None), ("child", nn.Linear(1, 1))]
)
def test_a_change_of_what_it_was_compared_with_makes_it_stale(name: str, value: Any) -> None:
    module = replaced()
    setattr(module, name, value)
    cut = cut_of(module)
    assert cut is not None
    assert cut.stale == f"its {name} has changed"
    assert why_stale(module, cut)
    assert added(module) == 1


@pytest.mark.parametrize(("name", "value"), [("top_k", 2), ("name", "a"), ("another", 3), ("a_tensor", torch.ones(2))])
def test_other_attributes_do_not(name: str, value: Any) -> None:
    module = replaced()
    setattr(module, name, value)
    assert added(module) == 100


def test_settings_are_plain_attributes_of_the_class() -> None:
    module = Adding()
    module.config = object()
    module.scale = 1.5
    assert settings_of(module) == {"top_k": 2, "name": "a", "scale": 1.5}


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_replaced_too(way: Any) -> None:
    other = way(replaced())
    assert added(other) == 100
    other.top_k = 3
    assert added(other) == 1
    uninstall(other)
    assert type(other) is Adding


def test_a_bound_method_may_outlive_its_replacement() -> None:
    module = replaced()
    forward = module.forward  # as hooks of accelerate keep it
    uninstall(module)
    assert forward(*ARGS)[0, 0] == 1


def test_compiled_code_notices_too() -> None:
    module = replaced()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert added(compiled) == 100  # type: ignore[arg-type]
    module.top_k = 3
    assert added(compiled) == 1  # type: ignore[arg-type]
