"""Scores with int8 weights and integer activations: ranges, groups of embeddings, 16-bit sites.

``python -m benchmarks.activations`` stores weights at 8 bits, one scale for each output, chooses
the activations' grids on 500 training samples without labels, and scores on development data.
Every score is saved at once and not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.environment import describe
from benchmarks.tasks import data_path, minilm_stsb, resnet20_cifar10
from dither.activations import Activation, Encodings, apply, observe, remove
from dither.formats import Affine

RESULTS = Path(__file__).parent / "results" / "activations.json"
SAMPLES = 500
TASKS: dict[str, Any] = {"resnet20_cifar10": resnet20_cifar10, "minilm_stsb": minilm_stsb}
BITS = {"resnet20_cifar10": (8, 4), "minilm_stsb": (8, 6)}
RANGES: dict[str, dict[str, Any]] = {
    "min-max": {},
    "running min-max": {"ranges": "running"},
    "percentile 99.99": {"ranges": "percentile"},
    "percentile 99.9": {"ranges": "percentile", "percentile": 99.9},
    "mse": {"ranges": "mse"},
    "dynamic, per tensor": {"dynamic": True},
}
TOKENS: dict[str, dict[str, Any]] = {"dynamic, per token": {"per": "token"}}
GROUPS = 6
FFN = ("*attention.output.LayerNorm@out", "*[0-9].output.dense@out", "*[0-9].output.LayerNorm@in")
"""What Bondarenko et al. 2021 give groups or 16 bits: input, output and sum of the feed-forward."""


def sites(task: str, **settings: Any) -> dict[str, Activation]:
    """Every tensor that a matrix product, a convolution or a sum reads, where a module sees it."""
    one = Activation(**settings)
    if task == "minilm_stsb":
        parts = ("query@out", "key@out", "value@out", "dense@in", "dense@out", "LayerNorm@*")
        return {f"*.{part}": one for part in parts}
    channels = Activation(**{**settings, "axis": 1})
    return {"*conv?@in": channels, "*bn2@out": channels, "linear@in": one}


def plans(task: str, bits: int) -> Iterator[tuple[str, dict[str, Activation]]]:
    """Name and plan of each row."""
    if task == "resnet20_cifar10":
        for name, settings in RANGES.items():
            yield name, sites(task, bits=bits, **settings)
        both = sites(task, bits=bits, ranges="mse")
        yield "mse, logits too", {**both, "linear@out": Activation(bits, ranges="mse")}
        yield (
            "mse, logits by cross-entropy",
            {**both, "linear@out": Activation(bits, ranges="crossentropy")},
        )
        return
    rest = sites(task, bits=bits)
    for name, special in {
        "min-max, feed-forward 16 bits": Activation(16),
        f"min-max, PEG {GROUPS}": Activation(bits, groups=GROUPS, share=3),
        f"min-max, PEG {GROUPS} without permutation": Activation(
            bits, groups=GROUPS, permute=False
        ),
    }.items():
        yield name, {**dict.fromkeys(FFN, special), **rest}
    for name, settings in {**RANGES, **TOKENS}.items():
        yield name, sites(task, bits=bits, **settings)


def samples(task: str) -> list[Any]:
    """Batches of 500 training samples in all, without labels."""
    if task == "resnet20_cifar10":
        batches = resnet20_cifar10.Batches(100, seed=0)
        return [batches[number][0] for number in range(SAMPLES // 100)]
    from tokenizers import Tokenizer

    lines = data_path("stsb/sts-train.csv").read_text(encoding="utf-8").splitlines()
    sentences = sorted({line.split("\t")[5].strip() for line in lines})
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))
    tokenizer = Tokenizer.from_file(str(minilm_stsb.model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([sentences[i] for i in order[:SAMPLES].tolist()])
    rows = sorted((row.ids for row in encoded), key=len)
    found = []
    for start in range(0, SAMPLES, 20):
        some = rows[start : start + 20]
        length = max(map(len, some))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in some])
        found.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    return found


def with_int8_weights(model: nn.Module) -> nn.Module:
    """Every matrix and kernel at 8 bits, one scale for each output (each row of a table)."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(Affine(8, axis=0).encode(weight).decode())
    return model


def measure(task: str, widths: tuple[int, ...], split: str, results: dict[str, Any]) -> None:
    """All rows of a task that are not there yet."""
    module = TASKS[task]
    rows = results.setdefault(f"{task}/{split}", {})

    def note(name: str, model: nn.Module, **more: object) -> None:
        start = time.monotonic()
        score = module.evaluate(model, split)
        rows[name] = {"score": score, "seconds": time.monotonic() - start, **more}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{task:18} {split:5} {name:48} {score:7.3f}", flush=True)

    if "fp32" not in rows:
        note("fp32", module.load())
    model = with_int8_weights(module.load())
    if "W8" not in rows:
        note("W8", model)
    batches = samples(task)
    for bits in widths:
        for title, plan in plans(task, bits):
            name = f"W8A{bits} {title}"
            if name in rows:
                continue
            start = time.monotonic()
            found: Encodings = observe(model, plan, batches)
            apply(model, found)
            more = {"sites": len(found), "numbers": found.parameters}
            note(name, model, calibration_seconds=time.monotonic() - start, **more)
            remove(model)


def main() -> None:
    """Measure what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--split", default="dev", choices=["dev", "test"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results["environment"] = describe()
    for place in range(2):
        for task in given.tasks:
            measure(task, BITS[task][place : place + 1], given.split, results)


if __name__ == "__main__":
    main()
