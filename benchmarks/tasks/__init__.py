"""Benchmark tasks: a trained model and the score that compression must keep.

Every module here offers `load` (the model in fp32, in evaluation mode; where it has no published
checkpoint, `load(weights)` of a file of trained weights) and `evaluate(model, split)`, whose scores
`benchmarks.methods.TASKS` describes. What trains is in `benchmarks.measure`, since peers import
these modules where there is no dither. The data lie in the folder that the environment variable
``DITHER_DATA`` names.
"""

import os
from pathlib import Path
from typing import Literal

__all__ = ["Split", "data_path", "unseen"]

Split = Literal["dev", "test"]
"""Decide settings on ``"dev"``; report ``"test"``."""


def data_path(relative: str) -> Path:
    """Find one file of the benchmark data.

    Args:
        relative: where the file lies inside the data folder, such as ``"stsb/sts-dev.csv"``.

    Returns:
        The path of the file, which exists.

    Raises:
        FileNotFoundError: if ``DITHER_DATA`` is not set, or the file is not there.
    """
    folder = os.environ.get("DITHER_DATA")
    if not folder:
        raise FileNotFoundError(
            f"the benchmark needs {relative!r}, but the environment variable DITHER_DATA is not "
            "set: let it name the folder with the benchmark data (cifar10/, stsb/, ...)"
        )
    path = Path(folder) / relative
    if not path.is_file():
        raise FileNotFoundError(
            f"DITHER_DATA={folder!r} holds no file {relative!r}: let it name the folder with the "
            "benchmark data (cifar10/, stsb/, ...)"
        )
    return path


def unseen(seed: int) -> int:
    """The seed of batches on which training goes on.

    Other than those of ``benchmarks.ordering``, with which the model was trained: what is replayed
    teaches nothing, and harms.
    """
    return 1000 * seed + 500
