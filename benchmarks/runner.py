"""Run the benchmarks that have no result yet, each in a process of its own, and keep every row.

    python -m benchmarks.runner --set quick
    python -m benchmarks.runner --set full --peers ENVIRONMENTS --jobs 2 --only 'minilm_stsb/*'

A run's result is ``RESULTS/runs/TASK/METHOD-SETTING-SEED.json``, written whole or not at all, with
commit, versions, machine, seconds and peak memory. Runs that have one, or that a benchmark with a
program of its own recorded, are not repeated: stop the program at any time and start it again. What
fails or takes more than two hours is a result, too, with the message as ``error``; ``--retry``
repeats these. Trainings keep their state in ``--folder`` and take up where they were stopped.

``--peers`` names the folder of the peers' environments (``benchmarks.peers.setup`` makes it); those
without an environment are left out. ``--jobs`` runs several at once, each with ``--threads``; their
seconds are those of a busy machine. It imports the standard library only.
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
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from benchmarks.environment import commit, machine
from benchmarks.methods import HOURS, RESULTS, ROOT, SEEDS, TASKS, Run, peers, runs
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
            found += ["--seed", str(run.seed)]
            if weights := run.weights(self.folder):
                found += ["--weights", str(weights)]
        return [*found, "--folder", str(self.folder), "--threads", str(self.threads)]

    def preparation(self, run: Run) -> list[str]:
        """What trains the model of a task without a checkpoint; runs of one seed share it."""
        return [*self.command(Run(run.task, "fp32", "none", run.seed)), "--prepare"]


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


class Process:
    """A command that runs in a session of its own, so that all it started can be ended with it."""

    def __init__(self, command: Sequence[str], limit: float) -> None:
        self._limit = limit
        self._start = time.monotonic()
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as it runs
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._child = subprocess.Popen(
            command,
            stdout=self._out,
            stderr=self._errors,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )

    def poll(self) -> Ended | None:
        """How it ended, once, or None while it runs; beyond its limit it is ended."""
        in_time = time.monotonic() - self._start < self._limit
        found, status, usage = os.wait4(self._child.pid, os.WNOHANG)
        if not found and in_time:
            return None
        if not found:
            os.killpg(self._child.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self._child.pid, 0)
        self._child.returncode = os.waitstatus_to_exitcode(status)
        unit = 1 if sys.platform == "darwin" else 1024
        return Ended(
            self._child.returncode if found else None,
            self._text(self._out),
            self._text(self._errors),
            round(time.monotonic() - self._start, 1),
            round(usage.ru_maxrss * unit / 1e6, 1),
        )

    @staticmethod
    def _text(stream: IO[str]) -> str:
        with stream:
            stream.seek(0)
            return stream.read()

    def kill(self) -> None:
        """End it and all that it started."""
        os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._out.close()
        self._errors.close()


def call(command: Sequence[str], limit: float) -> Ended:
    """Run a command to its end."""
    process = Process(command, limit)
    try:
        while (ended := process.poll()) is None:
            time.sleep(_POLL)
    except BaseException:  # the user's, too: nothing is left running
        process.kill()
        raise
    return ended


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
        row["error"] = cleaned(f"exit status {ended.status}: {last_line(ended)}")
    else:
        try:
            row = json.loads(ended.out.splitlines()[-1]) | row
        except (IndexError, ValueError):
            row["error"] = cleaned(f"it printed no row, but {ended.out[-200:]!r}")
    if "error" in row:
        row["error"] = cleaned(row["error"])
    if not run.ours:  # its environment knows neither
        row["environment"] = {"machine": machine(), "commit": commit()}
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
        command = [str(place.python(peer)), "-m", f"benchmarks.peers.{peer}", "--list"]
        ended = call(command, place.limit)
        if ended.status:
            print(f"{peer}: {last_line(ended)}; left out", flush=True)
            continue
        for task, setting in (line.split() for line in ended.out.splitlines()):
            seeds = SEEDS[:1] if TASKS[task].checkpoint else SEEDS  # of the model
            found += [Run(task, peer, setting, seed) for seed in seeds]
    return sorted(found, key=lambda run: run.seed)


def last_line(ended: Ended) -> str:
    """Of what a process said when it failed."""
    return (ended.errors.strip().splitlines() or [""])[-1]


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
            if "wall_seconds" in row:
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


def said(seconds: float | None, jobs: int = 1) -> str:
    """A guess for people."""
    if seconds is None:
        return "unknown"
    seconds /= jobs
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"


def prepare(wanted: Iterable[Run], place: Place) -> None:
    """Train the models that these runs compress, where there are none yet: each once."""
    for task, seed in sorted({(run.task, run.seed) for run in wanted}):
        run = Run(task, "fp32", "none", seed)
        weights = run.weights(place.folder)
        if weights and not weights.is_file():
            print(f"training the model of {task}, seed {seed} ...", flush=True)
            ended = call(place.preparation(run), place.limit)
            if ended.status != 0:  # the runs will say so, too
                print(f"    {last_line(ended)}", flush=True)


def execute(wanted: Sequence[Run], place: Place, jobs: int = 1) -> int:
    """Run them in order, so many at once; returns how many of ours have an error."""
    pace, failed = Pace(place.results), 0
    waiting, active = deque(wanted), dict[Run, Process]()
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                left = said(pace.guess([*active, *waiting]), jobs)
                run = waiting.popleft()
                number = len(wanted) - len(waiting)
                print(f"[{number}/{len(wanted)}] {run.name} (left: {left}) ...", flush=True)
                active[run] = Process(place.command(run), place.limit)
            time.sleep(_POLL)
            for run, process in list(active.items()):
                if ended := process.poll():
                    del active[run]
                    failed += keep(run, ended, place)
                    pace.note(run.task, run.method, ended.seconds)
    except BaseException:  # the user's, too: nothing is left running
        for process in active.values():
            process.kill()
        raise
    return failed


def keep(run: Run, ended: Ended, place: Place) -> bool:
    """Write the row of a run that ended, and say it; returns whether a run of ours failed."""
    row = outcome(run, ended, place.limit)
    write(result_path(place.results, run), row)
    shown = f"{row['nbytes']:,} bytes: {row['score']}" if "error" not in row else row["error"]
    took = f"{ended.seconds:.0f} s, {ended.peak_mb:.0f} MB"
    print(f"    {run.name}: {shown}; {took}", flush=True)
    return "error" in row and run.ours  # a peer's error is its result


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--set", choices=["quick", "full"], default="quick", dest="which")
    parser.add_argument("--only", nargs="+", default=["*"], help="globs: TASK/METHOD-SETTING-SEED")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=Place.folder, help="for files and models")
    parser.add_argument("--threads", type=int, default=1, help="of each run (1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
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
    prepare(wanted, place)
    failed = execute(wanted, place, options.jobs)
    print(f"{len(wanted)} runs, {failed} of ours failed, {said(time.monotonic() - start)} in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
