"""What runs an archive, and how: score, bytes, memory and time of each way.

    python -m benchmarks.running [--only MODEL] [--files FOLDER] [--json FILE]

Models: all-MiniLM-L6-v2, ResNet-20 and EfficientNet-lite0. Archives of each: ``8x``, of
`dither.compress` without data; ``w8``, with weights on grids of 8 bits for each row, nearest codes;
``w8a8``, with activations of 8 bits besides; and ``w4``, of 4 bits by GPTQ, in groups of 32 in
Linear layers and tables, for each row in convolutions (depthwise ones: 8).

Each row is measured in a process of its own: resident memory before the model is there is taken
from that after some runs, without what is free (glibc's `malloc_trim`). Times are of one process
for each number of threads, in which all rows take turns: the least and the median of rounds. The
least is what other programs on the machine disturb least; ratios of rows are what to compare.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.environment import describe
from benchmarks.running_models import TASKS, Task
from dither import GPTQ, Affine, Archive, Raw, compress
from dither.activations import Encodings, observe
from dither.archive import load_into, pack
from dither.calibrate import collect as collect_stats
from dither.core import Encoded, Encoder
from dither.model import collect
from dither.run import compact, to_onnx, to_torchao

_SECONDS, _SLOW = 0.1, 2.0
_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")

# --- files ---------------------------------------------------------------------------------------


def make_files(task: Task, folder: Path) -> None:
    """The archives, and the ONNX files of them; those that exist stay."""
    model = task.load()
    makers: dict[str, Callable[[], Archive]] = {
        "8x": lambda: compress(model, "8x"),
        "raw": lambda: _packed(model, _as_it_is),
        "w8": lambda: _packed(model, _eight),
        "w8a8": lambda: _packed(model, _eight, observe(model, task.sites(model), task.samples())),
        "w4": lambda: _packed(model, _four(model, task)),
    }
    for name, make in makers.items():
        path = folder / f"{name}.dither"
        if not path.exists():
            make().save(path)
    exports: dict[str, tuple[str, dict[str, Any]]] = {
        "ort-fp32": ("raw", {"half": False}),
        "ort-8x": ("8x", {}),
        "ort-w8": ("w8", {}),
        "ort-w8a8": ("w8a8", {}),
        "ort-w4": ("w4", {}),
        "ort-w4-fast": ("w4", {"kernels": "fast"}),
    }
    for name, (source, settings) in exports.items():
        path = folder / f"{name}.onnx"
        if path.exists():
            continue
        with Archive.open(folder / f"{source}.dither") as archive:
            sample = task.inputs(2)
            found = to_onnx(model, archive, sample, path, dynamic_shapes=task.axes, **settings)
        report = {"difference": found.difference, "largest": found.largest, "text": str(found)}
        path.with_suffix(".json").write_text(json.dumps(report), encoding="utf-8")


def _packed(
    model: nn.Module,
    encode: Callable[[str, Tensor], Encoded],
    sites: Encodings | None = None,
) -> Archive:
    tensors = collect(model)
    encoded = {name: encode(name, value) for name, value in tensors.values.items()}
    return pack(encoded, tensors.aliases, sites=None if sites is None else sites.to_json())


def _is_matrix(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 1


def _as_it_is(name: str, value: Tensor) -> Encoded:
    del name
    return Raw().encode(value)


def _eight(name: str, value: Tensor) -> Encoded:
    del name
    return (Affine(8, axis=0) if _is_matrix(value) else Raw()).encode(value)


def _four(model: nn.Module, task: Task) -> Callable[[str, Tensor], Encoded]:
    stats = collect_stats(model, task.samples())

    def encode(name: str, value: Tensor) -> Encoded:
        if not _is_matrix(value) or value.shape[1] == 1:
            return _eight(name, value)
        group = 32 if value.ndim == 2 and value.shape[1] % 32 == 0 else None
        made = Affine(4, group=group, axis=None if group else 0, scale_dtype=torch.float16)
        known = stats.get(name)
        coder: Encoder = made if known is None or known.gram is None else GPTQ(format=made)
        return coder.encode(value, known)

    return encode


# --- rows ----------------------------------------------------------------------------------------


def runner(task: Task, row: str, folder: Path, threads: int) -> tuple[Callable[[Any], Tensor], int]:
    """What runs a batch, and the bytes of its file."""
    kind, _, source = row.partition("-")
    if kind == "ort":
        path = folder / f"{row}.onnx"
        return _session(task, path, threads), path.stat().st_size
    model = task.load()
    for value in model.parameters():  # some are parts of a mapped file, which would stay in memory
        value.data = value.data.clone()
    path = folder / f"{source or 'raw'}.dither"
    archive = Archive.open(path)
    if kind == "dense":
        load_into(model, archive)
    elif kind == "compact":
        compact(model, archive)
    elif kind == "torchao":
        to_torchao(model, archive, four_bits=source == "w4")
    archive.close()

    def run(batch: Any) -> Tensor:  # noqa: ANN401 - tensors or dicts of them
        with torch.no_grad():
            output = model(**batch) if isinstance(batch, dict) else model(batch)
        found: Tensor = output if task.output is None else output[task.output]
        return found

    return run, path.stat().st_size


def _session(task: Task, path: Path, threads: int) -> Callable[[Any], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    names = [one.name for one in session.get_inputs()]
    output = [task.output or session.get_outputs()[0].name]

    def run(batch: Any) -> Tensor:  # noqa: ANN401
        fed = batch if isinstance(batch, dict) else {names[0]: batch}
        made = session.run(output, {name: value.numpy() for name, value in fed.items()})
        return torch.from_numpy(made[0])

    return run


ROWS = (
    *("torch", "dense-8x", "compact-8x", "torchao-w8", "torchao-w4"),
    *("ort-fp32", "ort-8x", "ort-w8", "ort-w8a8", "ort-w4", "ort-w4-fast"),
)


def measure(name: str, row: str, folder: Path) -> dict[str, Any]:
    """Score, bytes and memory of one way, in this process."""
    import onnxruntime  # so that it is in the memory of every row

    del onnxruntime
    task = TASKS[name]
    trim = ctypes.CDLL(None).malloc_trim  # gives back what is free: else it counts as used
    _warm(task)
    batch = task.inputs(1)
    gc.collect()
    trim(0)
    before = _resident()
    run, nbytes = runner(task, row, folder, 1)
    for _ in range(3):
        run(batch)
    gc.collect()
    trim(0)
    memory = _resident() - before
    return {"score": task.score(run), "nbytes": nbytes, "resident": memory}


def _warm(task: Task) -> None:
    """Let what all rows may use be in memory: packages, compiled loops, kernels."""
    task.load()
    layer = nn.Linear(128, 128)
    archive = pack({n: Affine(8).encode(v.detach()) for n, v in layer.named_parameters()})
    to_torchao(layer, archive)
    load_into(nn.Linear(128, 128), archive)
    torch.zeros(256, 256) @ torch.zeros(256, 256)


def _resident() -> int:
    """Bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def times(name: str, folder: Path, threads: int, rounds: int, ways: str) -> dict[str, Any]:
    """Seconds of each way for each size of batch, taken in turns; of slow ones, once."""
    torch.set_num_threads(threads)
    task = TASKS[name]
    rows = [row for row in ROWS if fnmatchcase(row, ways)]
    runs = {row: runner(task, row, folder, threads)[0] for row in rows}
    found: dict[str, Any] = {}
    for size in task.batches:
        batch = task.inputs(size)
        first = {}
        for row, run in runs.items():
            run(batch)
            start = time.perf_counter()
            run(batch)
            first[row] = time.perf_counter() - start
        seconds: dict[str, list[float]] = {row: [] for row in rows}
        for number in range(rounds):
            for row, run in runs.items():
                if number and first[row] > _SLOW:
                    continue
                count = max(1, int(_SECONDS / first[row]))
                start = time.perf_counter()
                for _ in range(count):
                    run(batch)
                seconds[row].append((time.perf_counter() - start) / count)
        found[str(size)] = {
            row: {"least": min(values), "median": float(np.median(values))}
            for row, values in seconds.items()
        }
    return found


# --- all -----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what runs an archive.")
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--files", type=Path, help="where archives and ONNX files are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15, help="of which the least time counts")
    parser.add_argument("--ways", default="*", help="with --times, a glob of rows")
    parser.add_argument("--row", nargs=2, metavar=("MODEL", "ROW"))
    parser.add_argument("--times", nargs=2, metavar=("MODEL", "THREADS"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.row:
        name, row = options.row
        print(json.dumps(measure(name, row, options.files / name)))
        return
    if options.times:
        name, threads = options.times
        how = (int(threads), options.rounds, options.ways)
        print(json.dumps(times(name, options.files / name, *how)))
        return
    files = options.files or Path(tempfile.mkdtemp())
    path = options.json
    held = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    for name in [options.only] if options.only else list(TASKS):
        held |= {**describe(), "flags": _flags(), name: measure_model(name, files, options.rounds)}
        if path:
            path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(table(held))


def table(held: dict[str, Any]) -> str:
    """Of each model a table in Markdown; speeds are ratios of the least times, to onnxruntime's."""
    lines: list[str] = []
    for name in [name for name in TASKS if name in held]:
        found = held[name]
        columns = [(threads, size) for threads, timed in found["threads"].items() for size in timed]
        heads = [
            f"batch {size}, {threads} thread{'s' * (threads != '1')}" for threads, size in columns
        ]
        lines += [f"{name}: {found['scored']}", ""]
        lines += [
            f"| way | score | file | memory | {' | '.join(heads)} |",
            "| --- " * (4 + len(heads)) + "|",
        ]
        for row, one in found["rows"].items():
            speeds = []
            for threads, size in columns:
                timed = found["threads"][threads][size]
                kind = "least" if "least" in timed["ort-fp32"] else "median"
                whole = timed["ort-fp32"][kind]
                speeds.append(f"{whole / timed[row][kind]:.2f}" if row in timed else "")
            sizes = [one[part] for part in ("nbytes", "resident")]
            megabytes = ["" if size is None else f"{size / 1e6:.2f}" for size in sizes]
            cells = [row, f"{one['score']:.2f}", *megabytes, *speeds]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def measure_model(name: str, files: Path, rounds: int) -> dict[str, Any]:
    """All rows of a model."""
    task, folder = TASKS[name], files / name
    folder.mkdir(parents=True, exist_ok=True)
    make_files(task, folder)
    rows = {row: _apart("--row", name, row, "--files", str(files)) for row in ROWS}
    how = ["--files", str(files), "--rounds", str(rounds)]
    timed = {n: _apart("--times", name, str(n), *how) for n in (1, 2)}
    checks = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
    return {"scored": task.scored, "rows": rows, "threads": timed, "exports": checks}


def _apart(*arguments: str) -> Any:  # noqa: ANN401 - whatever it prints
    """What this program prints in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.running", *arguments]
    # Threads that spin while they wait take the time of those that work, where cores are shared.
    passive = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=passive)
    return json.loads(done.stdout.splitlines()[-1])


def _flags() -> list[str]:
    """Which instructions for integers the processor has."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    have = set(text.split())
    return [flag for flag in _INT8_FLAGS if flag in have]


if __name__ == "__main__":
    main()
