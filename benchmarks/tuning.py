"""What tuning brings: `dither.compress` with samples, and then `dither.tune` with the same samples.

    python -m benchmarks.tuning --only resnet20_cifar10 --split test

Both files of a row take no more than its budget, and each is loaded and scored in a fresh process.
``distance`` is the mean of held-out training samples of another seed: cosine error times two for
MiniLM, Kullback-Leibler divergence in nats for ResNet-20. The compressed file is kept in
``--folder``, and a program that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import torch

import dither
from benchmarks.calibrated import samples_of
from benchmarks.distances import of_file
from benchmarks.environment import describe
from benchmarks.training import score
from dither.search import Course

RESULTS = Path(__file__).parent / "results" / "tuning.json"
SIZES = {"resnet20_cifar10": 34_000, "minilm_stsb": 2_670_000}


def measure(task: str, split: str, course: Course, folder: Path) -> dict[str, Any]:
    """A row: bytes, scores and distances of both files, and seconds of each step."""
    module: Any = importlib.import_module(f"benchmarks.tasks.{task}")
    model, data = module.load(), samples_of(task, course.seed)
    size, start = SIZES[task], time.process_time()
    before, after = (folder / f"{task}-{size}-{course.seed}{end}.dither" for end in ("", "-tuned"))
    row: dict[str, Any] = {"task": task, "split": split, "budget": size, "seed": course.seed}
    row |= {"passes": course.passes, "rate": course.rate}
    if not before.is_file():
        dither.compress(model, size, data=data).save(before)
        row["cpu_seconds_compress"] = round(time.process_time() - start, 1)
    start = time.process_time()
    with dither.Archive.open(before) as archive:
        tuned = dither.tune(model, archive, data, nbytes=size, course=course)
        tuned.save(after)
        row |= {"cpu_seconds_tune": round(time.process_time() - start, 1)}
        row["trial"] = str(tuned.trials[-1])
    for name, path in {"": before, "_tuned": after}.items():
        row[f"nbytes{name}"] = path.stat().st_size
        row[f"score{name}"] = round(score(task, path, split), 2)
        row[f"distance{name}"] = of_file(task, path, course.seed)
    return row


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--passes", type=int, default=Course().passes)
    parser.add_argument("--rate", type=float, default=Course().rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("out/tuning"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    course = Course(options.passes, rate=options.rate, seed=options.seed)
    found = json.loads(options.output.read_text()) if options.output.is_file() else {"rows": []}
    for task in options.only:
        row = measure(task, options.split, course, options.folder) | {"environment": describe()}
        print(json.dumps(row), flush=True)
        found["rows"].append(row)
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
