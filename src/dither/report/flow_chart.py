"""The debugging flow chart of Nagel et al. 2021 (arXiv 2106.08295, section 3.7), followed.

Does the original give the same twice? Do weights or activations lose? What are remedies worth, and
which is the next step? Remedies are tried in the white paper's order; slow ones (AdaRound,
training) are only named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dither.activations import Encodings, observe
from dither.core import Encoded, SpecError
from dither.encoders import Ranges
from dither.formats import Affine
from dither.model import duplicate
from dither.report.bench import Bench, quantized
from dither.report.diagnosis import Diagnosis, Row, Trial
from dither.report.targets import Targets
from dither.rewrite import chains, equalize, free_pairs

FEW = 10
"""A tenth of the tensors are few."""


def follow(bench: Bench, targets: Targets, found: Diagnosis, allowed: float) -> Diagnosis:
    """Try what the flow chart says, and name the next step.

    Args:
        bench: of the original model.
        targets: what was quantized.
        found: rows and wholes.
        allowed: a distance, or where there are scores a fall of the score.

    Raises:
        SpecError: ``allowed`` is no number that is 0 or more.
    """
    if not (math.isfinite(allowed) and allowed >= 0):
        raise SpecError(f"allowed={allowed}: give what may be lost, 0 or more")
    wholes = {part.name: part for part in found.overall}
    original = wholes.pop("original")
    chart = _Chart(bench, targets, found, allowed, original.score)
    if original.distance > allowed and not bench.scores:
        step = (
            f"make the original give the same numbers twice: it varies by {original.distance:.3g}, "
            "more than is allowed (random numbers in evaluation, or state that it keeps)"
        )
        return replace(found, next_step=step)
    lost = {name: chart.loss(part.distance, part.score) for name, part in wholes.items()}
    whole = "both" if "both" in lost else next(iter(lost))
    if lost[whole] <= allowed:
        return replace(found, next_step=f"none: {lost[whole]:.3g} is lost, {allowed:g} allowed")
    sides = [name for name in ("weights", "activations") if lost.get(name, 0.0) > allowed]
    sides.sort(key=lambda name: -lost[name])
    trials = [trial for side in sides for trial in chart.tries(side)]
    step = chart.step(sides[0], trials) if sides else _TOGETHER
    return replace(found, trials=tuple(trials), next_step=step)


_TOGETHER = (
    "neither side loses too much alone, but both together do: train with quantization "
    "(recipes.white_paper.qat), or give the worst rows more bits"
)
_LAST = {
    "weights": "AdaRound in the order of use (recipes.white_paper.ptq), or else training with "
    "quantization (recipes.white_paper.qat), or more bits",
    "activations": "finer grids where the worst rows are (groups=, per='token', 16 bits), or else "
    "training with learned ranges (recipes.white_paper.qat)",
}


class _Chart:
    """Tries remedies on one side at a time, all else being in floating point."""

    def __init__(
        self,
        bench: Bench,
        targets: Targets,
        found: Diagnosis,
        allowed: float,
        score: float | None,
    ) -> None:
        self._bench, self._targets, self._found = bench, targets, found
        self._allowed, self._score = allowed, score

    def loss(self, distance: float, score: float | None) -> float:
        """What counts: the fall of the score, where there is one."""
        if score is None or self._score is None:
            return distance if math.isfinite(distance) else math.inf
        return self._score - score if math.isfinite(score) else math.inf

    def tries(self, side: str) -> Iterator[Trial]:
        """Remedies in the order of the white paper."""
        if side == "weights":
            yield from self._weights()
        else:
            yield from self._activations()

    def step(self, side: str, trials: Sequence[Trial]) -> str:
        """The first remedy that is enough, or what comes after all of them."""
        own = [trial for trial in trials if trial.side == side]
        for trial in own:
            if trial.is_enough:
                return f"{side}: {trial.remedy}"
        helpful = min(own, key=lambda t: self.loss(t.distance, t.score), default=None)
        before = self._whole(side)
        said = ""
        if helpful and self.loss(helpful.distance, helpful.score) < 0.9 * before:
            said = f"{helpful.remedy}, which is not enough alone; then "
        return f"{side}: {said}{_LAST[side]}"

    def _whole(self, side: str) -> float:
        part = next(part for part in self._found.overall if part.name == side)
        return self.loss(part.distance, part.score)

    def _weights(self) -> Iterator[Trial]:
        targets, model = self._targets, self._bench.model
        affine = {n: f for n, f in targets.formats.items() if isinstance(f, Affine) and f.bits}
        if affine:
            made = {n: Ranges(f).encode(self._weight(n)) for n, f in affine.items()}
            yield self._try("weights", "ranges of the least squared error", self._with(made))
        coarse = {n: f for n, f in affine.items() if f.axis is None and f.group is None}
        coarse = {n: f for n, f in coarse.items() if self._weight(n).ndim > 1}
        if coarse:
            finer = {n: replace(f, axis=0) for n, f in coarse.items()}
            made = {n: Ranges(f).encode(self._weight(n)) for n, f in finer.items()}
            remedy = "a scale for each output (axis=0), least squared error"
            yield self._try("weights", remedy, self._with(made))
        if affine.keys() == targets.formats.keys() and (pairs := _pairs(model)):
            yield self._equalized(affine, pairs)
        yield from self._without_the_worst("weights", self._found.weights)

    def _activations(self) -> Iterator[Trial]:
        grids = self._targets.sites
        static = {
            s: replace(e.spec, ranges="mse")
            for s, e in grids.items()
            if not e.spec.is_dynamic and e.spec.ranges != "mse"
        }
        if static:
            found = observe(self._bench.model, static, self._bench.samples)
            targets = replace(self._targets, sites=Encodings({**grids, **found}))
            yield self._try("activations", "ranges='mse'", targets)
        yield from self._without_the_worst("activations", self._found.activations)

    def _without_the_worst(self, side: str, rows: Sequence[Row]) -> Iterator[Trial]:
        """A few of the rows left in floating point, which says whether they are the trouble."""
        count = -(-len(rows) // FEW)
        if len(rows) < 2:
            return
        worst = [row.name for row in rows[:count]]
        said = f"more bits for {', '.join(worst[:3])}" + (" and others" if count > 3 else "")
        remedy = f"{said} ({count} of {len(rows)}, here in floating point)"
        yield self._try(side, remedy, self._targets, leave=worst)

    def _equalized(self, affine: Mapping[str, Affine], pairs: Iterable[tuple[str, str]]) -> Trial:
        changed = duplicate(self._bench.model)
        equalize(changed, pairs)
        state = dict(changed.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, form in affine.items():
                state[name].copy_(Ranges(form).encode(state[name].detach()).decode())
        distance, score = self._bench.distance(changed), self._bench.score(changed)
        remedy = "layers equalized (rewrite.equalize), least squared error"
        return self._trial("weights", remedy, distance, score)

    def _weight(self, name: str) -> Tensor:
        return self._targets.weights[name][0].detach()

    def _with(self, made: Mapping[str, Encoded]) -> Targets:
        old = self._targets
        return replace(old, encoded=lambda n: made[n] if n in made else old.encoded(n))

    def _try(self, side: str, remedy: str, targets: Targets, leave: Sequence[str] = ()) -> Trial:
        weights = [n for n in targets.weights if n not in leave] if side == "weights" else []
        sites = [s for s in targets.sites if s not in leave] if side == "activations" else []
        with quantized(self._bench.model, targets, weights, sites, {}):
            distance, score = self._bench.distance(), self._bench.score()
        return self._trial(side, remedy, distance, score)

    def _trial(self, side: str, remedy: str, distance: float, score: float | None) -> Trial:
        return Trial(side, remedy, distance, score, self.loss(distance, score) <= self._allowed)


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Layers that can be equalized without a change of the function; none if it is not traced."""
    try:
        return free_pairs(model, chains(model), say=False)
    except SpecError:
        return []
