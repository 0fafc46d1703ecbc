"""The pipelines of the white paper and of AIMET, each step reported.

Nagel et al. 2021, "A White Paper on Neural Network Quantization", arXiv 2106.08295, figures 8
(after training) and 10 (aware); Siddegowda et al. 2022, arXiv 2201.08442 (AIMET), whose AutoQuant
is :func:`auto_quant`. MobileNetV2 (71.72 %), W8A8, scales per tensor: 70.99 % after training, 71.76
% trained.

The order is fixed: batch norms are folded, layers equalized, weights put on grids, and activations
last. Each step can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dither.activations import Activation
from dither.core import SpecError
from dither.data import Data
from dither.encoders import AdaRound, Ranges
from dither.formats import Affine
from dither.model import duplicate
from dither.recipes.model_layers import Layer, plan_of
from dither.recipes.pipeline_steps import Pipeline, Quantized, Step, ranges_by_norms
from dither.recipes.recipe import Recipe
from dither.train.lsq import LSQ

__all__ = [
    "ROUNDINGS",
    "Attempt",
    "Quantized",
    "Step",
    "auto_quant",
    "ptq",
    "qat",
    "ranges_by_norms",
]

ROUNDINGS = ("adaround", "correct biases", "correct biases by norms", "nearest")
"""AdaRound where there is data, or bias correction; both together would correct twice."""

Score = Callable[[nn.Module], float]


def ptq(
    model: nn.Module,
    data: Data | Iterable[Any],
    *,
    weights: int = 8,
    activations: int | Activation | None = 8,
    axis: int | None = 0,
    rounding: str = "adaround",
    equalized: bool | None = None,
    iterations: int = 10_000,
) -> Quantized:
    """Quantize after training (figure 8 of the white paper).

    Batch norms are folded; layers equalized and high biases absorbed; weights get symmetric grids
    of the least squared error, with AdaRound in the order of use, or nearest codes whose biases are
    corrected, from data or from batch norms; inputs of layers get grids of the least squared error.

    Args:
        model: is left as it was.
        data: 500 to 1,000 samples without labels in the paper, as a loader or
            :class:`~dither.Data`; kept in memory.
        weights: bits of weights.
        activations: bits of what goes into layers, or a spec of your own, such as ``Activation(8,
            ranges="norms")``: see :func:`ranges_by_norms`, and the least squared error where norms
            say nothing. None leaves them.
        axis: 0 for a scale for each output channel, None for one of each tensor.
        rounding: one of :data:`ROUNDINGS`.
        equalized: whether to equalize. By default where scales are per tensor or a kernel is
            depthwise, if rounded weights then change the output less.
        iterations: of AdaRound, for each layer.

    Raises:
        SpecError: settings that make no sense, or an empty loader.
    """
    if rounding not in ROUNDINGS:
        raise SpecError(f"roundings are {', '.join(ROUNDINGS)}, not {rounding!r}")
    work = Pipeline(model, data, Affine(weights, axis=axis))
    work.fold()
    work.equalize(equalized)
    if rounding == "adaround":
        work.round(AdaRound(work.format, iterations=iterations))
    else:
        work.nearest()
        work.correct(rounding)
    if isinstance(activations, Activation):
        work.activate(activations)
    elif activations is not None:
        work.activate(Activation(activations, ranges="mse"))
    return work.found


@dataclass(frozen=True)
class Attempt:
    """One try of :func:`auto_quant`.

    Attributes:
        name: what was done.
        score: of the quantized model.
        found: the model.
    """

    name: str
    score: float
    found: Quantized


def auto_quant(
    model: nn.Module,
    data: Data | Iterable[Any],
    evaluate: Score,
    allowed_drop: float,
    *,
    weights: int = 8,
    activations: int | None = 8,
    axis: int | None = 0,
    iterations: int = 10_000,
) -> list[Attempt]:
    """Fold, then equalize, then AdaRound, until the score falls by no more than allowed (AIMET).

    Args:
        model: is left as it was.
        data: samples without labels.
        evaluate: model to score, more is better.
        allowed_drop: from the score of the original.
        weights: bits.
        activations: bits, or None.
        axis: of the weights' scales.
        iterations: of AdaRound.

    Returns:
        All attempts, the first being the original; the last one met the target, or it is
        ``max(attempts[1:], key=lambda attempt: attempt.score)`` that comes nearest to it.
    """
    base = duplicate(model)
    attempts = [Attempt("original", evaluate(base), Quantized(base))]
    ways = (("folded", "nearest", False), ("equalized", "nearest", True))
    for name, rounding, equalized in (*ways, ("AdaRound", "adaround", None)):
        found = ptq(
            model,
            data,
            weights=weights,
            activations=activations,
            axis=axis,
            rounding=rounding,
            equalized=equalized,
            iterations=iterations,
        )
        attempts.append(Attempt(name, evaluate(found.model), found))
        if attempts[-1].score >= attempts[0].score - allowed_drop:
            break
    return attempts


def qat(
    model: nn.Module,
    data: Data | Iterable[Any],
    *,
    weights: int = 8,
    activations: int | None = 8,
    axis: int | None = 0,
    folded: bool | None = None,
    lr: float = 1e-3,
) -> tuple[Quantized, Recipe]:
    """Prepare for training on grids (figure 10 of the white paper).

    With a scale for each tensor batch norms are folded, layers equalized, and ranges begin at the
    least squared error. With one for each channel batch norms stay by default, their factors are in
    what the channels' scales learn, and ranges of weights begin at LSQ's own rule. All ranges are
    learned (section 4.2).

    Args:
        model: is left as it was.
        data: samples for the first ranges.
        weights: bits.
        activations: bits of what goes into layers, or None.
        axis: 0 or None, see :func:`ptq`.
        folded: whether batch norms are folded before.
        lr: learning rate of the logarithms of scales, for Adam.

    Returns:
        The prepared copy, and the recipe to attach to it: ``recipe.attach(found.model,
        optimizer=...)``.
    """
    work = Pipeline(model, data, Affine(weights, axis=axis))
    if folded if folded is not None else axis is None:
        work.fold()
        work.equalize(wanted=axis is None)
    if activations is not None:
        work.activate(Activation(activations, ranges="mse", training="learned", lr=lr))

    def choose(layer: Layer) -> LSQ:
        step = None
        if axis is None and bool(layer.weight.any()):
            step = float(Ranges(work.format).params(layer.weight.detach())["scale"])
        return LSQ(weights, axis=axis, step=step, lr=lr)

    return work.found, Recipe(plan_of(work.found.model, choose))
