"""Numbers of a file that cost no bytes, trained until outputs are as they were: codes stay.

What codes are multiplied by, what they are looked up in, and the values of vectors: few numbers,
which no code depends on. Hinton et al. 2015's distillation on samples without labels; for steps and
norms as in EfficientQAT's second phase (Chen et al. 2024, arXiv 2407.11062), WaterSIC's last (arXiv
2603.04956), and PV-tuning (Malinovskii et al. 2024, arXiv 2405.14852), which moves codes as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dither.core import Encoded, SpecError
from dither.data import Data, device_of
from dither.formats import Affine, Raw
from dither.formats.grouping import Grouping
from dither.model import evaluating
from dither.progress import steps

RATE = 5e-3
"""Learning rate of logarithms of scales, and of vectors in their standard deviations (Adam)."""

PATIENCE = 3
"""Passes without a gain on held-out samples after which no more follow."""


class Scales:
    """Codes that stay, and the scales that they are multiplied by; equal scales stay equal.

    Args:
        held: a tensor whose values are proportional to its scales.
        grouping: which values share a scale.
    """

    def __init__(self, held: Encoded, grouping: Grouping) -> None:
        self._held, self._grouping = held, grouping
        self._base = held.decode().float()
        self._first, self._which = held.params["scale"].float().unique(return_inverse=True)
        self.learned = torch.zeros_like(self._first, requires_grad=True)

    def _stored(self) -> Tensor:
        """Scales in the type of the file; the gradient passes through it."""
        scales: Tensor = self._first * self.learned.exp()
        return scales.to(self._held.params["scale"].dtype)

    def value(self) -> Tensor:
        factors = torch.where(self._first == 0, 1.0, self._stored().float() / self._first)
        args = (factors[self._which], self._base, self._grouping)
        found: Tensor = _Scaled.apply(*args)  # type: ignore[no-untyped-call]
        return found

    def encoded(self) -> Encoded:
        scale = self._stored().detach()[self._which]
        return replace(self._held, params={**self._held.params, "scale": scale})


class Points:
    """Codes that stay, and the values that they are looked up in."""

    def __init__(self, held: Encoded, name: str) -> None:
        self._held, self._name = held, name
        table = held.params[name]
        order = torch.arange(table.numel(), device=table.device)
        order = order.reshape(table.shape).to(table.dtype)
        self._index = replace(held, params={name: order}).decode().long()
        self._first = table.float().reshape(-1)
        self._unit = self._first.std(correction=0)
        self.learned = torch.zeros_like(self._first, requires_grad=True)

    def _stored(self) -> Tensor:
        moved = self._first + self._unit * self.learned
        return moved.to(self._held.params[self._name].dtype)

    def value(self) -> Tensor:
        return self._stored().float()[self._index]

    def encoded(self) -> Encoded:
        table = self._stored().detach().reshape(self._held.params[self._name].shape)
        if table.ndim == 1 and bool((table.diff() < 0).any()):
            return self._held  # points of a codebook are in order
        return replace(self._held, params={self._name: table})


class Values:
    """A vector: trained as it is, and rounded to its own grid again."""

    def __init__(self, held: Encoded) -> None:
        self._held = held
        self._first = held.decode().float()
        spread = float(self._first.std(correction=0)) if held.numel > 1 else 0.0
        self._unit = next(u for u in (spread, float(self._first.abs().mean()), 1.0) if u)
        self.learned = torch.zeros_like(self._first, requires_grad=True)

    def value(self) -> Tensor:
        return self._first + self._unit * self.learned

    def encoded(self) -> Encoded:
        held, fmt = self._held, self._held.format
        value = self.value().detach()
        if not bool(self.learned.any()):
            return held
        if not isinstance(fmt, Affine):
            return fmt.encode(value.to(held.dtype))
        # Within the ends that there were: a wider range takes a larger table.
        value = value.clamp(float(self._first.min()), float(self._first.max()))
        return fmt.assign(value.to(held.dtype), fmt.params_of(held))


Part = Scales | Points | Values
"""Numbers of one tensor that are trained: its value now, differentiable, and as a file has it."""


def part_of(held: Encoded) -> Part | None:
    """What can be trained of a tensor, if anything can."""
    if not held.dtype.is_floating_point or not held.numel:
        return None
    if len(held.shape) < 2:
        return Values(held) if isinstance(held.format, Raw | Affine) else None
    params = dict(held.params)
    if set(params) == {"scale"} and hasattr(held.format, "axis"):
        grouping = Grouping(held.shape, held.format.axis, getattr(held.format, "group", None))
        twice = replace(held, params={"scale": 2 * params["scale"]}).decode()
        if grouping.count == len(params["scale"]) and torch.equal(twice, 2 * held.decode()):
            return Scales(held, grouping)
    for name in ("points", "centroids"):
        table = params.get(name)
        # Their numbers are looked up in the table's own type, which must count so far.
        if (
            len(params) == 1
            and table is not None
            and table.numel() <= 2 / torch.finfo(table.dtype).eps
        ):
            return Points(held, name)
    return None


class _Scaled(torch.autograd.Function):
    """A tensor times one factor for each group of its values."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor, base: Tensor, grouping: Grouping) -> Tensor:
        ctx.base, ctx.grouping, ctx.count = base, grouping, len(factors)
        out = base.clone(memory_format=torch.contiguous_format)
        for box, part in zip(grouping.views(out), grouping.spread(factors), strict=True):
            box.mul_(part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        grouping: Grouping = ctx.grouping
        total = gradient.new_zeros(ctx.count)
        products = (gradient * ctx.base).contiguous()
        for box, part in zip(grouping.views(products), grouping.spread(total), strict=True):
            part.add_(box.sum(grouping.reduced, keepdim=True))
        return total, None, None


class Student:
    """A copy of a model that reads what is trained where it read parameters.

    Args:
        model: a copy of its own, with the values of the file; it is used up.
        tensors: of the file, by name; those that are no parameters stay as they are.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Encoded]) -> None:
        self.model = model
        named, device = dict(model.named_parameters(remove_duplicate=False)), device_of(model)
        self.parts: dict[str, Part] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        for name, held in tensors.items():
            part = part_of(held.to(device)) if name in named else None
            if part is not None:
                self.parts[name] = part
                self._places[name] = list(_places(model, named[name]))
        self._dtypes = {name: named[name].dtype for name in self.parts}
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's
        for places in self._places.values():
            for module, local in places:
                del module._parameters[local]
        # Batches go where the first parameter is, and there may be none any more.
        model.register_parameter("dither_device", nn.Parameter(torch.empty(0, device=device)))

    def show(self) -> None:
        """Let the model read what is learned, as it is now."""
        for name, part in self.parts.items():
            value = part.value().to(self._dtypes[name])
            for module, local in self._places[name]:
                setattr(module, local, value)  # of recurrent layers, in their list of weights, too

    def encoded(self) -> dict[str, Encoded]:
        """What is trained, as a file holds it."""
        return {name: part.encoded().to("cpu") for name, part in self.parts.items()}

    def learned(self) -> list[Tensor]:
        """What is trained."""
        return [part.learned for part in self.parts.values()]


def _places(model: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[nn.Module, str]]:
    """Where a model holds a parameter."""
    for module in model.modules():
        for local, value in list(module._parameters.items()):
            if value is parameter:
                yield module, local


@dataclass(frozen=True)
class Course:
    """How long and how fast.

    Attributes:
        passes: over the samples, at most.
        seconds: after which no pass begins, if given; files then depend on the machine.
        rate: of learning, at first; it falls along half a cosine.
        seed: of the order of batches.
    """

    passes: int = 8
    seconds: float | None = None
    rate: float = RATE
    seed: int = 0


def train(student: Student, fit: Data, judge: Data, teacher: nn.Module, course: Course) -> float:
    """Train what is learned, and leave it as it was best on the samples to judge by.

    Args:
        student: begins as the file is.
        fit: samples to train on, in memory.
        judge: others, in memory.
        teacher: the original.
        course: how long and how fast.

    Returns:
        The mean distance of outputs on the samples to judge by.

    Raises:
        SpecError: the distance has no gradient.
    """
    batches, goals, wanted = list(fit), outputs_of(teacher, fit), outputs_of(teacher, judge)
    optimizer = torch.optim.Adam(student.learned(), course.rate)
    generator = torch.Generator().manual_seed(course.seed)
    total, done, start = course.passes * len(batches), 0, time.monotonic()
    best, waited = judged(student, judge, wanted), 0
    kept = [value.detach().clone() for value in student.learned()]
    for _ in steps("tuning", range(course.passes)):
        if course.seconds is not None and time.monotonic() - start > course.seconds:
            break
        for number in torch.randperm(len(batches), generator=generator).tolist():
            share = (1 + math.cos(math.pi * done / total)) / 2
            optimizer.param_groups[0]["lr"] = course.rate * share
            _step(student, fit, (batches[number], goals[number]), optimizer)
            done += 1
        found = judged(student, judge, wanted)
        waited = 0 if found < best else waited + 1
        if found < best:
            best, kept = found, [value.detach().clone() for value in student.learned()]
        if waited == PATIENCE:
            break
    with torch.no_grad():
        for value, before in zip(student.learned(), kept, strict=True):
            value.copy_(before)
    return best


def _step(
    student: Student, fit: Data, pair: tuple[Any, object], optimizer: torch.optim.Optimizer
) -> None:
    with evaluating(student.model), torch.enable_grad():
        student.show()
        distance: object = fit.distance(fit.output(student.model, pair[0]), pair[1])
        if not (isinstance(distance, Tensor) and distance.requires_grad):
            raise SpecError(
                "tuning follows the gradient of the distance of outputs, and here there is none: "
                "give Data(..., distance=...) that torch can differentiate, and a forward without "
                "no_grad"
            )
        if bool(distance.detach().isfinite()):
            optimizer.zero_grad()
            distance.backward()
            optimizer.step()


def judged(student: Student, judge: Data, wanted: Sequence[object]) -> float:
    """Mean distance of outputs now."""
    with torch.no_grad():
        student.show()
    return apart(student.model, judge, wanted)


def apart(model: nn.Module, judge: Data, wanted: Sequence[object]) -> float:
    """Mean distance of a model's outputs from wanted ones."""
    with evaluating(model), torch.no_grad():
        outputs = (judge.output(model, batch) for batch in judge)
        each = [float(judge.distance(o, w)) for o, w in zip(outputs, wanted, strict=True)]
    return sum(each) / len(each)


def outputs_of(model: nn.Module, data: Data) -> list[object]:
    """What a model gives for each batch."""
    with evaluating(model), torch.no_grad():
        return [data.output(model, batch) for batch in data]
