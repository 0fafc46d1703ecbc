"""What data allows, in order of cost: each way is a trial, and the best file is kept."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from dither.archive import Archive
from dither.calibrate import Layerwise
from dither.core import SpecError
from dither.model import collect, duplicate, weights_of
from dither.rewrite import chains, equalize, free_pairs
from dither.search.activation_trials import Sites, nbytes_of, plans_of, try_plans
from dither.search.calibrated import calibrated
from dither.search.job import Job
from dither.search.layer_order import LayerOrder
from dither.search.trials import Bench


def with_data(bench: Bench, job: Job, sites: Sites | None = None) -> Archive:
    """The best archive of those that data allow; its ``trials`` tell what there was.

    Raises:
        BudgetError: the budget is impossible.
        SpecError: the text or plan of activations stands for nothing.
    """
    room, model = job.budget, bench.model
    plans = {} if sites is None else plans_of(sites, model, bench.data)
    job = replace(job, budget=room - nbytes_of(plans, model, bench.data))
    bench.attempt("data-free", partial(job.archive, collect(model)))
    equal = _equalized(model)
    if equal is not None and bench.attempt("equalized", partial(job.archive, collect(equal))):
        model = equal
    _try_measured(bench, job, model)
    if plans:
        try_plans(bench, plans, job.metadata, room)
    return bench.winner()


def _try_measured(bench: Bench, job: Job, model: nn.Module) -> None:
    """Sensitivities from data; then layers in sequence, which begin where those end."""
    job.progress("measuring", 0.0)
    tensors = collect(model)
    found = []

    def measured() -> Archive:
        sensitivity = calibrated(model, bench.data, prior=job.sensitivity)
        found.append(job.spend(tensors, sensitivity))
        return found[0][1].archive()

    def ordered() -> Archive | None:
        layers = Layerwise(model, bench.data)
        if not layers.order.names:
            return None
        forecast, ledger = found[0]
        LayerOrder(forecast, ledger, layers).spend(job.budget)
        return ledger.archive()

    bench.attempt("calibrated", measured)
    if found:
        bench.attempt("calibrated, in sequence", ordered)


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
