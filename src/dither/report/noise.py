"""How far a tensor is from what it was: signal, noise and range, in float64."""

from __future__ import annotations

import math

from torch import Tensor

_CHUNK = 1 << 22
"""Values compared at once: a large table in float64 would take twice its own memory."""


class Noise:
    """Sums over one or many tensors before and after quantization.

    Attributes:
        count: values seen.
        signal: sum of squares before.
        noise: sum of squared differences.
        low: least value before; infinite while nothing was seen, as ``high``.
        high: greatest value before.

    >>> import torch
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
            if not x.numel():
                continue
            wide = x.double()
            self.signal += float(wide.square().sum())
            self.noise += float((wide - y.to(x.device).double()).square().sum())
            self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))

    @property
    def decibels(self) -> float:
        """Signal to noise ratio in dB; infinite without noise."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
