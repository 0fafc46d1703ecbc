"""Evaluate saved networks in a process that has seen nothing but the files.

Run as ``python -m dither.demo.evaluate THREADS FILE...``; prints a JSON list.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dither.archive import load_into
from dither.core import DitherError
from dither.demo.network import DigitNet, accuracy, predict, test_set
from dither.demo.plain_rounding import load_rounded

ROUNDED_SUFFIX = ".rounded.safetensors"


@dataclass(frozen=True)
class Score:
    """What a network does on the test images: its accuracy, and a hash of all logits' bits."""

    accuracy: float
    sha256: str


def score(logits: Tensor, labels: Tensor) -> Score:
    """The score of logits ``(images, classes)``."""
    digest = hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()
    return Score(accuracy(logits, labels), digest)


def load_network(path: Path) -> DigitNet:
    """A network from an archive or from plain rounding's file."""
    model = DigitNet()
    if path.name.endswith(ROUNDED_SUFFIX):
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict(load_rounded(path, shapes))
    else:
        load_into(model, path)
    return model


def evaluate_in_fresh_process(paths: Sequence[Path]) -> list[Score]:
    """Score files in a new Python process with this one's number of threads.

    Raises:
        DitherError: the process failed.
    """
    command = [sys.executable, "-m", __name__, str(torch.get_num_threads()), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise DitherError(
            f"evaluating in a fresh process ended with status {done.returncode}:\n{done.stderr}"
        )
    return [Score(**item) for item in json.loads(done.stdout)]


def main() -> None:
    """Score the files named on the command line."""
    torch.set_num_threads(int(sys.argv[1]))
    images, labels = test_set()
    networks = map(load_network, map(Path, sys.argv[2:]))
    print(json.dumps([asdict(score(predict(net, images), labels)) for net in networks]))


if __name__ == "__main__":
    main()
