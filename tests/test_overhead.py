"""The overhead figure in a reduced form: it runs, and its counts hold. No time is judged."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch._inductor.runtime.cache_dir_utils import cache_dir

from dmoe_compile.bench import in_fresh_process, overhead

ENV = {"device", "isa", "cores", "threads", "torch", "transformers", "python"}


def test_what_one_process_measures():
    """In one test, because it compiles three times."""
    model, ids = overhead.build(layers=1)
    with torch.no_grad():
        rows, times = overhead.steady(model, ids, calls=3)
    (matcher,) = [row for row in rows if row["kind"] == "matcher"]
    assert matcher["sites"] == 1
    assert matcher["ms_per_site"] > 0
    check_guards({row["provider"]: row["guards"] for row in rows if row["kind"] == "guards"})
    assert [len(each) for each in times.outside.values()] == [3, 3, 3]
    check_calls({row["provider"]: row for row in overhead._call_rows(times)})


def check_guards(guards):
    assert guards.keys() == overhead.PROVIDERS.keys()
    assert guards["inductor"] > 50  # the walk reached the guards on the model's weights
    assert set(guards.values()) == {guards["inductor"]}


def check_calls(calls):
    assert calls.keys() == overhead.PROVIDERS.keys()
    for row in calls.values():
        assert 0 < row["outside_us"] < row["whole_us"]
    assert calls["inductor"]["extra_outside_us"] == 0


def test_a_fresh_process_reports_its_first_call():
    job = {"kind": "first call", "provider": "dmoe, dmoe pass", "layers": 1, "calls": 1, "threads": 1}
    answer = in_fresh_process(
        overhead.__name__, job, cache_dir()
    )  # ours, not an empty one: that would cost half a minute
    assert answer["s"] > 0
    assert answer["env"].keys() == ENV
    assert answer["env"]["threads"] == 1


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="KeyError: 'threads'"):
        in_fresh_process(overhead.__name__, {"kind": "first call"}, str(tmp_path))


def test_cold_runs_start_empty_and_warm_runs_do_not():
    with overhead._cache_folders() as folder_of:
        cold = Path(folder_of("inductor", "cold"))
        cold.mkdir()
        (cold / "compiled").touch()
        assert Path(folder_of("inductor", "warm"), "compiled").exists()
        assert not Path(folder_of("inductor", "cold"), "compiled").exists()
        assert folder_of("inductor", "cold") != folder_of("dmoe, no pass", "cold")
    assert not cold.parent.exists()


def test_providers_take_turns():
    assert [overhead._rotated([1, 2, 3], turn) for turn in (-1, 0, 1, 3)] == [
        [3, 1, 2],
        [1, 2, 3],
        [2, 3, 1],
        [1, 2, 3],
    ]


def test_ratios_are_of_medians_in_the_same_cache():
    seconds = {("inductor", "cold"): [10.0, 12.0, 99.0], ("dmoe, no pass", "cold"): [1.0, 15.0, 15.0]}
    rows = overhead._first_call_rows(seconds)
    assert [(row["s_median"], row["ratio"]) for row in rows] == [(12.0, 1.0), (15.0, 1.25)]


def test_extra_time_is_the_median_of_differences_over_all_processes():
    times = overhead.Times({"inductor": [10.0], "dmoe": [11.0]}, {"inductor": [1.0], "dmoe": [2.0]})
    times.add(
        overhead.Times({"inductor": [30.0, 20.0], "dmoe": [35.0, 22.0]}, {"inductor": [1.0] * 2, "dmoe": [1.0] * 2})
    )
    _, row = overhead._call_rows(times)
    assert (row["calls"], row["whole_us"], row["extra_whole_us"], row["extra_outside_us"]) == (3, 22.0, 2.0, 0.0)


@pytest.mark.nightly
def test_the_whole_figure():
    settings = overhead.Settings(layers=2, repeats=2, calls=10)
    rows = overhead.run(settings)
    assert all(row.keys() >= ENV and row["layers"] == 2 for row in rows)
    assert len([row for row in rows if row["kind"] == "first call"]) == 2 * len(overhead.PROVIDERS)
    assert [row["calls"] for row in rows if row["kind"] == "call"] == [10, 10, 10]
    json.dumps(rows)
    out = io.StringIO()
    Console(width=160, file=out).print(overhead.table(rows))
    assert [provider for provider in overhead.PROVIDERS if provider not in out.getvalue()] == []
