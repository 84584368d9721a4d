"""prepare(): what only looks right, and what else it refuses, with nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import JetMoeConfig, LongcatFlashConfig, NllbMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

import forms
from dmoe_compile import prepare
from loop_blocks import HIDDEN, Wrapper, inputs, output, replaced
from tiny_moe import INDUCTOR

# What only looks right: wrong mathematics that the block's own weights, or small inputs, would not show.


class Biased(forms.SoftmaxLoop):
    """The choice has a bias, which is zero before the weights are loaded."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(rows)
        scores = logits.sigmoid()
        ids = (scores + self.bias).topk(self.top_k).indices
        weights = scores.gather(-1, ids)
        return Wrapper(self.experts)(rows, ids, weights).view(hidden_states.shape), logits


class Clamped(forms.SoftmaxLoop):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        out, logits = super().forward(hidden_states)
        return out.clamp(-100, 100), logits


class Limited(forms.SoftmaxLoop):
    """An expert takes no more than 64 tokens."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(rows)
        weights, ids = logits.softmax(-1).topk(self.top_k)
        place = F.one_hot(ids, self.num_experts).sum(1).cumsum(0).gather(-1, ids)
        return Wrapper(self.experts)(rows, ids, weights * (place <= 64)).view(hidden_states.shape), logits


class Louder(forms.SoftmaxLoop):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        out, logits = super().forward(hidden_states)
        return out * 1.02, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Biased, Clamped, Limited, Louder])
def test_what_only_looks_right_is_refused(kind: type[forms.SoftmaxLoop], dtype: torch.dtype) -> None:
    block = kind(forms.config(hidden_size=64)).eval().to(dtype)
    (entry,) = prepare(block).blocks
    assert "of no known form" in entry.reason


def test_weights_that_show_nothing_do_not_mislead() -> None:
    """Not renormalised, with experts that are all zero when it is prepared."""
    block = forms.build("softmax_loop", norm_topk_prob=False)
    plain = copy.deepcopy(block)
    for expert in block.experts:
        nn.init.zeros_(expert.down_proj.weight)
    assert str(prepare(block).prepared[0].how) == "the whole block (softmax)"
    block.load_state_dict(plain.state_dict())
    assert_close(output(block, inputs()), output(plain, inputs()), **INDUCTOR)


def test_a_softmax_in_low_precision_is_told_from_one_in_fp32() -> None:
    class Native(forms.SoftmaxLoop):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            rows = hidden_states.view(-1, hidden_states.shape[-1])
            logits = self.gate(rows)
            weights, ids = logits.softmax(-1).topk(self.top_k)
            return Wrapper(self.experts)(rows, ids, weights).view(hidden_states.shape), logits

    block = Native(forms.config(num_experts=128)).eval().to(torch.bfloat16)  # so many that some scores are equal
    (entry,) = prepare(block).blocks
    assert entry.how == "the whole block (softmax, in the logits' dtype)"


# What is refused, by name, with nothing changed.


def tied(block: Any) -> None:
    block.experts[3].up_proj.weight = block.experts[2].up_proj.weight


def wider(block: Any) -> None:
    block.experts[3] = forms.MLP(forms.config(), 32)


def hooked(block: Any) -> None:
    block.experts[3].down_proj.register_forward_hook(lambda _module, _args, out: out * 2)


def with_a_forward_of_its_own(block: Any) -> None:
    block.experts[0].forward = lambda x: x


def quantised(block: Any) -> None:
    for expert in block.experts:
        expert.up_proj = torch.ao.nn.quantized.dynamic.Linear(HIDDEN, 24)


def quantised_by_subclass(block: Any) -> None:
    class Linear4bit(nn.Linear):
        """As bitsandbytes has it: a Linear that reads its weight in its own way."""

    for expert in block.experts:
        expert.up_proj.__class__ = Linear4bit


def on_meta(block: Any) -> None:
    block.to("meta")


def deeper(block: Any) -> None:
    for i in range(12):
        block.experts[i] = nn.Sequential(nn.Linear(HIDDEN, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, HIDDEN))


def with_a_norm(block: Any) -> None:
    for expert in block.experts:
        expert.act_fn = nn.Sequential(nn.SiLU(), nn.LayerNorm(24))


def differing_in_what_they_compute(block: Any) -> None:
    class Other(nn.SiLU):
        __qualname__ = __name__ = "SiLU"

        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

        def _get_name(self) -> str:
            return "SiLU"

    block.experts[7].act_fn = Other()


REFUSED: dict[Callable[[Any], None], str] = {
    tied: "2.up_proj.weight is 3.up_proj.weight",
    wider: "experts 0 and 3 are not of one shape",
    hooked: "hooks (expert 3)",
    with_a_forward_of_its_own: "a forward of their own",
    quantised: "quantized.dynamic.modules.linear.Linear",
    quantised_by_subclass: "Linear4bit",
    on_meta: "meta device",
    deeper: "not Linears on the input",
    with_a_norm: "LayerNorm",
    differing_in_what_they_compute: "off by",
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused(change: Callable[[Any], None]) -> None:
    block, x = forms.build("softmax_loop"), inputs()
    change(block)
    pointers = [parameter.data_ptr() for parameter in block.parameters()]
    own = None if change in (on_meta, quantised) else output(block, x)
    (entry,) = prepare(block).blocks
    assert REFUSED[change] in entry.reason
    assert not entry.how
    assert [parameter.data_ptr() for parameter in block.parameters()] == pointers
    assert not replaced(block)
    if own is not None:
        assert_close(output(block, x), own, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["softmax_loop", "expert_hit"])
def test_experts_that_accelerate_offloaded_are_named_so(form: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    block = forms.build(form)
    accelerate.cpu_offload(block, execution_device=torch.device("cpu"))
    (entry,) = prepare(block).blocks
    assert entry.reason == "its experts are offloaded by accelerate; load the model without offloading"


def test_stacked_experts_on_meta_are_refused() -> None:
    block = forms.build("expert_hit").to("meta")
    (entry,) = prepare(block).blocks
    assert "meta device" in entry.reason


# What a forward does beside its result.


def test_what_its_forward_changes_is_kept_or_refused() -> None:
    class Counting(forms.SoftmaxLoop):
        load: Tensor

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("load", torch.zeros(config.num_experts))
            self.calls = 0

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            self.load += 1
            self.calls += 1
            return super().forward(hidden_states)

    block = Counting(forms.config()).eval()
    (entry,) = prepare(block).blocks
    assert entry.reason == "its forward is of no known form; it changes calls, load"
    assert (block.load == 0).all()
    assert block.calls == 0


def test_what_its_experts_change_is_not_lost() -> None:
    class Counting(forms.MLP):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    block = forms.build("softmax_loop")
    block.experts = nn.ModuleList([Counting(forms.config()) for _ in range(12)])
    (entry,) = prepare(block).blocks
    assert entry.reason.startswith("its experts change 0.calls, 1.calls")
    assert not any("calls" in vars(expert) for expert in block.experts)


def test_a_method_with_an_argument_that_varies_is_refused() -> None:
    class Chunked(forms.Bailing):
        def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor, tokens: int = 0) -> Tensor:
            return super().moe_infer(x, topk_ids, topk_weight) if tokens else self.in_chunks(x, topk_ids, topk_weight)

        def in_chunks(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> list[Tensor]:
            return [self.moe_infer(x, topk_ids, topk_weight, len(x))]

        def forward(self, hidden_states: Tensor) -> Tensor:
            ids, weights, _ = self.gate(hidden_states)
            (out,) = self.in_chunks(hidden_states.view(-1, HIDDEN), ids, weights)
            return out.view(hidden_states.shape)

    block = Chunked(forms.config()).eval()
    (entry,) = prepare(block).blocks
    assert entry.reason == "its forward is of no known form"


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], dict[str, int], str]] = {
    "jetmoe": (
        lambda: JetMoeMoE(JetMoeConfig(hidden_size=16, intermediate_size=8, num_local_experts=4)),
        {"input_linear": 4, "output_linear": 4},
        "JetMoeParallelExperts.forward() loops over stacked weights",
    ),
    "longcat_flash": (
        lambda: LongcatFlashMoE(
            LongcatFlashConfig(hidden_size=16, expert_ffn_hidden_size=8, n_routed_experts=4, zero_expert_num=2)
        ),
        {"experts": 6},
        "LongcatFlashExperts.forward() loops over stacked weights",
    ),
    "nllb_moe": (
        lambda: NllbMoeSparseMLP(NllbMoeConfig(d_model=16, num_experts=4), 8),
        {"experts": 4},
        "NllbMoeExperts.forward() loops over a dict or list of experts",
    ),
}


@pytest.mark.parametrize(("make", "names", "why"), UNKNOWN.values(), ids=UNKNOWN)
def test_loops_in_another_form_are_named(make: Callable[[], nn.Module], names: dict[str, int], why: str) -> None:
    report = prepare(make().eval())
    assert {block.name: block.num_experts for block in report.refused} == names
    assert {block.reason for block in report.blocks} == {f"{why} in a form that is not known, see docs/forms.md"}
