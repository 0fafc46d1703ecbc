"""Many cells, by processes of this machine or on a Ray cluster; what was done is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from dither.cli.cells import Cell, failed, tried
from dither.cli.choose import check_choice, choose_file, lost
from dither.cli.console import Printer
from dither.cli.files import make_folder
from dither.core import CheckpointError, DitherError
from dither.report import check_picture, draw_sweep

_POLL = 0.05
_HEAD = b'{"source": '
"""How rows begin, also those that were cut off."""

_LOST = "the process ended without a result"


def sweep(
    printer: Printer,
    cells: Sequence[Cell],
    results: Path,
    *,
    jobs: int,
    ray: str | None,
    retry: bool,
    plot: Path | None,
    choose: int | None = None,
) -> bool:
    """Run the cells that have no row yet; whether all have one without an error at the end.

    With ``choose``, they are made without a score, and of so many of the files one is measured.
    """
    if plot is not None:
        check_picture(plot)
    rows = read_rows(results)
    make_folder(results)
    scored = cells
    if choose is not None:
        check_choice(cells, choose)
        cells = [replace(cell, evaluate=None) for cell in cells]
    done = {key for key, row in rows.items() if not (retry and "error" in row)}
    if choose is not None:
        done -= {cell.key for cell in cells if "error" not in rows.get(cell.key, {}) and lost(cell)}
    waiting = [cell for cell in cells if cell.key not in done]
    printer.text(f"{len(cells)} cells, {len(cells) - len(waiting)} done before")
    running = _on_ray(waiting, ray) if ray is not None else _on_this_machine(waiting, jobs)
    for number, (cell, row) in enumerate(running, 1):
        rows[cell.key] = row
        append(results, row)
        printer.text(f"[{number}/{len(waiting)}] {cell.name}: {_said(row)}")
    found = [rows[cell.key] for cell in cells]
    wrong = sum("error" in row for row in found)
    if plot is not None and wrong < len(found):
        make_folder(plot)
        draw_sweep(found, plot)
        printer.text(f"wrote {plot}")
    document = {"results": str(results), "failed": wrong, "rows": found}
    if choose is not None:
        choice = choose_file(printer, scored, rows, choose, lambda row: append(results, row))
        wrong += choice["failed"]
        document |= {"choice": choice}
    printer.document(document)
    printer.text(f"{results}: {len(found)} cells, {wrong} failed")
    return wrong == 0


def _said(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    score = "" if row["score"] is None else f", score {row['score']:.4g}"
    distance = "" if row["distance"] is None else f", distance {row['distance']:.4g}"
    return f"{row['nbytes']:,} bytes{score}{distance}, {row['seconds']:.1f} s"


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each cell, by its key; a line that was cut off counts for nothing.

    Raises:
        CheckpointError: the file holds something else.
    """
    if not path.exists():
        return {}
    rows: dict[str, dict[str, Any]] = {}
    names = set(asdict(Cell("", "", "", 0)))
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            cell = Cell(**{name: row[name] for name in names})
        except (ValueError, TypeError, KeyError):
            if line.rstrip()[: len(_HEAD)] == _HEAD[: len(line.rstrip())]:
                continue
            raise CheckpointError(
                f"{str(path)!r}, line {number}, is no result of a sweep; name another file with -o"
            ) from None
        rows[cell.key] = row
    return rows


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row in one write, on a line of its own even where one before was cut off."""
    line = json.dumps(row).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


class _Process:
    """One cell in a process of its own, which ends when this one does."""

    def __init__(self, cell: Cell, threads: int) -> None:
        self._cell = cell
        self._out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open while it runs
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            [sys.executable, "-m", "dither.cli.cells"],
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        assert self._child.stdin is not None  # noqa: S101 - for the type checker
        self._input: IO[bytes] = self._child.stdin
        with suppress(OSError):  # it ended at once: that is its result
            self._input.write(json.dumps(asdict(cell)).encode() + b"\n")
            self._input.flush()

    def poll(self) -> dict[str, Any] | None:
        """Its row once it ended, None before."""
        status = self._child.poll()
        if status is None:
            return None
        self._out.seek(0)
        self._errors.seek(0)
        out, errors = self._out.read(), self._errors.read()
        self.close()
        try:
            row: dict[str, Any] = json.loads(out.splitlines()[-1])
        except (IndexError, ValueError):
            last = (errors.decode(errors="replace").strip().splitlines() or [""])[-1]
            how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
            return failed(self._cell, f"{_LOST}, {how}{last and ': '}{last}")
        return row

    def close(self) -> None:
        """End it, if it runs, and let go of what it has."""
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        with suppress(OSError):
            self._input.close()
        self._out.close()
        self._errors.close()


def _on_this_machine(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    waiting, running = deque(cells), dict[Cell, _Process]()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                running[cell] = _Process(cell, threads)
            time.sleep(_POLL)
            for cell, process in list(running.items()):
                if (row := process.poll()) is not None:
                    del running[cell]
                    yield cell, row
    finally:
        for process in running.values():
            process.close()


def _on_ray(cells: Sequence[Cell], address: str) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell a task of one processor, in a process of its own."""
    try:
        import ray
    except ImportError as error:
        raise DitherError('clusters are run by Ray; run: pip install "dither[ray]"') from error
    began = not ray.is_initialized()
    if began:
        variables = {"OMP_NUM_THREADS": "1"}
        if path := os.environ.get("PYTHONPATH"):
            variables["PYTHONPATH"] = path
        try:
            environment = {"env_vars": variables}
            ray.init(address=address, log_to_driver=False, runtime_env=environment)
        except (ConnectionError, ValueError) as error:
            raise DitherError(f"there is no Ray cluster at {address!r}: {error}") from error
    try:
        run = ray.remote(num_cpus=1, max_calls=1, max_retries=1)(tried)
        tasks = {run.remote(asdict(_absolute(cell)), str(Path.cwd())): cell for cell in cells}
        while tasks:
            done, _ = ray.wait(list(tasks), num_returns=1)
            for task in done:
                cell = tasks.pop(task)
                try:
                    yield cell, {**ray.get(task), **asdict(cell)}
                except ray.exceptions.RayError as error:
                    lines = str(error).strip().splitlines() or [""]
                    yield cell, failed(cell, f"{type(error).__name__}: {lines[0]}")
    finally:
        if began:
            ray.shutdown()


def _absolute(cell: Cell) -> Cell:
    """The same with paths that mean the same in any folder."""
    keep = None if cell.keep is None else str(Path(cell.keep).absolute())
    return replace(cell, source=str(Path(cell.source).absolute()), keep=keep)
