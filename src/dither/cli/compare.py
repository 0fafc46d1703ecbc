"""Compare two sets of tensors, one tensor at a time and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.progress import steps
from dither.report.signal_noise import decibels

_CHUNK = 1 << 20
"""Values compared at once."""


@dataclass(frozen=True)
class Difference:
    """How far a tensor of B is from that of A.

    Attributes:
        name: of both tensors.
        shape: of both tensors.
        dtypes: of A's and of B's tensor.
        signal: sum of squares of A.
        noise: sum of squares of A - B.
        largest: largest absolute difference.
        equal: all values equal; NaN equals NaN.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    signal: float
    noise: float
    largest: float
    equal: bool

    @property
    def is_signal(self) -> bool:
        """Whether A's tensor holds no integers."""
        return self.dtypes[0].startswith(("float", "bfloat", "complex"))

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio in dB; infinite when equal."""
        return decibels(self.signal, self.noise)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found: ``differences`` holds the tensors that both have, equal or not.

    ``reshaped`` holds names with A's and B's shapes.
    """

    differences: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def same_names(self) -> bool:
        """Whether both hold the same names with the same shapes."""
        return not (self.only_a or self.only_b or self.reshaped)

    @property
    def sqnr(self) -> float:
        """Over all common tensors together, in dB; integers count where there is nothing else.

        Indices and counters are exact and large: they would drown the noise of weights.
        """
        some = [item for item in self.differences if item.is_signal] or self.differences
        return decibels(
            math.fsum(item.signal for item in some), math.fsum(item.noise for item in some)
        )

    @property
    def largest(self) -> float:
        """Largest absolute difference of any value."""
        return max((item.largest for item in self.differences), default=0.0)

    @property
    def equal(self) -> int:
        """How many of the common tensors are equal."""
        return sum(item.equal for item in self.differences)

    def below(self, least: float) -> list[str]:
        """Names of the tensors whose SQNR is less than ``least`` dB."""
        return [item.name for item in self.differences if item.sqnr < least]


def compare(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Comparison:
    """Compare what two sources hold under the same names."""
    common = [name for name in a if name in b]
    differences: list[Difference] = []
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name in steps("comparing", common):
        left, right = a[name], b[name]
        if left.shape != right.shape:
            reshaped[name] = (tuple(left.shape), tuple(right.shape))
        else:
            differences.append(_difference(name, left, right))
    return Comparison(
        tuple(differences),
        tuple(name for name in a if name not in b),
        tuple(name for name in b if name not in a),
        reshaped,
    )


def _difference(name: str, a: Tensor, b: Tensor) -> Difference:
    signal = noise = largest = 0.0
    equal = True
    for x, y in _chunks(a, b):
        same = (x == y) | (x.isnan() & y.isnan())
        equal = equal and bool(same.all())
        x, y = _wide(x), _wide(y)  # noqa: PLW2901 - the narrow ones are needed no more
        error = torch.where(same, 0.0, (x - y).abs())
        # What is infinite, or no number, in both alike is no error, and no signal either.
        known = x.abs()
        signal += float(torch.where(known.isfinite(), known, 0.0).square().sum())
        # A value that only one side lacks is infinitely wrong.
        error = torch.where(error.isfinite(), error, math.inf)
        noise += float(error.square().sum())
        largest = max(largest, float(error.max()))
    dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in (a, b))
    return Difference(name, tuple(a.shape), (dtypes[0], dtypes[1]), signal, noise, largest, equal)


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = a.detach().reshape(-1), b.detach().reshape(-1)
    for start in range(0, x.numel(), _CHUNK):
        left, right = x[start : start + _CHUNK], y[start : start + _CHUNK]
        if left.dtype != right.dtype or left.element_size() == 1 or not left.dtype.is_signed:
            left, right = _exact(left, right)
        yield left, right


def _exact(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type in which torch can compare them; 64-bit integers keep every bit."""
    if a.dtype == b.dtype == torch.uint64:
        return a.view(torch.int64), b.view(torch.int64)
    return _wide(a), _wide(b)


def _wide(a: Tensor) -> Tensor:
    return a.to(torch.complex128 if a.is_complex() else torch.float64)
