"""`dmoe bench`: one figure each, as a table and as JSON lines."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dmoe_compile.bench import require_compiler, require_packages
from dmoe_compile.bench.ways import WAYS
from dmoe_compile.cli_shared import Json, Threads, fail, names, progress_bar, show, usage_errors

# Everything else is imported in the commands: torch and transformers take seconds, and --help needs neither.

app = typer.Typer(help="Measure one figure; prints a table, and JSON lines with --json.", no_args_is_help=True)


def _measure(name: str, json: str | None, settings: Callable[[Any], Any], *, compiler: bool = True) -> None:
    """Run a figure, which is a module of bench/, and show it.

    Args:
        name: the module; it has Settings, run, table, and remarks if there is more to say.
        json: where JSON lines go, if anywhere.
        settings: makes the module's Settings, with the module as its argument.
        compiler: whether it needs a C++ compiler.
    """
    with usage_errors(json):
        figure = import_module(f"dmoe_compile.bench.{name}")
        if compiler:
            require_compiler()
        chosen = settings(figure)
        with progress_bar() as progress:
            rows = figure.run(chosen, progress)
    remarks = getattr(figure, "remarks", None)
    show(figure.table(rows), rows, json, () if remarks is None else remarks(rows))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in names(text))


@app.command()
def overhead(
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 12,
    repeats: Annotated[int, typer.Option(help="Fresh processes of each kind; medians are shown.")] = 3,
    calls: Annotated[int, typer.Option(help="Interleaved calls that are timed.")] = 1000,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """What the backend costs: matcher, compile time cold and warm, guards, and time per call."""
    _measure("overhead", json, lambda figure: figure.Settings(layers, repeats, calls, threads))


@app.command()
def coresets(
    blocks: Annotated[int, typer.Option(help="Blocks of 32 tokens.")] = 256,
    spread: Annotated[float, typer.Option(help="Standard deviation of the router's logits.")] = 0.8,
    calls: Annotated[int, typer.Option(help="Timed calls of every rule.")] = 200,
    json: Json = None,
) -> None:
    """Experts read and routing weight kept by every coreset method, and its time, on synthetic router scores."""
    _measure("coresets", json, lambda figure: figure.Settings(blocks, spread, calls))


@app.command()
def e2e(
    shapes: Annotated[str | None, typer.Option(help="Published models, separated by commas; all by default.")] = None,
    ways: Annotated[
        str | None, typer.Option(help="Ways, separated by commas; all but TEAM's single strategies by default.")
    ] = None,
    memory_gib: Annotated[float, typer.Option("--memory", help="GiB: as many layers are built as fit.")] = 12.0,
    layers: Annotated[int | None, typer.Option(help="So many layers instead.")] = None,
    blocks: Annotated[int | None, typer.Option(help="Blocks of an answer; the stack's own.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed decodings of each way; medians are shown.")] = 3,
    tokens_per_forward: Annotated[
        float | None, typer.Option(help="Assumed: tokens that a forward accepts without passes; the stack's own.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: bfloat16 where the CPU multiplies it.")
    ] = "auto",
    recorded: Annotated[
        str | None, typer.Option(metavar="JSON", help="Instead: tests/reference/sdar_tiny_weights.json as it is.")
    ] = None,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """End to end: real-width layers decode blocks; eager, Inductor, the kernel, and every pass. Takes long."""
    _measure(
        "e2e", json,
        lambda figure: figure.Settings(
            names(shapes), names(ways) or tuple(WAYS), memory_gib, layers, blocks, 64, repeats, tokens_per_forward,
            dtype, recorded, threads,
        ),
    )  # fmt: skip


@app.command()
def layer(
    shapes: Annotated[str | None, typer.Option(help="Published models, separated by commas; all by default.")] = None,
    coreset: Annotated[int, typer.Option(help="Smallest coreset of the dmoe pass.")] = 15,
    calls: Annotated[int, typer.Option(help="Timed calls of each way; medians are shown.")] = 20,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """A whole decoder layer at published widths on this CPU: Inductor against the passes and the expert kernel."""
    _measure(
        "layer", json,
        lambda figure: figure.Settings(names(shapes) or tuple(figure.SHAPES), coreset, calls, dtype, threads),
    )  # fmt: skip


@app.command()
def scaling(
    picture: Annotated[Path, typer.Argument(help="Where the picture goes, without its suffix: .png and .svg.")],
    shape: Annotated[str, typer.Option(help="A published model.")] = "LLaDA2.0-mini",
    calls: Annotated[int, typer.Option(help="Timed calls of each way; medians are shown.")] = 10,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and states.")] = "bfloat16",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """A decoder layer's time against experts in use, tokens and sequences, with its roofline: a table and a picture."""
    with usage_errors(json):
        from dmoe_compile.bench import scaling as figure

        require_compiler()
        require_packages("eval", "matplotlib")
        settings = figure.Settings(shape, calls=calls, dtype=dtype, threads=threads)
        if not picture.parent.is_dir():
            raise ValueError(f"{picture}: there is no folder {picture.parent}; make it first")
    with progress_bar() as progress:
        rows = figure.run(settings, progress)
    show(figure.table(rows), rows, json, figure.remarks(rows))
    for file in figure.draw(rows, picture):
        typer.echo(str(file), err=json == "-")


@app.command("diffusion-gemma")
def diffusion_gemma(
    config: Annotated[
        Literal["small", "large"], typer.Option(help="large: layers of the published 26B-A4B's width.")
    ] = "small",
    steps: Annotated[int, typer.Option(help="Denoising steps of a decoding.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed decodings of each backend; medians are shown.")] = 5,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of weights, prompt and sampling.")] = 0,
    json: Json = None,
) -> None:
    """DiffusionGemma's own generate(), random weights, through stock Inductor and through dmoe."""
    with usage_errors(json):
        from dmoe_compile.bench import diffusion_gemma as figure

        require_compiler()
        settings = figure.Settings(config, steps, repeats, threads, seed)
    with progress_bar() as progress:
        result = figure.run(settings, progress)
    show(result.table(), result.rows(), json)
    if not result.tokens_equal:
        fail("a coreset of all experts changed the tokens; please report it with the JSON lines of --json")


@app.command()
def prepare(
    layers: Annotated[float, typer.Option(help="Share of each model's layers.")] = 1.0,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds for plain Inductor on each model.")] = 300.0,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Prepare and compile time of published models at real numbers of experts and layers."""
    _measure("prepare", json, lambda figure: figure.Settings(layers, timeout_s, threads))


@app.command()
def experts(
    shapes: Annotated[str | None, typer.Option(help="Published models, separated by commas; all by default.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "32,64,128,256",
    distinct: Annotated[str, typer.Option(help="Experts that tokens are routed to; 0 for any.")] = "0,70,40,15,8",
    dtypes: Annotated[str, typer.Option(help="bfloat16, float32.")] = "bfloat16,float32",
    calls: Annotated[int, typer.Option(help="Timed calls of each way; medians are shown.")] = 20,
    isa: Annotated[
        str | None, typer.Option(help="amx_bf16, avx512_bf16, avx512, avx2 or portable; the best by default.")
    ] = None,
    inductor: Annotated[bool, typer.Option(help="Also compile grouped_mm, for each row.")] = True,
    huge_pages: Annotated[bool, typer.Option("--huge-pages", help="Also time the kernel on huge pages.")] = False,
    json: Json = None,
) -> None:
    """The experts of one layer on the CPU: the kernel, grouped_mm, a loop, and the machine's own limits."""
    _measure(
        "experts", json,
        lambda figure: figure.Settings(
            names(shapes) or figure.NAMES, _numbers(tokens), _numbers(distinct), names(dtypes), calls, isa, inductor,
            huge_pages,
        ),
    )  # fmt: skip


@app.command()
def gpu(
    shapes: Annotated[str | None, typer.Option(help="Published models, separated by commas; all by default.")] = None,
    calls: Annotated[int, typer.Option(help="Timed calls of each way; medians are shown.")] = 100,
    json: Json = None,
) -> None:
    """One MoE block at published widths on this machine's GPU: Inductor, transformers, vLLM, and the fused kernels."""
    _measure("gpu", json, lambda figure: figure.Settings(names(shapes) or tuple(figure.SHAPES), calls), compiler=False)


@app.command("gpu-model")
def gpu_model(
    shapes: Annotated[str | None, typer.Option(help="Published models, separated by commas; all by default.")] = None,
    coresets: Annotated[str, typer.Option(help="Smallest coresets of the dmoe pass; 0 is no pass.")] = "0,30,15",
    bandwidth_share: Annotated[float, typer.Option(help="Assumed: of the vendor's bandwidth that is reached.")] = 0.8,
    launch_us: Annotated[float, typer.Option(help="Assumed: microseconds that a launch costs.")] = 1.5,
    json: Json = None,
) -> None:
    """Bytes and launches of one MoE block, counted in the code generated for a GPU; takes no GPU, measures no time."""
    _measure(
        "gpu_model", json,
        lambda figure: figure.Settings(
            names(shapes) or tuple(figure.SHAPES), _numbers(coresets), bandwidth_share, launch_us
        ),
        compiler=False,
    )  # fmt: skip
