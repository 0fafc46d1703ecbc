"""Learned steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dither.core import Encoded, SpecError, Stats
from dither.encoders.rdo import HIGH_RATE_STRENGTH
from dither.formats import Affine
from dither.train.code_lengths import CodeLengths, GivenSlopes
from dither.train.method import Method
from dither.train.oscillations import Watch, hold
from dither.train.surrogate import Surrogate


@dataclass(frozen=True)
class LSQ(Method):
    """Learned step size quantization (Esser et al. 2020, arXiv 1902.08153).

    ``w = s * clamp(round(w / s))``; the gradient passes straight through to weights within the
    range, and reaches ``s`` as ``round(w / s) - w / s`` within it and as the code at its ends. The
    logarithm of ``s`` is what is learned, so that a step stays positive and one learning rate suits
    all tensors.

    With ``bits=None`` the grid has no ends and its codes are entropy-coded: only the size penalty
    keeps steps from shrinking. This is what a budget uses by default.

    Attributes:
        bits: 2 to 16, or None for an unbounded grid.
        axis: one step per index of this axis; by default one per tensor.
        group: one step per this many consecutive weights of a row.
        step: the first step; by default ``2 * mean|w| / sqrt(2**(bits - 1) - 1)`` as in the paper,
            and for an unbounded grid what the data-free search for the budget finds, or an eighth
            of the standard deviation.
        learn: whether the step is learned.
        refresh: steps for which the size penalty keeps its estimate and its gradients; 1 looks
            anew at each step, which costs about ten passes over the weight.
        lr: learning rate of the logarithm of the step, for Adam.

    >>> weight = torch.tensor([[-0.8, -0.31, 0.02, 0.7]])
    >>> LSQ(4, step=0.1).begin(weight).encode(weight).decode()
    tensor([[-0.8008, -0.3003,  0.0000,  0.7007]])
    """

    name: ClassVar[str] = "lsq"

    bits: int | None = 4
    axis: int | None = None
    group: int | None = None
    step: float | None = None
    learn: bool = True
    refresh: int = 10
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.refresh < 1:
            raise SpecError(f"LSQ looks anew after 1 or more steps, not {self.refresh}")
        if self.bits is not None and not 2 <= self.bits <= 16:
            raise SpecError(f"LSQ has 2 to 16 bits, or None for no bound, not {self.bits}")
        if self.step is not None and not (math.isfinite(self.step) and self.step > 0):
            raise SpecError(f"LSQ begins with a positive step, not {self.step}")
        self.format  # noqa: B018 - refuses what the format refuses

    @property
    def format(self) -> Affine:
        """What the file holds."""
        return Affine(self.bits, self.axis, self.group, scale_dtype=torch.bfloat16)

    def begin(self, weight: Tensor) -> LearnedStep:
        return LearnedStep(self, weight)


class LearnedStep(Surrogate):
    """One weight on a grid whose steps are learned.

    Attributes:
        log_step: natural logarithms of the steps, ``(steps,)``.
        classes: which of the steps each row has, ``(rows,)``, or None: where the search for the
            budget gave rows of a token table different steps, equal ones stay equal.
        watch: of codes that go back and forth, see :mod:`dither.train.oscillations`.
    """

    def __init__(self, spec: LSQ, weight: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.lr = spec.lr
        self.can_trim = True
        self.nudges = spec.bits is None and spec.learn
        self.classes: Tensor | None = None
        self.watch: Watch | None = None
        self._rate: tuple[Tensor, Tensor, Tensor] | None = None
        self._read: Tensor | None = None
        self._shape = tuple(weight.shape)
        self._grouping = spec.format.grouping(self._shape)
        steps = self._first(weight)
        self.log_step = nn.Parameter(steps.log(), requires_grad=spec.learn)

    def _first(self, weight: Tensor) -> Tensor:
        weight = weight.float()
        if self.spec.step is not None:
            return torch.full((self._grouping.count,), self.spec.step, device=weight.device)
        if self.spec.bits is None:
            return self.spec.format.fit(weight)["scale"].float()
        top = 2 ** (self.spec.bits - 1) - 1
        steps = 2 * self._grouping.magnitude(weight) / math.sqrt(top)
        return torch.where(steps > 0, steps, 1.0).float()

    def start(self, encoded: Encoded) -> None:
        """Take the steps that the data-free search found, where none was given."""
        found, plain_grid = encoded.format, self._grouping.count == 1
        if self.spec.bits is not None or self.spec.step is not None or not plain_grid:
            return
        if not isinstance(found, Affine) or found.bits is not None:
            return
        self._take(encoded.params["scale"])

    def _take(self, found: Tensor) -> None:
        """Begin with some steps: one, or one for each row, of which equal ones stay equal."""
        steps = found.float().to(self.log_step.device)
        self.classes = self._rate = None
        if len(steps) > 1:
            steps, self.classes = steps.unique(return_inverse=True)
        self.log_step = nn.Parameter(steps.log(), requires_grad=self.spec.learn)

    def nudge(self, octaves: float) -> None:
        if self.spec.bits is not None:
            octaves = max(octaves, 0.0)  # finer, it would clip; its gradient brings the step back
        if self.spec.learn:
            with torch.no_grad():
                self.log_step.add_(octaves * math.log(2))

    def steps(self) -> Tensor:
        """The steps as files store them, differentiable, broadcastable to the weight."""
        return self._spread(self._stored())

    def _stored(self) -> Tensor:
        steps = self.log_step.exp()
        return steps.detach().bfloat16().float() + (steps - steps.detach())

    def _trimmed(self) -> Tensor:
        """Steps as a budget wants them; finer ones of a grid with ends would clip."""
        trim = self.trim if self.spec.bits is None else max(self.trim, 0.0)
        steps: Tensor = self.log_step.detach().exp() * 2.0**trim
        return steps

    def noisy(self, weight: Tensor) -> Tensor:
        self._read = None
        steps = self.steps()
        return hold(self.watch, self._rounded(weight, steps), steps)

    def reads_rows(self) -> bool:
        return self.watch is None and self.spec.group is None and self._grouping.axis in {None, 0}

    def noisy_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        return self._rounded(rows, self._read_steps(index))

    def _read_steps(self, index: Tensor) -> Tensor:
        """Steps of some rows, ``(..., 1)``, and a note that these are read."""
        steps = self._stored()
        if self._read is not None:
            self._read[index] = True
        if self.classes is not None:
            steps = steps[self.classes[index]]
        elif len(steps) > 1:
            steps = steps[index]
        return steps.reshape(*(index.shape if len(steps) > 1 else [1] * index.ndim), 1)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        steps = self._trimmed()
        fmt = self.spec.format
        if self.classes is not None:
            steps, fmt = steps[self.classes], Affine(None, axis=0, scale_dtype=torch.bfloat16)
        if self.watch is not None:
            held = hold(self.watch, weight.float(), self.steps().detach())
            weight = held.to(weight.dtype)
        return fmt.assign(weight, {"scale": steps.bfloat16()})

    def soft_bits(self, weight: Tensor) -> Tensor:
        """The entropy of the codes, with the slopes of interpolated lengths: `CodeLengths`.

        Of a table of which only rows are read, only these have slopes, and only steps that one of
        them has: a row that no batch reads would otherwise fall to 0, with nothing to hold it.
        """
        bits, slopes, to_log = self._rate or self._look(weight.detach())
        if self._read is not None and bool(self._read.any()):
            slopes = slopes * self._read.unsqueeze(1)
            to_log = to_log * (self._gather(self._read.to(to_log.dtype)) > 0)
        value: Tensor = GivenSlopes.apply(  # type: ignore[no-untyped-call]
            weight, self.log_step, bits, (slopes, to_log)
        )
        return value

    @torch.no_grad()
    def worthless(self, weight: Tensor) -> float:
        """The share of weights that lose less as 0 than their codes cost.

        A bit is worth what a fine grid of this step pays for it, ``ln(2) / 6`` squared steps.
        """
        steps = self.steps()
        place = (self._cleared(weight.float(), steps) / steps).clamp_(*self._ends())
        lengths = CodeLengths.of(place, self.classes)
        codes = place.round()
        lost = place.square() - (place - codes).square()
        saved = lengths.at(codes, self.classes) - lengths.at(torch.zeros_like(codes), self.classes)
        return float((lost <= HIGH_RATE_STRENGTH * saved).float().mean())

    @property
    def bits(self) -> int | None:
        """Bits of a weight, or None where the grid has no ends."""
        return self.spec.bits

    def integers(self, weight: Tensor) -> Tensor:
        """The codes of a weight now, from 0 in both directions; float32, without a graph."""
        steps = self.steps().detach()
        cleared = self._cleared(weight.detach().float(), steps)
        return (cleared / steps).round_().clamp_(*self._ends())

    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and greatest value, broadcastable to the weight; no graph."""
        low, high = self._ends()
        steps = self.steps().detach()
        return steps * low, steps * high

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        if step % self.spec.refresh == 0:
            self.renew()
        # Of all rows, until some are looked up and the table as a whole is not.
        is_table = weight.ndim == 2 and self.reads_rows()
        marks = torch.zeros(weight.shape[:1], dtype=torch.bool, device=weight.device)
        self._read = marks if is_table else None

    def renew(self) -> None:
        self._rate = None

    def aside(self) -> dict[str, Any]:
        return {
            "classes": self.classes,
            "rate": self._rate,
            "watch": None if self.watch is None else self.watch.state_dict(),
        }

    def load_aside(self, state: Mapping[str, Any]) -> None:
        self.classes, self._rate = state["classes"], state["rate"]
        self.watch = None if state["watch"] is None else Watch.from_state(state["watch"])

    @torch.no_grad()
    def _look(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bits now, and their gradients to the weight and to the logarithms of the steps."""
        steps = self.steps()
        held = hold(self.watch, weight.float(), steps)
        place = (held / steps).clamp_(*self._ends())
        lengths = self._lengths(place)
        slopes = lengths.slopes(place, self.classes)
        to_log = self._share(place.mul_(slopes).neg_())
        value = torch.tensor(lengths.total, dtype=torch.float32, device=weight.device)
        self._rate = (value, slopes.div_(steps).to(weight.dtype), to_log)
        return self._rate

    def _cleared(self, weight: Tensor, steps: Tensor) -> Tensor:
        """The weight with 0 where it is 0 though another code is nearer: nowhere here."""
        return weight

    def _rounded(self, weight: Tensor, steps: Tensor) -> Tensor:
        """Values on the grid, with gradients to weights and steps."""
        low, high = self._ends()
        values: Tensor = _Learned.apply(  # type: ignore[no-untyped-call]
            self._cleared(weight, steps), steps, low, high
        )
        return values

    def _lengths(self, place: Tensor) -> CodeLengths:
        """What codes cost, by positions in steps."""
        return CodeLengths.of(place, self.classes)

    def _gather(self, by_row: Tensor) -> Tensor:
        """Sums over rows that share a step, ``(steps,)``."""
        if self.classes is not None:
            return torch.zeros_like(self.log_step).index_add_(0, self.classes, by_row)
        return by_row if len(by_row) == len(self.log_step) else by_row.sum().reshape(1)

    def _share(self, values: Tensor) -> Tensor:
        """Sums over the weights that share a step, ``(steps,)``."""
        if len(self.log_step) == 1:
            return values.sum().reshape(1)
        if self.classes is not None:
            return self._gather(values.reshape(len(values), -1).sum(1))
        total = torch.zeros_like(self.log_step)
        pieces = zip(self._grouping.views(values), self._grouping.spread(total), strict=True)
        for box, part in pieces:
            part.add_(box.sum(self._grouping.reduced, keepdim=True))
        return total

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Steps of classes load, too, before their classes do (:meth:`load_aside`)."""
        saved = state_dict.get(f"{prefix}log_step")
        if saved is not None and saved.shape != self.log_step.shape and saved.ndim == 1:
            self.log_step.data = torch.empty_like(saved, device=self.log_step.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _ends(self) -> tuple[float, float]:
        if self.spec.bits is None:
            return -math.inf, math.inf
        half = 1 << (self.spec.bits - 1)
        return float(-half), float(half - 1)

    def _spread(self, steps: Tensor) -> Tensor:
        """Steps as they broadcast to the weight."""
        if len(steps) == 1:
            return steps.reshape([1] * len(self._shape))
        if self.classes is not None:
            return steps[self.classes].reshape([-1] + [1] * (len(self._shape) - 1))
        if self.spec.group is None:
            axis = self._grouping.axis or 0
            return steps.reshape([-1 if a == axis else 1 for a in range(len(self._shape))])
        pieces = self._grouping.spread(steps)
        boxes = self._grouping.views(torch.empty(self._shape, device="meta"))
        wide = [p.expand(b.shape).flatten(1) for p, b in zip(pieces, boxes, strict=True)]
        if not wide:  # an empty weight
            return steps.new_ones(self._shape)
        return torch.cat(wide, 1).reshape(self._shape)


class _Learned(torch.autograd.Function):
    """Rounding to a grid with gradients to weights and steps (Esser et al. 2020, eqs. 1 to 3)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, low: float, high: float) -> Tensor:
        codes = (weight / step).round_()
        if math.isfinite(high):
            codes.clamp_(low, high)
        ctx.save_for_backward(weight, step)
        ctx.ends = (low, high)
        return codes.mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, step = ctx.saved_tensors
        low, high = ctx.ends
        place = weight / step
        codes = place.round()
        to_weight = gradient
        if math.isfinite(high):
            inside = (place >= low) & (place <= high)
            codes = codes.clamp_(low, high).sub_(place * inside)
            to_weight = gradient * inside
        else:
            codes = codes.sub_(place)
        to_step = codes.mul_(gradient).sum_to_size(step.shape) if ctx.needs_input_grad[1] else None
        return to_weight, to_step, None, None
