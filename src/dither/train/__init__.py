"""Train with quantization noise, to a budget."""

from dither.train.any_width import APQN, MQAT
from dither.train.attach import attach
from dither.train.attached import Attached
from dither.train.bayesian_bits import BayesianBits, GatePenalty
from dither.train.controller import Budget
from dither.train.dead_zone import DeadZone
from dither.train.default_plan import default_plan
from dither.train.diffq import DiffQ
from dither.train.diffq_size import DiffQSize, model_size_mib, true_model_size_mib
from dither.train.distill import Teacher, embeddings, hidden_states, similarities, soft_targets
from dither.train.fine_grid import Fine
from dither.train.finish import reestimate_batch_norm
from dither.train.ipq import IterativePQ, ProductCodes, published_nbytes
from dither.train.learned_codebook import LearnedCodebook, gradient_norms, redistribute
from dither.train.learned_factors import LearnedFactors
from dither.train.lsq import LSQ
from dither.train.method import Method
from dither.train.noise import Noise
from dither.train.oscillations import (
    CountOscillations,
    Dampening,
    FreezeOscillations,
    frozen_share,
    oscillating,
)
from dither.train.own_teacher import FixMasks, OwnTeacher
from dither.train.penalties import Kurtosis, Penalty, Size
from dither.train.plan import Plan
from dither.train.pruned import Pruned, Together
from dither.train.quant_noise import QuantNoise
from dither.train.ramp import Ramp
from dither.train.rotated_lsq import RotatedLSQ
from dither.train.run import Run
from dither.train.schedules import Schedule, Vary, WarmUp
from dither.train.sparsity import Cyclical, Gradual, Iterative, OneShot, Sparsity
from dither.train.straight_through import StraightThrough
from dither.train.surrogate import Surrogate, straight_through
from dither.train.whole_layers import LayerDrop, drop_layers, share_layers

__all__ = [
    "APQN",
    "LSQ",
    "MQAT",
    "Attached",
    "BayesianBits",
    "Budget",
    "CountOscillations",
    "Cyclical",
    "Dampening",
    "DeadZone",
    "DiffQ",
    "DiffQSize",
    "Fine",
    "FixMasks",
    "FreezeOscillations",
    "GatePenalty",
    "Gradual",
    "Iterative",
    "IterativePQ",
    "Kurtosis",
    "LayerDrop",
    "LearnedCodebook",
    "LearnedFactors",
    "Method",
    "Noise",
    "OneShot",
    "OwnTeacher",
    "Penalty",
    "Plan",
    "ProductCodes",
    "Pruned",
    "QuantNoise",
    "Ramp",
    "RotatedLSQ",
    "Run",
    "Schedule",
    "Size",
    "Sparsity",
    "StraightThrough",
    "Surrogate",
    "Teacher",
    "Together",
    "Vary",
    "WarmUp",
    "attach",
    "default_plan",
    "drop_layers",
    "embeddings",
    "frozen_share",
    "gradient_norms",
    "hidden_states",
    "model_size_mib",
    "oscillating",
    "published_nbytes",
    "redistribute",
    "reestimate_batch_norm",
    "share_layers",
    "similarities",
    "soft_targets",
    "straight_through",
    "true_model_size_mib",
]
