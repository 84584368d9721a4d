"""The model of bytes and launches: what it counts on a tiny block, and what it refuses."""

from __future__ import annotations

import json

import pytest

from dmoe_compile.bench import gpu_model
from dmoe_compile.bench.gpu import TINY
from dmoe_compile.bench.gpu_model import Settings
from dmoe_compile.testing.generated_code import Graph, Input, Launch
from dmoe_compile.testing.interpreter import Traffic

EXPERT_BYTES = 3 * TINY.hidden * TINY.width * 2


@pytest.fixture(scope="module")
def rows() -> dict[str, gpu_model.Row]:
    rows = gpu_model.run(Settings(shapes=("tiny",), coresets=(0, 15)))
    return {row["way"]: row for row in json.loads(json.dumps(rows))}  # as --json writes them


def test_the_fused_block_launches_router_matmul_route_experts_and_sum(rows) -> None:
    assert rows["dmoe, no pass"]["launches"] == rows["dmoe, 15 experts"]["launches"] == 5
    assert rows["inductor"]["launches"] > 5
    assert [len(table.rows) for table in gpu_model.table(list(rows.values())).renderables[:-1]] == [3]


def test_every_active_expert_is_read_once(rows) -> None:
    """The two rows differ in how many experts are active: by nothing else, but ids, weights and mid."""
    few, all_of_them = rows["dmoe, 15 experts"], rows["dmoe, no pass"]
    assert few["unique"] == 15 < all_of_them["unique"]
    more = all_of_them["bytes"] - few["bytes"]
    experts = all_of_them["unique"] - 15
    mid = 2 * TINY.tokens * TINY.width * 2 * experts  # written, and read by both waves of programs at the most
    assert experts * EXPERT_BYTES < more <= experts * EXPERT_BYTES + 2 * mid


def test_a_small_tensor_that_is_read_again_may_stay_in_the_cache(rows) -> None:
    for row in rows.values():
        assert row["floor_bytes"] < row["cached_bytes"] <= row["bytes"]
    weights, hidden = Traffic(touched=10**9, moved=10**9), Traffic(touched=10**6, moved=5 * 10**6)
    assert gpu_model._cached([weights, hidden]) == 10**9 + 10**6
    assert gpu_model._cached([weights, hidden, Traffic(touched=3 * 10**7, moved=6 * 10**7)]) == 10**9 + 65 * 10**6


def test_the_floor_and_the_time(rows) -> None:
    row = rows["dmoe, 15 experts"]
    assert row["floor_bytes"] == 15 * EXPERT_BYTES + 2 * TINY.tokens * TINY.hidden * 2
    assert row["over_floor"] == row["bytes"] / row["floor_bytes"] > 1
    for name, machine in gpu_model.MACHINES.items():
        ns_each = row["bytes"] / machine.gb_per_s / 0.8
        assert row["us"][name] == pytest.approx(5 * 1.5 + ns_each / 1e3, rel=1e-6)  # no launch has that many products
    assert row["us"]["B200"] < row["us"]["H200"] < row["us"]["H100"]


def test_of_a_stack_of_experts_a_matmul_reads_the_active_share() -> None:
    graph = Graph(inputs=[Input("w", "experts.w", True, (8, 4, 4), None)], nbytes={"w": 256, "x": 100, "out": 50})
    step = Launch("extern_kernels._grouped_mm", "extern", ("x", "w"), ("out",), 1)
    assert gpu_model._argument_bytes(step, graph, 0.25) == 100 + 50 + 64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shapes": ("x",)}, "shapes='x'"),
        ({"coresets": (-1,)}, "coresets has -1"),
        ({"bandwidth_share": 1.5}, r"bandwidth_share is 1.5, but must be in \(0, 1\]"),
        ({"launch_us": -1.0}, "launch_us is -1"),
    ],
)
def test_bad_settings_are_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_without_triton_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        Settings()
