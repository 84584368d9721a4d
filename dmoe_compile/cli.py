"""The `dmoe` command: dmoe demo, dmoe explain, dmoe generate, dmoe bench.

Exit codes: 0 done; 1 a check failed, such as a coreset of all experts that changed a token; 2 what was asked
for can't be done, with one line on standard error that says why.
With `--json -` standard output holds JSON lines alone; the table goes to standard error.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

    from dmoe_compile import Report
    from dmoe_compile.bench import Row

# Everything else is imported in the commands: torch and transformers take seconds, and --help needs neither.

app = typer.Typer(
    help="Mixture-of-experts routing for diffusion language models, as torch.compile passes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors in plain lines, not in a box
)
bench = typer.Typer(help="Measure one figure; prints a table, and JSON lines with --json.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Json = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Also write JSON lines to a file; - is stdout.")
]
Options = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="A backend option, such as dmoe.top_p=0.8; repeatable.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model code that lies in the folder.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if left out.")]


def main() -> None:
    """Run the command line; the console script."""
    app()


@app.command()
def demo(
    config: Annotated[
        Literal["small", "large"], typer.Option(help="large: layers of the published 26B-A4B's width.")
    ] = "small",
    steps: Annotated[int, typer.Option(help="Denoising steps of a decoding.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed decodings of each backend; medians are shown.")] = 5,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of weights, prompt and sampling.")] = 0,
    json: Json = None,
) -> None:
    """Decode with transformers' DiffusionGemma through stock Inductor and through dmoe, and compare."""
    with _usage_errors(json):
        from dmoe_compile import demo as demonstration
        from dmoe_compile.bench import require_compiler

        require_compiler()
        settings = demonstration.Settings(config, steps, repeats, threads, seed)
    with _progress() as progress:
        result = demonstration.run(settings, progress)
    _show(result.table(), result.rows(), json)
    if not result.tokens_equal:
        _fail("a coreset of all experts changed the tokens; please report it with the JSON lines of --json")


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or a transformers model type such as qwen3_moe.")],
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
    with _usage_errors(json):
        from dmoe_compile import Config, loading
        from dmoe_compile import explain as examine
        from dmoe_compile.bench import require_compiler

        if verify:
            require_compiler()
        options = _options(passes, option or [])
        Config.from_options(options)  # before the model loads, which can take minutes
        loaded = loading.load(model, batch, tokens, trust_remote_code)
        config = Config.from_options(
            {"block_length": loaded.block_length, **options} if loaded.block_length else options
        )
    with _quiet():
        report = examine(loaded.model, config=config, verify=verify, **loaded.inputs)
    _show(report.table(), _report_rows(report, model, config.to_options()), json, [loaded.note, *_remarks(report)])
    if report.verified is False:
        _fail("a coreset of all experts changed the model's output; please report it with the JSON lines of --json")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, or a transformers model type such as qwen3_moe.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeat it for a batch.")] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option(metavar="IDS", help="A prompt as token ids with commas between; repeatable.")
    ] = None,
    passes: Annotated[str, typer.Option(help="Passes to run, such as team,dmoe.")] = "",
    option: Options = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the longest answer.")] = 128,
    block_length: Annotated[int, typer.Option(help="Tokens that are denoised together: the model's own unit.")] = 32,
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
    with _usage_errors(json):
        from dmoe_compile import Config, decode_command
        from dmoe_compile.bench import require_compiler, write_rows

        require_compiler()
        config = Config.from_options({"block_length": block_length, **_options(passes, option or [])})
        how = {"steps": steps, "threshold": threshold, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        how |= {"editing_threshold": editing_threshold, "mask_token_id": mask_token_id}
        source = decode_command.Source(model, prompt or [], prompt_ids or [], chat, trust_remote_code, seed)
        with _quiet():
            row = decode_command.run(
                source, config, how | {"max_new_tokens": max_new_tokens}, warm_up, trace, threads, json == "-"
            )
    if json is not None:
        write_rows([row], json)
    typer.echo(decode_command.describe(row), err=True)


Problems = Annotated[int, typer.Option(help="Problems that are decoded, every skill in turn.")]
Skills = Annotated[str | None, typer.Option(help="Some skills, separated by commas; all by default.")]
Seed = Annotated[int, typer.Option(help="Of the problems.")]


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder with a tokenizer.")],
    passes: Annotated[str, typer.Option(help="Passes to run, such as team,dmoe.")] = "",
    option: Options = None,
    problems: Problems = 500,
    skills: Skills = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(help="Sequences that are decoded together.")] = 1,
    threshold: Annotated[float, typer.Option(help="Tokens that are surer than this are committed at once.")] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the longest answer.")] = 64,
    block_length: Annotated[int, typer.Option(help="Tokens that are denoised together: the model's own unit.")] = 32,
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
    with _usage_errors(json):
        from dmoe_compile import Config, evaluation, loading
        from dmoe_compile.bench import require_compiler, require_packages

        require_compiler()
        require_packages("eval", "scipy")
        config = Config.from_options({"block_length": block_length, **_options(passes, option or [])})
        settings = evaluation.Settings(problems, seed, _names(skills) or None, batch, threshold, max_new_tokens)
        other = None if against is None else evaluation.read(against)
        loading.need_tokenizer(model, trust_remote_code)
        with _progress() as progress:
            run = evaluation.evaluate(model, config, settings, lines, progress, threads, trust_remote_code)
        row, remarks = evaluation.row(run), evaluation.remarks(run, other)
    _show(evaluation.table([run] if other is None else [run, other]), [row], json, remarks)


@app.command()
def pareto(
    model: Annotated[str, typer.Argument(help="A checkpoint folder with a tokenizer.")],
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
    with _usage_errors(json):
        from dmoe_compile import evaluation, loading
        from dmoe_compile import pareto as sweep
        from dmoe_compile.bench import require_compiler, require_packages

        require_compiler()
        require_packages("eval", "scipy", "matplotlib")
        settings = evaluation.Settings(problems, seed, _names(skills) or None)
        loading.need_tokenizer(model)
        with _progress() as progress:
            runs = sweep.sweep(model, settings, folder, tuned, min_experts, progress, threads)
        files = sweep.draw(runs, folder / "pareto")
    _show(sweep.table(runs), [evaluation.row(run) for run in runs.values()], json, map(str, files))


@bench.command()
def overhead(
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 12,
    repeats: Annotated[int, typer.Option(help="Fresh processes of each kind; medians are shown.")] = 3,
    calls: Annotated[int, typer.Option(help="Interleaved calls that are timed.")] = 1000,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """What the backend costs: matcher, compile time cold and warm, guards, and time per call."""
    with _usage_errors(json):
        from dmoe_compile.bench import overhead as figure
        from dmoe_compile.bench import require_compiler

        require_compiler()
        settings = figure.Settings(layers, repeats, calls, threads)
    with _progress() as progress:
        rows = figure.run(settings, progress)
    _show(figure.table(rows), rows, json)


@bench.command()
def coresets(
    blocks: Annotated[int, typer.Option(help="Blocks of 32 tokens.")] = 256,
    spread: Annotated[float, typer.Option(help="Standard deviation of the router's logits.")] = 0.8,
    calls: Annotated[int, typer.Option(help="Timed calls of every rule.")] = 200,
    json: Json = None,
) -> None:
    """Experts read and routing weight kept by every coreset method, and its time, on synthetic router scores."""
    with _usage_errors(json):
        from dmoe_compile.bench import coresets as figure
        from dmoe_compile.bench import require_compiler

        require_compiler()
        settings = figure.Settings(blocks, spread, calls)
    with _progress() as progress:
        rows = figure.run(settings, progress)
    _show(figure.table(rows), rows, json)


@bench.command()
def decoding(
    layers: Annotated[int, typer.Option(help="Layers of SDAR-30B-A3B's width; 2.4 GB each in fp32.")] = 2,
    blocks: Annotated[int, typer.Option(help="Blocks of an answer.")] = 2,
    repeats: Annotated[int, typer.Option(help="Timed decodings of each way; medians are shown.")] = 3,
    tokens_per_forward: Annotated[
        float, typer.Option(help="Assumed: tokens that a forward accepts without passes.")
    ] = 2.0,
    top_p: Annotated[float, typer.Option(help="dmoe.top_p of the ways with dmoe.")] = 0.8,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: bfloat16 where the CPU multiplies it.")
    ] = "auto",
    recorded: Annotated[
        str | None, typer.Option(metavar="JSON", help="Instead: tests/reference/sdar_tiny_weights.json as it is.")
    ] = None,
    own_experts: Annotated[
        bool, typer.Option("--own-experts", help="Transformers' grouped_mm in every way, not the expert kernel.")
    ] = False,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """What TEAM gains in decoding, strategy by strategy: forwards, experts, time per accepted token."""
    with _usage_errors(json):
        from dmoe_compile.bench import decoding as figure
        from dmoe_compile.bench import require_compiler

        require_compiler()
        settings = figure.Settings(
            layers, blocks, 64, repeats, tokens_per_forward, top_p, dtype, recorded, own_experts, threads
        )
    with _progress() as progress:
        rows = figure.run(settings, progress)
    _show(figure.table(rows), rows, json)


@bench.command()
def layer(
    shapes: Annotated[str | None, typer.Option(help="Published models, separated by commas; all by default.")] = None,
    coreset: Annotated[int, typer.Option(help="Smallest coreset of the dmoe pass.")] = 15,
    calls: Annotated[int, typer.Option(help="Timed calls of each way; medians are shown.")] = 20,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """A whole decoder layer at published widths on this CPU: Inductor against the passes and the expert kernel."""
    with _usage_errors(json):
        from dmoe_compile.bench import layer as figure
        from dmoe_compile.bench import require_compiler

        require_compiler()
        names = _names(shapes) or tuple(figure.SHAPES)
        settings = figure.Settings(names, coreset, calls, dtype, threads)
    with _progress() as progress:
        rows = figure.run(settings, progress)
    _show(figure.table(rows), rows, json, figure.remarks(rows))


@bench.command()
def prepare(
    layers: Annotated[float, typer.Option(help="Share of each model's layers.")] = 1.0,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds for plain Inductor on each model.")] = 300.0,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Prepare and compile time of published models at real numbers of experts and layers."""
    with _usage_errors(json):
        from dmoe_compile.bench import prepare as figure
        from dmoe_compile.bench import require_compiler

        require_compiler()
        settings = figure.Settings(layers, timeout_s, threads)
    with _progress() as progress:
        rows = figure.run(settings, progress)
    _show(figure.table(rows), rows, json)


@bench.command()
def experts(
    shapes: Annotated[str | None, typer.Option(help="Published models, separated by commas; all by default.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "32,64,128,256",
    distinct: Annotated[str, typer.Option(help="Experts that tokens are routed to; 0 for any.")] = "0,70,40,15,8",
    dtypes: Annotated[str, typer.Option(help="bfloat16, float32.")] = "bfloat16,float32",
    calls: Annotated[int, typer.Option(help="Timed calls of each way; medians are shown.")] = 20,
    isa: Annotated[str | None, typer.Option(help="avx512_bf16, avx512, avx2 or portable; the best by default.")] = None,
    inductor: Annotated[bool, typer.Option(help="Also compile grouped_mm, for each row.")] = True,
    huge_pages: Annotated[bool, typer.Option("--huge-pages", help="Also time the kernel on huge pages.")] = False,
    json: Json = None,
) -> None:
    """The experts of one layer on the CPU: the kernel, grouped_mm, a loop, and the machine's own limits."""
    with _usage_errors(json):
        from dmoe_compile.bench import experts as figure
        from dmoe_compile.bench import require_compiler

        require_compiler()
        names = _names(shapes) or figure.NAMES
        rows, used = (tuple(int(number) for number in text.split(",")) for text in (tokens, distinct))
        settings = figure.Settings(names, rows, used, tuple(dtypes.split(",")), calls, isa, inductor, huge_pages)
    with _progress() as progress:
        found = figure.run(settings, progress)
    _show(figure.table(found), found, json, figure.summary(found))


@bench.command()
def gpu(
    shapes: Annotated[str | None, typer.Option(help="Published models, separated by commas; all by default.")] = None,
    calls: Annotated[int, typer.Option(help="Timed calls of each way; medians are shown.")] = 100,
    json: Json = None,
) -> None:
    """One MoE block at published widths on this machine's GPU: Inductor, transformers, vLLM, and the fused kernels."""
    with _usage_errors(json):
        from dmoe_compile.bench import gpu as figure

        names = _names(shapes) or tuple(figure.SHAPES)
        settings = figure.Settings(names, calls)
    with _progress() as progress:
        rows = figure.run(settings, progress)
    _show(figure.table(rows), rows, json)


@bench.command("gpu-model")
def gpu_model(
    shapes: Annotated[str | None, typer.Option(help="Published models, separated by commas; all by default.")] = None,
    coresets: Annotated[str, typer.Option(help="Smallest coresets of the dmoe pass; 0 is no pass.")] = "0,30,15",
    bandwidth_share: Annotated[float, typer.Option(help="Assumed: of the vendor's bandwidth that is reached.")] = 0.8,
    launch_us: Annotated[float, typer.Option(help="Assumed: microseconds that a launch costs.")] = 1.5,
    json: Json = None,
) -> None:
    """Bytes and launches of one MoE block, counted in the code generated for a GPU; takes no GPU, measures no time."""
    with _usage_errors(json):
        from dmoe_compile.bench import gpu_model as figure

        names = _names(shapes) or tuple(figure.SHAPES)
        sizes = tuple(int(size) for size in coresets.split(","))
        settings = figure.Settings(names, sizes, bandwidth_share, launch_us)
    with _progress() as progress:
        rows = figure.run(settings, progress)
    _show(figure.table(rows), rows, json)


def _names(text: str | None) -> tuple[str, ...]:
    """Return the names in a list that is separated by commas, none where it was not given."""
    return () if text is None else tuple(name.strip() for name in text.split(","))


def _options(passes: str, pairs: list[str]) -> dict[str, Any]:
    """Return backend options from `--passes a,b` and `--option key=value`."""
    options: dict[str, Any] = {"passes": [name.strip() for name in passes.split(",") if name.strip()]}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--option {pair!r} is not KEY=VALUE, such as dmoe.top_p=0.8")
        if key == "passes":
            raise ValueError(f"--option {pair!r}: passes have an option of their own, --passes {value}")
        options[key] = _literal(value)
    return options


def _literal(text: str) -> Any:
    """Return the value that an option's text stands for: a number, true, false, none, a list, or else the text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@contextmanager
def _usage_errors(json: str | None) -> Iterator[None]:
    """Turn a ValueError, which says what the caller did, into one line and exit code 2."""
    try:
        if json not in (None, "-") and not (folder := Path(json).parent).is_dir():  # said now, not after minutes
            raise ValueError(f"--json {json}: there is no folder {folder}; make it first")
        yield
    except ValueError as error:
        typer.echo(f"dmoe: {str(error).strip().splitlines()[0]}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a progress bar on standard error, so that standard output can be piped."""
    from rich.console import Console
    from rich.progress import Progress

    with _quiet(), Progress(console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        yield progress


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out Dynamo's warning that transformers' experts ask a cached function for the version of torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        yield


def _show(table: RenderableType, rows: list[Row], json: str | None, remarks: Iterable[str] = ()) -> None:
    """Print a table and remarks, and write rows where they were asked for."""
    from rich.console import Console

    from dmoe_compile.bench import write_rows

    console = Console(stderr=json == "-")
    console.print(table)
    for remark in remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if json is not None:
        write_rows(rows, json)


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


def _fail(message: str) -> None:
    typer.echo(f"dmoe: {message}", err=True)
    raise typer.Exit(1)
