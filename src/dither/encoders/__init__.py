"""Post-training encoders: a weight, and statistics where there are any, to an Encoded."""

from __future__ import annotations

from dither.encoders.adaround import AdaRound
from dither.encoders.gptq import GPTQ
from dither.encoders.kmeans import KMeans
from dither.encoders.nearest import Nearest
from dither.encoders.ranges import Ranges
from dither.encoders.rdo import RateDistortion
from dither.encoders.rotated import Rotated
from dither.encoders.sequential_mse import SequentialMSE
from dither.encoders.sparse_factors import SparseFactors
from dither.encoders.viterbi import Viterbi

__all__ = [
    "GPTQ",
    "AdaRound",
    "KMeans",
    "Nearest",
    "Ranges",
    "RateDistortion",
    "Rotated",
    "SequentialMSE",
    "SparseFactors",
    "Viterbi",
]
