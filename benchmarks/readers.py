"""Processes that read one open archive at once: what each finds is what the file holds.

``python -m benchmarks.readers`` opens an archive and lets four forked, four spawned and four
threaded readers take 10,000 tensors each, in orders of their own, from the archive that was opened
before they began, as the workers of a data loader do. Any error and any value that differs is a
failure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.environment import describe
from dither import Archive, ArchiveError
from dither.archive import write
from dither.encoders.gptq import GPTQ

TENSORS = 16
Answers: TypeAlias = "multiprocessing.Queue[list[str]]"
WAYS = ("fork", "spawn", "threads")


def specimen(path: Path) -> None:
    """An archive of sixteen tensors."""
    noise = torch.Generator().manual_seed(0)
    write(
        path,
        {f"w{i}": GPTQ(0.3).encode(torch.randn(12, 20, generator=noise)) for i in range(TENSORS)},
    )


def read(
    archive: Archive, expected: dict[str, torch.Tensor], seed: int, count: int, found: Answers
) -> None:
    """Take ``count`` tensors; what went wrong, or nothing, goes into the queue ``found``."""
    torch.set_num_threads(1)
    chance, wrong = random.Random(seed), []  # noqa: S311 - repeatable, not secret
    names = list(expected)
    for _ in range(count):
        name = chance.choice(names)
        try:
            if not torch.equal(archive[name], expected[name]):
                wrong.append(f"{name}: other values")
        except (ArchiveError, OSError, ValueError) as error:
            wrong.append(f"{name}: {error}")
    found.put(wrong)


def failures(archive: Archive, way: str, readers: int, count: int) -> list[str]:
    """Failures of ``readers`` at once, each of ``count`` reads; ``way`` is one of :data:`WAYS`."""
    context: Any = multiprocessing.get_context("fork" if way == "threads" else way)
    expected = archive.state_dict()
    found: Answers = context.Queue()
    start: Callable[..., Any] = threading.Thread if way == "threads" else context.Process
    running = [
        start(target=read, args=(archive, expected, seed, count, found)) for seed in range(readers)
    ]
    for reader in running:
        reader.start()
    wrong = [line for _ in running for line in found.get()]
    for reader in running:
        reader.join()
    return wrong


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--reads", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.dither"
        specimen(path)
        for way in WAYS:
            begin = time.monotonic()
            with Archive.open(path) as archive:
                wrong = failures(archive, way, arguments.readers, arguments.reads)
            seconds = time.monotonic() - begin
            reads = arguments.readers * arguments.reads
            print(f"{way}: {len(wrong)} failures of {reads:,} reads in {seconds:.0f} s")
            for line in wrong[:5]:
                print(line, file=sys.stderr)
            rows[way] = {"reads": reads, "failures": len(wrong), "seconds": round(seconds, 1)}
    if arguments.json:
        result = describe() | {"readers": arguments.readers, "ways": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row["failures"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
