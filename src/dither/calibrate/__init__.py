"""What a little data says about each weight: statistics, in one pass or layer by layer."""

from dither.calibrate.collect import Loss, collect
from dither.calibrate.data import Call, call, some_batches
from dither.calibrate.inputs import input_vectors
from dither.calibrate.layerwise import Sequence, Sequenced, in_sequence
from dither.calibrate.moments import MOST_INPUTS, Moments
from dither.model import evaluating

__all__ = [
    "MOST_INPUTS",
    "Call",
    "Loss",
    "Moments",
    "Sequence",
    "Sequenced",
    "call",
    "collect",
    "evaluating",
    "in_sequence",
    "input_vectors",
    "some_batches",
]
