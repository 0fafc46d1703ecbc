"""Weights that jump back and forth between two grid points: count, dampen or freeze them.

Everything here is from Nagel, Fournarakis et al. 2022, "Overcoming Oscillations in
Quantization-Aware Training" (arXiv 2203.11086), and works on every surrogate that is
:class:`Watchable`: learned steps, and rounding straight through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dither.core import SpecError
from dither.train.attached import Attached
from dither.train.ramp import Ramp, value_at
from dither.train.surrogate import Surrogate, gathered, plain, whole

FREEZING = Ramp(0.1, 0.011, begin=0.25, shape="cosine")
"""The paper's threshold at 3 bits; at 4 bits it ends at 0.01."""

MOMENTUM = 0.001
"""Of the counts, as in the published command line; the published class has 0.01 by default, which
is as large as the last thresholds: a weight that turned every 200 steps would be frozen."""

DAMPENING = Ramp(0.0, 0.1, begin=0.25, shape="cosine")
"""The paper's factor at 3 and 4 bits."""


@runtime_checkable
class Watchable(Protocol):
    """A surrogate that rounds to integers: what it must offer to be watched and frozen.

    Where ``watch.frozen`` is true, it reads ``watch.last`` in place of the integers of its weight,
    in training, in its encoding and for its size, and gives such weights no gradient. It hands
    ``watch`` on in ``aside``.

    Attributes:
        watch: None until someone watches; missing where its integers cannot be held.
    """

    watch: Watch | None

    def integers(self, weight: Tensor) -> Tensor:
        """The integers to which weights are rounded now, float32, without a graph."""
        ...

    def ends(self) -> tuple[Tensor, Tensor]:
        """The least and greatest value of the grid, broadcastable to the weight, no graph."""
        ...

    @property
    def bits(self) -> int | None:
        """Bits of a weight, or None where the grid has no ends."""
        ...


class Watch:
    """How often the integers of one weight tensor went back and forth.

    An integer oscillates when it changes in the direction opposite to its previous change,
    however long ago that was.

    Attributes:
        last: the integers seen last, float32.
        direction: sign of the last change, int8; 0 where there was none.
        frequency: moving average of how often they oscillate, in oscillations per step.
        average: moving average of the integers.
        frozen: where integers are fixed at ``last``.
        step: step of the last look.
    """

    def __init__(self, integers: Tensor) -> None:
        self.last = integers.detach().float().clone()
        self.direction = torch.zeros_like(self.last, dtype=torch.int8)
        self.frequency = torch.zeros_like(self.last)
        self.average = self.last.clone()
        self.frozen = torch.zeros_like(self.last, dtype=torch.bool)
        self.step = 0

    def look(self, integers: Tensor, momentum: float, step: int) -> Tensor:
        """Take in the integers after a step.

        Args:
            integers: of the weight's shape.
            momentum: share of the newest value in the averages.
            step: its number; a step that was seen is not counted again.

        Returns:
            Where they oscillated, bool.
        """
        self.to(integers.device)
        integers = torch.where(self.frozen, self.last, integers.detach().float())
        change = (integers - self.last).sign().to(torch.int8)
        oscillated = (change * self.direction) < 0
        if step == self.step:
            return oscillated
        self.step = step
        self.frequency.lerp_(oscillated.float(), momentum)
        self.average.lerp_(integers, momentum)
        self.direction = torch.where(change != 0, change, self.direction)
        self.last = integers
        return oscillated

    def freeze(self, threshold: float) -> int:
        """Fix the integers that oscillate more often, at their rounded average, to the end.

        Returns:
            How many were fixed by this call.
        """
        new = (self.frequency > threshold) & ~self.frozen
        self.last = torch.where(new, self.average.round(), self.last)
        self.frozen |= new
        return int(new.sum())

    def to(self, device: torch.device) -> None:
        """Move everything."""
        if self.last.device != device:
            for name in _TENSORS:
                setattr(self, name, getattr(self, name).to(device))

    def state_dict(self) -> dict[str, Any]:
        """Everything, for resuming."""
        return {**{name: getattr(self, name).clone() for name in _TENSORS}, "step": self.step}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Watch:
        """The inverse of :meth:`state_dict`."""
        watch = cls(state["last"])
        for name in _TENSORS:
            setattr(watch, name, state[name].clone())
        watch.step = state["step"]
        return watch


_TENSORS = ("last", "direction", "frequency", "average", "frozen")


def hold(watch: Watch | None, values: Tensor, steps: Tensor) -> Tensor:
    """``values``, but where integers are frozen those integers times ``steps``.

    Weights there get no gradient; steps get their true one.
    """
    if watch is None:
        return values
    watch.to(values.device)
    return torch.where(watch.frozen, watch.last * steps, values)


@dataclass(frozen=True)
class CountOscillations:
    """A schedule that counts and changes nothing; read with :func:`oscillating`.

    Attributes:
        momentum: share of the newest step in the moving averages, by default that of the published
            command line. A frequency is known well from two or three times this value on.
    """

    momentum: float = MOMENTUM

    def __post_init__(self) -> None:
        _check_momentum(self.momentum)

    def __call__(self, run: Attached, step: int) -> None:
        for _, watch in _look(run, self.momentum, step, None):
            del watch


@dataclass(frozen=True)
class FreezeOscillations:
    """A schedule that fixes the integers of weights which oscillate too often, to the end.

    They are fixed at their rounded moving average. By default as in the paper for 3 bits: nothing
    in the first quarter of training, then a threshold from 0.1 to 0.011; at 4 bits it ends at 0.01.

    Attributes:
        threshold: oscillations per step above which an integer is fixed. Of a ramp, nothing is
            fixed before it begins.
        momentum: share of the newest step in the moving averages; at most a half to a third of
            the threshold: with more, two changes of direction would do. A run of a few hundred
            steps needs a larger one, and a higher threshold.
        max_bits: weights of more bits are left alone, and grids without ends too; None for all.
    """

    threshold: float | Ramp = FREEZING
    momentum: float = MOMENTUM
    max_bits: int | None = 4

    def __post_init__(self) -> None:
        _check_momentum(self.momentum)

    def __call__(self, run: Attached, step: int) -> None:
        ramp = self.threshold
        begun = not isinstance(ramp, Ramp) or run.progress > ramp.begin
        limit = value_at(ramp, run.progress)
        for surrogate, watch in _look(run, self.momentum, step, self.max_bits):
            if begun and watch.freeze(limit):
                surrogate.reset()  # what it showed before is out of date


@dataclass(frozen=True)
class Dampening:
    """A penalty that pulls weights to the middle of their bins.

    ``weight * sum((rounded - clip(w, least, greatest))**2)``, summed over the first axis and
    averaged over the others ("kernel_mean"), then summed over tensors. Steps get no gradient.

    Attributes:
        weight: the factor (lambda), by default the paper's: 0 to 0.1 from a quarter of training on.
    """

    weight: float | Ramp = DAMPENING

    def __call__(self, run: Attached) -> Tensor:
        factor = value_at(self.weight, run.progress)
        total = torch.zeros((), device=next(run.model.parameters()).device)
        if not factor:
            return total
        for _, surrogate, weight in run.weights():
            if not isinstance(surrogate, Watchable) or not weight.numel():
                continue
            with whole(surrogate, weight.device):
                low, high = surrogate.ends()
                rounded = surrogate.noisy(plain(weight).float()).detach()
            distance = rounded - torch.clamp(gathered(weight).float(), low, high)
            total = total + distance.square().sum(0).mean()
        return total * factor


def oscillating(run: Attached, above: float = 0.005) -> float:
    """Share of the watched weights that oscillate more often than ``above``, frozen ones excepted.

    Raises:
        SpecError: nothing is watched.
    """
    watches = [watch for _, watch in _watched(run)]
    if not watches:
        raise SpecError(
            "nothing is watched yet: give attach schedules=[CountOscillations()] and train"
        )
    count = sum(int(((w.frequency > above) & ~w.frozen).sum()) for w in watches)
    return count / sum(w.last.numel() for w in watches)


def frozen_share(run: Attached) -> float:
    """Share of the watched weights that are frozen; 0 where nothing is watched."""
    watches = [watch for _, watch in _watched(run)]
    total = sum(watch.last.numel() for watch in watches)
    return sum(int(watch.frozen.sum()) for watch in watches) / max(total, 1)


def _watched(run: Attached) -> Iterator[tuple[Surrogate, Watch]]:
    for _, surrogate, _ in run.weights():
        watch = getattr(surrogate, "watch", None)
        if isinstance(watch, Watch):
            yield surrogate, watch


def _look(
    run: Attached, momentum: float, step: int, max_bits: int | None
) -> Iterator[tuple[Surrogate, Watch]]:
    """Let everything that can be watched be looked at after a step."""
    for _, surrogate, weight in run.weights():
        if not isinstance(surrogate, Watchable):
            continue
        if max_bits is not None and (surrogate.bits is None or surrogate.bits > max_bits):
            continue
        with whole(surrogate, weight.device):
            integers = surrogate.integers(plain(weight).float())
        if surrogate.watch is None:
            surrogate.watch = Watch(integers)
            surrogate.watch.step = step
        else:
            surrogate.watch.look(integers, momentum, step)
        yield surrogate, surrogate.watch


def _check_momentum(momentum: float) -> None:
    if not 0 < momentum <= 1:
        raise SpecError(f"momentum is the share of the newest step, 0 to 1, not {momentum}")
