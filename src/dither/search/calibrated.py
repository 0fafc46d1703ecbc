"""What an error in each tensor costs, measured at the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dither.calibrate import Call, call, collect, evaluating, some_batches
from dither.core import SpecError, Stats
from dither.model import collect as walk
from dither.search.allocate import allocate
from dither.search.options import Option, Weighted, build_ladder
from dither.search.sensitivity import Sensitivity, data_free
from dither.search.size import parse_size

Distance = Callable[[Any, Any], Tensor]
"""The output of the changed model and that of the original, to a scalar."""

PRIOR_SAMPLES = 256.0
"""Input vectors that the prior moments of inputs count as, for each input."""

PRIOR_SPREAD = 1.5
"""How far true sensitivities lie from the data-free rule, as a standard deviation of their log."""


def squared(output: object, original: object) -> Tensor:
    """Mean squared difference over the mean square, of all tensors of an output."""
    pairs = list(zip(_tensors(output), _tensors(original), strict=True))
    if not pairs:
        raise SpecError("the model's output holds no floating-point tensor; give a forward")
    total = torch.stack([(a.double() - b.double()).square().sum() for a, b in pairs]).sum()
    return total / torch.stack([b.double().square().sum() for _, b in pairs]).sum().clamp(min=1e-30)


def divergence(output: object, original: object) -> Tensor:
    """Mean Kullback-Leibler divergence in nats of the last axis' softmax: for classifiers."""
    pairs = list(zip(_tensors(output), _tensors(original), strict=True))
    if not pairs:
        raise SpecError("the model's output holds no floating-point tensor; give a forward")
    terms = []
    for a, b in pairs:
        wanted = b.double().log_softmax(-1)
        terms.append((wanted.exp() * (wanted - a.double().log_softmax(-1))).sum(-1).mean())
    return torch.stack(terms).mean()


@dataclass(frozen=True)
class Measured:
    """What a tensor's own error did to the output.

    Attributes:
        costs: distance of each batch, ``(batches,)``.
        error: squared error of the tensor, as ladders predict it.
    """

    costs: Tensor
    error: float

    @property
    def sensitivity(self) -> float:
        """Loss for each unit of squared error."""
        return float(self.costs.mean()) / self.error

    @property
    def variance(self) -> float:
        """Of the mean's logarithm, from how batches differ."""
        mean, count = float(self.costs.mean()), len(self.costs)
        if count < 2 or mean <= 0:
            return 1.0
        return float(self.costs.var()) / count / mean**2


def calibrated(
    model: nn.Module,
    loader: Iterable[Any],
    size: int | str,
    *,
    distance: Distance = squared,
    batches: int | None = None,
    forward: Call = call,
    prior: Sensitivity = data_free,
) -> Sensitivity:
    """A sensitivity measured from data without labels, for :func:`dither.compress`.

    Each tensor by itself is encoded as ``prior`` would at the given size, and the distance between
    the outputs of that model and of the original is what its error costs. Where errors differ much
    between batches, the result leans towards the prior. Errors are fed along measured second
    moments of inputs, which lean towards the prior's where samples are few. One forward pass over
    the batches for each tensor.

    Args:
        model: in floating point; is left as it was.
        loader: of batches as the model will meet them; kept in memory.
        size: the budget at which errors are measured, as for :func:`dither.compress`.
        distance: :func:`squared`, :func:`divergence`, or one's own.
        batches: how many to read, or all.
        forward: runs the model on a batch; its output is what counts.
        prior: sensitivities to start from.

    Raises:
        SpecError: the loader is empty.
        BudgetError: the size is not understood.
    """
    held = list(some_batches(loader, batches))
    tensors = walk(model)
    budget = parse_size(size, tensors.nbytes)
    stats = collect(model, held, forward=forward)
    start = {
        name: with_moments(weighted, stats.get(name))
        for name, weighted in prior(tensors.values).items()
    }
    ladders = {name: build_ladder(weighted) for name, weighted in start.items()}
    chosen = allocate(ladders, budget)
    measured = measure(model, held, start, chosen, distance, forward)
    found = blended(start, measured)

    def sensitivity(values: Mapping[str, Tensor]) -> Mapping[str, Weighted]:
        missing = [name for name in values if name not in found]
        if missing:
            raise SpecError(f"{missing[:5]} are no tensors of the model that was calibrated")
        return {name: replace(found[name], value=value) for name, value in values.items()}

    return sensitivity


def with_moments(weighted: Weighted, stats: Stats | None) -> Weighted:
    """Measured second moments in place of the prior's, which they lean towards.

    The diagonal is scaled to mean 1: the sensitivity says how much an error costs, the moments in
    which direction.
    """
    if stats is None or stats.gram is None or weighted.gram is None or stats.outputs:
        return weighted
    gram = stats.gram.float()
    inputs = weighted.value[0].numel()
    if gram.ndim == 3 and gram.shape[-1] >= inputs:
        gram = gram.mean(0)  # searches code parts of the rows, which cut through groups
    size = gram.shape[-1]
    scale = float(gram.diagonal(dim1=-2, dim2=-1).mean())
    if not scale > 0:
        return weighted
    known = weighted.gram
    base = known if len(known) == size else _fitting(known, size)
    share = stats.samples / (stats.samples + PRIOR_SAMPLES)
    return replace(weighted, gram=share * gram / scale + (1 - share) * base)


def _fitting(gram: Tensor, size: int) -> Tensor:
    """Prior moments of another number of inputs: a part, or independent repetitions."""
    count = -(-size // len(gram))
    whole = torch.block_diag(*[gram] * count) if count > 1 else gram
    return whole[:size, :size]


def measure(
    model: nn.Module,
    held: list[Any],
    tensors: Mapping[str, Weighted],
    chosen: Mapping[str, Option],
    distance: Distance,
    forward: Call,
) -> dict[str, Measured]:
    """What the chosen option of each tensor, by itself, does to the output.

    Options that lose nothing are left out. Tensors are put back after each.
    """
    places = dict(model.state_dict(keep_vars=True))
    found: dict[str, Measured] = {}
    with evaluating(model), torch.no_grad():
        originals = [forward(model, batch) for batch in held]
        for name, weighted in tensors.items():
            if chosen[name].step is None or chosen[name].loss <= 0:
                continue
            place = places[name]
            before = place.detach().clone()
            decoded = chosen[name].encode(weighted).decode()
            error = chosen[name].loss / weighted.sensitivity
            try:
                place.copy_(decoded)
                costs = [
                    distance(forward(model, batch), original)
                    for batch, original in zip(held, originals, strict=True)
                ]
            finally:
                place.copy_(before)
            found[name] = Measured(torch.stack(costs).double(), error)
    return found


def blended(
    tensors: Mapping[str, Weighted], measured: Mapping[str, Measured]
) -> dict[str, Weighted]:
    """Measured sensitivities, nearer to the prior the less sure they are.

    The mean of their logarithms, weighted by the inverse variances of measurement and prior, in the
    unit of the measurements; tensors without one have the prior's in that unit.
    """
    usable = {n: m for n, m in measured.items() if m.sensitivity > 0 and m.error > 0}
    if not usable:
        return dict(tensors)
    ratios = [math.log(m.sensitivity / tensors[n].sensitivity) for n, m in usable.items()]
    unit = sorted(ratios)[len(ratios) // 2]
    found = {}
    for name, weighted in tensors.items():
        expected = unit + math.log(weighted.sensitivity)
        if name in usable:
            trust = PRIOR_SPREAD**2 / (PRIOR_SPREAD**2 + usable[name].variance)
            expected += trust * (math.log(usable[name].sensitivity) - expected)
        found[name] = replace(weighted, sensitivity=math.exp(expected))
    return found


def _tensors(output: object) -> list[Tensor]:
    """The floating-point tensors of an output: tuples, lists, dicts and output objects."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for part in output.values() for tensor in _tensors(part)]
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return []
