"""The proof that a refactoring changes no byte: files of fixed cases, compared with recorded ones.

``python -m benchmarks.same_bytes --check benchmarks/results/same_bytes.json`` makes the file of
every case (`benchmarks.byte_cases`) on one thread and compares its SHA-256 with the recorded one;
``--record`` writes that record. ``--quick`` leaves out cases of more than a few seconds, ``--only``
takes those whose names match a glob. Real models need the folder named by ``DITHER_DATA``.

What is measured on data and what is trained depend in their last bits on the kernels that torch
chooses for a processor. Where machine or versions are not the recorded ones, record on the commit
before and check on the commit after, on one machine::

    git worktree add ../before COMMIT
    PYTHONPATH=../before/src python -m benchmarks.same_bytes --record before.json
    python -m benchmarks.same_bytes --check before.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks.byte_cases import CASES, Case
from benchmarks.environment import commit, describe
from dither.core import DitherError

_SAME = ("machine", "torch", "numpy", "threads", "capability")
"""What hashes depend on, beside the code."""


def environment() -> dict[str, object]:
    """Commit of the imported code, versions, machine, and the kernels that torch chooses."""
    import dither

    head = describe() | {"commit": commit(Path(str(dither.__file__)).parent)}
    return head | {"capability": torch.backends.cpu.get_cpu_capability()}


def row(case: Case) -> dict[str, Any]:
    """Hash and length of a case's file, or which error it raises, and the seconds it took."""
    torch.manual_seed(0)
    start = time.monotonic()
    try:
        data = case.make()
        found: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)}
    except DitherError as error:
        found = {"raises": type(error).__name__}
    return found | {"seconds": round(time.monotonic() - start, 2)}


def record(path: Path, cases: list[Case]) -> None:
    """Write rows; those of other cases stay if everything that they depend on is as it was.

    Raises:
        SystemExit: it is not.
    """
    head = environment()
    rows: dict[str, Any] = {}
    if path.exists() and len(cases) < len(CASES):
        old = json.loads(path.read_text(encoding="utf-8"))
        odd = [key for key in (*_SAME, "commit") if old[key] != head[key]]
        if odd:
            raise SystemExit(f"{path} was recorded with another {', '.join(odd)}: record all cases")
        rows = old["cases"]
    for case in cases:
        rows[case.name] = row(case)
        print(f"{case.name}: {rows[case.name]}", flush=True)
        ordered = {name: rows[name] for name in CASES if name in rows}
        path.write_text(json.dumps(head | {"cases": ordered}, indent=1) + "\n", encoding="utf-8")


def check(path: Path, cases: list[Case]) -> bool:
    """Whether all cases give the recorded bytes; tells which do not, and why that may be."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    wrong = []
    for case in cases:
        wanted = recorded["cases"].get(case.name)
        found = row(case)
        same = wanted is not None and _result(found) == _result(wanted)
        if not same:
            wrong.append(case.name)
            print(f"DIFFERS {case.name}: {found}, recorded {wanted}", flush=True)
    print(f"{len(cases) - len(wrong)} of {len(cases)} files are as recorded")
    head = environment()
    odd = [
        f"{key} {head[key]} (recorded {recorded[key]})"
        for key in _SAME
        if head[key] != recorded[key]
    ]
    if wrong and odd:
        print(
            f"a difference may come from {'; '.join(odd)}: record on the commit before and check "
            "on the commit after, on one machine"
        )
    return not wrong


def _result(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "seconds"}


def _chosen(only: str, *, quick: bool) -> Iterator[Case]:
    for case in CASES.values():
        if not fnmatchcase(case.name, only) or (quick and case.is_slow):
            continue
        if case.needs_data and not os.environ.get("DITHER_DATA"):
            print(f"left out, since DITHER_DATA is not set: {case.name}")
            continue
        yield case


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, help="write hashes to this file")
    what.add_argument("--check", type=Path, help="compare with the hashes in this file")
    parser.add_argument("--only", default="*", help="a glob of names")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(_chosen(arguments.only, quick=arguments.quick))
    if arguments.record:
        record(arguments.record, cases)
    elif not check(arguments.check, cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
