"""Two processes against one: all-MiniLM-L6-v2 with 512 sentences, at the bytes of NNCodec.

``python -m benchmarks.two_processes --json benchmarks/results/two_processes.json`` compresses it in
one process and then by ``torchrun --nproc-per-node 2``, each with one thread, and compares the
files byte for byte. Seconds are those of the call alone, in its slowest process; stages are those
of its trials. The load of the machine before each run is stated: two processes need two cores.

``path_seconds`` does not depend on what else a machine does: of processor seconds between two
exchanges those of the process that takes most, summed up, packing and sending included. That is
about how long it takes on free cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dither
from benchmarks.calibrated import samples_of
from benchmarks.environment import describe
from benchmarks.tasks import minilm_stsb
from dither.search import Trial
from dither.team import Team, joined

SIZE = 4_900_000


class Clock:
    """Processor seconds of this process from one exchange with others to the next."""

    def __init__(self, team: Team) -> None:
        self.spans: list[float] = []
        self._last = time.process_time()
        swap = team._swap  # noqa: SLF001 - all exchanges go through it

        def timed(parts: Sequence[object], own: object) -> list[Any]:
            self.stop()
            return swap(parts, own)

        team._swap = timed  # type: ignore[method-assign]  # noqa: SLF001

    def stop(self) -> None:
        """End a span."""
        now = time.process_time()
        self.spans.append(now - self._last)
        self._last = now


def compress(path: Path, size: int) -> None:
    """Compress in this process, one of those that torchrun started or alone; a row beside it."""
    torch.set_num_threads(1)
    model, data = minilm_stsb.load(), samples_of("minilm_stsb")
    with joined("the benchmark") as team:
        team.exchange("the start", [None] * team.size)
        start, cpu, clock = time.monotonic(), time.process_time(), Clock(team)
        archive = dither.compress(model, size, data=data)
        clock.stop()
        used = (time.monotonic() - start, time.process_time() - cpu, list(clock.spans))
        seconds, cpus, spans = zip(*team.exchange("seconds", [used] * team.size), strict=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peaks = team.exchange("memory", [peak] * team.size)
        if team.rank == 0:
            archive.save(path)
            trials = [trial for trial in archive.trials if isinstance(trial, Trial)]
            row = {
                "processes": team.size,
                "seconds": round(max(seconds), 1),
                "cpu_seconds": [round(each, 1) for each in cpus],
                "path_seconds": round(sum(map(max, zip(*spans, strict=True))), 1),
                "exchanges": len(spans[0]) - 1,
                "stages": {trial.stage: round(trial.seconds, 1) for trial in trials},
                "distance": [trial.distance for trial in trials if trial.kept][-1],
                "peak_mib": [round(peak) for peak in peaks],
            }
            path.with_suffix(".json").write_text(json.dumps(row), encoding="utf-8")


def measure(processes: int, size: int, folder: Path) -> dict[str, Any]:
    """The row of so many processes, with the hash of their file."""
    path = folder / f"{processes}.dither"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    command += ["-m", "benchmarks.two_processes", "--one", str(path), "--size", str(size)]
    load = os.getloadavg()[0]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    row: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    data = path.read_bytes()
    row |= {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return row | {"load_before": round(load, 2)}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--one", type=Path, help="compress to this file only")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.one:
        compress(given.one, given.size)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(processes, given.size, Path(folder)) for processes in (1, 2)]
    result = {
        "size": given.size,
        "rows": rows,
        "ratio": round(rows[1]["seconds"] / rows[0]["seconds"], 3),
        "path_ratio": round(rows[1]["path_seconds"] / rows[0]["path_seconds"], 3),
        "same_bytes": rows[0]["sha256"] == rows[1]["sha256"],
        "environment": describe(),
    }
    print(json.dumps(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
