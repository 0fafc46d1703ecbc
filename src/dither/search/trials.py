"""Try what data allows, in order of cost, and keep what is best at the model's output."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from dither.activations import Activation, Encodings, apply, inputs_of_layers, observe
from dither.archive import Archive, CodedTensor, load_into, pack, packed_nbytes
from dither.calibrate import Sequence
from dither.core import BudgetError, SpecError
from dither.model import Tensors, collect, evaluating, weights_of
from dither.rewrite import chains, equalize
from dither.search.budget import BudgetSearch, Progress
from dither.search.calibrated import Samples, calibrated
from dither.search.sensitivity import Sensitivity
from dither.search.sequenced import SequencedSearch

Sites = str | Mapping[str, Any]
"""``"int8"``, or a plan: glob to :class:`~dither.Activation`."""

_SITES_SHARE = 0.03
_SITES_NBYTES = 64


@dataclass(frozen=True)
class Trial:
    """One way that was tried, and what came of it.

    Attributes:
        stage: what was done.
        nbytes: of the file.
        distance: of the model's outputs from the original's, on the data.
        score: by ``evaluate``, if there is one.
        seconds: that it took, evaluation included.
        kept: whether it was the best so far.
    """

    stage: str
    nbytes: int
    distance: float
    score: float | None
    seconds: float
    kept: bool = False

    def __str__(self) -> str:
        """One line for people."""
        score = "" if self.score is None else f"  score {self.score:.4g}"
        kept = "kept" if self.kept else "not kept"
        return (
            f"{self.stage:28} {self.nbytes:>13,} bytes  distance {self.distance:.4g}{score}"
            f"  {self.seconds:.0f} s  {kept}"
        )


@dataclass(frozen=True)
class Job:
    """What is asked for: a budget in bytes, and how to spend it."""

    budget: int
    sensitivity: Sensitivity
    metadata: Mapping[str, Any]
    progress: Progress

    def search(self, tensors: Tensors, sensitivity: Sensitivity) -> BudgetSearch:
        """The search for these tensors.

        Raises:
            SpecError: a tensor is without a sensitivity.
        """
        found = sensitivity(tensors.values)
        if missing := sorted(set(tensors.values) - set(found)):
            raise SpecError(f"the sensitivity gives no value for {missing[:5]}; give one for each")
        weighted = {name: found[name] for name in tensors.values}
        return BudgetSearch(weighted, tensors.aliases, self.metadata, self.progress)


class Bench:
    """A model with data and the outputs that it gives, on which files are tried.

    Args:
        model: is left as it was.
        samples: what it reads.
        evaluate: its score.
    """

    def __init__(
        self, model: object, samples: Samples, evaluate: Callable[[nn.Module], float] | None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SpecError(
                "data runs through a model, and the source is a dict of tensors: give the model"
            )
        self.model = model
        self.held = samples.held()
        self.samples = replace(samples, loader=self.held, batches=None)
        self._evaluate = evaluate
        self.trials: list[Trial] = []
        self.best: Archive | None = None
        with evaluating(model), torch.no_grad():
            self._outputs = [samples.forward(model, batch) for batch in self.held]

    def measure(self, archive: Archive) -> tuple[float, float | None]:
        """Distance and score of a file, its sites included."""
        model = copy.deepcopy(self.model)
        if archive.sites:
            apply(model, Encodings.from_json(archive.sites))
        load_into(model, archive)
        with evaluating(model), torch.no_grad():
            distances = [
                self.samples.distance(self.samples.forward(model, batch), output)
                for batch, output in zip(self.held, self._outputs, strict=True)
            ]
            score = None if self._evaluate is None else float(self._evaluate(model))
        return float(torch.stack([d.detach().double() for d in distances]).mean()), score

    def judge(self, stage: str, archive: Archive, start: float, *, keep: bool = False) -> bool:
        """Note a file, and keep it if it is the best so far, or anyhow; whether it is kept."""
        distance, score = self.measure(archive)
        kept = keep or self._is_best(distance, score)
        seconds = time.monotonic() - start
        self.trials.append(Trial(stage, archive.nbytes, distance, score, seconds, kept))
        if kept:
            self.best = archive
        return kept

    def _is_best(self, distance: float, score: float | None) -> bool:
        before = [trial for trial in self.trials if trial.kept]
        if not before:
            return True
        if score is not None and before[-1].score is not None:
            return score > before[-1].score
        return distance < before[-1].distance


def with_data(bench: Bench, job: Job, sites: Sites | None = None) -> Archive:
    """The best archive of those that data allow; ``trials`` tells what there was."""
    original = bench.model
    room, plans = job.budget, {} if sites is None else plans_of(sites, bench)
    if plans:
        observed = [
            observe(original, plan, bench.held, forward=bench.samples.forward)
            for plan in plans.values()
        ]
        job = replace(job, budget=room - max(map(_nbytes_of, observed)))
    base = _Start(original, job)
    base.try_data_free(bench, "data-free")
    if (equal := _equalized(original)) is not None:
        other = _Start(equal, job)
        base = other if other.try_data_free(bench, "equalized") else base
    base.try_calibrated(bench)
    if bench.best is None:
        raise SpecError("no file could be evaluated; the model's outputs are not finite")
    _add_sites(bench, job, plans, room)
    bench.best.trials = tuple(bench.trials)
    return bench.best


class _Start:
    """A model to begin with: the original, or a rewritten one of the same function."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        self._model, self._job = model, job
        self._tensors: Tensors = collect(model)

    def try_data_free(self, bench: Bench, stage: str) -> bool:
        start = time.monotonic()
        search = self._job.search(self._tensors, self._job.sensitivity)
        return bench.judge(stage, self._pack(search.run(self._job.budget)), start)

    def try_calibrated(self, bench: Bench) -> None:
        start, job = time.monotonic(), self._job
        job.progress("measuring", 0.0)
        sensitivity = calibrated(self._model, bench.samples, prior=job.sensitivity)
        search = job.search(self._tensors, sensitivity)
        bench.judge("calibrated", self._pack(search.run(job.budget)), start)
        start = time.monotonic()
        sequence = Sequence(self._model, bench.held, forward=bench.samples.forward)
        if not sequence.order.names:
            return
        if SequencedSearch(search, sequence, job.budget, job.progress).run(len(bench.held)):
            bench.judge("calibrated, in sequence", self._pack(search.coded), start)

    def _pack(self, coded: Mapping[str, CodedTensor]) -> Archive:
        return pack(coded, self._tensors.aliases, self._job.metadata)


def _equalized(model: nn.Module) -> nn.Module | None:
    """A copy with equalized layers; None where there are none, or they cannot be found."""
    changed = copy.deepcopy(model)
    try:
        pairs = chains(changed)
        if not pairs:
            return None
        equalize(changed, pairs)
    except SpecError:
        return None
    before, after = weights_of(model.state_dict()), weights_of(changed.state_dict())
    same = {name: value.shape for name, value in before.items()}
    return changed if same == {name: value.shape for name, value in after.items()} else None


def plans_of(sites: Sites, bench: Bench) -> dict[str, Mapping[str, Any]]:
    """Plans to try by what they are: one's own, or those that a text such as ``"int8"`` stands for.

    These are static ranges, the extremes and those of least squared error, and a range for each
    token, found as it passes, for what goes into layers other than convolutions: transformers have
    tokens with outliers that widen the range of all (Bondarenko et al. 2021).

    Raises:
        SpecError: the text stands for nothing.
    """
    if not isinstance(sites, str):
        return {"activations": sites}
    match = re.fullmatch(r"int([2-9]|1[0-6])", sites)
    if match is None:
        raise SpecError(
            f'activations={sites!r}: give "int2" to "int16", or a plan such as '
            '{"*@in": Activation(8)}'
        )
    bits, modules = int(match[1]), dict(bench.model.named_modules())
    found = inputs_of_layers(bench.model, bench.held[0], forward=bench.samples.forward)
    convolved = {site for site in found if isinstance(modules[site.removesuffix("@in")], _ConvNd)}
    least = Activation(bits, ranges="mse")
    plans: dict[str, Mapping[str, Any]] = {
        f"activations {sites}": dict.fromkeys(found, Activation(bits)),
        f"activations {sites}, mse": dict.fromkeys(found, least),
    }
    if len(convolved) < len(found):
        token = Activation(bits, per="token")
        by_token = {site: least if site in convolved else token for site in found}
        plans[f"activations {sites}, by token"] = by_token
    return plans


def _nbytes_of(grids: Encodings) -> int:
    """What encodings of sites take in a file, with room for other numbers in them."""
    nbytes = packed_nbytes({}, sites=grids.to_json()) - packed_nbytes({})
    return round(nbytes * (1 + _SITES_SHARE)) + _SITES_NBYTES


def _add_sites(bench: Bench, job: Job, plans: Mapping[str, Mapping[str, Any]], room: int) -> None:
    """The best file with grids of activations, chosen with its weights in place.

    Args:
        bench: has a best file.
        job: for its metadata.
        plans: to be tried.
        room: bytes for file and grids.
    """
    best = bench.best
    if best is None:
        return
    model = copy.deepcopy(bench.model)
    load_into(model, best)
    tensors = {name: best.encoded(name) for name in best.entries}
    first = True
    for stage, plan in plans.items():
        start = time.monotonic()
        found = observe(model, plan, bench.held, forward=bench.samples.forward)
        archive = pack(tensors, best.aliases, job.metadata, found.to_json())
        if archive.nbytes <= room:
            bench.judge(stage, archive, start, keep=first)
            first = False
    if plans and first:
        raise BudgetError(f"encodings of activations do not fit into {room} bytes beside weights")
