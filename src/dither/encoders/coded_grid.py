"""The unbounded entropy-coded grid, as encoders fill it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dither.core import MAX_ALPHABET, Codes, Encoded, SpecError, code_dtype
from dither.encoders.outputs import gram_groups
from dither.formats import Affine


class BySettings:
    """Equal are encoders of one kind and equal settings; a tensor equals only itself."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(
            a is b or (not (isinstance(a, Tensor) or isinstance(b, Tensor)) and bool(a == b))
            for a, b in pairs
        )

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))


def grid_steps(step: float | Tensor) -> Tensor:
    """Steps as a file stores them: one for the tensor, ``(1,)``, or one for each row.

    On the CPU; bfloat16 where that holds them exactly, else float32.

    Raises:
        SpecError: a step is not positive and finite in float32.
    """
    steps = torch.as_tensor(step, dtype=torch.float32, device="cpu").reshape(-1)
    if not bool((steps > 0).all()) or not bool(steps.isfinite().all()):
        raise SpecError(f"a step is a positive number, or one for each row, not {step}")
    short = steps.to(torch.bfloat16)
    return short if bool((short.float() == steps).all()) else steps


def in_steps(weight: Tensor, steps: Tensor) -> Tensor:
    """The weight divided by its steps, in float32.

    Raises:
        SpecError: there is neither one step nor one for each row.
    """
    if len(steps) != 1 and tuple(weight.shape[:1]) != (len(steps),):
        raise SpecError(
            f"{len(steps)} steps do not fit a weight of shape {tuple(weight.shape)}; give one, or "
            "one for each index of the first axis"
        )
    values, divisor = weight.detach().float(), _along(steps.float(), weight.ndim)
    # What was copied to be converted takes the result: large tensors take as much as there is.
    return values / divisor if weight.dtype == torch.float32 else values.div_(divisor)


def refitted(steps: Tensor, aims: Tensor, found: Tensor, gram: Tensor | None = None) -> Tensor:
    """The steps for which rounded values have the least error, of the same type.

    Args:
        steps: from :func:`grid_steps`.
        aims: what values should be, ``(rows, inputs)``, in steps.
        found: the rounded values, likewise.
        gram: as for :func:`gram_groups`; without one errors of all inputs count alike.
    """
    return refitted_by(steps, *products_of(aims, found, gram))


def products_of(aims: Tensor, found: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each row, the product of rounded values with their aims and with themselves, float64.

    Args:
        aims: as for :func:`refitted`, as the two others.
        found: the rounded values.
        gram: moments of the inputs.
    """
    both, own = torch.zeros(2, len(found), dtype=torch.float64, device=found.device)
    groups = [(slice(None), slice(None), None)] if gram is None else gram_groups(found, gram)
    for rows, columns, moments in groups:
        values, wanted = found[rows, columns], aims[rows, columns]
        felt = values if moments is None else values @ moments.to(values.dtype)
        both[rows] += (felt * wanted).sum(1, dtype=torch.float64)
        own[rows] += (felt * values).sum(1, dtype=torch.float64)
    return both, own


def refitted_by(steps: Tensor, both: Tensor, own: Tensor) -> Tensor:
    """The same by the products of all rows."""
    if len(steps) == 1:
        both, own = both.sum(0, keepdim=True), own.sum(0, keepdim=True)
    factor = both / own
    usable = factor.isfinite() & (factor > 0.25) & (factor < 4)  # else the codes say too little
    scaled = (steps.double() * torch.where(usable, factor, 1.0)).to(steps.dtype)
    return torch.where(scaled.isfinite() & (scaled > 0), scaled, steps)


def _along(steps: Tensor, ndim: int) -> Tensor:
    """Steps as they broadcast to a weight."""
    return steps.reshape([-1] + [1] * (ndim - 1) if len(steps) > 1 else [1] * ndim)


def code_range(weight: Tensor, low: float, high: float) -> tuple[int, int]:
    """The lowest and the highest code of a grid, which always reaches 0.

    Args:
        weight: what is encoded, not empty.
        low: the lowest rounded value in steps; NaN where a weight is.
        high: the highest.

    Raises:
        SpecError: a weight is not finite, or no alphabet holds the codes.
    """
    if not math.isfinite(low) or not math.isfinite(high):
        if not bool(weight.detach().float().isfinite().all()):
            raise SpecError(
                "a weight is not finite, or is beyond float32; repair it, or store the tensor "
                "with Raw()"
            )
        raise SpecError("a step is too small for float32; take a larger step, or store with Raw()")
    if max(high, 0) - min(low, 0) >= MAX_ALPHABET:
        raise SpecError(
            f"a step is too small for values of {low:.0f} to {high:.0f} steps; at most "
            f"{MAX_ALPHABET} are possible: take a larger step, or store the tensor with Raw()"
        )
    return min(int(low), 0), max(int(high), 0)


def on_grid(weight: Tensor, steps: Tensor, levels: Tensor, low: int, high: int) -> Encoded:
    """The encoding of ``weight`` whose codes are ``levels``, counted from ``low`` steps.

    Args:
        weight: gives shape and type.
        steps: from :func:`grid_steps`.
        levels: integers ``0 .. high - low``, of the weight's shape; zero steps is ``-low``.
        low: the lowest code in steps, at most 0.
        high: the highest, at least 0.

    A value that would be rounded beyond float32 takes the last code that is not.
    """
    axis = 0 if len(steps) > 1 else None
    grid = Affine(bits=None, axis=axis, scale_dtype=steps.dtype)
    size = high - low + 1
    largest = torch.finfo(torch.float32).max
    if levels.numel() and max(-low, high) * float(steps.max()) > largest:
        most = _along((largest / steps.double()).floor(), weight.ndim)
        levels = torch.maximum(torch.minimum(levels.double() + low, most), -most) - low
    zero = Codes(torch.tensor([-low]), MAX_ALPHABET)
    codes = {"levels": Codes(levels.to(code_dtype(size)), size), "zero": zero}
    return Encoded(grid, tuple(weight.shape), weight.dtype, codes, {"scale": steps})
