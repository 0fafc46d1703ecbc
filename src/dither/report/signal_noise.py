"""How far a tensor is from what it was: signal, noise and range, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Values compared at once: a large table in float64 would take twice its own memory."""


def decibels(signal: float, noise: float) -> float:
    """Ratio of two sums of squares in dB; infinite without noise."""
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)


class Noise:
    """Sums over one or many tensors before and after quantization.

    Infinities and NaN that stay as they were are no error, and no signal either.

    Attributes:
        count: values seen.
        signal: sum of squares before.
        noise: sum of squared differences; infinite where only one side is finite.
        low: least finite value before; infinite while nothing was seen, as ``high``.
        high: greatest finite value before.

    >>> seen = Noise()
    >>> seen.add(torch.tensor([3.0, -1.0]), torch.tensor([3.0, 0.0]))
    >>> seen.decibels, seen.low, seen.high, seen.count
    (10.0, -1.0, 3.0, 2)
    """

    def __init__(self) -> None:
        self.count = 0
        self.signal = self.noise = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, before: Tensor, after: Tensor) -> None:
        """See a tensor before and after, of one shape."""
        flat, changed = before.detach().reshape(-1), after.detach().reshape(-1)
        self.count += flat.numel()
        for x, y in zip(flat.split(_CHUNK), changed.split(_CHUNK), strict=True):
            if x.numel():
                self._add(x, y.to(x.device))

    def _add(self, x: Tensor, y: Tensor) -> None:
        if x.is_complex():
            x, y = torch.view_as_real(x).reshape(-1), torch.view_as_real(y).reshape(-1)
        wide, other = x.double(), y.double()
        signal, noise = float(wide.square().sum()), float((wide - other).square().sum())
        if not math.isfinite(signal + noise):
            same = (wide == other) | (wide.isnan() & other.isnan())
            error = torch.where(same, 0.0, wide - other).nan_to_num(nan=math.inf, posinf=math.inf)
            noise = float(error.square().sum())
            wide = wide[wide.isfinite()]
            signal = float(wide.square().sum())
        self.signal += signal
        self.noise += noise
        if wide.numel():
            self.low, self.high = (
                min(self.low, float(wide.min())),
                max(self.high, float(wide.max())),
            )

    @property
    def decibels(self) -> float:
        """Signal to noise ratio in dB; infinite without noise."""
        return decibels(self.signal, self.noise)
