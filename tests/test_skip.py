"""Decoded tokens are left out of grouped matmuls: which rows these are given, and that nothing else changes.

B, S: sequences, tokens of each; E, k: experts, experts a token
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dmoe_compile.passes.skip import skip
from torch import Tensor, nn
from torch.testing import assert_close

import dmoe_compile
import forms
import zoo
from dmoe_compile import prepare
from tiny_moe import ATEN, INDUCTOR

B, S = 2, 8
SIZE = (B, S)
ALL = torch.ones(SIZE, dtype=torch.bool)
SOME = torch.rand(SIZE, generator=torch.Generator().manual_seed(3)) < 0.5


@contextmanager
def skipped() -> Iterator[list[bool]]:
    """Give what skip() said of each site."""
    said: list[bool] = []

    def listen(*args: Any) -> bool:
        said.append(skip(*args))
        return said[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmoe_compile.passes.team.skip", listen)
        yield said


@contextmanager
def rows_multiplied() -> Iterator[list[int]]:
    """Give the rows of every grouped matmul that runs, while NaN lies in all that it leaves out."""
    from transformers.integrations import moe

    rows: list[int] = []
    own = moe._grouped_mm_fallback

    def watched(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        rows.append(int(offs[-1]))
        out = own(input, weight, offs)
        out[rows[-1] :] = float("nan")
        return out

    with torch.library._scoped_library("transformers", "IMPL") as library:
        library.impl("grouped_mm_fallback", watched, "CPU", allow_override=True)
        yield rows


def moe_of(name: str) -> nn.Module:
    if name in forms.FORMS:
        block = forms.build(name)
        assert not prepare(block).refused
        return block
    return zoo.build(name).get_submodule(zoo.expected(name).names[0])


def output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "softmax_loop", "bailing", "hit_loop"])
def test_decoded_tokens_are_multiplied_by_nobody(name: str) -> None:
    """With a gate of its own, groups or a shared expert; NaN in what is left out reaches nobody."""
    block = moe_of(name)
    hidden = forms.CONFIG["hidden_size"] if name in forms.FORMS else zoo.HIDDEN
    inputs = torch.randn(3, B, S, hidden)
    with skipped() as said, rows_multiplied() as rows, dmoe_compile.denoising() as context:
        compiled = torch.compile(
            block, backend="dmoe", options={"passes": ["team"], "experts": False, **ATEN}, fullgraph=True
        )
        outs = []
        for decoded, x in zip((None, SOME, ALL), inputs, strict=True):
            context.step(decoded, shape=SIZE)
            outs.append(output(compiled(x)))
    assert said == [True]
    top_k = rows[0] // (B * S)
    assert set(rows[:2]) == {B * S * top_k}
    assert set(rows[2:4]) == {int((~SOME).sum()) * top_k}
    assert set(rows[4:6]) == {0}
    wanted = [output(block(x)) for x in inputs]
    computed = ~SOME
    assert_close(outs[0], wanted[0], **INDUCTOR)
    assert_close(outs[1][computed], wanted[1][computed], **INDUCTOR)
    assert not any(out.isnan().any() for out in outs)


class SlotMajor(nn.Module):
    """A router whose ids are sorted slot by slot: the first choices of all tokens, then the second ones."""

    def __init__(self, *, looks: str = "") -> None:
        super().__init__()
        self.gate = nn.Linear(16, 8, bias=False)
        self.up = nn.Parameter(torch.randn(8, 16, 16) / 4)
        self.looks = looks

    def forward(self, x: Tensor) -> Any:
        rows = x.reshape(-1, 16)
        weights, ids = self.gate(rows).softmax(-1).topk(2, dim=-1)
        if self.looks:
            flat, order, token = ids.reshape(-1), weights.reshape(-1), 2
        else:
            flat, order, token = ids.t().reshape(-1), weights.t().reshape(-1), 1
        sorted_ids, perm = torch.sort(flat)
        counts = torch.histc(sorted_ids.float(), bins=8, min=0, max=7)
        source = perm // 2 if token == 2 else perm % len(rows)
        offsets = counts.cumsum(0, dtype=torch.int32)
        out = torch.ops.transformers.grouped_mm_fallback(rows[source], self.up, offsets)
        weighted = out * order[perm].unsqueeze(-1)
        if self.looks == "scale":
            weighted = weighted / weighted.abs().amax()  # of all rows
        back = torch.empty_like(perm)
        back[perm] = torch.arange(len(perm))
        dims = (-1, 2, 16) if token == 2 else (2, -1, 16)
        result = weighted[back].view(dims).sum(1 if token == 2 else 0).view(x.shape)
        return (result, out) if self.looks == "returns" else result


@torch.no_grad()
@pytest.mark.parametrize(("looks", "skips"), [("no", True), ("", False), ("scale", False), ("returns", False)])
def test_only_what_stays_in_its_rows_is_left_out(looks: str, skips: bool) -> None:
    """Other orders of the ids, values over all rows, and rows that are handed out."""
    torch.manual_seed(0)
    model = SlotMajor(looks=looks)
    nn.init.normal_(model.gate.weight, std=0.5)
    inputs = torch.randn(2, B, S, 16)
    with skipped() as said, dmoe_compile.denoising() as context:
        compiled = torch.compile(
            model, backend="dmoe", options={"passes": ["team"], "experts": False, **ATEN}, fullgraph=True
        )
        context.step(shape=SIZE)
        compiled(inputs[0])
        context.step(SOME)
        out = output(compiled(inputs[1]))
    assert said == [skips]
    if looks != "scale":  # whose scale is also that of the tokens that are not computed
        assert_close(out[~SOME], output(model(inputs[1]))[~SOME], **INDUCTOR)


@torch.no_grad()
@pytest.mark.parametrize(("name", "experts"), [("gpt_oss", "grouped_mm"), ("qwen3_moe", "batched_mm")])
def test_other_forms_are_left_alone(name: str, experts: Any) -> None:
    """Biases are looked up by the sorted ids; batched_mm looks weights up by ids."""
    block = zoo.build(name, experts=experts, num_layers=1).model.layers[0].mlp
    inputs = torch.randn(2, B, S, zoo.HIDDEN)
    with skipped() as said, dmoe_compile.denoising() as context:
        compiled = torch.compile(
            block, backend="dmoe", options={"passes": ["team"], "experts": False, **ATEN}, fullgraph=True
        )
        context.step(shape=SIZE)
        first = output(compiled(inputs[0]))
        context.step(SOME)
        out = output(compiled(inputs[1]))
    assert said == [False]
    assert_close(first, output(block(inputs[0])), **INDUCTOR)
    assert_close(out[~SOME], output(block(inputs[1]))[~SOME], **INDUCTOR)
    assert_close(out[SOME], first[SOME], **INDUCTOR)
