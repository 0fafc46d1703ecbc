"""The quick benchmarks, one after another: what ``make bench`` runs.

Each is a process of its own; its figures, or its error, go into ``benchmarks/results/quick.json``.
The exit status is 1 where a benchmark cannot run or fails. What needs real models and data is
skipped, and said to be, without the environment variable DITHER_DATA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GOOD, SKIPPED = "good", "skipped"


@dataclass(frozen=True)
class Job:
    """One benchmark.

    Attributes:
        name: of its row.
        module: what ``python -m`` runs.
        arguments: without ``--json FILE``.
        needs_data: whether it needs DITHER_DATA.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    needs_data: bool = False

    @property
    def command(self) -> str:
        return " ".join(["python", "-m", self.module, *self.arguments])


JOBS = (
    Job("coding_speed", "benchmarks.coding_speed", ("--symbols", "2000000")),
    Job("kmeans_speed", "benchmarks.kmeans_speed"),
    Job("budgets", "benchmarks.budgets", ("--odd-only", "--count", "34")),
    Job("bad_files", "benchmarks.bad_files", ("--count", "2000")),
    Job("model_speed", "benchmarks.model_speed", needs_data=True),
    Job(
        "data_free minilm",
        "benchmarks.data_free",
        ("--tasks", "minilm_stsb", "--sizes", "4933591", "--split", "dev"),
        needs_data=True,
    ),
    Job(
        "data_free resnet20",
        "benchmarks.data_free",
        ("--tasks", "resnet20_cifar10", "--sizes", "83264", "--split", "dev"),
        needs_data=True,
    ),
)


def run(job: Job, limit: float) -> dict[str, Any]:
    """Run one benchmark: command, outcome, seconds and figures."""
    row: dict[str, Any] = {"command": job.command, "outcome": GOOD, "seconds": 0.0}
    if job.needs_data and not os.environ.get("DITHER_DATA"):
        return row | {"outcome": SKIPPED, "why": "DITHER_DATA is not set"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [sys.executable, "-m", job.module, *job.arguments, "--json", str(figures)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired:
            row |= {"outcome": "failed", "why": f"it took more than {limit:.0f} s"}
        else:
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines()
                row |= {"outcome": "failed", "why": "\n".join(lines[-5:])}
            if figures.is_file():
                row["figures"] = json.loads(figures.read_text(encoding="utf-8"))
    return row | {"seconds": round(time.monotonic() - start, 1)}


def headline(name: str, figures: dict[str, Any]) -> str:
    """The figures of a benchmark that fit a line."""
    if name == "coding_speed":
        ratios = [row.get("decode ratio") for row in figures["sources"].values()]
        speeds = [f"{row['ours decode']:.0f}" for row in figures["sources"].values()]
        shown = [f"{ratio:.2f}" for ratio in ratios if ratio is not None]
        beside = f"; beside constriction {', '.join(shown)}" if shown else ""
        return f"decoding {', '.join(speeds)} M symbols/s{beside}"
    if name == "kmeans_speed":
        return f"torch / faiss time {figures['encode']['median_ratio']:.2f}"
    if name == "budgets":
        return f"{figures['failures']} of {len(figures['rows'])} budgets broken"
    if name == "bad_files":
        return f"{len(figures['failures'])} failures of {figures['count']:,}"
    if name == "model_speed":
        rows, memory = figures["medians"], figures["compress_memory"]
        return (
            f"compress {rows['dither compress']['seconds']:.1f} s, load "
            f"{rows['dither load']['seconds']:.2f} s, {memory['peak_rss'] / 1e6:.0f} MB "
            f"of {memory['limit'] / 1e6:.0f}"
        )
    return ", ".join(f"{row['nbytes']:,} bytes: {row['score']}" for row in figures["rows"])


def brief(name: str, row: dict[str, Any]) -> str:
    """A row's figures in a line, or why there are none."""
    if "why" in row:
        return str(row["why"].splitlines()[-1])
    try:
        return headline(name, row["figures"])
    except KeyError as error:
        return f"no figure {error}"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of benchmarks to run")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each (600)")
    parser.add_argument("--json", type=Path, default=RESULTS / "quick.json")
    options = parser.parse_args()
    jobs = [job for job in JOBS if not options.only or job.name in options.only]
    start = time.monotonic()
    rows: dict[str, dict[str, Any]] = {}
    for i, job in enumerate(jobs, 1):
        print(f"[{i}/{len(jobs)}] {job.command} ...", flush=True)
        if importlib.util.find_spec(job.module) is None:
            rows[job.name] = {"command": job.command, "outcome": "failed", "seconds": 0.0}
            rows[job.name]["why"] = f"there is no module {job.module}"
        else:
            rows[job.name] = run(job, options.limit)
        print(f"    {rows[job.name]['outcome']} in {rows[job.name]['seconds']} s", flush=True)
    seconds = time.monotonic() - start
    print()
    for name, row in rows.items():
        print(f"{name:20} {row['outcome']:8} {row['seconds']:7.1f} s  {brief(name, row)}")
    print(f"{seconds:.0f} s in all")
    from benchmarks.environment import describe  # imports torch

    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = describe() | {"seconds": round(seconds, 1), "benchmarks": rows}
    options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        if row["outcome"] == "failed":
            print(f"\n{name} failed:\n{row['why']}", file=sys.stderr)
    return 1 if any(row["outcome"] == "failed" for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
