"""Published systems, each a short composition of dither's parts with its paper's settings.

Every module has ``recipe``, which says what is done to which weight, with the paper's penalties and
schedules; a :class:`Recipe` is data until it is attached::

    from dither.recipes import diffq

    run = diffq.recipe(model, penalty=5.0).attach(model, optimizer=optimizer)

A recipe that trains nothing, as ``ajpq``, gives a file at once.

What a recipe leaves out (learning rates, epochs, data) its paper's tables and ``examples/`` tell.
Each file is meant to be read, copied and changed.
"""

from dither.recipes import (
    ajpq,
    bayesian_bits,
    cyclical_pruning,
    differentiable_quantization,
    diffq,
    ipq,
    oscillations,
    pixel_flow,
    pqk,
    quant_noise,
    quantized_distillation,
    robust_fedavg,
    white_paper,
)
from dither.recipes.recipe import Recipe

__all__ = [
    "Recipe",
    "ajpq",
    "bayesian_bits",
    "cyclical_pruning",
    "differentiable_quantization",
    "diffq",
    "ipq",
    "oscillations",
    "pixel_flow",
    "pqk",
    "quant_noise",
    "quantized_distillation",
    "robust_fedavg",
    "white_paper",
]
