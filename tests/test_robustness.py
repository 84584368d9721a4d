"""What no model should be given, and what happens to a machine: values, sizes, modes, killed processes, long runs."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dmoe_compile
import zoo
from dmoe_compile import Config
from tiny_moe import ATEN, INDUCTOR

OPTIONS = {"passes": ["dmoe"], "dmoe.min_experts": 4, "block_length": 16, **ATEN}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.build("qwen3_moe", num_layers=1)


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="dmoe", options=OPTIONS | options)


def states(batch: int = 1, seq: int = 32) -> Tensor:
    return torch.randn(batch, seq, zoo.HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_hidden_state_of_nan_or_infinity_hurts_no_other_block(model: PreTrainedModel, value: float) -> None:
    """Its own token is lost, as it is without us; it votes for nothing, and stats say so."""
    block = model.model.layers[0].mlp
    good = states()
    bad = good.clone()
    bad[0, 3] = value
    run = compiled(block, stats=True)
    dmoe_compile.routing_stats(reset=True)
    with torch.no_grad():
        clean, hurt = run(good), run(bad)
    assert not hurt[0, 3].isfinite().any()
    assert hurt[0, :3].isfinite().all()
    assert hurt[0, 4:].isfinite().all()
    assert torch.equal(hurt[0, 16:], clean[0, 16:])
    assert list(dmoe_compile.routing_stats(reset=True).unsound.values()) == [[0, 1]]


def test_router_weights_of_nan_lose_their_expert_as_without_us(model: PreTrainedModel) -> None:
    """A router's row of NaN makes softmax NaN for every expert: all is lost, nothing crashes, tokens are counted."""
    block = zoo.build("qwen3_moe", num_layers=1).model.layers[0].mlp
    with torch.no_grad():
        block.gate.weight[2] = torch.nan
        dmoe_compile.routing_stats(reset=True)
        out = compiled(block, stats=True)(states())
        assert not block(states()).isfinite().any()
    assert not out.isfinite().any()
    assert list(dmoe_compile.routing_stats(reset=True).unsound.values()) == [[32]]


@pytest.mark.parametrize("seq", [1, 15, 17, 3000])
def test_any_number_of_tokens(model: PreTrainedModel, seq: int) -> None:
    """One token chooses for itself; the last block is short; many blocks have as many coresets."""
    block = model.model.layers[0].mlp
    with torch.no_grad():
        out, own = compiled(block)(states(seq=seq)), block(states(seq=seq))
    assert out.shape == own.shape
    assert torch.allclose(out, own, **INDUCTOR) == (seq == 1)


def test_no_tokens_are_what_inductor_makes_of_them(model: PreTrainedModel) -> None:
    block = model.model.layers[0].mlp
    with torch.no_grad():
        wanted = block(states(seq=0))
        assert compiled(block)(states(seq=0)).shape == wanted.shape


def test_in_train_mode_routing_is_rewritten_and_gradients_flow(model: PreTrainedModel) -> None:
    block = zoo.build("qwen3_moe", num_layers=1).model.layers[0].mlp.train()
    x = states().requires_grad_()
    out = compiled(block)(x)
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in block.parameters())
    with torch.no_grad():
        assert torch.allclose(out, compiled(block)(states()), **INDUCTOR)


@pytest.mark.parametrize("part", ["", "model.layers.0.mlp.experts"], ids=["whole", "experts"])
def test_a_model_without_values_is_refused_by_name(part: str) -> None:
    empty = zoo.build("qwen3_moe", num_layers=1)
    empty.get_submodule(part).to("meta")
    ids = torch.ones(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="the model has weights on the meta device, where they have no values: load"):
        dmoe_compile.explain(empty, input_ids=ids)
    with pytest.raises(ValueError, match="the model has weights on the meta device, where they have no values: load"):
        dmoe_compile.generate(empty, ids, mask_token_id=3, config=Config(passes=("dmoe",)))


JOB = """
import torch, zoo
model = zoo.build("qwen3_moe", num_layers=1).model.layers[0].mlp
run = torch.compile(model, backend="dmoe", options={"passes": ["dmoe"], "dmoe.min_experts": 4})
x = torch.randn(1, 32, zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    print("begin", flush=True)
    print(float(run(x).double().sum()), flush=True)
"""


@pytest.mark.parametrize(
    "after", [1.0, pytest.param(3.0, marks=pytest.mark.nightly), pytest.param(6.0, marks=pytest.mark.nightly)]
)
def test_a_process_killed_while_it_compiles_leaves_a_cache_that_works(after: float, tmp_path: Path) -> None:
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", JOB]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "begin\n"
        time.sleep(after)
        os.killpg(killed.pid, signal.SIGKILL)
    results = [subprocess.run(command, env=env, capture_output=True, text=True) for _ in range(2)]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr[-2000:]
    first, second = (result.stdout.splitlines()[-1] for result in results)
    assert first == second


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_two_thousand_steps_take_no_more_memory_and_few_graphs(model: PreTrainedModel) -> None:
    """Denoising steps of random batches, prompts and candidates, in a context for each answer, some left half-way."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    run = compiled(model, passes=["team", "dmoe"])
    steps, used, graphs, shapes, kinds = 0, [], [], set[tuple[int, bool, bool]](), []
    while steps < 2000:
        batch = draw(4)
        prompt = torch.randint(3, 127, (batch, draw(50)), generator=generator)
        seen: list[dict[str, Any]] = []

        def count(line: Any, seen: list[dict[str, Any]] = seen) -> None:
            seen.append(line)
            if len(seen) > 40:
                raise InterruptedError  # a user who has read enough

        with contextlib.suppress(InterruptedError):
            dmoe_compile.generate(
                run, prompt, mask_token_id=127, max_new_tokens=draw(40), threshold=0.02, eos_token_id=(), trace=count
            )
        forwards = [line for line in seen if line["kind"] == "forward"]
        steps += len(forwards)
        first = 0 if prompt.shape[1] < OPTIONS["block_length"] else -1  # the block that has no cache
        shapes |= {(batch, line["forward"] == "speculate", line["block"] > first) for line in forwards}
        kinds.append(len(shapes))  # numbers of rows, with and without a cache: what there are graphs for
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if len(graphs) % 10 == 0:  # collecting what is left over takes longer than to decode
            used.append(resident())
    half, middle = len(used) // 2, len(graphs) // 2
    grown = max(used[-5:]) - max(used[half - 5 : half])
    assert grown < 2**26  # 64 KiB a step: allocators keep a little, and what a step keeps is more than that
    assert graphs[-1] - graphs[0] < 40  # a few for each number of rows, and none for lengths
    assert graphs[-1] - graphs[middle] <= kinds[-1] - kinds[middle]
