"""A model is measured against what it was, with some of its tensors quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dither.core import SpecError
from dither.data import Data
from dither.model import evaluating
from dither.report.diagnosis import Overall
from dither.report.signal_noise import Noise
from dither.report.targets import Targets, sites_quantized, weights_quantized

Evaluate = Callable[[nn.Module], float]
"""A model to its score."""


class Bench:
    """Measures a model against what it was when this was made."""

    def __init__(self, model: nn.Module, samples: Data, evaluate: Evaluate | None) -> None:
        self.model, self.samples, self._evaluate = model, samples, evaluate
        self._originals = [self._output(model, batch) for batch in samples]
        self.count, self.scores = len(self._originals), evaluate is not None
        self.name = getattr(samples.distance, "__name__", type(samples.distance).__name__)

    def _output(self, model: nn.Module, batch: object) -> object:
        """What counts of the model's output, with what noise it may draw: that is to be seen."""
        return self.samples.counted(self.samples.forward(model, batch), batch)

    def original(self) -> Overall:
        """The original against itself, and its score.

        Raises:
            SpecError: one of them is not finite.
        """
        distance = self.samples.distance
        costs = [float(distance(output, output)) for output in self._originals]
        again = self._output(self.model, next(iter(self.samples)))
        score = self.score()
        if not all(map(math.isfinite, costs)):
            raise SpecError(
                "the original model's output is not finite, or the distance from itself is not: "
                f"{costs[:4]}; fix the model, the data or the distance first"
            )
        if score is not None and not math.isfinite(score):
            raise SpecError(f"the original model's score is {score}; fix `evaluate` first")
        return Overall("original", float(distance(again, self._originals[0])), score)

    def distance(self, model: nn.Module | None = None) -> float:
        """Of the model as it now is, or of another one, mean of the batches."""
        used = self.model if model is None else model
        costs = [
            self.samples.distance(self._output(used, batch), original)
            for batch, original in zip(self.samples, self._originals, strict=True)
        ]
        return float(torch.stack(costs).double().mean())

    def score(self, model: nn.Module | None = None) -> float | None:
        """What ``evaluate`` says of the model as it now is, or of another one."""
        if self._evaluate is None:
            return None
        used = self.model if model is None else model
        with evaluating(used):  # again, because it may change modes
            return float(self._evaluate(used))


@contextmanager
def quantized(
    model: nn.Module,
    targets: Targets,
    weights: Sequence[str],
    sites: Sequence[str],
    noises: Mapping[str, Noise],
) -> Iterator[None]:
    """These weights and sites are quantized for a while; ``noises`` take note of what changes."""
    with (
        weights_quantized(targets, weights, noises),
        sites_quantized(model, targets, sites, noises),
    ):
        yield
