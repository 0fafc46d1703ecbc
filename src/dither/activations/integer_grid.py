"""The integer grids of activations, and rounding to them with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cover(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the finest grid that holds 0 and covers ``low`` to ``high``.

    Asymmetric: ``scale = (high - low) / (2**bits - 1)`` and ``zero = round(-low / scale)``, so that
    codes are ``0 .. 2**bits - 1`` (Nagel et al. 2021, arXiv 2106.08295, eq. 7). Rounding the zero
    point moves the ends by up to half a step. Symmetric: ``zero = 2**(bits - 1)``.

    Args:
        low: any shape, finite.
        high: the same shape.
        bits: of a code.
        symmetric: as many codes below 0 as above, and one.

    Returns:
        Both float32, of the shape of ``low``; zero points hold integers.

    >>> cover(torch.tensor([-1.0]), torch.tensor([1.55]), 8, symmetric=False)
    (tensor([0.0100]), tensor([100.]))
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    top = (1 << bits) - 1
    half = 1 << (bits - 1)
    if symmetric:
        scale = torch.maximum(-low / half, high / (half - 1))
    else:
        scale = (high - low) / top
    scale = scale.float()
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(scale < tiny, torch.ones_like(scale), scale)
    if symmetric:
        return scale, torch.full_like(scale, half)
    return scale, (-low / scale).round().clamp(0, top).float()


def ends(scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value of a grid."""
    return -zero * scale, ((1 << bits) - 1 - zero) * scale


def integers(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes ``clamp(round(x / scale) + zero, 0, 2**bits - 1)``, int32.

    Scale and zero broadcast to ``values``; half-way cases go to the even integer.
    """
    codes = (values.float() / scale).round_().add_(zero).clamp_(0, (1 << bits) - 1)
    return codes.to(torch.int32)


def rounded(values: Tensor, scale: Tensor, zero: Tensor, bits: int, kind: str = "") -> Tensor:
    """Values of the grid, ``scale * (code - zero)``, float32, with gradients.

    The gradient to ``values`` is the identity's between the ends of the grid and 0 beyond (Bengio
    et al. 2013). To scale and zero, by ``kind``:

    * ``""``: none;
    * ``"learned"``: ``round(x / s) - x / s`` within the range and ``code - zero`` beyond it reach
      the scale (Esser et al. 2020, arXiv 1902.08153), ``-s`` beyond it reaches the zero point
      (Bhalgat et al. 2020, arXiv 2004.09576);
    * ``"clip"``: only values beyond the range move the scale (PACT, Choi et al. 2018, arXiv
      1805.06085).
    """
    result: Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
        values, scale, zero, float((1 << bits) - 1), kind
    )
    return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, zero: Tensor, top: float, kind: str
    ) -> Tensor:
        # What is saved must not be what a later step changes in place.
        ctx.save_for_backward(values, scale.clone(), zero.clone())
        ctx.top, ctx.kind = top, kind
        codes = (values / scale).round_().add_(zero.round()).clamp_(0.0, top)
        return codes.sub_(zero.round()).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, zero = ctx.saved_tensors
        zero = zero.round()
        place = values / scale
        level = place.round()
        # 1 where nothing is clipped, else 0: as numbers, which are faster than truth values.
        codes = level + zero
        passes = codes.clamp(0, ctx.top).eq_(codes)
        inside = passes.bool() if ctx.kind else passes
        to_scale = to_zero = None
        if ctx.kind and ctx.needs_input_grad[1]:
            within = level - place if ctx.kind == "learned" else torch.zeros_like(place)
            slope = torch.where(inside, within, codes.clamp(0, ctx.top) - zero)
            to_scale = (gradient * slope).sum_to_size(scale.shape)
        if ctx.kind == "learned" and ctx.needs_input_grad[2]:
            to_zero = torch.where(inside, 0.0, -gradient * scale).sum_to_size(zero.shape)
        return passes.mul_(gradient), to_scale, to_zero, None, None
