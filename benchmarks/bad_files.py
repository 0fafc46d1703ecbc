"""Mutated archives: refused by name, or decoded without crash, hang or undue memory.

``python -m benchmarks.bad_files --count 20000`` mutates archives of every format (bit flips,
truncations, splices, edits of the index and of payloads with all checksums made good again) and
counts what happened. Where checksums were not repaired, a value that differs from the original's
is a failure, as is any exception but ``ArchiveError``, a decoding that takes over ten seconds, or
one that allocates beyond a fixed allowance over ``max_nbytes``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import describe
from dither import Archive, ArchiveError
from dither.archive import pack
from dither.archive.layout import HEAD, TAIL
from dither.core import Encoded
from dither.encoders.rdo import RateDistortion
from dither.formats import Affine, Codebook, Mixed, Product, Raw

MAX_NBYTES = 1 << 24
ALLOWANCE = 3 << 29
"""Address space, in bytes, that the process may take on top of what it has at the start."""
SLOW = 10.0


def specimens() -> list[bytes]:
    """Small archives that between them hold every format, codec, alias and type."""
    noise = torch.Generator().manual_seed(5)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise)

    formats: dict[str, Encoded] = {
        "grid": RateDistortion(0.3).encode(weight(40, 50)),
        "rows": RateDistortion(torch.linspace(0.1, 1, 24)).encode(weight(24, 30)),
        "conv": Affine(4, axis=0).encode(weight(8, 4, 3, 3)),
        "group": Affine(3, group=16, grid="asymmetric").encode(weight(10, 40)),
        "ends": Affine(5, grid="endpoint", scale_dtype=torch.float16).encode(weight(300)),
        "book": Codebook(16, bucket=64, shift=True).encode(weight(20, 30)),
        "product": Product(4, 16).encode(weight(16, 22)),
        "product8": Product(8, 8, dtype=torch.int8).encode(weight(16, 32)),
        "mixed": Mixed(group=8).encode(weight(16, 20)),
        "raw": Raw().encode(weight(31)),
        "half": Raw(torch.float16).encode(weight(7, 9)),
        "steps": Raw().encode(torch.tensor(17)),
        "mask": Raw().encode(weight(64) > 0),
        "empty": Raw().encode(weight(0, 3)),
    }
    tied = {"tied": "grid", "tied too": "rows"}
    large = {"wide": RateDistortion(0.01).encode(weight(64, 128) ** 3)}
    return [
        pack(formats, tied, {"from": "a test"}).to_bytes(),
        pack(large).to_bytes(),
        pack({}).to_bytes(),
    ]


def flip(data: bytes, chance: random.Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncate(data: bytes, chance: random.Random) -> bytes:
    """Cut the end or the beginning off."""
    at = chance.randrange(len(data))
    return data[:at] if chance.random() < 0.8 else data[at:]


def splice(data: bytes, chance: random.Random) -> bytes:
    """Replace, insert, remove or double a stretch, from the file itself."""
    size = min(len(data), chance.choice([1, 4, 16, 200, 2000]))
    a, b = (chance.randrange(len(data) - size + 1) for _ in range(2))
    piece = data[a : a + size]
    kind = chance.randrange(4)
    if kind == 0:
        return data[:b] + piece + data[b + size :]
    if kind == 1:
        return data[:b] + piece + data[b:]
    if kind == 2:
        return data[:b] + data[b + size :]
    return data[:b] + bytes(chance.randrange(256) for _ in range(size)) + data[b + size :]


def edit_index(data: bytes, chance: random.Random) -> bytes:
    """Change values of the index and make its checksum good again."""
    payloads, index = _open(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        _edit(index, chance)
    return _close(payloads, index)


def edit_payload(data: bytes, chance: random.Random) -> bytes:
    """Change payloads, in the file and in the index, and make their checksums good again."""
    payloads, index = _open(data)
    parts = index["parts"]
    body, start, crc = bytearray(payloads), HEAD.size, 0
    for i, stored in enumerate(parts["data"]):
        hit = chance.random() < 0.15
        if isinstance(stored, str):
            if hit and stored:
                parts["data"][i] = flip(bytes.fromhex(stored), chance).hex()
            continue
        if hit and stored:
            body[start : start + stored] = flip(bytes(body[start : start + stored]), chance)
        parts["crc"][crc] = zlib.crc32(body[start : start + stored])
        start, crc = start + stored, crc + 1
    return _close(bytes(body), index)


REPAIRED: list[Callable[[bytes, random.Random], bytes]] = [edit_index, edit_payload]
PLAIN: list[Callable[[bytes, random.Random], bytes]] = [flip, truncate, splice]


def judge(data: bytes, original: dict[str, Tensor] | None) -> str:
    """What reading ``data`` does: ``refused``, ``read`` or what is wrong.

    ``original``: the values that must come out, if any do; None where they may differ.
    """
    start = time.monotonic()
    try:
        state = Archive.from_bytes(data, MAX_NBYTES).state_dict()
    except ArchiveError as error:
        outcome = "refused" if str(error) else "FAILED: an error without a text"
    except Exception as error:  # noqa: BLE001 - any other exception is the finding
        return f"FAILED: {type(error).__name__}: {error}"
    else:
        outcome = "read"
        if original is not None and not same(state, original):
            return "FAILED: values changed"
    return outcome if time.monotonic() - start < SLOW else "FAILED: slow"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names, types, shapes and bits."""
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].numpy().tobytes() == b[name].numpy().tobytes()
        for name in a
    )


def run(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Mutate ``count`` archives; returns how often each outcome came, and the failures."""
    originals = specimens()
    states = [Archive.from_bytes(data).state_dict() for data in originals]
    outcomes: Counter[str] = Counter()
    failures = []
    for i in range(count):
        chance = random.Random(f"{seed}/{i}")  # noqa: S311 - repeatable, not secret
        which = chance.randrange(len(originals))
        mutate = chance.choice(PLAIN + REPAIRED)
        data = mutate(originals[which], chance)
        outcome = judge(data, None if mutate in REPAIRED else states[which])
        outcomes[f"{mutate.__name__}: {outcome[:60]}"] += 1
        if outcome.startswith("FAILED"):
            failures.append(f"seed {seed}, number {i}, {mutate.__name__}: {outcome}")
    return outcomes, failures


def _open(data: bytes) -> tuple[bytes, dict[str, Any]]:
    packed, _, _, _ = TAIL.unpack(data[-TAIL.size :])
    start = len(data) - TAIL.size - packed
    index: dict[str, Any] = json.loads(zlib.decompress(data[start : -TAIL.size]))
    return data[:start], index


def _close(payloads: bytes, index: dict[str, Any]) -> bytes:
    text = json.dumps(index, separators=(",", ":")).encode()
    packed = zlib.compress(text)
    lengths = struct.pack("<II", len(packed), len(text))
    crc = zlib.crc32(payloads[: HEAD.size] + packed + lengths)
    return payloads + packed + TAIL.pack(len(packed), len(text), crc, b"htid")


def _edit(value: dict[str, Any] | list[Any], chance: random.Random) -> None:
    """Walk to a random place of a JSON value and change it."""
    place: Any = value  # a list or an object, whose keys differ in type
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = chance.choice(keys)
        if not (isinstance(place[key], dict | list) and place[key] and chance.random() < 0.9):
            break
        place = place[key]
    kind = chance.randrange(8)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, list):
        place.insert(key, place[key])
    elif isinstance(place[key], int) and kind < 6:
        place[key] = chance.choice(
            [place[key] + 1, place[key] - 1, place[key] * 2, 0, 1, -1, 2**31, 2**45, 10**30, 255]
        )
    elif isinstance(place[key], str) and kind < 6:
        other = chance.choice(["", "rans", "bits", "raw", "levels", "float64", "bool", "ff", "☃"])
        place[key] = other if kind < 4 else place[key][:-2] + "07"
    else:
        place[key] = chance.choice([None, True, 1.5, "x", [], {}, [[]], 7, float("inf")])


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with Path("/proc/self/statm").open() as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + ALLOWANCE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = time.monotonic()
    outcomes, failures = run(arguments.count, arguments.seed)
    seconds = time.monotonic() - start
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8,}  {outcome}")
    print(f"{len(failures)} failures of {arguments.count:,} in {seconds:.0f} s")
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    if arguments.json:
        result = {"count": arguments.count, "seed": arguments.seed, "seconds": round(seconds)}
        arguments.json.write_text(
            json.dumps(describe() | result | {"outcomes": outcomes, "failures": failures}, indent=1)
            + "\n"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
