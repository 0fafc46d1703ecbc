"""The decoders in `packages` and the library: one verdict on every file, hostile ones too.

``python -m benchmarks.small_decoders --count 4000`` mutates archives as
:mod:`benchmarks.bad_files` does and lets the library, the decoder in one Python file and, where
``node`` is found, the one in JavaScript read them. All must refuse a file, or all find the same
numbers. Where a reader says that it would take too much memory, the library may differ, which
counts by other rules; the small decoders count alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.bad_files import Cases
from benchmarks.environment import describe
from dither import Archive, ArchiveError
from dither.core import dtype_name
from packages.python import dither_decode

MAX_NBYTES = 1 << 24
READER = Path(__file__).parents[1] / "packages" / "js" / "tools" / "verdicts.js"
CHUNK = 1000
"""Files that are held at once, and that one process of node reads."""

Verdict = str | dict[str, str]
"""``refused``, ``limit``, or the digest of each tensor."""


def digest(kind: str, shape: Sequence[int], data: bytes) -> str:
    """SHA-256 of type, shape and bytes, where every NaN is the same."""
    part = {"complex64": "float32", "complex128": "float64"}.get(kind, kind)
    if part in dither_decode.FLOATING:
        bits = np.frombuffer(data, f"<u{dither_decode.SIZES[part]}").copy()
        bits[np.isnan(dither_decode.to_numbers(data, part))] = np.iinfo(bits.dtype).max
        data = bits.tobytes()
    return hashlib.sha256(f"{kind} {'x'.join(map(str, shape))}\n".encode() + data).hexdigest()


def by_library(data: bytes) -> Verdict:
    """What the library says."""
    try:
        archive = Archive.from_bytes(data, MAX_NBYTES)
        found = {}
        for name, tensor in ((name, archive[name]) for name in archive):
            numbers = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = digest(dtype_name(tensor.dtype), tensor.shape, numbers)
    except ArchiveError as error:
        return "limit" if "max_nbytes" in str(error) else "refused"
    return found


def by_python(data: bytes) -> Verdict:
    """What the decoder in one file says."""
    try:
        archive = dither_decode.Archive(data, MAX_NBYTES)
        return {name: digest(*archive.stored(name)) for name in archive}
    except dither_decode.LimitError:
        return "limit"
    except dither_decode.DecodeError:
        return "refused"


def by_javascript(files: Sequence[bytes]) -> Iterator[Verdict]:
    """What the decoder in JavaScript says of each file; needs ``node``."""
    with tempfile.NamedTemporaryFile(suffix=".files") as stream:
        for data in files:
            stream.write(struct.pack("<I", len(data)) + data)
        stream.flush()
        command = ["node", str(READER), stream.name, str(MAX_NBYTES)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    yield from map(json.loads, done.stdout.splitlines())


def kind_of(verdict: Verdict) -> str:
    """``refused``, ``limit`` or ``read``."""
    return verdict if isinstance(verdict, str) else "read"


def compare(
    cases: Iterable[tuple[str, bytes]],
    readers: Mapping[str, Callable[[Sequence[bytes]], Iterator[Verdict]]],
) -> tuple[Counter[str], list[str]]:
    """Verdicts by kind, and where the others differ from the first of ``readers``.

    Args:
        cases: names and bytes of files.
        readers: by name; the library first.
    """
    names, files = zip(*cases, strict=True)
    verdicts = {reader: list(read(files)) for reader, read in readers.items()}
    outcomes: Counter[str] = Counter()
    differences = []
    for i, name in enumerate(names):
        library, *others = (verdicts[reader][i] for reader in readers)
        outcomes.update(f"{reader}: {kind_of(verdicts[reader][i])}" for reader in readers)
        excused = "limit" in (library, others[0])
        if any(other != others[0] for other in others) or (others[0] != library and not excused):
            kinds = ", ".join(f"{r}: {kind_of(verdicts[r][i])}" for r in readers)
            differences.append(f"{name}: {kinds}")
    return outcomes, differences


def readers() -> dict[str, Callable[[Sequence[bytes]], Iterator[Verdict]]]:
    """The library and the small decoders, as far as they can be run here."""
    found: dict[str, Callable[[Sequence[bytes]], Iterator[Verdict]]] = {
        "library": lambda files: map(by_library, files),
        "python": lambda files: map(by_python, files),
    }
    if shutil.which("node") and READER.exists():
        found["javascript"] = by_javascript
    return found


def run(cases: Cases, numbers: range) -> tuple[Counter[str], list[str]]:
    """Let all read the mutated files of some numbers."""
    numbered = ((number, cases.case(number)) for number in numbers)
    named = ((f"seed {cases.seed}, number {n}, {what}", data) for n, (what, data, _) in numbered)
    return compare(named, readers())


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = Cases(arguments.seed)
    outcomes: Counter[str] = Counter()
    differences: list[str] = []
    for start in range(0, arguments.count, CHUNK):
        numbers = range(start, min(start + CHUNK, arguments.count))
        found, wrong = run(cases, numbers)
        outcomes, differences = outcomes + found, differences + wrong
        for line in wrong:
            print(line, file=sys.stderr, flush=True)
        if arguments.json:
            result = {"count": numbers.stop, "seed": arguments.seed}
            result |= {"outcomes": dict(sorted(outcomes.items())), "differences": differences}
            arguments.json.write_text(json.dumps(describe() | result, indent=1) + "\n")
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8,}  {outcome}")
    print(f"{len(differences)} differences in {arguments.count:,} files")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
