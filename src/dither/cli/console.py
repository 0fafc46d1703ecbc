"""What the command line prints, and how it fails: one message, no traceback."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from dither.cli import interrupt
from dither.progress import Step, listening, report, spoken
from dither.terminal import printable

_WIDE = 160
"""Columns of a table that goes into a file or a pipe."""

_PATIENCE, _EVERY = 2.0, 10.0
"""Seconds after which work shows its progress, and between two lines in a file or a pipe."""

GOOD, CHECK_FAILED, BAD_INPUT = 0, 1, 2
"""Exit statuses, beside those of signals."""

_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
"""What torch says of its allocators, in errors of no kind of their own."""


@dataclass(frozen=True)
class Printer:
    """Prints results as the user wants them: tables, one JSON document, or nothing."""

    as_json: bool
    quiet: bool

    def document(self, values: object) -> None:
        """Print the result for machines, if that is wanted; ``--json`` outweighs ``--quiet``."""
        if self.as_json:
            typer.echo(json.dumps(_finite(values), allow_nan=False))

    def text(self, line: str) -> None:
        """Print one line for people, whatever is in it."""
        if not (self.as_json or self.quiet):
            typer.echo(printable(line))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
        """Print a table for people; all but the ``left`` first columns are numbers."""
        if self.as_json or self.quiet:
            return
        grid = Table(box=None, header_style="bold", pad_edge=False)
        for i, column in enumerate(columns):
            if i < left:
                grid.add_column(column, overflow="fold")
            else:
                grid.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            grid.add_row(*map(printable, row))
        width = None if sys.stdout.isatty() else _WIDE
        Console(markup=False, highlight=False, emoji=False, width=width).print(grid)

    @contextmanager
    def progress(self, stage: str) -> Iterator[Callable[[str, float], None]]:
        """Show on standard error where work is that takes long, as it reports it.

        A terminal has one line, which is written anew; a file or a pipe gets one now and then.

        Args:
            stage: what is done at first.

        Yields:
            A hook for work that takes one: what is being done, and the share that is.
        """
        if self.as_json or self.quiet:
            yield lambda _what, _share: None
            return
        console = Console(stderr=True)
        with (
            _line(console, stage) if console.is_terminal else _lines(stage) as hear,
            listening(hear),
        ):
            yield report


@contextmanager
def _line(console: Console, stage: str) -> Iterator[Callable[[Step], None]]:
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    bar = Progress(*columns, console=console, transient=True, expand=True)
    task = bar.add_task(stage, total=None, left="")
    # From a timer, so that it also appears while a single long step reports nothing.
    timer = threading.Timer(_PATIENCE, bar.start)
    timer.daemon = True
    timer.start()

    def hear(step: Step) -> None:
        # Never quite full: a finished stage would stop the clock for those that follow.
        part = min(step.share, 0.999)
        left = "" if step.left is None else f"about {spoken(step.left)} left of this"
        bar.update(task, description=printable(step.what), total=1.0, completed=part, left=left)

    try:
        yield hear
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


@contextmanager
def _lines(stage: str) -> Iterator[Callable[[Step], None]]:
    start, ended = time.monotonic(), threading.Event()
    last: list[Step] = [Step("", stage, "", 0.0)]

    def say() -> None:
        while not ended.wait(_EVERY):
            after = spoken(time.monotonic() - start)
            typer.echo(f"dither: {printable(str(last[0]))} (after {after})", err=True)

    def hear(step: Step) -> None:
        last[0] = step

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield hear
    finally:
        ended.set()
        thread.join()


def prepare_streams() -> None:
    """Let every name be printed, in any encoding, and nothing where a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what is the user's to mend into one message on standard error and exit status 2."""
    try:
        yield
    except KeyboardInterrupt:
        interrupt.told()
        typer.echo(interrupt.SAID, err=True)
        raise typer.Exit(interrupt.INTERRUPTED) from None
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        lines = f"dither: {message}".split("\n")
        typer.echo("\n".join(map(printable, lines)), err=True)
        raise typer.Exit(BAD_INPUT) from None


def _user_message(error: Exception) -> str | None:
    if isinstance(error, BrokenPipeError):
        return None  # typer ends quietly
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    text = str(error)
    if isinstance(error, MemoryError) or any(said in text for said in _NO_MEMORY):
        return f"not enough memory. {text}".strip()
    if isinstance(error, RecursionError):
        return f"what the file holds is nested too deeply to be shown ({text})"
    # Found, not imported: before anything of ours has run there is no error of ours to know.
    core = sys.modules.get("dither.core")
    if core is None or not isinstance(error, core.DitherError):
        return None
    smallest = getattr(error, "smallest", None)
    if smallest is not None and not {str(smallest), f"{smallest:,}"} & set(text.split()):
        text += f" (the smallest possible is {smallest} bytes)"
    if "max_nbytes" in text:
        text += " (on the command line: --max-size)"
    return text


def _finite(value: object) -> object:
    """The value with ``null`` for numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
