"""The pipelines of the white paper and of AIMET, each step reported.

Nagel et al. 2021, "A White Paper on Neural Network Quantization", arXiv 2106.08295, figures 8
(after training) and 10 (aware); Siddegowda et al. 2022, arXiv 2201.08442 (AIMET), whose AutoQuant
is :func:`auto_quant`. MobileNetV2 (71.72 %), W8A8, scales per tensor: 70.99 % after training, 71.76
% trained.

The order is fixed: batch norms are folded, layers equalized, weights put on grids, and activations
last. Each step can be left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dither.activations import Activation, Encodings, apply, inputs_of_layers, observe
from dither.archive import Archive, pack
from dither.calibrate import in_sequence
from dither.core import Encoded, Encoder, SpecError
from dither.data import Data
from dither.encoders import AdaRound, Ranges
from dither.formats import Affine, Raw
from dither.model import collect, duplicate, evaluating
from dither.recipes.model_layers import Layer, layers, plan_of
from dither.recipes.recipe import Recipe
from dither.rewrite import (
    Channels,
    absorb_biases,
    chains,
    correct_biases,
    equalize,
    fold_batch_norm,
    free_pairs,
    replace_relu6,
)
from dither.train.lsq import LSQ

ROUNDINGS = ("adaround", "correct biases", "nearest")
"""AdaRound where there is data, or bias correction; both together would correct twice."""

Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Step:
    """One step of a pipeline.

    Attributes:
        name: of the step.
        said: what it did, or why it was left out.
        distance: of outputs from the original model's, mean of the batches.
        seconds: it took.
    """

    name: str
    said: str
    distance: float
    seconds: float


@dataclass
class Quantized:
    """A model after a pipeline.

    Attributes:
        model: a changed copy, which computes with the values on their grids.
        steps: what was done to it, in order.
        encoded: weights by name.
        sites: grids of activations.
    """

    model: nn.Module
    steps: list[Step] = field(default_factory=list)
    encoded: dict[str, Encoded] = field(default_factory=dict)
    sites: Encodings = field(default_factory=lambda: Encodings({}))

    def archive(self, metadata: Mapping[str, Any] | None = None) -> Archive:
        """A file that is this model; it loads into one of this structure, with norms folded."""
        tensors = collect(self.model)
        found = {
            name: self.encoded[name] if name in self.encoded else Raw().encode(value)
            for name, value in tensors.values.items()
        }
        return pack(found, tensors.aliases, metadata or {}, self.sites.to_json())

    def __str__(self) -> str:
        """A line for each step."""
        rows = [f"{s.name:22} {s.distance:<10.4g} {s.seconds:6.1f} s  {s.said}" for s in self.steps]
        return "\n".join([f"{'step':22} {'distance':10} {'time':>8}", *rows])


def ptq(
    model: nn.Module,
    data: Data | Iterable[Any],
    *,
    weights: int = 8,
    activations: int | None = 8,
    axis: int | None = 0,
    rounding: str = "adaround",
    equalized: bool | None = None,
    iterations: int = 10_000,
) -> Quantized:
    """Quantize after training (figure 8 of the white paper).

    Batch norms are folded; layers equalized and high biases absorbed; weights get symmetric grids
    of the least squared error, with AdaRound in the order of use, or nearest codes whose biases are
    corrected; inputs of layers get grids of the least squared error.

    Args:
        model: is left as it was.
        data: 500 to 1,000 samples without labels in the paper, as a loader or
            :class:`~dither.Data`; kept in memory.
        weights: bits of weights.
        activations: bits of what goes into layers; None leaves them.
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
    work = _Work(model, data, Affine(weights, axis=axis))
    work.fold()
    work.equalize(equalized)
    if rounding == "adaround":
        work.round(AdaRound(work.format, iterations=iterations))
    else:
        work.nearest()
        work.correct(wanted=rounding == "correct biases")
    if activations is not None:
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
    work = _Work(model, data, Affine(weights, axis=axis))
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


class _Work:
    """A model under way."""

    def __init__(self, model: nn.Module, data: Data | Iterable[Any], form: Affine) -> None:
        self.data, self.format = Data.of(data).held(), form
        self.found = Quantized(duplicate(model).eval())
        with evaluating(model), torch.no_grad():
            self._wanted = [self.data.output(model, batch) for batch in self.data]
        self._channels: dict[str, Channels] = {}
        self._before: dict[str, Tensor] = {}
        self._began = time.monotonic()

    def fold(self) -> None:
        """Batch norms into the layers before them."""
        try:
            self._channels = fold_batch_norm(self.found.model)
        except SpecError as error:
            self._note("fold batch norms", f"left out: {error}")
        else:
            self._note("fold batch norms", f"{len(self._channels)} layers")

    def equalize(self, wanted: bool | None) -> None:  # noqa: FBT001 - three-valued
        """Like ranges on both sides of channels, and high biases absorbed."""
        name = "equalize"
        if wanted is False or (wanted is None and not self._may_help()):
            self._note(name, "left out")
            return
        changed = duplicate(self.found.model)
        try:
            swapped = replace_relu6(changed)
            pairs = free_pairs(changed, chains(changed), say=False)
            factors = equalize(changed, pairs)
            channels = {
                n: c.scaled(factors[n]) if n in factors else c for n, c in self._channels.items()
            }
            absorbed = absorb_biases(changed, channels, pairs)
        except SpecError as error:
            self._note(name, f"left out: {error}")
            return
        said = f"{len(factors)} pairs, {len(swapped)} ReLU6 to ReLU, {len(absorbed)} absorbed"
        if wanted is None and self._rounded(changed) >= self._rounded(self.found.model):
            self._note(name, f"left out, since it does not help: {said}")
            return
        self.found.model, self._channels = changed, channels
        self._note(name, said)

    def nearest(self) -> None:
        """Nearest codes, in ranges of the least squared error."""
        encoder = Ranges(self.format)
        self._place({n: encoder.encode(w.detach()) for n, w in self._weights().items()})
        self._note("weights, nearest", f"{len(self.found.encoded)} tensors, {self.format!r}")

    def round(self, encoder: AdaRound) -> None:
        """AdaRound in the order of use; what no sample reaches gets nearest codes."""
        weights = self._weights()
        chosen: dict[str, Encoder] = dict.fromkeys(weights, encoder)
        made = in_sequence(self.found.model, self.data, chosen)
        rest = {n: Ranges(self.format).encode(w.detach()) for n, w in weights.items()}
        self._place(rest | made)
        self._note("weights, AdaRound", f"{len(made)} of {len(rest)} tensors, {self.format!r}")

    def correct(self, *, wanted: bool) -> None:
        """Mean outputs of layers as they were, by biases."""
        if not wanted:
            return
        original = duplicate(self.found.model)
        with torch.no_grad():
            for name, weight in self._before.items():
                original.get_parameter(name).copy_(weight)
        shifts = correct_biases(self.found.model, original, self.data)
        self._note("correct biases", f"{len(shifts)} layers")

    def activate(self, spec: Activation) -> None:
        """Grids for what goes into layers."""
        model = self.found.model
        plan = dict.fromkeys(inputs_of_layers(model, self.data), spec)
        self.found.sites = observe(model, plan, self.data)
        apply(model, self.found.sites)
        self._note("activations", f"{len(plan)} sites, {spec!r}")

    def _may_help(self) -> bool:
        modules = self.found.model.modules()
        return self.format.axis is None or any(
            isinstance(m, _ConvNd) and m.groups > 1 for m in modules
        )

    def _weights(self) -> dict[str, nn.Parameter]:
        model = self.found.model
        return {layer.name: model.get_parameter(layer.name) for layer in layers(model)}

    def _place(self, encoded: Mapping[str, Encoded]) -> None:
        weights = self._weights()
        self._before = {name: weight.detach().clone() for name, weight in weights.items()}
        self.found.encoded = dict(encoded)
        with torch.no_grad():
            for name, value in encoded.items():
                weights[name].copy_(value.decode())

    def _rounded(self, model: nn.Module) -> float:
        """The distance of outputs with nearest codes."""
        changed = duplicate(model)
        with torch.no_grad():
            for layer in layers(changed):
                weight = changed.get_parameter(layer.name)
                weight.copy_(Ranges(self.format).encode(weight.detach()).decode())
        return self._distance(changed)

    def _distance(self, model: nn.Module) -> float:
        with evaluating(model), torch.no_grad():
            pairs = zip(self.data, self._wanted, strict=True)
            made = [float(self.data.distance(self.data.output(model, b), w)) for b, w in pairs]
        return sum(made) / len(made)

    def _note(self, name: str, said: str) -> None:
        distance, now = self._distance(self.found.model), time.monotonic()
        self.found.steps.append(Step(name, said, distance, now - self._began))
        self._began = now
