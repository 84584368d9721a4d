"""What is seen of a running block, and templates of whole blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import forms
from dmoe_compile.blocks import Template, observe, templates

HIDDEN, EXPERTS, TOP_K = (forms.CONFIG[key] for key in ("hidden_size", "num_experts", "num_experts_per_tok"))


def hidden() -> Tensor:
    return torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(0))


def seams_of(name: str) -> list[tuple[str, str, dict[str, str]]]:
    block = forms.build(name)
    with torch.no_grad():
        seen = observe(block, block.experts, hidden())
    assert not {"forward", "moe_infer"} & set(vars(block))  # what watched is gone
    assert not any(child._forward_hooks for child in block.children())
    return [(type(seam.owner).__name__, seam.method, seam.roles) for seam in seen.seams]


def test_a_method_that_runs_the_experts_is_a_seam() -> None:
    roles = {"hidden": "x", "ids": "topk_ids", "weights": "topk_weight"}
    assert seams_of("bailing") == [("Bailing", "moe_infer", roles)]


def test_a_block_in_one_function_has_no_seam() -> None:
    assert seams_of("softmax_loop") == []


def test_what_children_got_and_gave_is_noted() -> None:
    block = forms.build("softmax_loop")
    with torch.no_grad():
        seen = observe(block, block.experts, hidden())
        expected = block(hidden())
    assert list(seen.children) == ["gate"]
    args, logits = seen.children["gate"]
    assert args[0].shape == (16, HIDDEN)
    assert logits.shape == (16, EXPERTS)
    assert seen.selected == [TOP_K]
    assert_close(seen.output, expected, rtol=0, atol=0)


def test_templates_take_their_shape_from_what_was_seen() -> None:
    block = forms.build("softmax_loop")
    with torch.no_grad():
        found = list(templates(block, observe(block, block.experts, hidden())))
    assert {(t.gate, t.takes_rows, t.gives, t.top_k, t.returns) for t in found} == {
        ("gate", True, ("logits",), TOP_K, ("out", "logits"))
    }
    assert {t.score for t in found} == {"softmax", "sigmoid", "top-k softmax"}
    assert len(set(found)) == len(found)


def test_a_result_that_nobody_knows_leaves_no_template() -> None:
    class Counting(forms.SoftmaxLoop):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            out, logits = super().forward(hidden_states)
            return out, logits.sum(0)

    block = Counting(forms.config()).eval()
    with torch.no_grad():
        assert list(templates(block, observe(block, block.experts, hidden()))) == []


def routed(template: Template, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids and weights [T, k] that a template hands to the experts."""
    handed: list[Tensor] = []

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, EXPERTS)
            self.gate.forward = lambda _: logits

    def run(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        handed.extend([ids, weights])
        return rows

    template(Router(), run, torch.zeros(1, len(logits), HIDDEN))
    return handed[0], handed[1]


LOGITS = torch.tensor([[2.0, -1.0, 0.5] + [-4.0] * (EXPERTS - 3), [0.0, 3.0, 1.0] + [-4.0] * (EXPERTS - 3)])
TOP_2 = LOGITS.topk(2)
SOFTMAX, SIGMOID = LOGITS.softmax(-1).gather(-1, TOP_2.indices), TOP_2.values.sigmoid()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"score": "softmax"}, SOFTMAX),
        ({"score": "softmax", "renormalise": True}, SOFTMAX / SOFTMAX.sum(-1, keepdim=True)),
        ({"score": "sigmoid"}, SIGMOID),
        ({"score": "sigmoid", "renormalise": True, "scale": 2.5}, 2.5 * SIGMOID / SIGMOID.sum(-1, keepdim=True)),
        ({"score": "top-k softmax"}, TOP_2.values.softmax(-1)),
        ({"score": "softmax", "cast": True}, SOFTMAX),
    ],
)
def test_a_template_routes_as_its_options_say(options: dict[str, object], weights: Tensor) -> None:
    template = Template("gate", True, ("logits",), 2, **options)  # type: ignore[arg-type]
    ids, given = routed(template, LOGITS)
    assert_close(ids, TOP_2.indices)
    assert_close(given, weights)


def test_templates_say_what_they_are() -> None:
    template = Template("gate", True, ("logits",), 2, "sigmoid", renormalise=True, scale=2.5, shared="shared_expert")
    assert str(template) == "the whole block (sigmoid, renormalised, times 2.5, plus shared_expert)"
    assert str(Template("gate", True, ("ids", "weights"), 2)) == "the whole block (ids and weights of gate)"
