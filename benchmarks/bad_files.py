"""Mutated archives: refused by name, or read and shown without crash, hang or undue memory.

``python -m benchmarks.bad_files --count 200000 --json FILE --resume`` mutates archives of every
format and codec (:mod:`benchmarks.mutations`: bits, lengths, structure, values that are hostile in
just their field, checksums made good) and counts what happened. Each is opened, listed, read tensor
by tensor and as a whole, and some are shown as a page. Failures are

* any exception but ``ArchiveError``, or one without a text;
* values that differ from the original's where checksums were not made good;
* more memory at the peak than ``max_nbytes`` and a fixed allowance;
* more than ten seconds of a core.

Every case follows from the seed and its number, whatever else is run; ``--resume`` continues a
file of results.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decoding_memory import vast_cases
from benchmarks.environment import describe
from benchmarks.mutations import PLAIN, REPAIRED
from benchmarks.peak_memory import Peak, restart_for_exact_peaks
from dither import Archive, ArchiveError
from dither.archive import pack
from dither.cli.report import archive_document
from dither.core import Encoded
from dither.encoders.gptq import GPTQ
from dither.encoders.rotated import Rotated
from dither.encoders.viterbi import Viterbi
from dither.formats import Affine, Codebook, Mixed, Product, Raw
from dither.report.contents import contents
from dither.report.page import page

MAX_NBYTES = 1 << 26
ALLOWANCE = 56 << 20
"""Bytes beside ``max_nbytes``: 40 for each byte of an index of 1 MiB, and boxes."""
SLOW = 10.0
HANG = 60
MOST = 6 << 30
"""Address space of this process: a bomb ends in an error, and not with the machine."""
SAVED = 2000
"""Cases after which results are written."""


def specimens() -> dict[str, bytes]:
    """Small archives that between them hold every format, codec, alias and type, by name."""
    noise = torch.Generator().manual_seed(5)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise)

    formats: dict[str, Encoded] = {
        "grid": GPTQ(0.3).encode(weight(20, 25)),
        "rows": GPTQ(torch.linspace(0.1, 1, 24)).encode(weight(24, 30)),
        "contexts": GPTQ(0.2).encode(weight(48, 40) * torch.linspace(0.05, 4, 48)[:, None]),
        "outliers": GPTQ(0.1).encode(weight(40, 30) ** 5),
        "lanes": GPTQ(0.5).encode(weight(210, 200)),
        "conv": Affine(4, axis=0).encode(weight(8, 4, 3, 3)),
        "group": Affine(3, group=16, grid="asymmetric").encode(weight(10, 40)),
        "ends": Affine(5, grid="endpoint", scale_dtype=torch.float16).encode(weight(300)),
        "sign": Affine(1, group=7).encode(weight(5, 20).bfloat16()),
        "book": Codebook(16, bucket=64, shift=True).encode(weight(20, 30)),
        "product": Product(4, 16).encode(weight(16, 22)),
        "product8": Product(8, 8, dtype=torch.int8).encode(weight(16, 32)),
        "mixed": Mixed(group=8).encode(weight(16, 20)),
        "trellis": Viterbi(0.3).encode(weight(12, 40)),
        "steered": Viterbi(0.3).encode(weight(40, 60)),
        "factors": Rotated(0.3).encode(weight(30, 12) @ weight(12, 12)),
        "raw": Raw().encode(weight(31)),
        "planes": Raw().encode(weight(400)),
        "half": Raw(torch.float16).encode(weight(7, 9)),
        "double": Raw().encode((weight(40) * 1e-3).double()),
        "steps": Raw().encode(torch.tensor(17)),
        "mask": Raw().encode(weight(64) > 0),
        "empty": Raw().encode(weight(0, 3)),
    }
    tied = {"tied": "grid", "tied too": "rows"}
    sites = {"a@in": {"site": "activation", "bits": 8, "scale": [0.5], "zero": [3]}}
    small = {name: item for name, item in formats.items() if item.numel < 2000}
    found = {name: pack({name: item}).to_bytes() for name, item in formats.items()}
    notes = {"from": "a test", "sensitivity": {"grid": 2.0}}
    found["all"] = pack(small, tied, notes, sites).to_bytes()
    found["none"] = pack({}).to_bytes()
    return found | {f"vast {name}": make() for name, make in vast_cases(16).items()}


def judge(data: bytes, original: dict[str, Tensor] | None, *, show: bool = False) -> str:
    """What reading ``data`` does: ``refused``, ``read`` or what is wrong.

    Args:
        data: of the file.
        original: the values that must come out, if any do; None where they may differ.
        show: whether to make a page of it, too.
    """
    start, peak = time.process_time(), Peak()
    try:
        archive = Archive.from_bytes(data, MAX_NBYTES)
        str(archive)
        json.dumps(archive_document(archive), allow_nan=False)
        outcome = _read(archive, original)
    except ArchiveError as error:
        outcome = "refused" if str(error) else "FAILED: an error without a text"
        archive = None
    except Exception as error:  # noqa: BLE001 - any other exception is the finding
        return f"FAILED: {type(error).__name__}: {error}"
    grew = peak.grew()
    if grew > MAX_NBYTES + ALLOWANCE:
        return f"FAILED: memory: {grew} bytes"
    if archive is not None and show and outcome == "read":
        try:
            page(contents(archive, "a file"))
        except Exception as error:  # noqa: BLE001 - likewise
            return f"FAILED: page: {type(error).__name__}: {error}"
    return outcome if time.process_time() - start < SLOW else "FAILED: slow"


def _read(archive: Archive, original: dict[str, Tensor] | None) -> str:
    """Tensor by tensor, then, if all of them can be read, as a whole."""
    refused = 0
    for name in archive:
        try:
            archive[name]
        except ArchiveError as error:
            refused += 1
            if not str(error):
                return "FAILED: an error without a text"
    if refused:
        return "refused"
    state = archive.state_dict()
    return "read" if original is None or same(state, original) else "FAILED: values changed"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names, types, shapes and bits."""
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and _bytes(a[name]) == _bytes(b[name])
        for name in a
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Cases:
    """Mutated archives by number."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.originals = specimens()
        self.states = {
            name: Archive.from_bytes(data).state_dict() for name, data in self.originals.items()
        }

    def case(self, number: int) -> tuple[str, bytes, dict[str, Tensor] | None]:
        """Name, bytes and the values that must come out if any do."""
        chance = random.Random(f"{self.seed}/{number}")  # noqa: S311 - repeatable, not secret
        name = chance.choice(list(self.originals))
        mutate = chance.choice(REPAIRED if chance.random() < 0.75 else PLAIN)
        data = mutate(self.originals[name], chance)
        if mutate in REPAIRED and chance.random() < 0.2:
            mutate_too = chance.choice(REPAIRED)
            # What was changed may be no longer what can be changed in another way.
            with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                data = mutate_too(data, chance)
        state = None if mutate in REPAIRED else self.states[name]
        return f"{mutate.__name__} of {name}", data, state

    def run(self, numbers: range) -> tuple[Counter[str], list[str]]:
        """How often each outcome came, and the failures."""
        outcomes: Counter[str] = Counter()
        failures = []
        for number in numbers:
            what, data, state = self.case(number)
            signal.setitimer(signal.ITIMER_PROF, HANG)
            outcome = judge(data, state, show=number % 8 == 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            outcomes[f"{what.partition(' of ')[0]}: {outcome[:60]}"] += 1
            if outcome.startswith("FAILED"):
                failures.append(f"seed {self.seed}, number {number}, {what}: {outcome}")
        return outcomes, failures


def run(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Mutate ``count`` archives; returns how often each outcome came, and the failures."""
    return Cases(seed).run(range(count))


def _hang(*_: object) -> None:
    raise TimeoutError(f"no end after {HANG} seconds")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    restart_for_exact_peaks()
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, _hang)
    resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    done, seconds = 0, 0.0
    if arguments.resume and arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        if before["seed"] == arguments.seed:
            outcomes, failures = Counter(before["outcomes"]), before["failures"]
            done, seconds = before["count"], before["seconds"]
    cases = Cases(arguments.seed)
    while done < arguments.count:
        start = time.monotonic()
        numbers = range(done, min(done + SAVED, arguments.count))
        found, wrong = cases.run(numbers)
        outcomes, failures, done = outcomes + found, failures + wrong, numbers.stop
        seconds += time.monotonic() - start
        for failure in wrong:
            print(failure, file=sys.stderr, flush=True)
        if arguments.json:
            result = {"count": done, "seed": arguments.seed, "seconds": round(seconds, 1)}
            result |= {"outcomes": dict(sorted(outcomes.items())), "failures": failures}
            arguments.json.write_text(json.dumps(describe() | result, indent=1) + "\n")
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8,}  {outcome}")
    print(f"{len(failures)} failures of {done:,} in {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
