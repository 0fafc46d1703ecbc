"""Spend a budget in bytes where the model needs it."""

from dither.search.budget import LEAST_SHARE, SLACK_NBYTES
from dither.search.calibrated import Samples, calibrated, divergence, squared
from dither.search.compress import compress
from dither.search.options import Weighted
from dither.search.sensitivity import Sensitivity, data_free, token_counts
from dither.search.size import parse_size
from dither.search.trials import Trial

__all__ = [
    "LEAST_SHARE",
    "SLACK_NBYTES",
    "Samples",
    "Sensitivity",
    "Trial",
    "Weighted",
    "calibrated",
    "compress",
    "data_free",
    "divergence",
    "parse_size",
    "squared",
    "token_counts",
]
