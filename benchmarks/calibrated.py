"""Compression with 512 unlabelled training samples and no training: the score of the loaded file.

``python -m benchmarks.calibrated --split test`` gives each model, its samples and a size to
``dither.compress``, saves the file, loads it in a fresh process and scores that. Sizes are those
that NNCodec reaches, as in ``benchmarks.data_free``. Rows tell what each trial brought, how long it
all took (``cpu_seconds``: of all cores), and the peak memory of the process. Rows that exist stay.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dither
from benchmarks.data_free import PEER, _score_fresh
from benchmarks.environment import describe
from benchmarks.tasks import data_path, minilm_stsb, resnet20_cifar10
from dither.data import divergence
from dither.search import Trial

SAMPLES = 512
RESULTS = Path(__file__).parent / "results"
_ROWS = 32


def sentences(count: int, seed: int = 0) -> list[Tensor]:
    """Training sentences in batches ``(rows, tokens)`` of one length each: none is padded."""
    from tokenizers import Tokenizer

    lines = data_path("stsb/sts-train.csv").read_text(encoding="utf-8").splitlines()
    distinct = sorted({line.split("\t")[5].strip() for line in lines})
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    tokenizer = Tokenizer.from_file(str(minilm_stsb.model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([distinct[i] for i in order[:count].tolist()])
    return of_one_length([torch.tensor(row.ids) for row in encoded])


def of_one_length(rows: Sequence[Tensor]) -> list[Tensor]:
    """Rows of ids ``(tokens,)`` in batches ``(rows, tokens)``: padding would count as data."""
    batches = []
    for _, same in groupby(sorted(rows, key=len), key=len):
        some = list(same)
        batches += [torch.stack(some[i : i + _ROWS]) for i in range(0, len(some), _ROWS)]
    return batches


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """Sentence embeddings of length 1, ``(rows, width)``: what this model is used for."""
    hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    mean = hidden.mean(1)
    embedded: Tensor = mean / mean.norm(dim=1, keepdim=True)
    return embedded


def samples_of(task: str, seed: int = 0) -> dither.Data:
    """512 training samples without labels, and how the model reads them."""
    if task == "minilm_stsb":
        return dither.Data(sentences(SAMPLES, seed), forward=embed)
    batches = resnet20_cifar10.Batches(64, seed=seed)
    images = [batches[number][0] for number in range(SAMPLES // 64)]
    return dither.Data(images, distance=divergence)


def compress(task: str, size: int, path: Path, seed: int) -> Mapping[str, Any]:
    """Compress a task's model to a file; what was tried, seconds and peak memory."""
    module: Any = {"minilm_stsb": minilm_stsb, "resnet20_cifar10": resnet20_cifar10}[task]
    model, data = module.load(), samples_of(task, seed)
    start = time.monotonic()
    archive = dither.compress(model, size, data=data)
    archive.save(path)
    seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak, cpu = used.ru_maxrss / 1024, used.ru_utime + used.ru_stime
    trials = [asdict(trial) for trial in archive.trials if isinstance(trial, Trial)]
    row = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_mib": round(peak)}
    return {**row, "trials": trials}


def measure(task: str, size: int, split: str, seed: int, folder: Path) -> dict[str, Any]:
    """A row, from two fresh processes: one compresses, one loads and scores."""
    path = folder / f"{task}-{size}.dither"
    command = [sys.executable, "-m", "benchmarks.calibrated", "--one", str(path), "--tasks", task]
    command += ["--sizes", str(size), "--seed", str(seed)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = {"task": task, "split": split, "budget": size, "seed": seed}
    row |= {"nbytes": path.stat().st_size, "score": round(_score_fresh(task, path, split), 2)}
    tried: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row | tried | {"environment": describe()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="*", default=list(PEER), choices=list(PEER))
    parser.add_argument("--sizes", nargs="*", type=int, default=[])
    parser.add_argument("--split", default="dev", choices=["dev", "test"])
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", type=Path, help="compress to this file only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        task, size = arguments.tasks[0], arguments.sizes[0]
        print(json.dumps(compress(task, size, arguments.one, arguments.seed)))
        return
    results = arguments.json or RESULTS / f"calibrated_{arguments.split}.json"
    rows = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    known = {(row["task"], row["budget"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        for task in arguments.tasks:
            for size in arguments.sizes or PEER[task]:
                if (task, size, arguments.seed) in known:
                    continue
                row = measure(task, size, arguments.split, arguments.seed, Path(temporary))
                rows.append(row)
                results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                shown = {k: row[k] for k in ("task", "budget", "nbytes", "score", "seconds")}
                print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
