"""Speed of our rANS coder beside constriction's, in one process.

    python -m benchmarks.coding_speed --symbols 20000000 --json coding_speed.json

Both coders run in one thread, whose processor time is taken; repeats are interleaved, so that both
meet the same load of caches and clocks. Compare the ratios, which are medians of the ratios within
each repeat, and not the speeds. The symbols are one part, and then eight parts, decoded by one
thread and by two and timed by the clock, for which the machine must be idle. The first two
repeats, in which loops are compiled or loaded, are not counted. constriction is optional
(`pip install constriction`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import describe
from dither.coding import decode_codes, encode_codes
from dither.compiled import LOADING, expect

try:
    import constriction
except ImportError:
    constriction = None

SOURCES = {"16 symbols, 3 bits": (16, 1.5), "16 symbols, 1.5 bits": (16, 0.45)}
SOURCES["256 symbols, 6.4 bits"] = (256, 16.0)


def laplacian(count: int, alphabet: int, scale: float) -> NDArray[np.uint8]:
    values = np.random.default_rng(0).laplace(size=count) * scale + alphabet / 2
    return np.clip(np.rint(values), 0, alphabet - 1).astype(np.uint8)


def timed(
    action: Callable[[], Any], clock: Callable[[], float] = time.thread_time
) -> tuple[float, Any]:
    begin = clock()
    result = action()
    return clock() - begin, result


def ours(codes: NDArray[np.uint8], alphabet: int) -> tuple[float, float, int]:
    """Seconds to encode and to decode, and bytes."""
    encoding, (codec, payload) = timed(lambda: encode_codes(codes, alphabet))
    decoding, found = timed(lambda: decode_codes(codec, payload, codes.shape, alphabet))
    assert np.array_equal(found, codes)
    return encoding, decoding, len(payload)


def theirs(codes: NDArray[np.uint8], alphabet: int) -> tuple[float, float, int]:
    """The same by constriction, with an iid Categorical model; its model is given, ours is not."""
    shares = np.bincount(codes, minlength=alphabet) / len(codes)
    symbols = codes.astype(np.int32)
    model = constriction.stream.model.Categorical(shares, perfect=False, lazy=False)

    def encode() -> Any:  # noqa: ANN401
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols, model)
        return coder.get_compressed()

    encoding, words = timed(encode)
    decoding, found = timed(
        lambda: constriction.stream.stack.AnsCoder(words).decode(model, len(codes))
    )
    assert np.array_equal(found, symbols)
    return encoding, decoding, 4 * len(words)


PARTS = 8


def side_by_side(parts: list[tuple[str, bytes]], length: int, alphabet: int, threads: int) -> float:
    """Seconds to decode several parts in threads, as the tensors of a file are."""

    def decode(part: tuple[str, bytes]) -> Any:  # noqa: ANN401
        return decode_codes(*part, (length,), alphabet)

    with ThreadPoolExecutor(threads) as pool:
        return timed(lambda: list(pool.map(decode, parts)), time.perf_counter)[0]


def measure(count: int, alphabet: int, scale: float, repeats: int) -> dict[str, float]:
    """Bits per symbol, median speeds in millions of symbols per second, and median ratios."""
    codes = laplacian(count, alphabet, scale)
    counts = np.bincount(codes, minlength=alphabet)
    counts = counts[counts > 0]
    coders = {"ours": ours} | ({"constriction": theirs} if constriction else {})
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in coders}
    expect(LOADING)
    for repeat in range(-2, repeats):
        for name, coder in coders.items():
            row_of = coder(codes, alphabet)
            if repeat >= 0:
                runs[name].append(row_of)
    row = {"entropy": float((counts * np.log2(count / counts)).sum() / count)}
    for name, times in runs.items():
        row[f"{name} bits"] = 8 * times[0][2] / count
        row[f"{name} encode"] = count / 1e6 / median(t[0] for t in times)
        row[f"{name} decode"] = count / 1e6 / median(t[1] for t in times)
    if constriction:
        pairs = list(zip(runs["ours"], runs["constriction"], strict=True))
        row["encode ratio"] = median(b[0] / a[0] for a, b in pairs)
        row["decode ratio"] = median(b[1] / a[1] for a, b in pairs)
    length = count // PARTS
    parts = [encode_codes(codes[i * length : (i + 1) * length], alphabet) for i in range(PARTS)]
    threaded = [
        [side_by_side(parts, length, alphabet, threads) for threads in (1, 2)]
        for _ in range(2 * repeats)
    ]
    row["two threads ratio"] = median(one / two for one, two in threaded)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--symbols", type=float, default=20e6, help="symbols to code (20e6)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    if constriction is None:
        print("constriction is not installed (pip install constriction): ours only, no ratios")
    count, start = int(arguments.symbols), time.monotonic()
    rows = {}
    for name, (alphabet, scale) in SOURCES.items():
        rows[name] = measure(count, alphabet, scale, arguments.repeats)
        print(f"\n{name}, {count / 1e6:g} M of them (speeds in M symbols/s)")
        for key, value in rows[name].items():
            print(f"  {key:20} {value:10.3f}")
    if arguments.json:
        head = describe() | {"seconds": round(time.monotonic() - start, 1)}
        result = {"symbols": count, "repeats": arguments.repeats, "sources": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(head | result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
