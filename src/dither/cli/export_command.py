"""The command ``dither export``: its arguments."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from dither.cli.commands import AsJson, Quiet, app
from dither.cli.console import Printer

_MODEL = "A model folder, or MODULE:NAME of what builds the model."
_KERNELS = "exact; fast: inputs are rounded to 8 bits; standard: ONNX's own operators alone."
_Text = Annotated[str | None, typer.Option(metavar="MODEL", help=_MODEL)]
_Data = Annotated[
    str | None, typer.Option(metavar="DATA", help="As for compress; one batch is run.")
]


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive, or a folder with one.")],
    *,
    to: Annotated[str, typer.Option(metavar="KIND", help="onnx.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="By default ./FILE.onnx.")
    ] = None,
    model: _Text = None,
    data: _Data = None,
    kernels: Annotated[str, typer.Option(metavar="KIND", help=_KERNELS)] = "exact",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an archive as an ONNX file for onnxruntime, with weights as integers."""
    late: Any = importlib.import_module("dither.cli.exporting")  # torch takes seconds
    how = {"kind": to, "kernels": kernels, "model": model, "data": data}
    late.export(Printer(as_json, quiet), file, output, **how)
