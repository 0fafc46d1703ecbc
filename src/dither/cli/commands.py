"""The commands of ``dither``: their arguments and exit statuses."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dither import __version__
from dither.cli.console import (
    CHECK_FAILED,
    GOOD,
    Printer,
    prepare_streams,
    user_errors,
)
from dither.cli.interrupt import answer_signals, ending_at_once
from dither.terminal import printable

if TYPE_CHECKING:
    from dither.cli import work
else:

    class _Late:
        """Imported at the first use: torch takes seconds, and ``dither --help`` needs none."""

        def __getattr__(self, name: str) -> object:
            return getattr(importlib.import_module("dither.cli.work"), name)

    work = _Late()


class _Commands(TyperGroup):
    """Runs a command; the errors of all of them end in one place."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - as typer declares it
        with user_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="dither",
    cls=_Commands,
    help="Compress neural networks to a byte budget: name the bytes, keep the model.",
    epilog="Exit status: 0 success, 1 a check failed, 2 bad input. Errors go to standard error.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
OnDisk = Annotated[
    bool | None,
    typer.Option(
        "--on-disk/--in-memory",
        help="Where to keep the model's weights while it runs on DATA; on disk means beside OUT. "
        "By default on disk if they take more than a quarter of the memory.",
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        "--max-size",
        metavar="SIZE",
        help="The most memory that reading an archive may take, such as 16GB.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="By default ./SOURCE.dither. If it ends in / and SOURCE is a model folder, a model "
        "folder that transformers reads.",
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(metavar="WEIGHTS", help="The weights that FILE stores differences to."),
]
NewBase = Annotated[
    Path | None,
    typer.Option(
        metavar="WEIGHTS",
        help="Store differences to these weights, which are then needed to read OUT.",
    ),
]
Prune = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Without data: first set 0.9 or 90% of the weights of matrices to 0, those that cost "
        "least; or 2:4, two of every four.",
    ),
]
Factored = Annotated[
    bool,
    typer.Option(
        "--factors",
        help="Without data: also try products of quantized sparse matrices; some seconds each.",
    ),
]
Tuned = Annotated[
    bool, typer.Option("--tune", help="Finally, train all but the codes on DATA: minutes.")
]
MAX_BITS = 64
_SOURCE = "A .safetensors, .pt, .pth, .th, .bin, .ckpt, .npz or .dither file, or a model folder."


def main() -> None:
    """Run the command line."""
    answer_signals()
    prepare_streams()
    warnings.formatwarning = lambda message, *_, **__: f"dither: {printable(str(message))}\n"
    with ending_at_once():
        app(prog_name="dither")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"dither {__version__}")
        raise typer.Exit


def _parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


@app.callback()
def _options(
    *,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Compress neural networks to a byte budget: name the bytes, keep the model."""


@app.command()
def compress(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help=_SOURCE)],
    *,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="At most: 9000000 bytes, 9MB (10^6), 9MiB, 25% or 12x."),
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Bits per value, instead of SIZE.")] = None,
    output: Output = None,
    key: Annotated[
        str | None, typer.Option(help="The state dict to read, if a PyTorch file has several.")
    ] = None,
    base: NewBase = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="A few hundred samples to compress by: a text file, one per line, for a model "
            "folder; or MODULE:NAME of a loader or a function that makes one.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME", help="Builds the model, if SOURCE is not a model folder."
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="Scores a model; the best is kept."),
    ] = None,
    activations: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Quantize activations: int8, or int2 to 16.")
    ] = None,
    tune: Tuned = False,
    on_disk: OnDisk = None,
    prune: Prune = None,
    factors: Factored = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model to a file of at most SIZE bytes."""
    if (size is None) == (bits is None):
        given = "neither" if size is None else "both"
        raise typer.BadParameter(f"give either --size or --bits, not {given}")
    if bits is not None and not 0 < bits <= MAX_BITS:
        raise typer.BadParameter(f"--bits is a number from 0 to {MAX_BITS}, not {bits:g}")
    wanted = size or f"{bits:.12f} bits"
    if data is None and (model or evaluate or activations or tune or on_disk is not None):
        options = "--model, --evaluate, --activations, --tune, --on-disk and --in-memory"
        raise typer.BadParameter(f"{options} go with --data")
    if (data is not None or base is not None) and (prune is not None or factors):
        raise typer.BadParameter("--prune and --factors work without --data and --base")
    told = work.Given(data, model, evaluate, activations, on_disk, base, tune)
    way = work.sensitivity_of(prune, factors=factors)
    printer = Printer(as_json, quiet)
    work.compress(printer, source, output, size=wanted, key=key, given=told, way=way)


@app.command()
def plan(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help=_SOURCE)],
    *,
    sizes: Annotated[
        str, typer.Option(metavar="SIZES", help="Comma-separated: 9MB,25%,12x.")
    ] = "4x,8x,12x,16x",
    key: Annotated[
        str | None, typer.Option(help="The state dict to read, if a PyTorch file has several.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: .svg, .png or .pdf.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict in seconds what several sizes would do; nothing is compressed."""
    work.plan(Printer(as_json, quiet), source, _parts(sizes), key=key, picture=plot)


@app.command()
def sweep(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help=_SOURCE)],
    *,
    sizes: Annotated[
        str, typer.Option(metavar="SIZES", help="Comma-separated: 9MB,25%,12x.")
    ] = "4x,8x,12x,16x",
    methods: Annotated[
        str,
        typer.Option(
            metavar="METHODS",
            help="Comma-separated: data-free, data, int8, or MODULE:NAME of a function of "
            "(model, nbytes, data, seed) that returns an archive.",
        ),
    ] = "data-free",
    seeds: Annotated[str, typer.Option(metavar="SEEDS", help="Comma-separated: 0,1,2.")] = "0",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="One line of JSON per cell.")
    ] = Path("sweep.jsonl"),
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="As for compress; a seed is passed on.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="As for compress.")
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME", help="Scores a model; else by the distance of outputs."
        ),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the files in this folder.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Parallel processes on this machine.")] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on this Ray cluster, such as auto.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Repeat cells that failed.")] = False,
    choose: Annotated[
        int | None, typer.Option(metavar="TRIALS", help="Find the best file with this many scores.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw size against score: .svg, .png, .pdf.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compress by sizes x methods x seeds x models; cells with a result are not repeated.

    The exit status is 1 if a cell failed; the others continue.
    """
    wanted = work.Wanted(_parts(methods), _parts(sizes), _parts(seeds), data, model, evaluate, keep)
    how: dict[str, Any] = {"jobs": jobs, "ray": ray, "retry": retry, "plot": plot, "choose": choose}
    good = work.sweep(Printer(as_json, quiet), sources, wanted, output, **how)
    raise typer.Exit(GOOD if good else CHECK_FAILED)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .dither archive.")],
    *,
    as_tree: Annotated[
        bool, typer.Option("--tree", help="By module, with the total bytes of each.")
    ] = False,
    max_size: MaxSize = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what an archive holds; nothing is decoded, so its size does not matter."""
    work.inspect(Printer(as_json, quiet), file, max_size, as_tree=as_tree)


@app.command()
def decompress(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .dither archive.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="A .safetensors, .pt or .npz file; by default ./FILE.safetensors.",
        ),
    ] = None,
    base: Base = None,
    max_size: MaxSize = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an archive's tensors as a checkpoint that other programs can read."""
    work.decompress(Printer(as_json, quiet), file, output, max_size, base)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .dither archive.")],
    *,
    base: Base = None,
    max_size: MaxSize = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read and decode everything in an archive; exit with status 1 if anything is wrong."""
    good = work.verify(Printer(as_json, quiet), file, max_size, base)
    raise typer.Exit(GOOD if good else CHECK_FAILED)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help=_SOURCE)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The same.")],
    *,
    min_sqnr: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Exit with status 1 if any tensor's SQNR is lower."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="WEIGHTS", help="What A or B stores differences to.")
    ] = None,
    max_size: MaxSize = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare tensors: signal-to-quantization-noise ratio (SQNR, dB) and largest error.

    The exit status is 1 if names or shapes differ, or a tensor is below --min-sqnr.
    """
    printer = Printer(as_json, quiet)
    good = work.compare(printer, a, b, work.Beside(None, max_size, base), min_sqnr=min_sqnr)
    raise typer.Exit(GOOD if good else CHECK_FAILED)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .dither archive.")],
    *,
    against: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help=f"The original, to show errors: {_SOURCE}"),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(metavar="OTHER", help="A second archive, to show beside the first."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="By default ./FILE.html."),
    ] = None,
    base: Base = None,
    max_size: MaxSize = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an HTML page: where the bytes go, bits and errors of tensors, their distributions."""
    printer, given = Printer(as_json, quiet), work.Beside(against, max_size, base)
    if beside is None:
        work.write_page(printer, file, output, given)
    else:
        work.write_pair(printer, (file, beside), output, given)
