"""dmoe::count_experts against its reference. T: tokens, k: experts a token, E: experts of the layer."""

from __future__ import annotations

import pytest
import torch
from dmoe_compile.kernels.count_experts import count_experts, launch, reference
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
EVERY, NONE = 1.0, 0.0
SHAPES = {
    "a decode step": (64, 8, 256, 0.7),
    "one token": (1, 8, 64, EVERY),
    "no token": (0, 4, 16, EVERY),  # a forward that is served from a cache
    "nobody routed": (8, 4, 16, NONE),  # every hit goes to the slot past the experts
    "one expert each": (33, 1, 7, 0.5),
    "every expert": (40, 5, 5, EVERY),
    "one expert in all": (9, 1, 1, 0.5),
    "no power of two": (31, 3, 100, 0.5),
    "many tokens": (5000, 8, 512, 0.9),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, int]:
    """Ids [T, k], which tokens are routed [T], and E; the last expert is among the ids, as the slot past it is near."""
    tokens, top_k, num_experts, share = request.param
    ids = torch.rand(tokens, num_experts).topk(top_k).indices
    if tokens:
        ids[-1, -1] = num_experts - 1
    return ids, torch.rand(tokens) < share, num_experts


@pytest.mark.parametrize("device", DEVICES)
def test_counts_what_the_reference_counts(case: tuple[Tensor, Tensor, int], device: str) -> None:
    ids, routed, num_experts = case
    for mask in (None, routed):
        counts = torch.ones_like(routed) if mask is None else mask
        counted = {e for token, each in zip(ids.tolist(), counts.tolist(), strict=True) if each for e in token}
        args = ids.to(device), None if mask is None else mask.to(device), num_experts
        for count in (count_experts(*args), launch(*args), reference(*args)):
            assert count.item() == len(counted)
            assert (count.dtype, count.shape, count.device.type) == (torch.int64, (), device)


@pytest.mark.parametrize("device", DEVICES)
def test_reads_ids_of_any_layout(device: str) -> None:
    """Selections are often slices of a sort: [:, :k] of [T, E], not contiguous."""
    ids = torch.rand(6, 10, device=device).argsort(-1)[:, :3]
    assert not ids.is_contiguous()
    assert count_experts(ids, None, 10).item() == len(set(ids.flatten().tolist()))


def test_inputs_are_left_as_they_are(case: tuple[Tensor, Tensor, int]) -> None:
    ids, routed, num_experts = case
    before = ids.clone(), routed.clone()
    count_experts(ids, routed, num_experts)
    assert torch.equal(ids, before[0])
    assert torch.equal(routed, before[1])


@pytest.mark.parametrize("device", DEVICES)
def test_op_is_registered_as_it_should_be(case: tuple[Tensor, Tensor, int], device: str) -> None:
    ids, routed, num_experts = case
    for mask in (None, routed.to(device)):
        torch.library.opcheck(count_experts, (ids.to(device), mask, num_experts))
