"""Data-free compression of the real models at given sizes: the score of the loaded file.

``python -m benchmarks.data_free --split test`` compresses each model to the sizes that NNCodec
(ISO/IEC 15938-17) reaches, saves, loads the file in a fresh process, and evaluates what was loaded.
All settings are dither's defaults; they were chosen on development and training data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import dither
from benchmarks.environment import describe

PEER = {
    "minilm_stsb": {9_321_884: 81.99, 6_941_013: 81.08, 4_933_591: 79.54, 3_248_904: 71.49},
    "resnet20_cifar10": {127_949: 91.42, 106_380: 90.47, 83_264: 89.50, 62_913: 84.66},
}
"""Bytes and test scores of NNCodec 2.1.3: ``benchmarks/peers/README.md`` says how to get them."""


def compress(task: str, size: int, path: Path) -> float:
    """Compress a task's checkpoint to a file; returns the seconds it took."""
    from dither.checkpoint import read_checkpoint

    state = read_checkpoint(_checkpoint(task))
    start = time.monotonic()
    dither.compress(state, size).save(path)
    return time.monotonic() - start


def score(task: str, path: Path | None, split: str) -> float:
    """Load a file into the task's model, in this process, and evaluate it."""
    from benchmarks.tasks import minilm_stsb, resnet20_cifar10

    module = {"minilm_stsb": minilm_stsb, "resnet20_cifar10": resnet20_cifar10}[task]
    model = module.load()
    if path is not None:
        found = dither.load_into(model, path, strict=False)
        # Batch counters are in the model and not in the checkpoint, position ids the reverse.
        odd = [n for n in found.missing if "num_batches" not in n]
        odd += [n for n in found.unexpected if "position_ids" not in n]
        if odd or found.mismatched or found.cast:
            raise SystemExit(f"{path} does not fit the model: {found}")
    result: float = module.evaluate(model, split)
    return result


def _checkpoint(task: str) -> Path:
    from benchmarks.tasks import minilm_stsb, resnet20_cifar10

    if task == "minilm_stsb":
        return minilm_stsb.model_folder()
    return resnet20_cifar10.state_dict_path()


def _score_fresh(task: str, path: Path, split: str) -> float:
    command = [sys.executable, "-m", "benchmarks.data_free", "--score", str(path)]
    command += ["--tasks", task, "--split", split, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def run(tasks: list[str], sizes: list[int], split: str, folder: Path) -> list[dict[str, object]]:
    """All rows: task, budget, bytes, score, the peer's score, seconds."""
    rows: list[dict[str, object]] = []
    for task in tasks:
        for size in sizes or PEER[task]:
            path = folder / f"{task}-{size}.dither"
            seconds = compress(task, size, path)
            result = _score_fresh(task, path, split)
            peer = PEER[task].get(size) if split == "test" else None
            row: dict[str, object] = {"task": task, "split": split, "budget": size}
            row |= {"nbytes": path.stat().st_size, "score": round(result, 2), "nncodec": peer}
            rows.append(row | {"seconds": round(seconds, 1)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="*", default=list(PEER), choices=list(PEER))
    parser.add_argument("--sizes", nargs="*", type=int, default=[])
    parser.add_argument("--split", default="dev", choices=["dev", "test"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--score", type=Path, help="evaluate this file alone (for one task)")
    parser.add_argument("--out", type=Path, help="keep the files in this folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.score:
        print(score(arguments.tasks[0], arguments.score, arguments.split))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = run(arguments.tasks, arguments.sizes, arguments.split, folder)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(describe() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
