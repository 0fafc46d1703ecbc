"""Trellis coded quantization: two uniform grids, and a machine that says which one is in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from dither.core import (
    Codes,
    Encoded,
    Format,
    SpecError,
    Stats,
    expect_codes,
    expect_param,
    expect_parts,
)
from dither.formats.affine import SCALE_DTYPES
from dither.formats.grid_rounding import require_floating, require_held, restore, usable_scale
from dither.formats.grouping import CHUNK, Grouping, rows_of
from dither.formats.memory import new_tensor
from dither.formats.parity_machine import POLYNOMIALS, last_steps, predecessors, quantizers
from dither.formats.settings import check_choice, check_count, check_restored

MOST_CODES = 1 << 23
"""The largest alphabet: multiples of the step, twice as many, are exact in float32."""

CLASSES = 4
"""Multiples of the step modulo 4: the quantizer, plus twice the parity of the code."""

_ACROSS = 1 << 10
"""Rows decoded at once, at least: neighbours in memory, so that they are read together."""

_SEARCHED = 1 << 20
"""Weights whose paths are sought at once: it bounds the temporary memory, to some 100 MB."""


@dataclass(frozen=True)
class Trellis(Format):
    """Trellis-coded quantization: even or odd multiples of a step (Marcellin, Fischer 1990).

    A code ``k`` stands for ``(2 * k + z) * scale``: with ``z = 0`` for an even and with ``z = 1``
    for an odd multiple. Which of the two holds follows from the parities of the codes before it in
    the row, by a linear machine (:mod:`dither.formats.parity_machine`); a row of the tensor viewed
    as ``(shape[0], rest)`` is a path that begins with ``z = 0``, and a vector is one row. Because
    an encoder may choose among all paths, errors are as small as those of a scalar grid at 0.15 to
    0.2 bits more for each weight. Codes have no bound.

    Parts: codes ``levels`` and ``zero`` (minus the lowest code, ``(1,)``); param ``scale``. Rows
    are the last axis of ``levels``, of shape ``(*shape[1:], shape[0])``, so that codes of all rows
    can be read side by side. Decoding multiplies once in float32.

    Attributes:
        states: of the machine: 4, 8, 16, 32, 64, 128 or 256. Encoding takes time in proportion;
            each doubling gains about 0.05 dB.
        axis: one scale per index of this axis; None for one scale.
        scale_dtype: type of scales: float32, float16 or bfloat16.

    Raises:
        SpecError: settings out of range, weights that are not finite, a step too small.

    >>> weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> encoded = Trellis().assign(weight, {"scale": torch.tensor([0.5])})
    >>> error = float((encoded.decode() - weight).square().mean())
    >>> error < 0.8 * 1.0**2 / 12  # a grid of the same rate has a step of 1
    True
    """

    name: ClassVar[str] = "trellis"

    states: int = 8
    axis: int | None = None
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_choice("Trellis", "states", self.states, tuple(POLYNOMIALS))
        check_choice("Trellis", "scale_dtype", self.scale_dtype, SCALE_DTYPES)
        if self.axis is not None:
            check_count("Trellis", "axis", self.axis, -64, 63)

    def grouping(self, shape: tuple[int, ...]) -> Grouping:
        """Which weights of a tensor share a scale."""
        return Grouping(tuple(shape), self.axis)

    def fit(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """A sixteenth of the standard deviation, at least 2**-21 of the largest magnitude.

        For a constant a quarter of its magnitude, which a path of even multiples meets exactly.
        """
        del stats
        weight = require_floating(weight, self.name)
        grouping = self.grouping(tuple(weight.shape))
        low, high = grouping.bounds(weight)
        largest = torch.maximum(low.abs(), high)
        step = grouping.deviation(weight) / 16
        step = torch.where(step > 0, torch.maximum(step, largest / (1 << 21)), largest / 4)
        return {"scale": usable_scale(torch.where(step == 0, 1.0, step), self.scale_dtype)}

    def assign(self, weight: Tensor, params: Mapping[str, Tensor]) -> Encoded:
        """The path of the least squared error (Viterbi); ``params`` as :meth:`fit` gives them.

        Raises:
            SpecError: parameters that are missing, not finite or of the wrong size; a step so
                small that it would need more than 2**23 codes.
        """
        weight = require_floating(weight, self.name)
        shape = tuple(weight.shape)
        grouping = self.grouping(shape)
        scale = require_held(self, params, "scale", grouping.count).to(weight.device)
        scale = scale.to(self.scale_dtype, copy=True)
        if not bool(scale.isfinite().all()):
            raise SpecError(f"{self!r}: 'scale' is not finite in {self.scale_dtype}")
        if not bool(weight.to(torch.float32).isfinite().all()):
            raise SpecError(
                "a weight is not finite, or is beyond float32; repair it, or store the tensor "
                "with Raw()"
            )
        rows, columns = rows_of(shape)
        shared = self._along(scale, shape)
        multiples = torch.empty(columns, rows, dtype=torch.int32, device=weight.device)
        table, steps = weight.reshape(rows, columns), shared.expand(shape).reshape(rows, columns)
        for start in range(0, rows, size := max(1, _SEARCHED // max(columns, 1))):
            part = slice(start, start + size)
            multiples[:, part] = _nearest(table[part].T, steps[part].T.float(), self.states)
        return self.encoded(multiples, shape, weight.dtype, scale)

    def encoded(
        self, multiples: Tensor, shape: tuple[int, ...], dtype: torch.dtype, scale: Tensor
    ) -> Encoded:
        """A tensor from the multiples of its steps.

        Args:
            multiples: ``(columns, rows)`` int32, a path of the trellis in each row.
            shape: of the tensor.
            dtype: type to restore it to.
            scale: ``(scales,)`` in ``scale_dtype``.

        Raises:
            SpecError: there are more than 2**23 codes between the lowest and the highest.
        """
        codes = multiples >> 1  # rounds down, so that an odd multiple is 2 * code + 1
        low = min(0, int(codes.min())) if codes.numel() else 0
        low -= low & 1  # codes as they are stored keep their parity, which the coder looks at
        alphabet = (max(0, int(codes.max())) if codes.numel() else 0) - low + 1
        if max(alphabet, -low) >= MOST_CODES:
            raise SpecError(
                f"a step of {scale.abs().min().item():.4g} needs more than 2**23 codes for this "
                "tensor; give a larger step, or use Raw()"
            )
        zero = torch.full((1,), -low, dtype=torch.int32, device=codes.device)
        levels = Codes(codes.sub_(low).reshape(_stored(shape)), alphabet)
        parts = {"levels": levels, "zero": Codes(zero, MOST_CODES)}
        return Encoded(self, shape, dtype, parts, {"scale": scale})

    def machine(self, part: str) -> tuple[int, int] | None:
        """The one that says which quantizer is in force."""
        return POLYNOMIALS[self.states] if part == "levels" else None

    def decode(self, encoded: Encoded) -> Tensor:
        """The machine from the parities, exact integers, then one float32 multiplication."""
        rows, columns = rows_of(encoded.shape)
        levels = encoded.codes["levels"].values.reshape(columns, rows)
        zero = encoded.codes["zero"].values.to(torch.int32)
        out = new_tensor((rows, columns), encoded.dtype, levels.device)
        width = max(1, min(rows, max(_ACROSS, CHUNK // max(columns, 1))))
        length = max(1, CHUNK // width)
        for left in range(0, rows, width):
            across, before = slice(left, left + width), None
            for top in range(0, columns, length):
                along = slice(top, top + length)
                codes = levels[along, across].to(torch.int32) - zero
                parities = (codes & 1).to(torch.uint8)
                second = quantizers(parities, self.states, before)
                before = last_steps(second, parities, before)
                values = (
                    codes.mul_(2).add_(second).float().T.mul_(self._box(encoded, across, along))
                )
                out[across, along] = restore(values, encoded.dtype)
        return out.reshape(encoded.shape)

    def _box(self, encoded: Encoded, across: slice, along: slice) -> Tensor:
        """Scales of some rows and columns, float32, as they broadcast to the box."""
        scale, axis = encoded.params["scale"], self.grouping(encoded.shape).axis
        if axis is None:
            return scale.float()
        if axis == 0 and len(encoded.shape) > 1:
            return scale[across].float()[:, None]
        at = torch.arange(*along.indices(rows_of(encoded.shape)[1]), device=scale.device)
        inner = prod(encoded.shape[axis + 1 :])
        return scale[at // inner % len(scale)].float()

    def check(self, encoded: Encoded) -> None:
        """Levels with the rows as their last axis, one zero, one scale for each index."""
        expect_parts(encoded, {"levels", "zero"}, {"scale"})
        check_restored(self.name, encoded.dtype)
        count = self.grouping(encoded.shape).count
        expect_param(encoded, "scale", (count,), self.scale_dtype)
        expect_codes(encoded, "levels", _stored(encoded.shape), None)
        expect_codes(encoded, "zero", (1,), MOST_CODES)
        if encoded.codes["levels"].alphabet > MOST_CODES:
            raise SpecError(
                f"part 'levels' of format 'trellis' has at most {MOST_CODES} symbols, not "
                f"{encoded.codes['levels'].alphabet}"
            )

    def _along(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Scales as they broadcast to the tensor."""
        axis = self.grouping(shape).axis
        return scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the levels: rows last."""
    return (*shape[1:], *shape[:1])


def _nearest(weight: Tensor, steps: Tensor, states: int) -> Tensor:
    """Multiples, int32, whose restored values have the least squared error in each row.

    Args:
        weight: ``(columns, rows)``, finite.
        steps: likewise, float32.
        states: of the machine.
    """
    double = weight.double()
    place = double / torch.where(steps == 0, torch.inf, steps).double()
    if place.numel() and float(place.abs().max()) > 2 * MOST_CODES - 2 * CLASSES:
        raise SpecError(
            f"a step of {steps.abs().min().item():.4g} needs more than 2**23 codes for this "
            "tensor; give a larger step, or use Raw()"
        )
    multiples = torch.empty(CLASSES, *weight.shape, dtype=torch.int32, device=weight.device)
    errors = torch.empty(CLASSES, *weight.shape, dtype=torch.float64, device=weight.device)
    for index in range(CLASSES):
        below = ((place - index) / CLASSES).floor_().mul_(CLASSES).add_(index)
        pair = []
        for values in (below, below + CLASSES):
            # The decoder's own arithmetic; what it makes infinite is infinitely bad.
            decoded = restore(values.float() * steps, weight.dtype)
            pair.append((decoded.double() - double).square_())
        closer = pair[1] < pair[0]
        multiples[index] = below + CLASSES * closer
        errors[index] = torch.minimum(*pair)
    classes = cheapest(errors, states)
    return multiples.gather(0, classes[None])[0]


def cheapest(costs: Tensor, states: int) -> Tensor:
    """The cheapest path through the trellis in each row (Viterbi 1967).

    Args:
        costs: ``(4, steps, rows)``, of each class at each step; may be infinite, but not NaN.
        states: of the machine.

    Returns:
        The classes along the path, ``(steps, rows)`` int64.
    """
    _, steps, rows = costs.shape
    before = predecessors(states).to(costs.device)
    classes = (before & 1) + 2 * torch.arange(2, device=costs.device)[:, None]
    total = torch.full((states, rows), torch.inf, dtype=costs.dtype, device=costs.device)
    total[0] = 0
    parities = torch.empty(steps, states, rows, dtype=torch.bool, device=costs.device)
    for step in range(steps):
        here = costs[:, step]
        even = total[before[0]].add_(here[classes[0]])
        odd = total[before[1]].add_(here[classes[1]])
        torch.lt(odd, even, out=parities[step])
        total = torch.minimum(even, odd)
    state = total.argmin(0)
    path = torch.empty(steps, rows, dtype=torch.int64, device=costs.device)
    for step in range(steps - 1, -1, -1):
        parity = parities[step].gather(0, state[None])[0].long()
        state = before[parity, state]
        path[step] = (state & 1) + 2 * parity
    return path
