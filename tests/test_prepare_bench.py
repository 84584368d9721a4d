"""The prepare figure in a reduced form: it runs, and its counts hold. No time is judged."""

import io
import subprocess

import pytest
from rich.console import Console
from torch._inductor.runtime.cache_dir_utils import cache_dir

from dmoe_compile.bench import in_fresh_process, prepare
from dmoe_compile.bench.prepare import MODELS, Settings


def job(model, provider="dmoe"):
    return {"model": model, "provider": provider, "layers": 0.01, "threads": 1}


def printed(rows):
    console = Console(file=io.StringIO(), width=160)
    console.print(prepare.table(rows))
    return console.file.getvalue()


@pytest.mark.parametrize("model", MODELS)
def test_one_graph_with_every_site(model):
    row = in_fresh_process(prepare.__name__, job(model), cache_dir())
    assert (row["graphs"], row["breaks"], row["sites"], row["layers_made"]) == (1, 0, 1, 1)
    assert 0 < row["guards_ms"] < row["call_ms"]
    assert 0 < row["outside_ms"] < row["call_ms"]
    assert f"{MODELS[model]['experts']} x 1" in printed([job(model) | row])


def test_every_model_has_its_real_numbers():
    for name, spec in MODELS.items():
        model = prepare.build(name)
        assert len(model.layers) == spec["layers"]
        assert all(len(layer.mlp.experts) == spec["experts"] for layer in model.layers)


def test_plain_inductor_gets_no_more_time_than_it_is_given(monkeypatch):
    def slow(module, job, folder, timeout_s):
        if job["provider"] == "inductor":
            assert timeout_s == 7
            raise subprocess.TimeoutExpired(module, timeout_s)
        assert timeout_s is None
        return {"prepare_s": 1.0, "first_call_s": 2.0, "graphs": 1, "breaks": 0, "guards_ms": 0.1} | {
            "outside_ms": 0.2,
            "call_ms": 3.0,
        }

    monkeypatch.setattr(prepare, "in_fresh_process", slow)
    rows = prepare.run(Settings(timeout_s=7))
    assert [row["first_call_s"] for row in rows] == [2.0, None, 2.0, None]
    assert printed(rows).count("stopped after 7") == 2


@pytest.mark.parametrize("values", [{"layers": 0}, {"layers": 1.5}, {"timeout_s": 0}, {"threads": 0}], ids=str)
def test_settings_that_mean_nothing_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Settings(**values)
