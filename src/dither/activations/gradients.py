"""Quantized back-propagation: the identity, whose gradient is on an integer grid."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dither.activations.integer_grid import cover
from dither.activations.site_spec import Gradient
from dither.model import Added


class GradientQuantizer(Added):
    """Passes activations unchanged and quantizes the gradient that comes back.

    Ranges are those of earlier steps (Fournarakis and Nagel 2021, arXiv 2105.04246): they move in
    :meth:`step` only. The first step, which has none, uses the gradient's own. Rounding is a
    function of (seed, name, step, how many gradients came before in this step).

    Attributes:
        spec: the settings.
        low: end of the range, ``(1,)``; ``seen_low`` and ``seen_high``: extremes of this step.
        steps: steps done, ``(1,)``; 0: there is no range yet.
    """

    low: Tensor
    high: Tensor
    seen_low: Tensor
    seen_high: Tensor
    steps: Tensor

    def __init__(self, spec: Gradient, name: str = "") -> None:
        super().__init__()
        self.spec = spec
        self.path = name
        self.calls = 0
        for buffer in ("low", "high"):
            self.register_buffer(buffer, torch.zeros(1))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self._forget()

    @torch.compiler.disable  # type: ignore[untyped-decorator] # compilers know no generators
    def forward(self, values: Tensor) -> Tensor:
        """``values`` themselves."""
        if not (values.requires_grad and self.training):
            return values
        passed: Tensor = _Quantized.apply(values, self)  # type: ignore[no-untyped-call]
        return passed

    def quantize(self, gradient: Tensor) -> Tensor:
        """A gradient on this step's grid, of its shape and type; notes its extremes."""
        if not gradient.numel():
            return gradient
        single = gradient.detach().float()
        low, high = single.amin().reshape(1), single.amax().reshape(1)
        if not bool(low.isfinite() & high.isfinite()):
            return gradient  # a gradient scaler is to see that
        torch.minimum(self.seen_low, low, out=self.seen_low)
        torch.maximum(self.seen_high, high, out=self.seen_high)
        if self.spec.dynamic or not int(self.steps):
            scale, zero = cover(low, high, self.spec.bits, symmetric=False)
        else:
            scale, zero = cover(self.low, self.high, self.spec.bits, symmetric=False)
        place = single / scale
        if self.spec.stochastic:
            place = place.add_(_fractions(place, self._generator(place))).floor_()
        else:
            place = place.round_()
        self.calls += 1
        codes = place.add_(zero).clamp_(0, (1 << self.spec.bits) - 1)
        return codes.sub_(zero).mul_(scale).to(gradient.dtype)

    @torch.no_grad()
    def step(self) -> None:
        """An optimizer step is done: the range moves to what was seen since the step before."""
        if bool(self.seen_low <= self.seen_high):
            old = self.spec.momentum if int(self.steps) else 0.0
            self.low.mul_(old).add_(self.seen_low, alpha=1 - old)
            self.high.mul_(old).add_(self.seen_high, alpha=1 - old)
            self.steps += 1
        self.calls = 0
        self._forget()

    def _forget(self) -> None:
        empty = torch.full_like(self.low, torch.inf)
        self.register_buffer("seen_low", empty)
        self.register_buffer("seen_high", -empty)

    def _generator(self, like: Tensor) -> torch.Generator:
        text = f"{self.spec.seed}/{self.path}/{int(self.steps)}/{self.calls}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        return torch.Generator(like.device).manual_seed(seed >> 1)

    def extra_repr(self) -> str:
        return repr(self.spec)


def _fractions(like: Tensor, generator: torch.Generator) -> Tensor:
    """Multiples of 1/65536 from 0 to below 1, float32, each as likely; a quarter of rand's time.

    They do not depend on the memory format. Up to 8 bits, adding them to a place is exact, so what
    is on the grid stays there.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(1 << 63), None, generator=generator)
    drawn = words.view(torch.int16)[: like.numel()].view(like.shape)
    return torch.empty_like(like, dtype=torch.float32).copy_(drawn).add_(1 << 15).mul_(2.0**-16)


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, quantizer: GradientQuantizer) -> Tensor:
        ctx.quantizer = quantizer
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.quantizer.quantize(gradient), None
