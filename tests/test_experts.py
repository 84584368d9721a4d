"""transformers' experts implementation "dmoe": every class that supports the interface, and where it is registered."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import zoo
from dmoe_compile import experts
from tiny_moe import SUMS


@pytest.mark.parametrize("name", zoo.NAMES)
@torch.no_grad()
def test_set_experts_implementation(name: str) -> None:
    """gpt_oss has biases, transposed and interleaved weights, and a gate of its own."""
    model, inputs = zoo.build(name), zoo.inputs(name)
    own = model(**inputs).logits
    experts.register()
    model.set_experts_implementation("dmoe")
    assert_close(model(**inputs).logits, own, rtol=0, atol=0)


def test_ids_of_experts_elsewhere_are_skipped() -> None:
    """With expert parallelism ids of E and above stand for experts on other ranks."""
    model = zoo.build("qwen3_moe")
    bank = model.model.layers[0].mlp.experts
    hidden, weights = torch.randn(4, bank.gate_up_proj.shape[2]), torch.rand(4, 2)
    ids = torch.tensor([[0, 99], [1, 2], [99, 99], [3, 99]])
    bank._is_expert_parallel = True
    with torch.no_grad():
        got = experts.experts_forward(bank, hidden, ids.clone(), weights)
        kept = torch.where(ids < 99, weights, 0)
        bank._is_expert_parallel = False
        wanted = experts.experts_forward(bank, hidden, torch.where(ids < 99, ids, 0), kept)
    assert_close(got, wanted, **SUMS)


@pytest.mark.parametrize(
    "script",
    [
        "import transformers.integrations.moe; import dmoe_compile",
        "import dmoe_compile, torch; torch._dynamo.lookup_backend('dmoe')",
    ],
    ids=["transformers first", "at backend load"],
)
def test_registered(script: str) -> None:
    check = "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as f; assert 'dmoe' in f"
    subprocess.run([sys.executable, "-P", "-c", f"{script}; {check}"], check=True)
