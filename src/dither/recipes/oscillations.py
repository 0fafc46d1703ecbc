"""Overcoming oscillations (Nagel, Fournarakis et al., ICML 2022, arXiv 2203.11086).

Learned steps at 3 or 4 bits whose oscillating weights are frozen or dampened. MobileNetV2, W4A4:
LSQ 69.5 %, dampened 70.5 %, frozen 70.6 %; W3A3: 65.3, 67.8 and 67.6 %.
"""

from __future__ import annotations

from torch import nn

from dither.core import SpecError
from dither.encoders import Ranges
from dither.formats import Affine
from dither.recipes.model_layers import Layer, layers, plan_of
from dither.recipes.recipe import Recipe
from dither.train.lsq import LSQ
from dither.train.oscillations import (
    MOMENTUM,
    CountOscillations,
    Dampening,
    FreezeOscillations,
)
from dither.train.ramp import Ramp

REMEDIES = ("freeze", "dampen", "none")

THRESHOLDS = {3: 0.011, 4: 0.01}
"""Where the freezing threshold of MobileNetV2 ends, by bits; EfficientNet-lite: 0.005, 0.015."""

WEIGHT_DECAY = {3: 2.5e-5, 4: 5e-5}
"""Of the weights with freezing; with dampening 2.5e-5 at both widths."""

_END_BITS = 8


def recipe(
    model: nn.Module,
    bits: int = 4,
    remedy: str = "freeze",
    *,
    steps: int,
    momentum: float = MOMENTUM,
    lr: float = 1e-3,
) -> Recipe:
    """Learned steps per tensor from the least squared error; first and last layer at 8 bits.

    Oscillations are counted in any case. Give ``run.finish`` 50 training batches: batch norm's
    statistics are then re-estimated, as the paper does before evaluation.

    Args:
        model: any module.
        bits: of the other layers, 3 or 4 in the paper.
        remedy: ``"freeze"``: the threshold falls from 0.1 to 0.011 (3 bits) or 0.01 from a quarter
            of training on; ``"dampen"``: the penalty's factor rises to 0.1; ``"none"``.
        steps: optimizer steps in all.
        momentum: of the counts.
        lr: learning rate of the logarithms of the steps, for Adam. The paper's is 1e-5 of the steps
            themselves, which Adam moves by about as much in each iteration: the same for a step of
            0.01, a fifth of it for one of 0.05.

    Raises:
        SpecError: an unknown remedy.
    """
    if remedy not in REMEDIES:
        raise SpecError(f"remedies are {', '.join(REMEDIES)}, not {remedy!r}")
    ends = {layers(model)[0].name, layers(model)[-1].name}

    def choose(layer: Layer) -> LSQ:
        width = _END_BITS if layer.name in ends else bits
        weight = layer.weight.detach()
        step = float(Ranges(Affine(width)).params(weight)["scale"]) if bool(weight.any()) else None
        return LSQ(width, step=step, lr=lr)

    threshold = Ramp(0.1, THRESHOLDS.get(bits, 0.01), begin=0.25, shape="cosine")
    freeze = FreezeOscillations(threshold, momentum, max_bits=bits)
    return Recipe(
        plan_of(model, choose),
        (Dampening(),) if remedy == "dampen" else (),
        (freeze if remedy == "freeze" else CountOscillations(momentum),),
        steps,
    )
