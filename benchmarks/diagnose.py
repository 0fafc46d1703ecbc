"""Which tensors of two real models lose most at 8 bits, each quantized alone.

``python -m benchmarks.diagnose`` uses the defaults of ``dither.diagnose`` on training samples
without labels: 500 images for ResNet-20, 100 sentences for MiniLM.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import dither
from benchmarks.environment import describe
from benchmarks.tasks import data_path, minilm_stsb, resnet20_cifar10
from dither.data import divergence, squared

RESULTS = Path(__file__).parent / "results" / "diagnose.json"
TASKS: dict[str, Any] = {"resnet20_cifar10": resnet20_cifar10, "minilm_stsb": minilm_stsb}
DISTANCES = {"resnet20_cifar10": divergence, "minilm_stsb": squared}


def samples(task: str) -> list[Any]:
    """Batches of training samples."""
    if task == "resnet20_cifar10":
        batches = resnet20_cifar10.Batches(100, seed=0)
        return [batches[number][0] for number in range(5)]
    from tokenizers import Tokenizer

    lines = data_path("stsb/sts-train.csv").read_text(encoding="utf-8").splitlines()
    sentences = sorted({line.split("\t")[5].strip() for line in lines})
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))[:100]
    tokenizer = Tokenizer.from_file(str(minilm_stsb.model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    rows = sorted((tokenizer.encode(sentences[i]).ids for i in order.tolist()), key=len)
    found = []
    for some in (rows[start : start + 20] for start in range(0, len(rows), 20)):
        ids = torch.tensor([row + [0] * (len(some[-1]) - len(row)) for row in some])
        found.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    return found


def main() -> None:
    """Diagnose what is missing in the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--plots", type=Path, help="folder for the pictures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["environment"] = describe()
    for task in given.tasks:
        if task in results and given.plots is None:
            continue
        start = time.monotonic()
        model = TASKS[task].load()
        found = dither.diagnose(model, dither.Data(samples(task), distance=DISTANCES[task]))
        print(f"{task}\n{found}\n", flush=True)
        results[task] = {"seconds": time.monotonic() - start, **found.to_json()}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if given.plots is not None:
            found.plot(given.plots / f"{task}.svg")


if __name__ == "__main__":
    main()
