"""Measure one run of ours; the last line printed is its row as JSON, as with peers.

    python -m benchmarks.measure --task minilm_stsb --method dither --setting 4933591 --folder out/b

``seconds`` are those of making the file, ``peak_mb`` the largest resident memory (10^6 bytes) until
it is written. The file is then loaded and scored in a fresh process, into a model whose every
number was made NaN before, so that nothing of the original can count. ``distance`` is that of its
outputs from fp32's on training samples that no file was fitted to: Kullback-Leibler divergence in
nats, for MiniLM's embeddings twice the cosine error.

Training on labels goes on from the model, on batches that it has not seen, and its row has the
score of a ``control``, the same steps without quantization. ResNet-20 and MiniLM are trained to
give their own fp32 outputs, so that fp32 itself is their control.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dither
from benchmarks import calibrated, ordering, train_minilm, train_resnet20
from benchmarks.distances import OTHER, distance
from benchmarks.environment import describe
from benchmarks.methods import METHODS, NOISE, ORDERING, TASKS, WEIGHTS, Run
from benchmarks.tasks import lm_ptb, minilm_sst2, minilm_stsb, resnet20_cifar10, unseen
from dither.checkpoint import read_checkpoint
from dither.data import divergence

WINDOWS = 64
LENGTHS: dict[tuple[str, int], float] = {("minilm_stsb", 4_930_000): 480}
"""How long to train to a budget, where not 3 epochs or 1,600 steps."""
TRAINERS: dict[str, tuple[Callable[..., tuple[Path, dict[str, Any]]], float]] = {
    "resnet20_cifar10": (train_resnet20.train, 3.0),
    "minilm_stsb": (train_minilm.train, 1600),
}


def load(run: Run, folder: Path) -> nn.Module:
    """The task's model in fp32 and evaluation mode: read, or trained from the seed and kept."""
    if run.task in ORDERING:
        task, work = ordering.TASKS[ORDERING[run.task]], run.work(folder)
        work.mkdir(parents=True, exist_ok=True)
        return ordering.branch(task, None, run.seed, work, Path(WEIGHTS).stem).eval()
    module: Any = importlib.import_module(f"benchmarks.tasks.{run.task}")
    model: nn.Module = module.load()
    return model


def evaluate(task: str, model: nn.Module, split: str) -> float:
    """The task's score; see :class:`benchmarks.methods.Task`."""
    module: Any = importlib.import_module(f"benchmarks.tasks.{task}")
    return float(module.evaluate(model, split))


# --- data without labels -------------------------------------------------------------------------


def samples(task: str, seed: int) -> dither.Data:
    """Training samples without labels, drawn by a seed, and what counts of the outputs."""
    if task in {"resnet20_cifar10", "minilm_stsb"}:
        return calibrated.samples_of(task, seed)
    if task == "minilm_sst2":
        ids, mask, _ = next(minilm_sst2.batches(calibrated.SAMPLES, 12_345 + seed))
        rows = [row[known.bool()] for row, known in zip(ids, mask, strict=True)]
        pairs = [(batch, torch.ones_like(batch)) for batch in calibrated.of_one_length(rows)]
        return dither.Data(pairs, forward=lambda m, b: m(*b), distance=divergence)
    text = lm_ptb.windows(16, 12_345 + seed)
    windows = [next(text)[:, :-1] for _ in range(WINDOWS // 16)]
    return dither.Data(windows, distance=divergence)


# --- methods -------------------------------------------------------------------------------------


def fine_tune(run: Run, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Train to a budget: the file, and more for the row."""
    size = int(run.setting)
    if run.task in TRAINERS:
        train, length = TRAINERS[run.task]
        length = type(length)(LENGTHS.get((run.task, size), length))
        path, more = train(size, run.seed, length, folder)
        return path, {"length": length, "untrimmed": more["untrimmed"]}
    task = ordering.TASKS[ORDERING[run.task]]
    length = task.steps[1]
    start, model = time.monotonic(), load(run, folder)
    torch.manual_seed(run.seed)
    training = dither.attach(model, budget=size, steps=length, noise=run.seed)
    go_on(run, model, training)
    untrimmed = training.measure()
    training.finish()
    path = file_of(run, folder)
    training.save(path)
    more = {"length": length, "untrimmed": untrimmed, "unseen": True}
    more["seconds"] = round(time.monotonic() - start, 2)
    return path, more | {"control": round(control(run, folder), 4)}


def control(run: Run, folder: Path) -> float:
    """Score of the model after the same steps without quantization: what training alone brings."""
    model = load(run, folder)
    torch.manual_seed(run.seed)
    go_on(run, model)
    return evaluate(run.task, model.eval(), "test")


def go_on(run: Run, model: nn.Module, training: dither.Run | None = None) -> None:
    """Train a model further, on batches that it has not seen, attached or not."""
    task = ordering.TASKS[ORDERING[run.task]]
    length = task.steps[1]
    optimizer = torch.optim.Adam(model.parameters(), task.rates[1])
    if training is not None:
        training.join(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    data = task.batches(unseen(run.seed))
    model.train()
    for step in range(length):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * step / length)) / 2
        loss = task.loss(model, next(data))
        (loss if training is None else loss + training.penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if training is not None:
            training.step()


def make(run: Run, folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Do what the method does: its file, or None where a model is scored as it is, and figures."""
    if run.method == "fp32":
        model = load(run, folder)
        nbytes = sum(t.numel() * t.element_size() for t in tensors_of(model).values())
        return None, {"nbytes": nbytes, "score": evaluate(run.task, model, "test")}
    if run.method == "dither-noise":
        task = ordering.TASKS[ORDERING[run.task]]
        run.work(folder).mkdir(parents=True, exist_ok=True)
        row = ordering.result(task, NOISE[run.setting], run.seed, run.work(folder))
        return None, {"nbytes": row["nbytes"], "score": row["score"]}
    if run.method == "dither-train":
        return fine_tune(run, folder)
    model = load(run, folder)  # not counted: a model for a task without a checkpoint is trained
    start, more = time.monotonic(), {}
    if run.method == "dither":
        archive = dither.compress(source(run.task, model), int(run.setting))
    else:
        data = samples(run.task, run.seed)
        archive = dither.compress(model, int(run.setting), data=data)
        more = {"trials": [str(trial) for trial in archive.trials]}
    path = file_of(run, folder)
    archive.save(path)
    return path, {"seconds": round(time.monotonic() - start, 2), **more}


def source(task: str, model: nn.Module) -> nn.Module | dict[str, Tensor]:
    """What is compressed without data: the checkpoint as it was published, or the trained model."""
    if task == "resnet20_cifar10":
        return dict(read_checkpoint(resnet20_cifar10.state_dict_path()))
    if task == "minilm_stsb":
        return dict(read_checkpoint(minilm_stsb.model_folder()))
    return model


def file_of(run: Run, folder: Path) -> Path:
    """Where the file of a run is written."""
    return folder / f"{run.name.replace('/', '-')}.dither"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a state, each once where tied."""
    found = {tensor.data_ptr(): (name, tensor) for name, tensor in model.state_dict().items()}
    return dict(found.values())


def loaded(run: Run, path: Path, folder: Path) -> nn.Module:
    """The model with what a file holds, and nothing else: it was emptied before."""
    model = copy.deepcopy(load(run, folder))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(math.nan)
    found = dither.load_into(model, path, strict=False)
    # Batch counters are in the model and not in the checkpoint, position ids the reverse.
    odd = [name for name in found.missing if "num_batches" not in name]
    odd += [name for name in found.unexpected if "position_ids" not in name]
    odd += [*found.mismatched, *found.cast]
    if odd:
        raise SystemExit(f"the file does not fit the model: {odd}")
    return model


def score(run: Run, path: Path, folder: Path) -> float:
    """Of a file."""
    return evaluate(run.task, loaded(run, path, folder), "test")


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """The row of a run.

    Raises:
        subprocess.CalledProcessError: the file could not be loaded and scored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    path, more = make(run, folder)
    more = {"seconds": round(time.monotonic() - start, 2)} | more
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    row: dict[str, Any] = {"task": run.task, "method": run.method, "setting": run.setting}
    row |= {"seed": run.seed, "split": "test"}
    if path is not None:
        command = [sys.executable, "-m", "benchmarks.measure", *run.arguments]
        command += ["--folder", str(folder), "--score", str(path)]
        command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found, apart = map(float, done.stdout.split()[-2:])
        row |= {"nbytes": path.stat().st_size, "score": found, "distance": float(f"{apart:.4g}")}
    row |= more | {"peak_mb": round(peak, 1)}
    row["score"] = round(row["score"], 4) if math.isfinite(row["score"]) else None
    return row | {"environment": describe()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Measure one run of ours.")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--setting", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="for files and trained models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--score", type=Path, help="score this file alone")
    parser.add_argument("--prepare", action="store_true", help="train the task's model, and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Run(options.task, options.method, options.setting, options.seed)
    if options.prepare:
        load(run, options.folder)
    elif options.score:
        model = loaded(run, options.score, options.folder)
        others = samples(run.task, run.seed + OTHER)
        print(
            evaluate(run.task, model, "test"),
            distance(model, load(run, options.folder), others),
        )
    else:
        print(json.dumps(measure(run, options.folder)), flush=True)


if __name__ == "__main__":
    main()
