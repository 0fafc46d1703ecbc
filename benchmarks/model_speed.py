"""Time and memory to compress and to load a real model, beside NNCodec (ISO/IEC 15938-17).

``python -m benchmarks.model_speed --peer-python PYTHON`` compresses all-MiniLM-L6-v2 to the bytes
that NNCodec reaches at QP -20, and decodes both files. Every call has a process of its own and the
calls are interleaved; times are taken inside the processes, without imports and without reading
and writing safetensors. (dither's loading reads and checks its file; NNCodec decodes from memory.)
Compare the ratios, which are medians of the ratios within each repeat. Memory is that of the whole
process, libraries and the weights included; the limit is 2.5 times the fp32 weights and 500 MB.

PYTHON is the interpreter of NNCodec's own environment, see ``benchmarks/peers/README.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

SIZE = 4_933_591
QP = -20
LIMIT_RATIO, LIMIT_EXTRA = 2.5, 500_000_000

Row = dict[str, float]
Runs = dict[str, list[Row]]


def peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def resident() -> int:
    """Resident memory of this process now, in bytes; the peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak()
    return pages * resource.getpagesize()


def clocked(action: Callable[[], Any]) -> tuple[Any, Row]:
    """What an action returns, and its times and memory."""
    before, start, cpu_start = resident(), time.perf_counter(), time.process_time()
    result = action()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    return result, times | {"rss_before": before, "peak_rss": peak()}


def work(what: str, path: Path, size: int, threads: int) -> Row:
    """One call of dither, in the process that exists for it."""
    import torch

    import dither

    torch.set_num_threads(threads)
    load, compress = dither.load, dither.compress  # imported here, at their first use
    if what == "load":
        _, row = clocked(lambda: load(path))
        return row | {"bytes": path.stat().st_size}
    from safetensors.torch import load_file

    from benchmarks.tasks.minilm_stsb import state_dict_path

    state = load_file(state_dict_path())
    archive, row = clocked(lambda: compress(state, size))
    archive.save(path)
    fp32 = sum(value.nbytes for value in state.values() if value.dtype == torch.float32)
    return row | {"bytes": archive.nbytes, "fp32_bytes": fp32}


def call(command: list[str], threads: int) -> Row:
    """Run a process whose last line of output is a JSON object.

    Raises:
        RuntimeError: the process failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command[1:]} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def model_path() -> Path:
    """The weights; found in a process of its own, since this one must not import torch."""
    code = "from benchmarks.tasks.minilm_stsb import state_dict_path; print(state_dict_path())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FileNotFoundError(done.stderr.strip().rpartition("\n")[2])
    return Path(done.stdout.strip())


def measure(peer: Path | None, repeats: int, size: int, threads: int) -> Runs:
    """Rows of each call; this process stays small, for a child's peak begins at its parent's."""
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = str(Path(folder, "ours.dither")), str(Path(folder, "theirs.nnc"))
        us = [sys.executable, "-m", "benchmarks.model_speed", "--size", str(size)]
        us += ["--threads", str(threads), "--work"]
        calls = {"dither compress": [*us, "compress", ours], "dither load": [*us, "load", ours]}
        if peer is not None:
            script = str(Path(__file__).parent / "peers" / "nncodec_peer.py")
            encode = ["encode", str(model_path()), theirs, "--qp", str(QP)]
            decode = ["decode", theirs, str(Path(folder, "back.safetensors"))]
            flags = ["--threads", str(threads)]
            calls = {
                "dither compress": calls["dither compress"],
                "nncodec encode": [str(peer), script, *encode, *flags],
                "dither load": calls["dither load"],
                "nncodec decode": [str(peer), script, *decode, *flags],
            }
        for repeat in range(repeats):
            for name, command in calls.items():
                row = call(command, threads)
                runs.setdefault(name, []).append(row)
                print(f"{repeat + 1}/{repeats} {name:16} {_shown(row)}", flush=True)
    return runs


def summarize(runs: Runs) -> dict[str, object]:
    """Medians of every figure, ratios, and memory against the limit."""
    medians = {
        name: {key: median(row[key] for row in rows) for key in rows[0]}
        for name, rows in runs.items()
    }
    ratios = {}
    for what, a, b in (
        ("encode", "dither compress", "nncodec encode"),
        ("decode", "dither load", "nncodec decode"),
    ):
        for key in ("seconds", "cpu_seconds") if b in runs else ():
            pairs = zip(runs[a], runs[b], strict=True)
            ratios[f"{what} {key}"] = median(ours[key] / theirs[key] for ours, theirs in pairs)
    most = max(row["peak_rss"] for row in runs["dither compress"])
    limit = LIMIT_RATIO * runs["dither compress"][0]["fp32_bytes"] + LIMIT_EXTRA
    memory = {"peak_rss": most, "limit": limit, "within": most <= limit}
    return {"medians": medians, "ratios": ratios, "compress_memory": memory, "runs": runs}


def _shown(row: Mapping[str, float]) -> str:
    return (
        f"{row['seconds']:7.2f} s, {row['cpu_seconds']:7.2f} s of CPU,"
        f" peak {row['peak_rss'] / 1e6:6.0f} MB, {row['bytes']:,.0f} bytes"
    )


def show(result: dict[str, Any]) -> None:
    """Print medians, ratios and memory."""
    print("\nmedians")
    for name, row in result["medians"].items():
        print(f"  {name:16} {_shown(row)}")
    for name, ratio in result["ratios"].items():
        print(f"  dither / NNCodec, {name:19} {ratio:.2f}")
    if not result["ratios"]:
        print("  no --peer-python was given: only dither was measured, there are no ratios")
    memory = result["compress_memory"]
    print(
        f"  compressing took {memory['peak_rss'] / 1e6:.0f} MB at most; the limit is "
        f"{memory['limit'] / 1e6:.0f} MB: {'kept' if memory['within'] else 'EXCEEDED'}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--peer-python", type=Path, help="python of NNCodec's environment")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats (3)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"bytes to compress to ({SIZE:,})")
    parser.add_argument("--threads", type=int, default=1, help="threads of every process (1)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--work", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        what, path = options.work
        print(json.dumps(work(what, Path(path), options.size, options.threads)))
        return
    start = time.monotonic()
    runs = measure(options.peer_python, options.repeats, options.size, options.threads)
    result = summarize(runs)
    show(result)
    if options.json:
        from benchmarks.environment import describe  # imports torch

        head = describe()
        command = str(head["command"]).replace(str(options.peer_python), "PYTHON")
        head |= {"command": command, "threads": options.threads}
        head["seconds"] = round(time.monotonic() - start, 1)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(head | result, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
