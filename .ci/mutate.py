"""Mutation tests of passes/: small faults, one at a time, and whether a test sees each. Called by .ci/mutate.

Every fault is cosmic-ray's. Tests run in a forked child of this process, which has imported torch and transformers
already. The files are changed in place and put back: run it in a copy of the tree.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis  # noqa: F401  # like the next: what every child would import
import pytest
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec

# The tests that speak of a module, the quickest first: the first that fails ends the run of a fault.
TESTS = {
    "auto": "test_auto test_config",
    "constrain": "test_constrain test_layouts test_top_any test_dmoe_released",
    "coreset": "test_coreset test_dmoe test_dmoe_released",
    "cost": "test_cost test_auto test_lower",
    "count": "test_count test_runtime",
    "cover": "test_cover test_cover_op test_policies",
    "des": "test_des test_coreset test_policies",
    "dmoe": "test_coreset test_dmoe test_policies test_dmoe_released",
    "fuse_experts": "test_fuse_experts",
    "fuse_route": "test_fuse_route",
    "inline": "test_constrain test_top_any",
    "layouts": "test_layouts test_team",
    "limit": "test_team test_route test_route_ties",
    "lower": "test_lower test_fuse_experts",
    "nodes": "test_sites test_region test_fuse_experts",
    "pipeline": "test_pipeline test_top_any test_backend test_backend_unchanged test_notices test_joint",
    "policies": "test_policies",
    "reach": "test_sites",
    "readings": "test_fuse_experts",
    "region": "test_region test_fuse_experts",
    "routers": "test_sites",
    "selections": "test_sites",
    "sites": "test_sites",
    "skip": "test_skip",
    "team": "test_team test_context test_context_owners",
    "top_any": "test_top_any",
    "votes": "test_coreset test_des test_dmoe test_dmoe_released",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="of passes/; all by default")
    parser.add_argument("--sample", type=int, default=8, help="faults of each module")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    known = {path.stem for path in Path("passes").glob("*.py")}
    if unknown := (known ^ TESTS.keys()) | (set(chosen.modules) - known):
        parser.error(f"{', '.join(sorted(unknown))}: must be of passes/ and in TESTS")
    if chosen.sample < 1:
        parser.error(f"--sample is {chosen.sample}, but must be at least 1")
    caught = tried = 0
    for module in chosen.modules:
        tests = [f"tests/{name}.py" for name in TESTS[module].split()]
        start = time.monotonic()
        if not _passes(tests, 3600):
            raise SystemExit(f"{module}: its tests fail without a fault")
        limit = 60 + 3 * int(time.monotonic() - start)
        faults = list(_faults(Path("passes", f"{module}.py")))
        drawn = random.Random(chosen.seed).sample(faults, min(chosen.sample, len(faults)))
        survivors = [diff for fault in drawn if (diff := _unseen(fault, tests, limit))]
        for each in survivors:
            print(each, end="\n\n")
        print(f"{module}: {len(drawn) - len(survivors)} of {len(drawn)} caught, {len(faults)} possible", flush=True)
        caught, tried = caught + len(drawn) - len(survivors), tried + len(drawn)
    print(f"passes/: {caught} of {tried} caught, {caught / tried:.0%}")


def _faults(path: Path) -> Iterator[MutationSpec]:
    """Yield the faults of a module that can change what it does: of annotations, `X | None` is none."""
    annotations = [
        (node.lineno, node.end_lineno)
        for each in ast.walk(ast.parse(path.read_text()))
        for node in (getattr(each, "annotation", None), getattr(each, "returns", None))
        if node is not None
    ]
    for item in _all_work_items([path], {}):
        (fault,) = item.mutations
        line = fault.start_pos[0]
        annotated = any(first <= line <= last for first, last in annotations)
        if not (annotated and "BinaryOperator_BitOr" in fault.operator_name):
            yield fault


def _unseen(fault: MutationSpec, tests: list[str], limit: int) -> str:
    """Return a fault as a diff if no test sees it, "" if one does."""
    operator = get_operator(fault.operator_name)(**fault.operator_args)
    with use_mutation(fault.module_path, operator, fault.occurrence) as (before, after):
        assert after is not None, f"{fault} can't be made"
        if not _passes(tests, limit):
            return ""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), str(fault.module_path), "", lineterm="", n=1)
    return "\n".join(lines)


def _passes(tests: list[str], limit: int) -> bool:
    """Say whether tests pass within `limit` seconds, in a child of this process."""
    child = os.fork()
    if not child:
        try:
            os.setsid()
            signal.alarm(limit)
            out = os.open(os.devnull, os.O_WRONLY)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os._exit(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]))
        finally:
            os._exit(1)  # never back into the parent's work
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what a test had started
    return status == 0


if __name__ == "__main__":
    main()
