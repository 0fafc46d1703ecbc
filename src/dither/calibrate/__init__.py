"""What a little data says about each weight: statistics, in one pass or layer by layer."""

from dither.calibrate.backward import Loss
from dither.calibrate.collect import collect
from dither.calibrate.inputs import input_vectors
from dither.calibrate.layerwise import Layer, Layerwise, Walk, in_sequence
from dither.calibrate.moments import MOST_INPUTS, Moments
from dither.calibrate.together import collect_together

__all__ = [
    "MOST_INPUTS",
    "Layer",
    "Layerwise",
    "Loss",
    "Moments",
    "Walk",
    "collect",
    "collect_together",
    "in_sequence",
    "input_vectors",
]
