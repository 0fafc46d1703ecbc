"""Attach: swap what a model's forward reads, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from dither.activations import begin as begin_sites
from dither.activations import placed
from dither.core import SpecError
from dither.data import Data
from dither.model import collect, inner, overlapping
from dither.search import (
    Grid,
    Knowledge,
    RotatedGrid,
    Sensitivity,
    Stored,
    calibrated,
    compress,
    parse_size,
)
from dither.team import alone
from dither.terminal import some_names
from dither.train.controller import Budget, Controller
from dither.train.default_plan import default_plan
from dither.train.method import begin
from dither.train.noise import Noise
from dither.train.penalties import Penalty
from dither.train.plan import Plan, Rule, Spec, as_plan
from dither.train.rotated_lsq import RotatedLSQ
from dither.train.run import Run
from dither.train.schedules import Schedule
from dither.train.shadow import become_root, is_shadowed, shadow
from dither.train.sites import find_sites
from dither.train.surrogate import Surrogate, plain


class More(TypedDict, total=False):
    """What :func:`attach` takes besides."""

    penalties: Iterable[Penalty]
    schedules: Iterable[Schedule]
    noise: Noise | int
    owners: Mapping[str, str]


def attach(
    model: nn.Module,
    plan: Plan | Mapping[str, Rule] | None = None,
    *,
    budget: int | str | Budget | None = None,
    data: Data | Iterable[Any] | None = None,
    steps: int | None = None,
    optimizer: Optimizer | None = None,
    **more: Unpack[More],
) -> Run:
    """Prepare a model for training to a budget: `forward` reads surrogates in place of weights.

    Parameters, names, ties and optimizers stay as they are. Attach before the model is wrapped in
    DDP or FSDP.

    Args:
        model: any module.
        plan: ``glob -> format, encoder or training method``, the first match wins; by default,
            with a budget, :func:`~dither.train.default_plan`: learned steps on an entropy-coded
            grid for every tensor. Rules about activations begin from the first batch, unless
            ``dither.activations.apply`` went before.
        budget: size of the file: bytes, ``"60KB"``, or ``"12x"``, ``"5%"`` of the model's own
            bytes, ``"4 bits"`` for each value, or a :class:`Budget`. Training is steered there by
            :meth:`Run.penalty`.
        data: a few hundred samples without labels, as for :func:`dither.compress`: the sizes of
            steps then begin where these say. Training alone moves them far less.
        steps: optimizer steps that training will take; needed for a budget.
        optimizer: learned extras are added to it: see :meth:`Run.join`.
        **more: ``penalties``, further terms for :meth:`Run.penalty`; ``schedules``, called now and
            after every step; ``noise``, a seed or a :class:`Noise`; ``owners``: see :class:`Plan`.

    Raises:
        SpecError: the plan does not fit the model, the model is attached already, or an argument
            is of a wrong kind.
        BudgetError: the budget is not understood or impossible.
    """
    _check_kinds(model, steps, optimizer, more)
    penalties, schedules = list(more.get("penalties", ())), list(more.get("schedules", ()))
    tensors = collect(model)
    values = sum(value.numel() for value in tensors.values.values())
    goal = budget if budget is None or isinstance(budget, Budget) else Budget(budget)
    nbytes = None if goal is None else parse_size(goal.size, tensors.nbytes, values)
    _check(model, plan, nbytes, steps)
    if data is not None:
        goal = _measured(model, goal, data)
    rules = default_plan(model, steps=steps) if plan is None else as_plan(plan)
    rules = replace(rules, owners={**rules.owners, **more.get("owners", {})})
    specs = rules.resolve(model)
    surrogates = _begin(model, specs, goal)
    _place(model, rules, surrogates)
    noise = more.get("noise", 0)
    noise = noise if isinstance(noise, Noise) else Noise(noise)
    buffers = {name: spec for name, spec in specs.items() if name not in surrogates}
    run = Run(model, rules, surrogates, buffers, steps=steps, noise=noise, aliases=tensors.aliases)
    run.penalties += penalties
    run.schedules += schedules
    _start(run, optimizer, nbytes, goal)
    return run


def _measured(model: nn.Module, budget: Budget | None, data: Data | Iterable[Any]) -> Budget:
    """The same budget, spent by what data measure."""
    if budget is None:
        raise SpecError("data= says where a budget is spent first: give budget=, too")
    sensitivity = calibrated(model, data, prior=budget.sensitivity)
    return replace(budget, sensitivity=sensitivity)


def _start(
    run: Run, optimizer: Optimizer | None, nbytes: int | None, budget: Budget | None
) -> None:
    """Step 0; what cannot begin leaves the model as it was."""
    try:
        for schedule in run.schedules:
            schedule(run, 0)
        if budget is not None and nbytes is not None:
            tensors = collect(run.model)
            count = sum(weight.numel() for *_, weight in run.weights())
            run.controller = Controller(nbytes, budget.arrive, count)
            values = sum(value.numel() for value in tensors.values.values())
            first = parse_size(budget.start or budget.size, tensors.nbytes, values)
            run.settle(first)
        if optimizer is not None:
            run.join(optimizer)
    except BaseException:
        run.detach()
        raise


def _check_kinds(model: object, steps: object, optimizer: object, more: More) -> None:
    """Refuse arguments of a wrong kind before anything is done."""
    if unknown := sorted(set(more) - set(More.__annotations__)):
        raise TypeError(f"attach() got an unexpected keyword argument {unknown[0]!r}")
    noise: object = more.get("noise", 0)
    if not isinstance(model, nn.Module):
        raise SpecError(f"attach takes a model, a torch.nn.Module, not a {type(model).__name__}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Integral)):
        raise SpecError(f"steps is a whole number of optimizer steps, not {steps!r}")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise SpecError(f"optimizer is one of torch.optim, not a {type(optimizer).__name__}")
    if not isinstance(noise, Integral | Noise):
        raise SpecError(f"noise is a seed, a whole number, or Noise(...), not {noise!r}")


def _check(model: nn.Module, plan: object, nbytes: int | None, steps: int | None) -> None:
    if any(is_shadowed(module) for module in model.modules()):
        raise SpecError("this model is attached already; call run.detach() on its run first")
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    if sharded or inner(model) is not model:
        raise SpecError(
            f"this {type(model).__name__} is wrapped already; attach to the plain model, and then "
            "give it to DDP, FSDP, DataParallel, AveragedModel or torch.compile"
        )
    if mixed := overlapping(dict(model.named_parameters())):
        raise SpecError(
            f"{some_names(mixed)}: these parameters are expanded, or share a part of their memory, "
            "so that one cannot be trained without changing others; give each memory of its own: "
            "parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)"
        )
    if nbytes is not None and (steps is None or steps < 1):
        raise SpecError(
            f"a budget needs the number of optimizer steps that will follow, not steps={steps}"
        )
    if plan == {} and not placed(model):
        raise SpecError('the plan has no rules: write {"*.weight": LSQ(4)}, for example')
    if plan is None and nbytes is None:
        raise SpecError('give a plan, such as {"*.weight": LSQ(4)}, or a budget such as "60KB"')


def _place(model: nn.Module, plan: Plan, surrogates: Mapping[str, Surrogate]) -> None:
    """Let modules read surrogates, and quantize activations; if one cannot, nothing is changed."""
    sites = {
        name: find_sites(model, name, plan.owners, is_noisy=not surrogate.is_still)
        for name, surrogate in surrogates.items()
    }
    begin_sites(model, plan)
    for name, surrogate in surrogates.items():
        for number, site in enumerate(sites[name]):
            shadow(site, surrogate, is_first=number == 0)
    become_root(model)


def _on_grids(
    sensitivity: Sensitivity, rotated: Collection[str], tensors: Mapping[str, Tensor]
) -> Mapping[str, Knowledge]:
    """The same for what is trained: plain grids, whose steps are their own, and rotated tables."""
    plain = (Stored(), Grid(refit=False))
    return {
        name: replace(known, axes=None, proposers=plain)
        if name not in rotated or known.axes is None
        else replace(known, proposers=(Stored(), RotatedGrid()))
        for name, known in sensitivity(tensors).items()
    }


def _begin(
    model: nn.Module, specs: Mapping[str, Spec], budget: Budget | None
) -> dict[str, Surrogate]:
    """A surrogate for each parameter, begun where the data-free search for the budget puts it."""
    start = None
    if budget is not None:
        size = budget.size if budget.start is None else budget.start
        with alone():  # replicas are made equal later, or this is but one of them
            rotated = {name for name, spec in specs.items() if isinstance(spec, RotatedLSQ)}
            rule = partial(_on_grids, budget.sensitivity, rotated)
            start = compress(model, size, sensitivity=rule)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    surrogates = {}
    for name, spec in specs.items():
        if name in parameters:
            surrogate = begin(spec, plain(parameters[name])).to(parameters[name].device)
            surrogate.weight_name, surrogate.weight_shape = name, tuple(parameters[name].shape)
            if start is not None:
                surrogate.start(start.encoded(name))
            surrogates[name] = surrogate
    return surrogates
