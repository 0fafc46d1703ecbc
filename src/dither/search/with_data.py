"""What data allows, in order of cost: each way is a trial, and the best file is kept."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from dither.archive import Archive
from dither.calibrate import Layerwise
from dither.calibrate.tuning import Course
from dither.core import SpecError
from dither.data import Data
from dither.model import collect, duplicate, weights_of
from dither.rewrite import chains, equalize, free_pairs
from dither.search.activation_trials import Sites, nbytes_of, plans_of, try_plans
from dither.search.calibrated import by_statistics, statistics
from dither.search.forecast import Forecast
from dither.search.held_out import enough
from dither.search.job import Job
from dither.search.layer_order import LayerOrder
from dither.search.ledger import Ledger
from dither.search.trials import Bench
from dither.search.tune import tuned


def with_data(
    bench: Bench, job: Job, sites: Sites | None = None, *, tunes: bool = False
) -> Archive:
    """The best archive of those that data allow; its ``trials`` tell what there was.

    Args:
        bench: on which they are tried.
        job: what is wanted.
        sites: activations to quantize, last.
        tunes: whether the best file is tuned before.

    Raises:
        BudgetError: the budget is impossible.
        SpecError: the text or plan of activations stands for nothing.
    """
    room, model = job.budget, bench.model
    plans = {} if sites is None else plans_of(sites, model, bench.data)
    job = replace(job, budget=room - nbytes_of(plans, model, bench.data))
    bench.attempt("data-free", partial(job.archive, collect(model)))
    equal = None if job.base is not None else _equalized(model)
    if equal is not None and bench.attempt("equalized", partial(job.archive, collect(equal))):
        model = equal
    _try_fitted(bench, job, model)
    if tunes:
        bench.attempt("tuned", partial(_tuned, bench, job.budget))
    if plans:
        try_plans(bench, plans, job.metadata, room)
    return bench.winner()


def _try_fitted(bench: Bench, job: Job, model: nn.Module) -> None:
    """Sensitivities from data; then layers in sequence, which begin where those end."""
    fitted = _Fitted(bench, job, model, bench.part)
    stages = ("calibrated", "calibrated, in sequence")
    kept = [bench.attempt(stages[0], fitted.calibrated)]
    if fitted.found and job.base is None:  # layers in sequence leave the base
        kept.append(bench.attempt(stages[1], fitted.ordered))
    bench.note = ""
    if bench.held and any(kept):
        again = _Fitted(bench, job, model, bench.data)
        bench.refit(again.both if kept[-1] and len(kept) > 1 else again.calibrated)


def _tuned(bench: Bench, budget: int) -> Archive | None:
    """The best file so far, tuned; as it was where that is no better on samples held out of it."""
    if bench.best is None:
        return None
    return tuned(bench.model, bench.best, bench.part, budget, Course())[0] or bench.best


class _Fitted:
    """Ways that are fitted to samples."""

    def __init__(self, bench: Bench, job: Job, model: nn.Module, data: Data) -> None:
        self._bench, self._job, self._model, self._data = bench, job, model, data
        self.found: tuple[Forecast, Ledger] | None = None

    def calibrated(self) -> Archive:
        """Sensitivities from data."""
        stats = statistics(self._model, self._data, self._job.team)
        self._bench.note = _said_of(enough(stats, self._data), self._bench)
        sensitivity = by_statistics(stats, self._job.sensitivity)
        self.found = self._job.spend(collect(self._model), sensitivity)
        return self._job.file(self.found[1])

    def ordered(self) -> Archive | None:
        """Layers in sequence, from where the other ended; None where there are none."""
        layers = Layerwise(self._model, self._data, team=self._job.team, disk=self._job.disk)
        if not layers.order.names or self.found is None:
            return None
        forecast, ledger = self.found
        LayerOrder(forecast, ledger, layers).spend(self._job.budget)
        return self._job.file(ledger)

    def both(self) -> Archive:
        """One after the other."""
        calibrated, ordered = self.calibrated(), self.ordered()
        return calibrated if ordered is None else ordered


def _said_of(enough: int, bench: Bench) -> str:
    """What is to be said of files that are fitted to few samples."""
    notes = []
    if enough > bench.rows:
        notes.append(f"{bench.rows} samples are few: about {enough:,} would do")
    if bench.is_blind:
        notes.append("judged by what it is fitted to: no sample could be held out")
    return "; ".join(notes)


def _equalized(model: nn.Module) -> nn.Module | None:
    """A copy with equalized layers; None where there are none, or they cannot be found."""
    changed = duplicate(model)
    try:
        pairs = free_pairs(changed, chains(changed), say=False)
        if not pairs:
            return None
        equalize(changed, pairs)
    except SpecError:
        return None
    before, after = weights_of(model.state_dict()), weights_of(changed.state_dict())
    same = {name: value.shape for name, value in before.items()}
    return changed if same == {name: value.shape for name, value in after.items()} else None
