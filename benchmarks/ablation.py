"""What each part of the data-free rule brings: scores on development data.

``python -m benchmarks.ablation`` compresses each model at two sizes with one step size for all
matrices, with steps that grow with the cube root of a tensor's size, with error feedback from
prior second moments too, with token rows by frequency, with token tables in a basis of their own,
with steps refitted to their codes (the default), and with codes of the other matrices on a trellis.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import dither
from benchmarks.environment import describe
from benchmarks.tasks import minilm_stsb, resnet20_cifar10
from dither.checkpoint import read_checkpoint
from dither.encoders.viterbi import Viterbi
from dither.search import (
    Grid,
    Knowledge,
    Proposer,
    RotatedGrid,
    Sensitivity,
    Stored,
    TrellisGrid,
    data_free,
)

SIZES = {"minilm_stsb": [4_933_591, 3_248_904], "resnet20_cifar10": [83_264, 62_913]}


def _one_step(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
    """The same cost of a squared error in every matrix, at a common level."""
    full = data_free(tensors)
    matrices = [w for w in full.values() if w.value.ndim > 1 and w.value.is_floating_point()]
    count = sum(w.value.numel() for w in matrices)
    mean = sum(w.sensitivity * w.value.numel() for w in matrices) / count
    return {
        name: replace(w, sensitivity=mean, rows=None, gram=None, axes=None)
        if w.value.ndim > 1
        else w
        for name, w in full.items()
    }


def _cube_root(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
    return {n: replace(w, gram=None) for n, w in _feedback(tensors).items()}


def _feedback(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
    return {n: replace(w, rows=None) for n, w in _frequency(tensors).items()}


def _frequency(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
    return {n: replace(w, axes=None) for n, w in _basis(tensors).items()}


def _basis(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
    return _proposed(tensors, Stored(), Grid(refit=False), RotatedGrid())


def _trellis(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
    return _proposed(tensors, Stored(), TrellisGrid(Viterbi(1.0)), RotatedGrid())


def _proposed(tensors: Mapping[str, Tensor], *proposers: Proposer) -> dict[str, Knowledge]:
    return {n: replace(k, proposers=proposers) for n, k in data_free(tensors).items()}


VARIANTS: dict[str, Sensitivity] = {
    "one step for all": _one_step,
    "steps by size": _cube_root,
    "and error feedback": _feedback,
    "and token frequency": _frequency,
    "and a basis for token tables": _basis,
    "and refitted steps (default)": data_free,
    "and a trellis": _trellis,
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for task in arguments.tasks:
        module = {"minilm_stsb": minilm_stsb, "resnet20_cifar10": resnet20_cifar10}[task]
        model = module.load()
        source = (
            minilm_stsb.model_folder()
            if task == "minilm_stsb"
            else resnet20_cifar10.state_dict_path()
        )
        state = read_checkpoint(source)
        for size in SIZES[task]:
            for variant, sensitivity in VARIANTS.items():
                archive = dither.compress(state, size, sensitivity=sensitivity)
                dither.load_into(model, archive, strict=False)
                row = {"task": task, "split": "dev", "variant": variant, "nbytes": archive.nbytes}
                rows.append(row | {"score": round(module.evaluate(model, "dev"), 2)})
                print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(describe() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
