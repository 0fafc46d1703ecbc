"""Train with quantization noise, to a budget."""

from dither.train.attach import attach
from dither.train.lsq import LSQ
from dither.train.noise import Noise
from dither.train.penalties import Penalty, Size
from dither.train.plan import Plan
from dither.train.run import Run
from dither.train.schedules import Ramp, Schedule
from dither.train.spec import Method
from dither.train.surrogate import Surrogate, straight_through

__all__ = [
    "LSQ",
    "Method",
    "Noise",
    "Penalty",
    "Plan",
    "Ramp",
    "Run",
    "Schedule",
    "Size",
    "Surrogate",
    "attach",
    "straight_through",
]
