"""Seconds and memory that bringing files back takes, beside reading numbers as they are.

    DITHER_DATA=... python -m benchmarks.reading_speed --peers FOLDER --json reading_speed.json

* MiniLM (22.7 M weights) in 4.9 MB: ``dither.load``, with one thread and with two, beside reading
  its float16 safetensors file from the system's cache, and NNCodec's decoding of a file of about
  that size, where ``benchmarks.peers.setup nncodec`` has made its environment. Ours runs in this
  process, after its loops were loaded; ``first`` is the first load of a fresh process, without
  ``import``.
* Numbers that are kept exactly, bfloat16, float16 and float32: MB of numbers per second.
* A thousand small tensors: microseconds for each.
* What ``load``, ``load(dtype=)`` and ``load_into`` take at their peak, beside the numbers that they
  give, in units of the largest tensor.

Repeats are interleaved, and ratios are medians of the ratios within each. Times are processor time
of one thread, but for two threads, of the clock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dither
from benchmarks.environment import describe
from benchmarks.peak_memory import Peak, restart_for_exact_peaks
from benchmarks.tasks import minilm_stsb
from dither.archive import write
from dither.compiled import LOADING, expect
from dither.formats import Affine, Raw

SIZE = 4_933_591
SMALL = 1000
SIDE, LAYERS = 2048, 8
QP = -20
"""With which NNCodec's file has about as many bytes."""

_FIRST = (
    "import sys, time, torch, dither.archive\ntorch.set_num_threads(1)\n"
    "start = time.process_time()\ndither.load(sys.argv[1])\nprint(time.process_time() - start)"
)


def seconds(action: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    action()
    return clock() - start


def read_whole(path: Path) -> dict[str, Tensor]:
    """A safetensors file in memory of its own, not mapped."""
    return {name: value.clone() for name, value in load_file(path).items()}


def minilm(folder: Path, repeats: int, peers: Path | None) -> dict[str, float]:
    """Decoding MiniLM's file: medians of seconds, and ratios."""
    model = minilm_stsb.load()
    file, half, full = folder / "m.dither", folder / "half.safetensors", folder / "m.safetensors"
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    dither.compress(state, SIZE).save(file)
    save_file({n: v.half() if v.is_floating_point() else v for n, v in state.items()}, half)
    found: dict[str, list[float]] = {"ours": [], "two threads": [], "float16": [], "first": []}
    python = None if peers is None else peers / "nncodec" / "bin" / "python"
    if python is not None:
        save_file(state, full)
        found["nncodec"] = []
        coded = run_peer(python, "encode", full, folder / "m.nnc", "--qp", str(QP))
        found["nncodec nbytes"] = [coded["bytes"]]
    expect(LOADING)
    for repeat in range(-3, repeats):
        torch.set_num_threads(1)
        row = {"ours": seconds(lambda: dither.load(file))}
        row["float16"] = seconds(lambda: read_whole(half))
        row["one by the clock"] = seconds(lambda: dither.load(file), time.perf_counter)
        torch.set_num_threads(2)
        row["two threads"] = seconds(lambda: dither.load(file), time.perf_counter)
        torch.set_num_threads(1)
        if repeat >= 0:
            command = [sys.executable, "-c", _FIRST, str(file)]
            row["first"] = float(subprocess.run(command, capture_output=True, check=True).stdout)
            if python is not None:
                back = run_peer(python, "decode", folder / "m.nnc", folder / "back.safetensors")
                row["nncodec"] = back["cpu_seconds"]
            for name, value in row.items():
                found.setdefault(name, []).append(value)
    result = {name: median(values) for name, values in found.items()}

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(found[one], found[other], strict=True))

    result["ours / float16"] = ratio("ours", "float16")
    result["one thread / two"] = ratio("one by the clock", "two threads")
    if python is not None:
        result["ours / nncodec"] = ratio("ours", "nncodec")
    return result


def run_peer(python: Path, *arguments: str | Path) -> dict[str, float]:
    """What the peer's script prints."""
    script = Path(__file__).parent / "peers" / "nncodec_peer.py"
    command = [str(python), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def exact(folder: Path, repeats: int) -> dict[str, float]:
    """MB of numbers per second, by their type."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(2048, 1, generator=draw) + 0.1
    weight = rows * torch.randn(2048, 2048, generator=draw)
    speeds = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        value, path = weight.to(dtype), folder / "exact"
        write(path, {"w": Raw().encode(value)})
        with dither.open(path) as archive:
            taken = [seconds(lambda: archive["w"]) for _ in range(repeats + 2)][2:]
        speeds[str(dtype).removeprefix("torch.")] = value.nbytes / 1e6 / median(taken)
    return speeds


def small(folder: Path, repeats: int) -> float:
    """Microseconds for each of many tensors of 64 values."""
    draw = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(8, 8, generator=draw) for i in range(SMALL)}
    write(folder / "small", {n: Affine(bits=4).encode(value) for n, value in tensors.items()})
    return (
        median(seconds(lambda: dither.load(folder / "small")) for _ in range(repeats)) * 1e6 / SMALL
    )


def peaks(folder: Path) -> dict[str, float]:
    """Memory at the peak beside what is given, in units of one tensor of float32."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    layers = {f"{i}.weight": torch.randn(SIDE, SIDE, generator=draw) for i in range(LAYERS)}
    write(folder / "deep", {n: Affine(bits=4).encode(value) for n, value in layers.items()})
    del layers
    one = 4 * SIDE * SIDE
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    with torch.device("meta"):
        empty = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    path, result = folder / "deep", {}
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "load": (lambda: dither.load(path), LAYERS * one),
        "load, bfloat16": (lambda: dither.load(path, dtype=torch.bfloat16), LAYERS * one // 2),
        "load_into": (lambda: dither.load_into(model, path), 0),
        "load_into, meta device": (lambda: dither.load_into(empty, path), LAYERS * one),
    }
    expect(LOADING)
    for _ in range(3):  # what stays after the first time, as numba does, is no part of it
        dither.load_into(model, path)
    for name, (action, given) in ways.items():
        peak = Peak()
        kept = action()
        result[name] = (peak.grew() - given) / one
        del kept
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats (7)")
    parser.add_argument("--peers", type=Path, help="folder that benchmarks.peers.setup filled")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    restart_for_exact_peaks()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result: dict[str, object] = {
            "peak beside the result, in tensors": peaks(folder),
            "MiniLM, seconds": minilm(folder, arguments.repeats, arguments.peers),
            "exact numbers, MB per second": exact(folder, arguments.repeats),
            "small tensors, microseconds": small(folder, arguments.repeats),
        }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        head = describe() | {"repeats": arguments.repeats}
        arguments.json.write_text(json.dumps(head | result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
