"""Run the benchmarks that have no result yet, each in a process of its own, and keep every row.

    python -m benchmarks.runner --set quick
    python -m benchmarks.runner --set full --peers ENVIRONMENTS --only 'minilm_stsb/*'

A run's result is ``RESULTS/runs/TASK/METHOD-SETTING-SEED.json``, written whole or not at all, with
commit, versions, machine, seconds and peak memory. Runs that have one, or that a benchmark with a
program of its own recorded, are not repeated: stop the program at any time and start it again. What
fails or takes more than two hours is a result, too, with the message as ``error``; ``--retry``
repeats these. Trainings keep their state in ``--folder`` and take up where they were stopped.

``--peers`` names the folder of the peers' environments (``benchmarks.peers.setup`` makes it); those
without an environment are left out. It imports the standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.methods import HOURS, RESULTS, ROOT, TASKS, Run, peers, runs
from benchmarks.rows import recorded, result_path

_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Place:
    """Where programs are, and where they may write.

    Attributes:
        results: folder of results.
        folder: for files and models, which may be deleted.
        peers: folder of the peers' environments, if any.
        threads: of each run.
        limit: seconds for each run.
    """

    results: Path = RESULTS
    folder: Path = Path("out/bench")
    peers: Path | None = None
    threads: int = 1
    limit: float = HOURS * 3600

    def python(self, peer: str) -> Path:
        """The interpreter of a peer's environment."""
        return (self.peers or Path()).absolute() / peer / "bin" / "python"

    def command(self, run: Run) -> list[str]:
        """What measures a run; its last line is the row."""
        if run.ours:
            found = [sys.executable, "-m", "benchmarks.measure", *run.arguments]
        else:
            found = [str(self.python(run.method)), "-m", f"benchmarks.peers.{run.method}"]
            found += ["--task", run.task, "--setting", run.setting, "--split", "test"]
        return [*found, "--folder", str(self.folder), "--threads", str(self.threads)]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: of exit, negative for a signal; None if it took too long.
        out: what it printed.
        errors: the same of standard error.
        seconds: from its start to its end.
        peak_mb: its largest resident memory, or that of a process it waited for, in 10^6 bytes.
    """

    status: int | None
    out: str
    errors: str
    seconds: float
    peak_mb: float


def call(command: Sequence[str], limit: float) -> Ended:
    """Run a command in a session of its own; all of it is ended where it takes too long."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=out, stderr=errors, cwd=ROOT, env=environment, start_new_session=True
        )
        in_time = True
        try:
            found, status, usage = os.wait4(child.pid, os.WNOHANG)
            while not found and in_time:
                time.sleep(_POLL)
                in_time = time.monotonic() - start < limit
                found, status, usage = os.wait4(child.pid, os.WNOHANG)
        except BaseException:  # the user's, too: nothing is left running
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        if not found:
            os.killpg(child.pid, signal.SIGKILL)
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, errors):
            stream.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return Ended(
            child.returncode if found else None,
            out.read(),
            errors.read(),
            round(time.monotonic() - start, 1),
            round(usage.ru_maxrss * unit / 1e6, 1),
        )


def cleaned(text: str) -> str:
    """A message without the names of this machine's folders."""
    names = {str(ROOT): ".", sys.prefix: "PYTHON", tempfile.gettempdir(): "TMP"}
    names |= {os.environ.get("DITHER_DATA", ""): "DITHER_DATA", str(Path.home()): "HOME"}
    for path in sorted(names, key=len, reverse=True):
        if len(path) > 1:
            text = text.replace(path, names[path])
    return text


def outcome(run: Run, ended: Ended, limit: float) -> dict[str, Any]:
    """The row of a run that ended: what it printed, or why there is none."""
    row: dict[str, Any] = {"task": run.task, "method": run.method, "setting": run.setting}
    row |= {"seed": run.seed, "split": "test"}
    if ended.status is None:
        row["error"] = f"it took more than {limit:.0f} s"
    elif ended.status:
        lines = ended.errors.strip().splitlines() or [""]
        row["error"] = cleaned(f"exit status {ended.status}: {lines[-1]}")
    else:
        try:
            row = json.loads(ended.out.splitlines()[-1]) | row
        except (IndexError, ValueError):
            row["error"] = cleaned(f"it printed no row, but {ended.out[-200:]!r}")
    if "error" in row:
        row["error"] = cleaned(row["error"])
    return row | {"wall_seconds": ended.seconds, "process_peak_mb": ended.peak_mb}


def write(path: Path, row: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    new.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def runs_of_peers(place: Place) -> list[Run]:
    """All settings of all peers that have an environment, as each of them lists them."""
    found = []
    for peer in peers() if place.peers else []:
        if not place.python(peer).is_file():
            print(f"{peer}: no environment; left out", flush=True)
            continue
        for task in (name for name, facts in TASKS.items() if facts.checkpoint):
            command = [str(place.python(peer)), "-m", f"benchmarks.peers.{peer}"]
            ended = call([*command, "--list", "--task", task], place.limit)
            if ended.status:
                lines = ended.errors.strip().splitlines() or [""]
                print(f"{peer}: {lines[-1]}; left out", flush=True)
                break
            found += [Run(task, peer, setting) for setting in ended.out.split()]
    return found


def to_do(wanted: Iterable[Run], globs: Sequence[str], place: Place, *, retry: bool) -> list[Run]:
    """The runs that match a glob and have no result."""
    rows = recorded(place.results)
    done = {run for run, row in rows.items() if not (row.error and retry)}
    return [
        run
        for run in wanted
        if run not in done and any(fnmatchcase(run.name, glob) for glob in globs)
    ]


class Pace:
    """Guesses how long runs take, from those of the same task and method, or else from all."""

    def __init__(self, results: Path) -> None:
        self._seconds: dict[tuple[str, str], list[float]] = {}
        for path in (results / "runs").glob("*/*.json"):
            row = json.loads(path.read_text(encoding="utf-8"))
            self.note(row["task"], row["method"], row["wall_seconds"])

    def note(self, task: str, method: str, seconds: float) -> None:
        """Learn from one run."""
        self._seconds.setdefault((task, method), []).append(seconds)

    def guess(self, remaining: Iterable[Run]) -> float | None:
        """Seconds for these runs; None before anything was run."""
        every = [s for some in self._seconds.values() for s in some]
        if not every:
            return None
        return sum(
            statistics.mean(self._seconds.get((run.task, run.method), every)) for run in remaining
        )


def said(seconds: float | None) -> str:
    """A guess for people."""
    if seconds is None:
        return "unknown"
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"


def execute(wanted: Sequence[Run], place: Place) -> int:
    """Run them one after another; returns how many of ours have an error."""
    pace, failed = Pace(place.results), 0
    for i, run in enumerate(wanted):
        left = said(pace.guess(wanted[i:]))
        print(f"[{i + 1}/{len(wanted)}] {run.name} (left: {left}) ...", flush=True)
        ended = call(place.command(run), place.limit)
        row = outcome(run, ended, place.limit)
        write(result_path(place.results, run), row)
        pace.note(run.task, run.method, ended.seconds)
        failed += "error" in row and run.ours  # a peer's error is its result
        shown = f"{row['nbytes']:,} bytes: {row['score']}" if "error" not in row else row["error"]
        print(f"    {shown}; {ended.seconds:.0f} s, {ended.peak_mb:.0f} MB", flush=True)
    return failed


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--set", choices=["quick", "full"], default="quick", dest="which")
    parser.add_argument("--only", nargs="+", default=["*"], help="globs: TASK/METHOD-SETTING-SEED")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=Place.folder, help="for files and models")
    parser.add_argument("--threads", type=int, default=1, help="of each run (1)")
    parser.add_argument("--limit", type=float, default=Place.limit, help="seconds for each run")
    parser.add_argument("--retry", action="store_true", help="repeat runs that had an error")
    parser.add_argument("--list", action="store_true", help="show what there is to do, and stop")
    options = parser.parse_args()
    place = Place(
        options.results.absolute(),
        options.folder,
        options.peers,
        options.threads,
        options.limit,
    )
    if not os.environ.get("DITHER_DATA"):
        print("DITHER_DATA is not set: nothing is measured on models.", flush=True)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    wanted = runs(options.which)
    if options.which == "full":
        wanted += runs_of_peers(place)
    wanted = to_do(wanted, options.only, place, retry=options.retry)
    if options.list:
        print("\n".join(run.name for run in wanted))
        return 0
    start = time.monotonic()
    failed = execute(wanted, place)
    print(f"{len(wanted)} runs, {failed} of ours failed, {said(time.monotonic() - start)} in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
