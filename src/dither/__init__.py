"""Name the bytes, keep the model: compress neural networks to a byte budget."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dither.activations import Activation, Gradient
    from dither.archive import Archive, Loaded, load, load_into, verify
    from dither.calibrate import collect, in_sequence
    from dither.core import (
        ArchiveError,
        BudgetError,
        CheckpointError,
        DitherError,
        Encoded,
        Encoder,
        Format,
        SpecError,
        Stats,
    )
    from dither.encoders import GPTQ, AdaRound, KMeans, SequentialMSE
    from dither.formats import Affine, Codebook, Mixed, Product, Raw
    from dither.report import Diagnosis, diagnose
    from dither.rewrite import absorb_biases, correct_biases, equalize, fold_batch_norm
    from dither.search import Samples, calibrated, compress
    from dither.train import (
        LSQ,
        BayesianBits,
        Budget,
        Dampening,
        DiffQ,
        DiffQSize,
        FreezeOscillations,
        GatePenalty,
        IterativePQ,
        Kurtosis,
        LayerDrop,
        LearnedCodebook,
        Noise,
        Plan,
        ProductCodes,
        QuantNoise,
        Ramp,
        Run,
        Size,
        StraightThrough,
        Teacher,
        Vary,
        WarmUp,
        attach,
        soft_targets,
    )

    open = Archive.open

__version__ = "0.1.0"

__all__ = [
    "GPTQ",
    "LSQ",
    "Activation",
    "AdaRound",
    "Affine",
    "Archive",
    "ArchiveError",
    "BayesianBits",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "Codebook",
    "Dampening",
    "Diagnosis",
    "DiffQ",
    "DiffQSize",
    "DitherError",
    "Encoded",
    "Encoder",
    "Format",
    "FreezeOscillations",
    "GatePenalty",
    "Gradient",
    "IterativePQ",
    "KMeans",
    "Kurtosis",
    "LayerDrop",
    "LearnedCodebook",
    "Loaded",
    "Mixed",
    "Noise",
    "Plan",
    "Product",
    "ProductCodes",
    "QuantNoise",
    "Ramp",
    "Raw",
    "Run",
    "Samples",
    "SequentialMSE",
    "Size",
    "SpecError",
    "Stats",
    "StraightThrough",
    "Teacher",
    "Vary",
    "WarmUp",
    "absorb_biases",
    "attach",
    "calibrated",
    "collect",
    "compress",
    "correct_biases",
    "diagnose",
    "equalize",
    "fold_batch_norm",
    "in_sequence",
    "load",
    "load_into",
    "open",
    "soft_targets",
    "verify",
]

_ROOMS = (
    "core",
    "formats",
    "encoders",
    "calibrate",
    "rewrite",
    "archive",
    "search",
    "train",
    "report",
    "activations",  # last, because it has a module called `attach`
)


def __getattr__(name: str) -> object:
    """Import a public name at its first use: torch takes seconds, `dither --help` needs none."""
    if name == "open":
        return import_module("dither.archive").Archive.open
    for room in _ROOMS if name in __all__ else ():
        module = import_module(f"dither.{room}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'dither' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
