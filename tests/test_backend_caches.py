"""Inductor's caches on disk never serve the code of other options, to another process either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each differs from the first in one option alone, and all of them route differently.
OPTION_SETS = {
    "no pass": {"passes": [], "experts": False},
    "dmoe": {"passes": ["dmoe"], "block_length": 8, "dmoe.top_p": 0.2, "dmoe.min_experts": 2},
    "top_p": {"passes": ["dmoe"], "block_length": 8, "dmoe.top_p": 0.5, "dmoe.min_experts": 2},
    "block_length": {"passes": ["dmoe"], "block_length": 24, "dmoe.top_p": 0.2, "dmoe.min_experts": 2},
    "min_experts": {"passes": ["dmoe"], "block_length": 8, "dmoe.top_p": 0.2, "dmoe.min_experts": 5},
}

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from tiny_moe import ATEN, TinyMoE

option_sets, grad = json.loads(sys.argv[1]), sys.argv[2] == "gradients"
torch.manual_seed(0)
model, x = TinyMoE(), torch.randn(2, 24, 16)
results = {}
for name, options in option_sets.items():
    torch._dynamo.reset()
    counters.clear()
    with torch.set_grad_enabled(grad):
        out = torch.compile(model, backend="dmoe", options={**options, **ATEN})(x)
        grads = torch.autograd.grad(out.square().sum(), [model.up, model.gate.weight]) if grad else []
    results[name] = {
        "out": [value.tolist() for value in (out, *grads)],
        "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"],
        "bypasses": counters["inductor"]["fxgraph_cache_bypass"] + counters["aot_autograd"]["autograd_cache_bypass"],
    }
print(json.dumps(results))
"""


def run(cache: Path, path: str, option_sets: dict) -> dict:
    """Compile and run every option set in a process of its own."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(option_sets), path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", ["inference", "gradients"])
def test_a_second_process_gets_its_own_options_from_the_cache(path, tmp_path):
    first = run(tmp_path, path, OPTION_SETS)
    for name, result in first.items():
        assert result["misses"] > 0, f"{name}: served what another option set had compiled"
        assert result["aot_hits"] == result["bypasses"] == 0, name
    outputs = [json.dumps(result["out"]) for result in first.values()]
    assert len(set(outputs)) == len(OPTION_SETS), "two option sets route alike: nothing is tested"
    second = run(tmp_path, path, dict(reversed(OPTION_SETS.items())))
    for name, result in second.items():
        assert result["aot_hits"] > 0, f"{name}: {result['hits']} hits, {result['misses']} misses"
        assert result["misses"] == 0, name
        assert result["out"] == first[name]["out"], name
