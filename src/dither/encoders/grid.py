"""The unbounded entropy-coded grid, as encoders fill it."""

from __future__ import annotations

import torch
from torch import Tensor

from dither.core import Codes, Encoded, SpecError, code_dtype
from dither.formats import Affine

ZERO_ALPHABET = 1 << 24


def grid_steps(step: float | Tensor) -> Tensor:
    """Steps as a file stores them: one for the tensor, ``(1,)``, or one for each row.

    bfloat16 where that holds them exactly, else float32.

    Raises:
        SpecError: a step is not positive and finite in float32.
    """
    steps = torch.as_tensor(step, dtype=torch.float32).reshape(-1)
    if not bool((steps > 0).all()) or not bool(steps.isfinite().all()):
        raise SpecError(f"a step is a positive number, or one for each row, not {step}")
    short = steps.to(torch.bfloat16)
    return short if bool((short.float() == steps).all()) else steps


def in_steps(weight: Tensor, steps: Tensor) -> Tensor:
    """The weight divided by its steps, in float32."""
    shape = [-1] + [1] * (weight.ndim - 1) if len(steps) > 1 else [1] * weight.ndim
    return weight.detach().float() / steps.float().reshape(shape)


def check_range(low: int, high: int) -> None:
    """Refuse codes that no alphabet holds."""
    if max(high, 0) - min(low, 0) >= ZERO_ALPHABET:
        raise SpecError(
            f"a step is too small for values of {low} to {high} steps; at most {ZERO_ALPHABET} "
            "are possible: take a larger step, or store the tensor Raw"
        )


def on_grid(weight: Tensor, steps: Tensor, levels: Tensor, low: int, high: int) -> Encoded:
    """The encoding of ``weight`` whose codes are ``levels``, counted from ``low`` steps.

    Args:
        weight: gives shape and type.
        steps: from :func:`grid_steps`.
        levels: integers ``0 .. high - low``, of the weight's shape; zero steps is ``-low``.
        low: the lowest code in steps, at most 0.
        high: the highest, at least 0.
    """
    axis = 0 if len(steps) > 1 else None
    grid = Affine(bits=None, axis=axis, scale_dtype=steps.dtype)
    size = high - low + 1
    zero = Codes(torch.tensor([-low]), ZERO_ALPHABET)
    codes = {"levels": Codes(levels.to(code_dtype(size)), size), "zero": zero}
    return Encoded(grid, tuple(weight.shape), weight.dtype, codes, {"scale": steps})
