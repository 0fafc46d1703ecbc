"""The command ``dither demo``: it says what it will do before torch is imported."""

from __future__ import annotations

import importlib
import webbrowser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import typer

from dither.cli.commands import AsJson, Quiet, app
from dither.cli.console import CHECK_FAILED, GOOD, Printer
from dither.terminal import printable

PAGE = Path("out") / "web"
"""Where ``make web`` builds the page, from the folder of a clone."""

_STORY = (
    "dither demo: trains a small network on handwritten digits, compresses it to several sizes, "
    "and compares with plain rounding. This takes about a minute; results go to "
)


@app.command()
def demo(
    *,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the files, table and plot.")
    ] = Path("dither-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes.")] = False,
    web: Annotated[
        bool,
        typer.Option(
            "--web", help=f"Open the page that `make web` built in {PAGE.as_posix()}, instead."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a small network, compress it to several sizes, and compare with plain rounding."""
    printer = Printer(as_json, quiet)
    if web:
        show(printer, PAGE)
        return
    if not (as_json or quiet):
        typer.echo(_STORY + printable(str(out)), err=True)
    late: Any = importlib.import_module("dither.cli.work")  # torch takes seconds
    raise typer.Exit(GOOD if late.demo(printer, out, quick=quick) else CHECK_FAILED)


class _Files(SimpleHTTPRequestHandler):
    """A folder's files; modules and WebAssembly run only under their own types."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""


def served(folder: Path) -> ThreadingHTTPServer:
    """A server of a folder, for this machine alone, at a port that was free; it does not run yet.

    Raises:
        BadParameter: there is no page in the folder.
    """
    if not (folder / "index.html").is_file():
        raise typer.BadParameter(
            f"there is no page in {str(folder)!r}: in a clone, `make web DITHER_DATA=FOLDER` "
            "compresses all-MiniLM-L6-v2 and builds it there"
        )
    return ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(folder)))


def show(printer: Printer, folder: Path) -> None:
    """Serve a page and open it in a browser, until Ctrl-C."""
    with served(folder) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        printer.text(f"{url} (Ctrl-C ends it)")
        webbrowser.open(url)
        server.serve_forever()
