"""Published systems, each a short composition of dither's parts with its paper's settings.

Every module has ``plan``, which says what is done to which weight, and ``attach``, which adds the
paper's penalties and schedules::

    from dither.recipes import diffq

    run = diffq.attach(model, penalty=5.0, optimizer=optimizer)

What a recipe leaves out (learning rates, epochs, data) its paper's tables and ``examples/`` tell.
Each file is meant to be read, copied and changed.
"""

from dither.recipes import (
    bayesian_bits,
    differentiable_quantization,
    diffq,
    ipq,
    oscillations,
    quant_noise,
    quantized_distillation,
)

__all__ = [
    "bayesian_bits",
    "differentiable_quantization",
    "diffq",
    "ipq",
    "oscillations",
    "quant_noise",
    "quantized_distillation",
]
