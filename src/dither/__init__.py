"""Name the bytes, keep the model: compress neural networks to a byte budget.

This module has what a newcomer needs and what plans use; everything else is in its own module:
``dither.train`` (penalties, schedules, distillation), ``dither.rewrite``, ``dither.calibrate``,
``dither.search``, ``dither.recipes`` and so on.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dither.activations import Activation, Gradient
    from dither.archive import Archive, load, load_into, verify
    from dither.core import ArchiveError, BudgetError, CheckpointError, DitherError, SpecError
    from dither.data import Data
    from dither.encoders import (
        GPTQ,
        AdaRound,
        KMeans,
        Nearest,
        Ranges,
        RateDistortion,
        Rotated,
        SequentialMSE,
        SparseFactors,
        Viterbi,
    )
    from dither.formats import Affine, Codebook, Factors, Mixed, Product, Raw, Trellis
    from dither.report import diagnose
    from dither.search import compress, compress_to, plan, tune
    from dither.train import (
        APQN,
        LSQ,
        MQAT,
        BayesianBits,
        Budget,
        DeadZone,
        DiffQ,
        Fine,
        LearnedCodebook,
        LearnedFactors,
        Plan,
        ProductCodes,
        Pruned,
        QuantNoise,
        RotatedLSQ,
        Run,
        StraightThrough,
        attach,
    )

    open = Archive.open

__version__ = "0.2.0"

__all__ = [  # noqa: RUF022 - by task
    # Compress, bring back, look inside.
    "compress",
    "compress_to",
    "tune",
    "plan",
    "Data",
    "load",
    "load_into",
    "open",
    "verify",
    "diagnose",
    "Archive",
    # Train to a budget.
    "attach",
    "Plan",
    "Budget",
    "Run",
    # What goes wrong.
    "DitherError",
    "ArchiveError",
    "BudgetError",
    "CheckpointError",
    "SpecError",
    # A plan names formats,
    "Raw",
    "Affine",
    "Codebook",
    "Product",
    "Mixed",
    "Trellis",
    "Factors",
    # encoders that choose their codes,
    "AdaRound",
    "GPTQ",
    "KMeans",
    "Nearest",
    "Ranges",
    "RateDistortion",
    "Rotated",
    "SequentialMSE",
    "SparseFactors",
    "Viterbi",
    # methods of training,
    "APQN",
    "BayesianBits",
    "DeadZone",
    "DiffQ",
    "Fine",
    "LSQ",
    "LearnedCodebook",
    "LearnedFactors",
    "MQAT",
    "ProductCodes",
    "Pruned",
    "QuantNoise",
    "RotatedLSQ",
    "StraightThrough",
    # and grids for activations and gradients.
    "Activation",
    "Gradient",
]

_NAMES = {
    "activations": "Activation Gradient",
    "archive": "Archive load load_into verify",
    "core": "ArchiveError BudgetError CheckpointError DitherError SpecError",
    "data": "Data",
    "encoders": (
        "AdaRound GPTQ KMeans Nearest Ranges RateDistortion Rotated SequentialMSE SparseFactors "
        "Viterbi"
    ),
    "formats": "Affine Codebook Factors Mixed Product Raw Trellis",
    "report": "diagnose",
    "search": "compress compress_to plan tune",
    "train": (
        "APQN BayesianBits Budget DeadZone DiffQ Fine LSQ LearnedCodebook LearnedFactors MQAT Plan "
        "ProductCodes Pruned QuantNoise RotatedLSQ Run StraightThrough attach"
    ),
}
_ROOM = {name: room for room, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import a public name at its first use: torch takes seconds, `dither --help` needs none."""
    if name == "open":
        found = import_module("dither.archive").Archive.open
    elif name in _ROOM:
        found = getattr(import_module(f"dither.{_ROOM[name]}"), name)
    else:
        raise AttributeError(
            f"module 'dither' has no attribute {name!r}; most names are in its modules, "
            "for instance dither.train"
        )
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
