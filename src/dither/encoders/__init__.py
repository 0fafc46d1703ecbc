"""Post-training encoders: a weight, and statistics where there are any, to an Encoded."""

from __future__ import annotations

from dither.encoders.gptq import GPTQ
from dither.encoders.kmeans import KMeans
from dither.encoders.nearest import Nearest
from dither.encoders.ranges import Ranges
from dither.encoders.rdo import RateDistortion

__all__ = ["GPTQ", "KMeans", "Nearest", "Ranges", "RateDistortion"]
