"""The `dmoe` command: dmoe demo, doctor, explain, generate, eval, pareto, bench.

Exit codes: 0 done; 1 a check failed, such as a coreset of all experts that changed a token, or the reader of a pipe
has closed it; 2 what was asked for can't be done, with one line on standard error that says why.
With `--json -` standard output holds JSON lines alone; the table goes to standard error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import dmoe_compile
from dmoe_compile import cli_bench
from dmoe_compile.cli_shared import (
    BlockLength,
    Json,
    Options,
    Threads,
    TrustRemoteCode,
    backend_options,
    fail,
    names,
    progress_bar,
    quiet,
    show,
    usage_errors,
    write_json,
)

if TYPE_CHECKING:
    from dmoe_compile import Report
    from dmoe_compile.bench import Row

# Everything else is imported in the commands: torch and transformers take seconds, and --help needs neither.

app = typer.Typer(
    help="Mixture-of-experts routing for diffusion language models, as torch.compile passes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors in plain lines, not in a box
)
app.add_typer(cli_bench.app, name="bench")


def main() -> None:
    """Run the command line; the console script."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dmoe-compile {dmoe_compile.__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before a command; typer's help is that of `app`."""


@app.command()
def demo(
    problems: Annotated[int, typer.Option(help="Problems that are decoded, every skill in turn.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the problems.")] = 0,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Decode problems with the trained model of this package, with and without passes, and compare."""
    with usage_errors(json):
        from dmoe_compile import demo as demonstration
        from dmoe_compile.bench import require_compiler

        require_compiler()
        settings = demonstration.Settings(problems, seed, threads)
    with progress_bar() as progress:
        result = demonstration.run(settings, progress)
    show(result.table(), result.rows(), json, result.remarks())
    if not result.tokens_equal:
        fail("a coreset of all experts changed the tokens; please report it with the JSON lines of --json")


@app.command()
def doctor(json: Json = None) -> None:
    """Show what this installation has, what would be used, and what is missing."""
    with usage_errors(json):
        from dmoe_compile import doctor as examination

        findings = examination.examine()
    show(examination.table(findings), examination.rows(findings), json)
    if missing := [each.what for each in findings if each.verdict == "missing"]:
        fail(f"missing: {', '.join(missing)}; see above")


@app.command()
def explain(
    model: Annotated[
        str, typer.Argument(help="A checkpoint folder, demo of this package, or a transformers type such as qwen3_moe.")
    ],
    passes: Annotated[str, typer.Option(help="Passes to run, with commas between; '' for none.")] = "dmoe",
    option: Options = None,
    tokens: Annotated[int, typer.Option(help="Random tokens of a sequence.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that a coreset of all experts changes nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = None,
) -> None:
    """Show every mixture-of-experts site of a model: found, rewritten or refused and why, and experts used."""
    with usage_errors(json):
        from dmoe_compile import Config, loading
        from dmoe_compile import explain as examine
        from dmoe_compile.bench import require_compiler

        if verify:
            require_compiler()
        options = backend_options(passes, option or [])
        Config.from_options(options)  # before the model loads, which can take minutes
        loaded = loading.load(model, batch, tokens, trust_remote_code)
        config = Config.from_options(
            {"block_length": loaded.block_length, **options} if loaded.block_length else options
        )
    with quiet():
        report = examine(loaded.model, config=config, verify=verify, **loaded.inputs)
    show(report.table(), _report_rows(report, model, config.to_options()), json, [loaded.note, *_remarks(report)])
    if report.verified is False:
        fail("a coreset of all experts changed the model's output; please report it with the JSON lines of --json")


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(help="A checkpoint folder, demo of this package, or a transformers type such as qwen3_moe.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeat it for a batch.")] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option(metavar="IDS", help="A prompt as token ids with commas between; repeatable.")
    ] = None,
    passes: Annotated[str, typer.Option(help="Passes to run, such as team,dmoe.")] = "",
    option: Options = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the longest answer.")] = 128,
    block_length: BlockLength = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a block; as many as it has tokens.")] = None,
    threshold: Annotated[float, typer.Option(help="Tokens that are surer than this are committed at once.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from tokens of this probability together.")] = None,
    editing_threshold: Annotated[
        float | None, typer.Option(help="Change committed tokens where the model is surer than this of another.")
    ] = None,
    mask_token_id: Annotated[int | None, typer.Option(help="Where neither tokenizer nor config names it.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, and of a random model's weights.")] = 0,
    chat: Annotated[bool, typer.Option(help="Put a prompt into the tokenizer's chat template, if it has one.")] = True,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Decode once before, so that no compiling is timed.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what every forward did, as JSON lines.")
    ] = None,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = None,
) -> None:
    """Decode prompts block by block with a KV cache, and stream each block as it is finished."""
    with usage_errors(json):
        from dmoe_compile import Config, decode_command
        from dmoe_compile.bench import require_compiler

        require_compiler()
        config = Config.from_options(backend_options(passes, option or [], block_length))
        how = {"steps": steps, "threshold": threshold, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        how |= {"editing_threshold": editing_threshold, "mask_token_id": mask_token_id}
        source = decode_command.Source(model, prompt or [], prompt_ids or [], chat, trust_remote_code, seed)
        with quiet():
            row = decode_command.run(
                source, config, how | {"max_new_tokens": max_new_tokens}, warm_up, trace, threads, json == "-"
            )
    write_json([row], json)
    typer.echo(decode_command.describe(row), err=True)


Problems = Annotated[int, typer.Option(help="Problems that are decoded, every skill in turn.")]
Skills = Annotated[str | None, typer.Option(help="Some skills, separated by commas; all by default.")]
Seed = Annotated[int, typer.Option(help="Of the problems.")]


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A checkpoint folder with a tokenizer, or demo or demo-tuned of this package.")
    ] = "demo",
    passes: Annotated[str, typer.Option(help="Passes to run, such as team,dmoe.")] = "",
    option: Options = None,
    problems: Problems = 500,
    skills: Skills = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(help="Sequences that are decoded together.")] = 1,
    threshold: Annotated[float, typer.Option(help="Tokens that are surer than this are committed at once.")] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the longest answer.")] = 64,
    block_length: BlockLength = None,
    lines: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep answers here, as JSON lines; go on with what is there."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare with the lines of another run, by McNemar's test.")
    ] = None,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = None,
) -> None:
    """How often a model's final answers are right with some passes, and the experts that it reads for that."""
    with usage_errors(json):
        from dmoe_compile import Config, evaluation, loading
        from dmoe_compile.bench import require_compiler, require_packages

        require_compiler()
        require_packages("eval", "scipy")
        config = Config.from_options(backend_options(passes, option or [], block_length))
        settings = evaluation.Settings(problems, seed, names(skills) or None, batch, threshold, max_new_tokens)
        other = None if against is None else evaluation.read(against)
        if other is not None:
            evaluation.check_paired(asdict(settings), other)
        loading.need_tokenizer(model, trust_remote_code)
        with progress_bar() as progress:
            run = evaluation.evaluate(model, config, settings, lines, progress, threads, trust_remote_code)
        row, remarks = evaluation.row(run), evaluation.remarks(run, other)
    show(evaluation.table([run] if other is None else [run, other]), [row], json, remarks)


@app.command()
def pareto(
    model: Annotated[str, typer.Argument(help="A checkpoint folder with a tokenizer, or demo of this package.")],
    folder: Annotated[Path, typer.Argument(help="Takes a file of lines for every setting, and the picture.")],
    tuned: Annotated[str | None, typer.Option(help="The same, tuned with the dmoe pass: curves of its own.")] = None,
    problems: Problems = 500,
    skills: Skills = None,
    seed: Seed = 0,
    min_experts: Annotated[int | None, typer.Option(help="Smallest coreset of dmoe; the model's k by default.")] = None,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Accuracy against unique experts, for every method and a range of its options: a table and a picture."""
    with usage_errors(json):
        from dmoe_compile import evaluation, loading
        from dmoe_compile import pareto as sweep
        from dmoe_compile.bench import require_compiler, require_packages

        require_compiler()
        require_packages("eval", "scipy", "matplotlib")
        settings = evaluation.Settings(problems, seed, names(skills) or None)
        loading.need_tokenizer(model)
        with progress_bar() as progress:
            runs = sweep.sweep(model, settings, folder, tuned, min_experts, progress, threads)
        files = sweep.draw(runs, folder / "pareto")
    show(sweep.table(runs), [evaluation.row(run) for run in runs.values()], json, map(str, files))


def _remarks(report: Report) -> Iterator[str]:
    """What a report says beside its table of sites."""
    everywhere = set.intersection(*(set(site.notes) for site in report.sites)) if report.sites else set()
    yield from (f"note: {note}" for note in sorted(everywhere))
    if report.cost_model:
        yield f"cost model: {report.cost_model}"
    for site in report.sites:
        yield from (f"{site.name}: {note}" for note in site.notes if note not in everywhere)
        yield from (f"{site.name}: changes with the routing: {escape}" for escape in site.escapes)
    yield from (f"refused {name}: {reason}" for name, reason in report.refused)
    yield from (f"warning: {warning}" for warning in report.warnings)
    if report.verified is not None:
        yield f"all-experts identity: {'holds, bit for bit' if report.verified else 'BROKEN'}"


def _report_rows(report: Report, model: str, options: Row) -> list[Row]:
    from dmoe_compile.bench import environment

    whole = report.to_dict()
    sites, refused = whole.pop("sites"), whole.pop("refused")
    rows: list[Row] = [{"kind": "site", **site} for site in sites]
    rows += [{"kind": "refused", "name": name, "reason": reason} for name, reason in refused]
    rows.append({"kind": "report", **whole})
    return [environment() | {"model": model, "options": options} | row for row in rows]
