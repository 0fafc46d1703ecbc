"""Measure all settings of peers, and keep the rows. It needs the standard library only.

    python -m benchmarks.peers.collect NAME... --environments FOLDER [--split test]

``FOLDER/NAME`` is the environment that ``benchmarks.peers.setup`` made. Each setting and task is a
process of its own, one thread, one after the other. Rows go to a file of the peer's name in
``benchmarks/results/peers``, with the versions of that environment; finished rows are not repeated,
those with an error are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results/peers")
TASKS = ("resnet20_cifar10", "minilm_stsb")
KEY = ("task", "setting", "split")
LIMIT = 3600.0  # seconds


def call(python: Path, peer: str, *arguments: str, limit: float = LIMIT) -> str:
    """What one call of a peer prints; errors of the call are the caller's to catch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), "-m", f"benchmarks.peers.{peer}", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=limit,
        env=environment,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"exit status {done.returncode}: {lines[-1] if lines else ''}")
    return done.stdout


def row_of(python: Path, peer: str, key: Sequence[str], folder: Path) -> dict[str, Any]:
    """Measure one setting; a process that dies or takes too long is a row with ``error``, too."""
    task, setting, split = key
    given = ["--task", task, "--setting", setting, "--split", split, "--folder", str(folder)]
    try:
        row: dict[str, Any] = json.loads(call(python, peer, *given).splitlines()[-1])
    except (RuntimeError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        row = {"peer": peer, **dict(zip(KEY, key, strict=True)), "error": str(error)}
    return row


def collect(peer: str, python: Path, options: argparse.Namespace) -> None:
    """Measure what is missing of one peer, and write after each row."""
    split = options.split
    path = RESULTS / f"{peer}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    head = {
        "command": f"python -m benchmarks.peers.collect {peer} --split {split}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "environment": json.loads(call(python, peer, "--environment").splitlines()[-1]),
    }
    for task in options.tasks:
        labels = call(python, peer, "--list", "--task", task).split()
        for setting in (label for label in labels if label in (options.settings or labels)):
            key = (task, setting, split)
            old = [row for row in rows if tuple(row[k] for k in KEY) == key]
            if any("error" not in row for row in old):
                continue
            row = row_of(python, peer, key, options.folder)
            print(json.dumps(row), flush=True)
            rows = [r for r in rows if r not in old] + [row]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Measure all settings of peers.")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--settings", nargs="+", help="labels; all, if none is given")
    parser.add_argument("--folder", type=Path, default=Path("out/peers"), help="for files of peers")
    options = parser.parse_args()
    for name in options.names:
        collect(name, options.environments / name / "bin" / "python", options)


if __name__ == "__main__":
    main()
