"""Statistics of every weight by processes that each run some of the batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dither.calibrate.backward import squared_gradients
from dither.calibrate.collect import Watch
from dither.calibrate.moments import CROSSED, SQUARES, Moments, Vectors
from dither.core import Stats
from dither.data import Data
from dither.model import evaluating, memory_of, parameters_of
from dither.progress import report
from dither.team import Team, nbytes_of

NumberedLoss = Callable[[Any, Any, int], Tensor]
"""A model's output, the batch and its number to a scalar."""

_WINDOW = 2
"""Batches of each process between two exchanges: their input vectors are in memory."""


def collect_together(
    model: nn.Module, data: Data, team: Team, loss: NumberedLoss | None = None
) -> dict[str, Stats]:
    """What :func:`~dither.calibrate.collect` does, by several processes, to the same last bit.

    Every weight has an owner. What goes into it is sent there, and its owner alone sums up, batch
    after batch, as one process does.

    Args:
        model: the same in all processes.
        data: the same in all; with batches in memory.
        team: the processes.
        loss: for ``Stats.importance``, which is but the mean over the weight, ``(1,)``.

    Raises:
        SpecError: the loader is empty, or the loss has no gradient.
    """
    watch = Watch(model) if team.size == 1 else _Parcels(model)
    sums: dict[str, float] = {}
    count, total = 0, data.count or math.inf
    owners = team.owners(_costs(model))
    with team.section("statistics"), evaluating(model), watch.hooks():
        for window in _windows(data, 1 if team.size == 1 else _WINDOW * team.size):
            made: dict[int, dict[str, float]] = {}
            parcels: dict[int, _Parcel] = {}
            for number in map(int, team.mine({str(n): nbytes_of(b) for n, b in window.items()})):
                made[number] = _run(watch, model, data, (number, window[number]), loss)
                if isinstance(watch, _Parcels):
                    parcels[number] = watch.take()
            if isinstance(watch, _Parcels):
                made = _dealt(watch, parcels, made, owners, team)
            for number in sorted(made):
                for name, square in made[number].items():
                    sums[name] = sums.get(name, 0.0) + square
            count += len(window)
            report("reading samples", min(count / total, 1.0))
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    means = {
        name: torch.tensor([total / count / sizes[name]], dtype=torch.float64)
        for name, total in sums.items()
    }
    return _joined(watch, means, team, _costs(model))


Inputs = list[tuple[str, Vectors, Vectors | None]]
"""What a batch brings: names of weights, their input vectors, and what these should be."""


def moments_together(
    seen: Mapping[int, Inputs], names: Sequence[str], most: int, team: Team
) -> dict[str, Moments]:
    """Moments of some weights' inputs, of batches that several processes ran.

    Second moments of each kind have an owner, which is sent what is in them, and sums up in the
    order of batches.

    Args:
        seen: by number of batch, what this process saw.
        names: of all weights that may be among them.
        most: inputs of one Gram matrix.
        team: the processes.
    """
    owners = team.owners({f"{kind} {name}": 1.0 for name in names for kind in (SQUARES, CROSSED)})
    parts = [{n: _for_owner(some, owners, rank) for n, some in seen.items()} for rank in team.ranks]
    came = {n: some for got in team.exchange("inputs", parts) for n, some in got.items()}
    found: dict[str, Moments] = {}
    for number in sorted(came):
        for name, vectors, wanted in came[number]:
            kinds = [k for k in (SQUARES, CROSSED) if owners[f"{k} {name}"] == team.rank]
            for kind in kinds:
                moments = found.setdefault(f"{kind} {name}", Moments(most))
                moments.add(vectors, wanted, (kind,))
    every = {
        key: m for got in team.exchange("moments", [found] * team.size) for key, m in got.items()
    }
    joined = {}
    for name in names:
        if f"{SQUARES} {name}" in every:
            joined[name] = every[f"{SQUARES} {name}"]
            joined[name].join(every[f"{CROSSED} {name}"])
    return joined


def _for_owner(seen: Inputs, owners: Mapping[str, int], rank: int) -> Inputs:
    """What a process needs of a batch's inputs."""
    return [
        (name, vectors, wanted if owners[f"{CROSSED} {name}"] == rank else None)
        for name, vectors, wanted in seen
        if rank in (owners[f"{SQUARES} {name}"], owners[f"{CROSSED} {name}"])
    ]


def _run(
    watch: Watch, model: nn.Module, data: Data, item: tuple[int, object], loss: NumberedLoss | None
) -> dict[str, float]:
    """Watch one batch; sums of squared gradients by name, if there is a loss."""
    number, batch = item
    watch.mask = data.shown(batch)
    if loss is None:
        with torch.no_grad():
            data.forward(model, batch)
        return {}

    def numbered(output: object, batch: object) -> Tensor:
        return loss(output, batch, number)

    found: dict[str, float] = {}

    def note(name: str, square: Tensor) -> None:
        found[name] = float(square.sum(dtype=torch.float64))

    squared_gradients(model, batch, numbered, data.forward, note)
    return found


def _windows(data: Data, length: int) -> Iterator[dict[int, object]]:
    """Some batches at a time, by number."""
    window: dict[int, object] = {}
    for number, batch in enumerate(data):
        window[number] = batch
        if len(window) == length:
            yield window
            window = {}
    if window:
        yield window


def _costs(model: nn.Module) -> dict[str, float]:
    """What moments of each parameter cost, about: by the square of its inputs."""
    places = dict(model.named_parameters())
    return {
        name: float(prod(places[name].shape[1:]) ** 2)  # of an empty one, too
        for name in parameters_of(model).values()
    }


@dataclass
class _Parcel:
    """What was seen of a batch, for one owner or all."""

    vectors: list[tuple[str, Vectors]] = field(default_factory=list)
    counts: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)

    def of(self, names: set[str]) -> _Parcel:
        """What concerns some weights."""
        return _Parcel(
            [(name, vectors) for name, vectors in self.vectors if name in names],
            {name: counts for name, counts in self.counts.items() if name in names},
            {name: axis for name, axis in self.outputs.items() if name in names},
        )


class _Parcels(Watch):
    """Keeps the input vectors of a batch, on the CPU, to be sent."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._parcel = _Parcel()
        self._last: tuple[Vectors, object, Vectors] | None = None
        self._mine: dict[str, Tensor] = {}
        self._axes: dict[str, int] = {}
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def note(self, name: str, vectors: Vectors) -> None:
        """Keep a copy; weights that read the same input share one."""
        seen = _state(vectors)
        if self._last is None or seen is None or self._last[1] != seen:
            self._last = (vectors, seen, _copied(vectors))
        self._parcel.vectors.append((name, self._last[2]))

    def take(self) -> _Parcel:
        """What was seen since the last time."""
        parcel, self._parcel, self._last = self._parcel, _Parcel(), None
        parcel.counts = {name: counts.cpu() for name, counts in self.counts.items()}
        parcel.outputs = dict(self.outputs)
        self.counts.clear()
        self.outputs.clear()
        return parcel

    def receive(self, parcel: _Parcel) -> None:
        """Sum up what was seen of one batch, on the model's device."""
        for name, vectors in parcel.vectors:
            placed = vectors if isinstance(vectors, Tensor) else list(vectors)
            if isinstance(placed, Tensor):
                super().note(name, placed.to(self._device))
            else:
                super().note(name, [some.to(self._device) for some in placed])
        for name, counts in parcel.counts.items():
            self._mine[name] = self._mine[name] + counts if name in self._mine else counts
        self._axes |= parcel.outputs

    def finish(self) -> None:
        """Have counts and axes of what was received."""
        self.counts, self.outputs = self._mine, self._axes


def _state(vectors: Vectors) -> object:
    """Where a tensor lies and how often it was changed; None of several."""
    return (memory_of(vectors), vectors._version) if isinstance(vectors, Tensor) else None  # noqa: SLF001 - no public name


def _copied(vectors: Vectors) -> Vectors:
    if isinstance(vectors, Tensor):
        return vectors.detach().clone().cpu()
    return [some.detach().clone().cpu() for some in vectors]


def _dealt(
    watch: _Parcels,
    parcels: dict[int, _Parcel],
    made: dict[int, dict[str, float]],
    owners: dict[str, int],
    team: Team,
) -> dict[int, dict[str, float]]:
    """Send every owner its parcels, sum up those that come; what all made of their batches."""
    names = [{n for n, owner in owners.items() if owner == rank} for rank in range(team.size)]
    parts = [({n: parcel.of(some) for n, parcel in parcels.items()}, made) for some in names]
    got = team.exchange("input vectors", parts)
    came = {number: parcel for some, _ in got for number, parcel in some.items()}
    for number in sorted(came):
        watch.receive(came[number])
    return {number: squares for _, some in got for number, squares in some.items()}


def _joined(
    watch: Watch, means: dict[str, Tensor], team: Team, costs: dict[str, float]
) -> dict[str, Stats]:
    """The statistics of all weights that were seen, of those owned here and elsewhere."""
    if isinstance(watch, _Parcels):
        watch.finish()

    def stats(names: Sequence[str]) -> dict[str, Stats | None]:
        return {
            name: watch.stats(name, means.get(name)).to("cpu")
            if name in watch.moments or name in watch.counts or name in means
            else None
            for name in names
        }

    found = team.collected("moments", stats, costs)
    return {name: seen for name, seen in found.items() if seen is not None}
