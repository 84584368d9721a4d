"""The command line: exit codes, one-line errors, where output goes. What is measured is tested beside its module."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.main import get_command
from typer.testing import CliRunner

import dmoe_compile
from dmoe_compile import cli, demo
from dmoe_compile.bench import diffusion_gemma, environment, overhead
from dmoe_compile.cli_shared import backend_options, usage_errors


def invoke(*args):
    """Run the command in this process; an exception that is no exit is a failure of the test."""
    return CliRunner().invoke(cli.app, args, catch_exceptions=False)


@pytest.mark.parametrize(
    "command", [(), ("demo",), ("explain",), ("bench",), ("bench", "overhead"), ("eval",), ("pareto",)], ids=" ".join
)
def test_help(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def leaves(command, path=()):
    """Yield every command that does something, and how it is called."""
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


def test_every_command_writes_json_lines():
    found = dict(leaves(get_command(cli.app)))
    assert ("bench", "e2e") in found
    assert [
        path for path, command in found.items() if "--json" not in {o for p in command.params for o in p.opts}
    ] == []


def test_version():
    result = invoke("--version")
    assert result.stdout == f"dmoe-compile {dmoe_compile.__version__}\n"


@pytest.mark.parametrize(("env", "coloured"), [({}, False), ({"FORCE_COLOR": "1"}, True)], ids=["pipe", "forced"])
def test_colours_are_off_where_output_is_no_terminal(env, coloured):
    own = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    dmoe = str(Path(sys.executable).with_name("dmoe"))
    done = subprocess.run([dmoe, "doctor"], capture_output=True, text=True, env=own | env)
    assert done.returncode == 0, done.stderr
    assert ("\x1b[" in done.stdout) == coloured
    assert "\x1b[" not in done.stderr


CLOSED_PIPES = {
    "a table": "show('table', [], None)",
    "JSON lines": "write_json([{'a': 1}], '-')",
    "blocks": "print('block', flush=True)",
}


@pytest.mark.parametrize("writing", CLOSED_PIPES.values(), ids=CLOSED_PIPES)
def test_a_closed_pipe_ends_a_command_quietly(writing):
    script = f"""if True:
        import typer
        from dmoe_compile.cli_shared import show, usage_errors, write_json
        app = typer.Typer()
        @app.command()
        def command():
            input()  # until the pipe is closed
            with usage_errors(None):
                {writing}
        app()
    """
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-P", "-c", script], text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_help_does_not_wait_for_torch():
    script = "import sys; from dmoe_compile import cli; print(*{'torch', 'transformers', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() in ([], ["rich"])  # typer may load rich for its help


USAGE_ERRORS = {
    "no such model": (["explain", "qwen3_mo"], ["'qwen3_mo'", "qwen3_moe"]),
    "a hub name": (["explain", "Qwen/Qwen3-30B-A3B"], ["Qwen/Qwen3-30B-A3B", "nothing is downloaded"]),
    "no such pass": (["explain", "qwen3_moe", "--passes", "dmo"], ["'dmo'", "dmoe"]),
    "a pass twice": (["explain", "qwen3_moe", "--passes", "dmoe,dmoe"], ["twice"]),
    "out of range": (["explain", "qwen3_moe", "--option", "dmoe.top_p=1.5"], ["dmoe.top_p=1.5", "(0, 1]"]),
    "wrong type": (["explain", "qwen3_moe", "--option", "block_length=long"], ["block_length='long'", "integer"]),
    "no such option": (["explain", "qwen3_moe", "--option", "dmoe.topp=0.5"], ["dmoe.topp", "dmoe.top_p"]),
    "no value": (["explain", "qwen3_moe", "--option", "stats"], ["'stats'", "KEY=VALUE"]),
    "passes as an option": (["explain", "qwen3_moe", "--option", "passes=dmoe"], ["--passes dmoe"]),
    "no tokens": (["explain", "qwen3_moe", "--tokens", "0"], ["tokens=0", "at least 1"]),
    "no steps": (["bench", "diffusion-gemma", "--steps", "0"], ["steps=0", "at least 1"]),
    "no threads": (["demo", "--threads", "-1"], ["threads=-1", "at least 1"]),
    "no folder for json": (["demo", "--json", "no/such/out.jsonl"], ["no/such", "make it first"]),
    "a folder for json": (["explain", "qwen3_mo", "--json", "."], ["--json . is a folder", "name a file in it"]),
    "no file for json": (["explain", "qwen3_mo", "--json", "/proc/rows"], ["--json /proc/rows", "name another file"]),
    "a folder for lines": (["eval", "demo", "--lines", "."], ["--lines . is a folder", "name a file in it"]),
    "a folder for the trace": (
        ["generate", "qwen3_mo", "--prompt-ids", "1", "--trace", "."],
        ["--trace . is a folder", "name a file in it"],
    ),
    "two lengths of a block": (
        ["generate", "qwen3_mo", "--block-length", "8", "--option", "block_length=16"],
        ["--block-length 8", "--option block_length=16", "give one"],
    ),
    "two lengths of a block to evaluate": (
        ["eval", "demo", "--block-length", "8", "--option", "block_length=8"],
        ["--block-length 8", "--option block_length=8", "give one"],
    ),
    "no such folder": (["explain", "./no/such"], ["there is no folder ./no/such"]),
    "no such folder to decode with": (["generate", "/no/such", "--prompt", "a"], ["there is no folder /no/such"]),
    "no such model to evaluate": (["eval", "qwen3_mo"], ["'qwen3_mo' is no local folder", "qwen3_moe"]),
    "a file": (["explain", "README.md"], ["README.md is a file", "name the folder"]),
    "a seed too large": (["generate", "demo", "--seed", "9" * 20], ["seed=" + "9" * 20, "2**64"]),
    "a seed of a figure": (["bench", "diffusion-gemma", "--seed", "9" * 20], ["seed=" + "9" * 20, "2**64"]),
    "no threshold": (["eval", "demo", "--threshold", "0"], ["threshold=0.0 must be a number above 0"]),
    "no blocks": (["bench", "coresets", "--blocks", "0"], ["blocks=0", "at least 1"]),
    "no tokenizer": (["eval", "qwen3_moe"], ["qwen3_moe has no tokenizer", "give the folder of a whole checkpoint"]),
    "no problems": (["eval", "qwen3_moe", "--problems", "0"], ["problems=0", "at least 1"]),
    "no such skill": (["pareto", "qwen3_moe", "out", "--skills", "poetry"], ["'poetry'", "arithmetic, sorting"]),
    "no such run": (["eval", "qwen3_moe", "--against", "no/run.jsonl"], ["no/run.jsonl", "--lines"]),
    "no folder for lines": (["eval", "demo", "--lines", "no/such/run.jsonl"], ["no/such", "make it first"]),
    "no lines": (["eval", "demo", "--lines", "README.md"], ["README.md holds no lines of a run", "name another file"]),
    "no threads to decode": (["generate", "demo", "--prompt", "a", "--threads", "0"], ["threads=0", "at least 1"]),
    "no threads to evaluate": (["eval", "demo", "--threads", "0"], ["threads=0", "at least 1"]),
    "what can't be had": (
        ["generate", "phimoe", "--prompt-ids", "1,2", "--mask-token-id", "3", "--option", "experts=true"],
        ["experts=True, but", "can't have the fused kernel"],
    ),
    "no layers": (["bench", "overhead", "--layers", "0"], ["layers=0", "at least 1"]),
}


@pytest.mark.parametrize(("args", "words"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_a_usage_error_is_one_line_and_exit_code_2(args, words):
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("dmoe: ")
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize("file", ["/proc/no", "/proc/no/such/ab/x.py"], ids=["made", "written"])
def test_a_cache_that_can_t_be_written_is_said_with_the_way_out(monkeypatch, capsys, file):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/no/such")
    with pytest.raises(typer.Exit), usage_errors(None):
        raise FileNotFoundError(2, "No such file or directory", file)
    assert "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written" in capsys.readouterr().err


def test_the_check_of_a_file_leaves_none_behind(tmp_path):
    assert invoke("explain", "qwen3_mo", "--json", str(tmp_path / "rows.jsonl")).exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_is_one_line_and_exit_code_2(explained):
    result = invoke("explain", "mixtral", "--json", "/dev/full")
    assert result.exit_code == 2
    assert "sites" in result.stdout
    assert result.stderr == "dmoe: --json /dev/full: No space left on device; name another file\n"


@pytest.mark.parametrize(
    "args", [["bench", "diffusion-gemma", "--config", "huge"], ["bench", "speed"], ["explain"], ["demo", "--fast"]]
)
def test_what_the_parser_refuses_exits_with_2(args):
    result = invoke(*args)
    assert result.exit_code == 2
    assert "Error" in result.stderr


@pytest.mark.parametrize("args", [["demo"], ["bench", "overhead"], ["explain", "qwen3_moe", "--verify"]], ids=" ".join)
def test_no_compiler_is_said_before_anything_runs(args):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        result = invoke(*args)
    assert result.exit_code == 2
    assert "C++ compiler" in result.stderr
    assert "CXX" in result.stderr


VALUES = {
    "true": True,
    "False": False,
    "none": None,
    "3": 3,
    "0.5": 0.5,
    "max-autotune": "max-autotune",
    "[1, 2]": [1, 2],
    "{[1]: 2}": "{[1]: 2}",  # no dict: a list can't be a key
    "(" * 5000: "(" * 5000,
}


@pytest.mark.parametrize(("text", "value"), VALUES.items(), ids=[text[:20] for text in VALUES])
def test_option_values_are_typed(text, value):
    parsed = backend_options("a, b", [f"key={text}"])
    assert parsed == {"passes": ["a", "b"], "key": value}
    assert type(parsed["key"]) is type(value)


def test_an_option_value_may_hold_an_equals_sign():
    assert backend_options("", ["key=a=b"]) == {"passes": [], "key": "a=b"}


def test_explain_writes_lines_of_json_alone_to_stdout():
    result = invoke("explain", "qwen3_moe", "--option", "dmoe.min_experts=8", "--tokens", "48", "--json", "-")
    assert result.exit_code == 0
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    sites = [row for row in rows if row["kind"] == "site"]
    assert [site["name"] for site in sites] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for site in sites:
        assert (site["num_experts"], site["top_k"], site["rewritten"]) == (128, 8, True)
        assert 8 <= site["unique_experts_after"] < site["unique_experts_before"] <= 128
    assert all(row["model"] == "qwen3_moe" and row["torch"] == torch.__version__ for row in rows)
    assert rows[0]["options"]["dmoe.min_experts"] == 8
    assert "rewritten" in result.stderr
    assert "tiny random qwen3_moe" in result.stderr  # that it isn't the published model is said


@pytest.fixture
def explained(monkeypatch):
    """Stand in for explain(); holds what it was asked, and what it answers."""
    asked = SimpleNamespace(report=dmoe_compile.Report())

    def explain(model, *, config, verify, **inputs):
        vars(asked).update(model=model, config=config, verify=verify, inputs=inputs)
        return asked.report

    monkeypatch.setattr(dmoe_compile, "explain", explain)
    return asked


def test_explain_passes_on_what_it_was_asked(explained):
    option = ["--option", "dmoe.top_p=0.8", "--option", "block_length=16"]
    result = invoke("explain", "mixtral", *option, "--tokens", "24", "--batch", "3")
    assert result.exit_code == 0
    assert explained.config.to_options() == {"passes": ["dmoe"], "block_length": 16} | dmoe_options(top_p=0.8)
    assert type(explained.model).__name__ == "MixtralForCausalLM"
    assert explained.inputs["input_ids"].shape == (3, 24)
    assert explained.verify is False


def test_explain_without_passes(explained):
    assert invoke("explain", "mixtral", "--passes", "").exit_code == 0
    assert explained.config.passes == ()


@pytest.mark.parametrize(
    ("option", "block_length"), [((), 256), (("--option", "block_length=64"), 64)], ids=["left out", "given"]
)
def test_explain_takes_the_canvas_for_the_block(explained, option, block_length):
    assert invoke("explain", "diffusion_gemma", *option).exit_code == 0
    assert explained.config.block_length == block_length


def test_explain_writes_json_to_a_file_and_the_table_to_stdout(explained, tmp_path):
    result = invoke("explain", "mixtral", "--json", str(tmp_path / "out.jsonl"))
    assert result.exit_code == 0
    assert "sites" in result.stdout
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["kind"] == "report"


def test_explain_shows_everything_but_sites_below_the_table(explained):
    explained.report = dmoe_compile.Report(refused=[("topk over 64", "[E, ., .]")], warnings=["broken"], verified=True)
    out = invoke("explain", "mixtral").stdout
    assert "refused topk over 64: [E, ., .]\n" in out  # brackets are no markup
    assert "warning: broken\n" in out
    assert "all-experts identity: holds" in out


def test_explain_exits_with_1_when_the_identity_is_broken(explained):
    explained.report = dmoe_compile.Report(verified=False)
    result = invoke("explain", "mixtral", "--verify")
    assert explained.verify is True
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout
    assert "changed the model's output" in result.stderr


KERNEL = [  # a run of one problem
    {"kind": "run", "num_experts": 64, "expert_bytes": {}},
    {"right": [True], "skills": ["sorting"], "unique": {"a": {"9": 1}}, "tokens": 4, "forwards": {"denoise": 1}}
    | {"seconds": 0.5},
]


@pytest.mark.parametrize(("tokens_equal", "exit_code"), [(True, 0), (False, 1)])
def test_demo_exits_with_1_when_tokens_differ(monkeypatch, tmp_path, tokens_equal, exit_code):
    seen = []

    def run(settings, progress):
        seen.append(settings)
        return demo.Result(settings, environment(), [], {"kernel": KERNEL}, tokens_equal)

    monkeypatch.setattr(demo, "run", run)
    path = tmp_path / "out.jsonl"
    result = invoke("demo", "--problems", "3", "--seed", "5", "--threads", "1", "--json", str(path))
    assert result.exit_code == exit_code
    assert seen == [demo.Settings(problems=3, seed=5, threads=1)]
    assert ("changed the tokens" in result.stderr) is not tokens_equal
    assert json.loads(path.read_text().splitlines()[-1])["tokens_equal"] is tokens_equal
    assert "experts: of 64" in result.stdout


@pytest.mark.parametrize(("tokens_equal", "exit_code"), [(True, 0), (False, 1)])
def test_bench_diffusion_gemma_exits_with_1_when_tokens_differ(monkeypatch, tmp_path, tokens_equal, exit_code):
    seen = []

    def run(settings, progress):
        seen.append(settings)
        timing = diffusion_gemma.Timing(forwards=2, wall_s=[0.5], decoder_s=[0.25])
        layer = diffusion_gemma.Layer("layer", 128, 1000, unique_before=100.0, unique_after=20.0)
        return diffusion_gemma.Result(
            settings, {**environment()}, [layer], dict.fromkeys(diffusion_gemma.TIMED, timing), tokens_equal
        )

    monkeypatch.setattr(diffusion_gemma, "run", run)
    path = tmp_path / "out.jsonl"
    how = ["--config", "large", "--steps", "2", "--threads", "1", "--seed", "5", "--json", str(path)]
    result = invoke("bench", "diffusion-gemma", *how)
    assert result.exit_code == exit_code
    assert seen == [diffusion_gemma.Settings("large", steps=2, repeats=5, threads=1, seed=5)]
    assert ("changed the tokens" in result.stderr) is not tokens_equal
    assert json.loads(path.read_text().splitlines()[-1])["tokens_equal"] is tokens_equal


def test_bench_overhead_prints_a_table_and_lines_of_json(monkeypatch):
    monkeypatch.setattr(overhead, "run", lambda settings, progress: overhead_rows(settings.layers))
    result = invoke("bench", "overhead", "--layers", "3", "--json", "-")
    assert result.exit_code == 0
    assert [json.loads(line) for line in result.stdout.splitlines()] == overhead_rows(3)
    assert "qwen3_moe of 3 layers" in result.stderr


def test_bench_coresets_prints_a_table_and_lines_of_json():
    result = invoke("bench", "coresets", "--blocks", "4", "--json", "-")
    assert result.exit_code == 0
    assert json.loads(result.stdout.splitlines()[0])["method"] == "the model's own"
    assert "4 blocks" in result.stderr


def dmoe_options(**changed):
    return {f"dmoe.{name}": value for name, value in {"top_p": 0.6, "min_experts": 16, **changed}.items()}


def overhead_rows(layers):
    env = environment() | {"layers": layers}
    rows = [{"kind": "matcher", "sites": layers, "ms_per_site": 1.5}]
    for provider in overhead.PROVIDERS:
        for cache in ("cold", "warm"):
            rows.append({"kind": "first call", "provider": provider, "cache": cache, "s_median": 2.0, "ratio": 1.0})
        rows.append({"kind": "guards", "provider": provider, "guards": 12})
        us = {"whole_us": 30.0, "extra_whole_us": 0.0, "outside_us": 10.0, "extra_outside_us": 0.0}
        rows.append({"kind": "call", "provider": provider, **us})
    return [env | row for row in rows]


@pytest.mark.usefixtures("aten")
def test_eval_prints_a_table_and_compares_with_another_run(untrained, tmp_path):
    how = ["eval", untrained, "--problems", "2", "--threshold", "0.004", "--max-new-tokens", "32"]
    first, second = str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")
    invoke(*how, "--lines", first)
    result = invoke(*how, "--passes", "dmoe", "--lines", second, "--against", first, "--json", "-")
    assert result.exit_code == 0
    (row,) = (json.loads(line) for line in result.stdout.splitlines())
    assert (row["problems"], row["right"], row["options"]) == (2, 0, {"passes": ["dmoe"]})
    assert row["unique_mean"] > 8
    assert "0.0% of 2" in result.stderr
    assert "arithmetic: 0.0%" in result.stderr
    assert "right here alone 0, there alone 0; McNemar's exact test: p = 1" in result.stderr
