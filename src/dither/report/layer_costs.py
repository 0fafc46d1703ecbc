"""Quantize one tensor at a time and see what that does to the model's output."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dither.activations import placed
from dither.archive import Archive
from dither.core import Format, SpecError
from dither.data import Data
from dither.model import evaluating
from dither.report.diagnosis import Diagnosis, Overall, Row, worst_first
from dither.report.signal_noise import Noise
from dither.report.targets import Targets, sites_quantized, targets_of, weights_quantized
from dither.train.plan import Plan
from dither.train.shadow import is_shadowed

Evaluate = Callable[[nn.Module], float]
"""A model to its score."""

Progress = Callable[[str, float], None]
"""Called with what is measured and the share of everything that is done."""

Quantization = Plan | Mapping[str, Any]
"""Rules by glob, encodings by name, or an archive."""


def diagnose(
    model: nn.Module,
    data: Data | Iterable[Any],
    plan: Quantization | str | os.PathLike[str] | None = None,
    *,
    evaluate: Evaluate | None = None,
    scored: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Which weights and activations lose most when quantized, each alone, worst first.

    The debugging procedure of Nagel et al. 2021 (arXiv 2106.08295): the original must
    evaluate well; then all weights, all activations and both are quantized, which says on which
    side to look; then each weight and each site by itself. Grids of activations are calibrated on
    ``data`` with the original weights. One forward pass over the batches for each row.

    Args:
        model: in floating point; runs in evaluation mode and is left as it was, bit for bit.
        data: a loader of batches without labels, or :class:`~dither.Data`, which says how the
            model is called and what counts as a difference; kept in memory, with the outputs.
        plan: ``glob -> format or encoder`` for weights and ``glob -> Activation`` for sites, as for
            :func:`dither.attach`; or an archive or its path: then each tensor is as that file holds
            it; or encodings by name, as ``in_sequence`` and ``observe`` make them. By default 8
            bits for every parameter of two or more dimensions, a scale for each output, and for
            what goes into each module that holds weights, batch norms excepted.
        evaluate: the score of a model, for the original and the wholes. It may be slow.
        scored: how many of the worst rows are evaluated, too.
        progress: called with what is measured, and the share of all that is done.

    Raises:
        SpecError: a rule that fits nothing, a model that is attached or quantized already, an
            original whose output or score is not finite.
        CheckpointError: the archive is of another model.

    >>> import dither
    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> found = diagnose(model, [torch.randn(32, 8)], {"2.weight": dither.Affine(2, axis=0)})
    >>> [(row.name, row.kind) for row in found.rows]
    [('2.weight', 'weight')]
    """
    if isinstance(plan, str | os.PathLike):
        with Archive.open(plan) as archive:
            return diagnose(
                model, data, archive, evaluate=evaluate, scored=scored, progress=progress
            )
    _require_plain(model)
    samples = Data.of(data).held()
    with evaluating(model), torch.no_grad():
        targets = targets_of(model, plan, samples)
        bench = _Bench(model, samples, evaluate)
        return _measure(bench, targets, scored, progress or _silent)


class _Bench:
    """Measures a model against what it was when this was made."""

    def __init__(self, model: nn.Module, samples: Data, evaluate: Evaluate | None) -> None:
        self.model, self.samples, self._evaluate = model, samples, evaluate
        self._originals = [self._output(batch) for batch in samples]
        self.count, self.scores = len(self._originals), evaluate is not None
        self.name = getattr(samples.distance, "__name__", type(samples.distance).__name__)

    def _output(self, batch: object) -> object:
        """What counts of the model's output, with what noise it may draw: that is to be seen."""
        return self.samples.counted(self.samples.forward(self.model, batch), batch)

    def original(self) -> Overall:
        """The original against itself, and its score.

        Raises:
            SpecError: one of them is not finite.
        """
        distance = self.samples.distance
        costs = [float(distance(output, output)) for output in self._originals]
        again = self._output(next(iter(self.samples)))
        score = self.score()
        if not all(map(math.isfinite, costs)):
            raise SpecError(
                "the original model's output is not finite, or the distance from itself is not: "
                f"{costs[:4]}; mend the model, the data or the distance first"
            )
        if score is not None and not math.isfinite(score):
            raise SpecError(f"the original model's score is {score}; mend `evaluate` first")
        return Overall("original", float(distance(again, self._originals[0])), score)

    def distance(self) -> float:
        """Of the model as it now is, mean of the batches."""
        costs = [
            self.samples.distance(self._output(batch), original)
            for batch, original in zip(self.samples, self._originals, strict=True)
        ]
        return float(torch.stack(costs).double().mean())

    def score(self) -> float | None:
        """What ``evaluate`` says of the model as it now is."""
        if self._evaluate is None:
            return None
        with evaluating(self.model):  # again, because it may change modes
            return float(self._evaluate(self.model))


def _measure(bench: _Bench, targets: Targets, scored: int, progress: Progress) -> Diagnosis:
    weights, sites = list(targets.weights), list(targets.sites)
    wholes: dict[str, tuple[list[str], list[str]]] = {}
    if weights:
        wholes["weights"] = (weights, [])
    if sites:
        wholes["activations"] = ([], sites)
    if weights and sites:
        wholes["both"] = (weights, sites)
    again = scored if bench.scores else 0
    steps = _Steps(progress, 1 + len(wholes) + len(weights) + len(sites) + again)
    steps.begin("original")
    overall = [bench.original()]
    for name, part in wholes.items():
        steps.begin(name)
        with _quantized(bench, targets, *part, {}):
            overall.append(Overall(name, bench.distance(), bench.score()))
    rows = []
    for name in weights:
        steps.begin(name)
        rows.append(_weight(bench, targets, name))
    for site in sites:
        steps.begin(site)
        rows.append(_activation(bench, targets, site))
    ranked = list(worst_first(rows))
    for place, row in enumerate(ranked[:again]):
        steps.begin(row.name)
        part = ([row.name], []) if row.kind == "weight" else ([], [row.name])
        with _quantized(bench, targets, *part, {}):
            ranked[place] = replace(row, score=bench.score())
    return Diagnosis(tuple(ranked), tuple(overall), bench.name, bench.count)


def _weight(bench: _Bench, targets: Targets, name: str) -> Row:
    noise = Noise()
    with _quantized(bench, targets, [name], [], {name: noise}):
        # Equal values give equal outputs: a file holds many tensors as they were.
        cost = bench.distance() if noise.noise else 0.0
    return _row(name, "weight", _described(targets.formats[name]), noise, cost)


def _activation(bench: _Bench, targets: Targets, site: str) -> Row:
    noise = Noise()
    with _quantized(bench, targets, [], [site], {site: noise}):
        cost = bench.distance()
    return _row(site, "activation", repr(targets.sites[site].spec), noise, cost)


def _described(form: Format) -> str:
    """A format and its settings, short; bits always: ``affine(bits=8, axis=0)``."""
    bits = getattr(form, "bits", None)
    settings = ({} if bits is None else {"bits": bits}) | form.to_json()
    return f"{form.name}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _row(name: str, kind: str, spec: str, noise: Noise, cost: float) -> Row:
    return Row(name, kind, spec, noise.count, cost, noise.decibels, noise.low, noise.high)


@contextmanager
def _quantized(
    bench: _Bench,
    targets: Targets,
    weights: list[str],
    sites: list[str],
    noises: Mapping[str, Noise],
) -> Iterator[None]:
    with (
        weights_quantized(targets, weights, noises),
        sites_quantized(bench.model, targets, sites, noises),
    ):
        yield


class _Steps:
    """Reports the share of all steps that is done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def begin(self, name: str) -> None:
        """A step begins."""
        self._progress(name, self._done / self._total)
        self._done += 1


def _require_plain(model: nn.Module) -> None:
    if any(is_shadowed(module) for module in model.modules()):
        raise SpecError(
            "this model is attached, so it is quantized as it evaluates; call run.detach() first, "
            "or diagnose the model with the file that the run saves"
        )
    if placed(model):
        raise SpecError(
            "this model's activations are quantized already; call dither.activations.remove(model)"
        )


def _silent(_name: str, _share: float) -> None:
    pass
