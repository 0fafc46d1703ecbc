"""What an error in each tensor costs, measured at the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dither.calibrate import collect_together
from dither.core import Stats
from dither.data import Data, Distance, divergence, floats_of, squared
from dither.disk import kept
from dither.encoders.outputs import with_silent_groups
from dither.model import evaluating
from dither.progress import steps
from dither.search.knowledge import Knowledge, Sensitivity
from dither.search.row_steps import frequencies, steps_of
from dither.search.sensitivity import data_free
from dither.team import ALONE, Team, nbytes_of

Projection = Callable[[object, torch.Generator], Tensor]
"""An output to a random number, whose squared gradient says what errors cost."""

PRIOR_SAMPLES = 256.0
"""Input vectors that the prior moments of inputs count as, for each input."""

ROW_EXPONENT = 0.375
"""Steps of a table's rows fall with this power of how often they are read.

At high rates it would be 1/2; where rare rows round to nothing, less is better.
"""

_NOISE = 1 / 32
"""Of a weight, as a share of its root mean square, where noise says what an error costs."""

_NOISY_BATCHES = 4

TABLES = 2.0
"""What an error in a token table costs, in that of the data-free rule.

Layers make up for their errors, once they are measured, and tables do not: more bytes go there.
"""

TRUST = 0.3
"""Share of measured sensitivities in the logarithm; the data-free rule has the rest.

They hold for small errors. At a few bits for each weight errors are large, and what small ones say
misleads if it is taken alone.
"""


def calibrated(
    model: nn.Module, data: Data | Iterable[Any], *, prior: Sensitivity = data_free
) -> Sensitivity:
    """A sensitivity measured from data without labels, for :func:`dither.compress`.

    In one forward and backward pass over the batches:

    * Second moments of inputs, along which errors are fed; they lean towards the prior's where
      samples are few.
    * How often rows of token tables are read, joined with the prior's frequencies.
    * How much a small error in each matrix changes the output: squared gradients of random
      projections of the output (Gauss-Newton; with :func:`divergence` its Fisher information),
      which count for :data:`TRUST`. With a distance of one's own, the prior's are kept. Where
      gradients do not reach, since a part of the model runs without them or outside torch, the
      distance that noise in each matrix makes says it: a forward pass for each.

    Args:
        model: in floating point; is left as it was.
        data: a loader, or :class:`~dither.Data`.
        prior: sensitivities to start from.

    Raises:
        SpecError: the loader is empty.
    """
    samples = Data.of(data)
    samples = samples.held() if isinstance(samples.loader, Iterator) else samples
    return by_statistics(statistics(model, samples), prior)


def statistics(model: nn.Module, samples: Data, team: Team = ALONE) -> dict[str, Stats]:
    """What :func:`calibrated` measures, by the name of the parameter.

    Args:
        model: the same in all processes.
        samples: with batches in memory, the same in all.
        team: processes that measure together.

    Raises:
        SpecError: the loader is empty.
    """
    project = _PROJECTIONS.get(samples.distance)
    if project is not None:
        return _measured(model, samples, project, team)
    found = collect_together(model, samples, team)
    return {name: replace(stats, importance=None) for name, stats in found.items()}


def by_statistics(stats: Mapping[str, Stats], prior: Sensitivity = data_free) -> Sensitivity:
    """What :func:`calibrated` makes of :func:`statistics`."""

    def sensitivity(tensors: Mapping[str, Tensor]) -> Mapping[str, Knowledge]:
        found = {
            name: with_stats(weighted, stats.get(name)) for name, weighted in prior(tensors).items()
        }
        return blended(found, stats)

    return sensitivity


def _measured(model: nn.Module, samples: Data, project: Projection, team: Team) -> dict[str, Stats]:
    """Statistics with what errors cost as importance, by gradients or else by noise."""
    try:
        generators = _generators(model, samples, team)

        def loss(output: object, batch: object, number: int) -> Tensor:
            return project(samples.counted(output, batch), generators[number])

        stats = collect_together(model, samples, team, loss)
    except Exception:  # whatever a model raises that cannot run with gradients
        if team.is_ended:
            raise
        stats = collect_together(model, samples, team)  # what else is wrong is raised here
    fed = [name for name, found in stats.items() if found.gram is not None]
    silent = [name for name in fed if stats[name].importance is None]
    if silent and any(_by_noise(model, samples, silent, team).values()):
        for name, cost in _by_noise(model, samples, fed, team).items():
            stats[name] = replace(stats[name], importance=torch.tensor([cost]))
    return stats


def _generators(model: nn.Module, samples: Data, team: Team) -> Sequence[torch.Generator]:
    """Random numbers for each batch: those that one process draws, batch after batch."""
    generator = torch.Generator().manual_seed(0)
    batches = {str(number): batch for number, batch in enumerate(samples)}
    if team.size == 1:
        return [generator] * len(batches)

    def shapes(batch: object) -> list[tuple[int, ...]]:
        return [tuple(t.shape) for t in floats_of(samples.counted(model_output(batch), batch))]

    def model_output(batch: object) -> object:
        with evaluating(model), torch.no_grad():
            return samples.forward(model, batch)

    costs = {number: nbytes_of(batch) for number, batch in batches.items()}
    found = []
    for each in team.map("shapes of outputs", shapes, batches, costs).values():
        found.append(torch.Generator())
        found[-1].set_state(generator.get_state())
        for shape in each:
            torch.randn(shape, generator=generator)
    return found


def _by_noise(
    model: nn.Module, samples: Data, names: Sequence[str], team: Team
) -> dict[str, float]:
    """Distance for each unit of squared error that noise in each of some weights makes."""

    def run(some: Sequence[str]) -> dict[str, float]:
        return _by_noise_here(model, samples, names, set(some))

    return team.collected("noise", run, dict.fromkeys(names, 1.0))


def _by_noise_here(
    model: nn.Module, samples: Data, names: Sequence[str], own: AbstractSet[str]
) -> dict[str, float]:
    """The same of those that are a process's own; random numbers are drawn for all."""
    generator, some = torch.Generator().manual_seed(0), samples.first(_NOISY_BATCHES).held()
    weights, costs = dict(model.named_parameters()), {}

    def outputs() -> Iterator[object]:
        return (some.output(model, batch) for batch in some)

    with evaluating(model), torch.no_grad():
        plain = list(outputs())
        for name in steps("adding noise to", names):
            weight = weights[name]
            drawn = _noise(weight, generator)
            if name not in own:
                continue
            kept = weight.detach().clone()
            size = _NOISE * kept.float().square().mean().sqrt()
            try:
                weight.add_((size * drawn).to(kept.dtype))
                error = float((weight.double() - kept.double()).square().sum())
                pairs = zip(outputs(), plain, strict=True)
                made = [float(some.distance(noisy, wanted)) for noisy, wanted in pairs]
            finally:
                weight.copy_(kept)
            cost = sum(made) / len(made) / max(error, 1e-30)
            costs[name] = cost if math.isfinite(cost) else 0.0
    return costs


def with_stats(weighted: Knowledge, stats: Stats | None) -> Knowledge:
    """Measured moments and counts in place of the prior's, which they lean towards.

    The diagonal of moments is scaled to mean 1: the sensitivity says how much an error costs, the
    moments in which direction.
    """
    if stats is not None and stats.counts is not None and weighted.rows is not None:
        rows = steps_of(frequencies(stats.counts), ROW_EXPONENT)
        return replace(weighted, rows=rows, sensitivity=TABLES * weighted.sensitivity)
    if stats is None or stats.gram is None or weighted.gram is None or stats.outputs > 0:
        return weighted
    if not float(stats.gram.diagonal(dim1=-2, dim2=-1).mean()) > 0:
        return weighted
    gram = lean(stats, weighted.gram).gram
    if gram is None:
        return weighted
    inputs = weighted.value.shape[-1] if stats.outputs else weighted.value[0].numel()
    if gram.ndim == 3 and gram.shape[-1] >= inputs:
        gram = gram.mean(0)  # searches code parts of the rows, which cut through groups
    scale = float(gram.diagonal(dim1=-2, dim2=-1).mean())
    return weighted if not scale > 0 else replace(weighted, gram=kept(gram / scale, stats.gram))


def lean(stats: Stats, prior: Tensor | None) -> Stats:
    """Moments that lean towards the prior's, more so the fewer samples there were.

    Of groups of inputs that say nothing, see :func:`~dither.encoders.outputs.with_silent_groups`.
    """
    stats = with_silent_groups(stats)
    if prior is None or stats.gram is None:
        return stats
    size = stats.gram.shape[-1]
    base = prior if len(prior) == size else _fitting(prior, size)
    share = PRIOR_SAMPLES / (stats.samples + PRIOR_SAMPLES)
    extra = share * stats.gram.diagonal(dim1=-2, dim2=-1).mean() * base
    gram = (1 - share) * stats.gram.float() + extra
    cross = None if stats.cross is None else (1 - share) * stats.cross.float() + extra
    return replace(stats, gram=gram, cross=cross)


def _fitting(gram: Tensor, size: int) -> Tensor:
    """Prior moments of another number of inputs: a part, or independent repetitions."""
    count = -(-size // len(gram))
    whole = torch.block_diag(*[gram] * count) if count > 1 else gram
    return whole[:size, :size]


def blended(tensors: Mapping[str, Knowledge], stats: Mapping[str, Stats]) -> dict[str, Knowledge]:
    """Sensitivities of matrices moved towards measured ones, in their common unit.

    Only tensors with measured moments are moved: what no gradient reaches keeps the prior.
    """
    measured = {
        name: float(found.importance.double().mean())
        for name, found in stats.items()
        if name in tensors and found.importance is not None and found.gram is not None
    }
    ratios = {
        name: math.log(value / tensors[name].sensitivity)
        for name, value in measured.items()
        if value > 0
    }
    mean = sum(ratios.values()) / max(len(ratios), 1)
    moves = {name: math.exp(TRUST * (ratio - mean)) for name, ratio in ratios.items()}
    return {
        name: replace(weighted, sensitivity=weighted.sensitivity * moves.get(name, 1.0))
        for name, weighted in tensors.items()
    }


def _project_squares(output: object, generator: torch.Generator) -> Tensor:
    """Whose squared gradient is, on average, that of :func:`squared` to second order."""
    tensors = [_finite(tensor) for tensor in floats_of(output)]
    norm = torch.stack([t.detach().double().square().sum() for t in tensors]).sum().sqrt()
    noise = [_noise(t, generator) for t in tensors]
    return torch.stack([(n * t).sum() for n, t in zip(noise, tensors, strict=True)]).sum() / norm


def _project_logits(output: object, generator: torch.Generator) -> Tensor:
    """The same of :func:`divergence`: the noise has the covariance ``diag(p) - p p'``."""
    terms = []
    for logits in floats_of(output):
        shares = logits.detach().softmax(-1)
        noise = shares.sqrt() * _noise(logits, generator)
        terms.append(((noise - shares * noise.sum(-1, keepdim=True)) * _finite(logits)).sum())
    return torch.stack(terms).sum()


_PROJECTIONS: dict[Distance, Projection] = {
    squared: _project_squares,
    divergence: _project_logits,
}


def _finite(tensor: Tensor) -> Tensor:
    """The same without infinities, as masked scores have them: they do not move."""
    return tensor.masked_fill(tensor.detach().isinf(), 0.0)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)
