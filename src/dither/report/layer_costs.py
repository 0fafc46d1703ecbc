"""Quantize one tensor at a time and see what that does to the model's output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dither.activations import placed
from dither.archive import Archive
from dither.core import Format, SpecError
from dither.data import Data
from dither.model import evaluating
from dither.report.bench import Bench, Evaluate, quantized
from dither.report.diagnosis import Diagnosis, Overall, Row, worst_first
from dither.report.flow_chart import follow
from dither.report.signal_noise import Noise
from dither.report.targets import Targets, targets_of
from dither.train.plan import Plan
from dither.train.shadow import is_shadowed

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
    allowed: float | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Find which weights and activations lose most when quantized, each alone, worst first.

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
        allowed: what may be lost: a distance, or with ``evaluate`` a fall of the score. Then the
            procedure goes on: remedies are tried, one pass over the batches each, and
            ``next_step`` says what to do.
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
            given = {"scored": scored, "allowed": allowed, "progress": progress}
            return diagnose(model, data, archive, evaluate=evaluate, **given)  # type: ignore[arg-type]
    _require_plain(model)
    samples = Data.of(data).held()
    with evaluating(model), torch.no_grad():
        targets = targets_of(model, plan, samples)
        bench = Bench(model, samples, evaluate)
        found = _measure(bench, targets, scored, progress or _silent)
        return found if allowed is None else follow(bench, targets, found, allowed)


def _measure(bench: Bench, targets: Targets, scored: int, progress: Progress) -> Diagnosis:
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
        with quantized(bench.model, targets, *part, {}):
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
        with quantized(bench.model, targets, *part, {}):
            ranked[place] = replace(row, score=bench.score())
    return Diagnosis(tuple(ranked), tuple(overall), bench.name, bench.count)


def _weight(bench: Bench, targets: Targets, name: str) -> Row:
    noise = Noise()
    with quantized(bench.model, targets, [name], [], {name: noise}):
        # Equal values give equal outputs: a file holds many tensors as they were.
        cost = bench.distance() if noise.noise else 0.0
    return _row(name, "weight", _described(targets.formats[name]), noise, cost)


def _activation(bench: Bench, targets: Targets, site: str) -> Row:
    noise = Noise()
    with quantized(bench.model, targets, [], [site], {site: noise}):
        cost = bench.distance()
    return _row(site, "activation", repr(targets.sites[site].spec), noise, cost)


def _described(form: Format) -> str:
    """A format and its settings, short; bits always: ``affine(bits=8, axis=0)``."""
    bits = getattr(form, "bits", None)
    settings = ({} if bits is None else {"bits": bits}) | form.to_json()
    return f"{form.name}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _row(name: str, kind: str, spec: str, noise: Noise, cost: float) -> Row:
    return Row(name, kind, spec, noise.count, cost, noise.decibels, noise.low, noise.high)


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
