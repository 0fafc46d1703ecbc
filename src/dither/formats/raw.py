"""Numbers as they are, or in a shorter floating-point type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dither.core import Encoded, Format, SpecError, Stats, dtype_name, expect_param, expect_parts


@dataclass(frozen=True)
class Raw(Format):
    """The values themselves, of any type and shape, buffers included.

    One parameter part, ``values``, of the tensor's shape. Decoding restores the tensor's type.

    Attributes:
        dtype: type to store in; None stores the tensor's own type, bit for bit. A shorter one is
            for floating-point (or complex) tensors only.

    Raises:
        SpecError: ``dtype`` would turn numbers into another kind, or a finite value into infinity.

    >>> encoded = Raw(torch.float16).encode(torch.tensor([1.0, 0.1]))
    >>> encoded.bits, encoded.decode()
    (32, tensor([1.0000, 0.1000]))
    """

    name: ClassVar[str] = "raw"

    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Refuse what is no tensor type."""
        if self.dtype is None:
            return
        if not isinstance(self.dtype, torch.dtype):
            raise SpecError(f"Raw(dtype={self.dtype!r}): give a torch.dtype, or None")
        dtype_name(self.dtype)

    def fit(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """No parameters: the values are the codes."""
        del weight, stats
        return {}

    def assign(self, weight: Tensor, params: Mapping[str, Tensor]) -> Encoded:
        """A copy of the values in the stored type; ``params`` is not read."""
        del params
        stored = self._stored(weight.dtype)
        values = weight.detach().to(stored, copy=True, memory_format=torch.contiguous_format)
        if stored != weight.dtype:
            self._refuse_overflow(weight.detach(), values)
        return Encoded(self, tuple(weight.shape), weight.dtype, {}, {"values": values})

    def decode(self, encoded: Encoded) -> Tensor:
        """A copy of the values in the tensor's own type."""
        return encoded.params["values"].to(encoded.dtype, copy=True)

    def check(self, encoded: Encoded) -> None:
        """One part of the tensor's shape, in the stored type."""
        expect_parts(encoded, set(), {"values"})
        expect_param(encoded, "values", encoded.shape, self._stored(encoded.dtype))

    def _refuse_overflow(self, source: Tensor, values: Tensor) -> None:
        """Raise where a finite number became infinite, NaN or (float8, by torch) saturated.

        It may do so in the stored type, or on its way back by rounding up: 65504 of float16 is
        65536 in bfloat16.
        """
        info, back = torch.finfo(values.dtype), _computable(values.to(source.dtype))
        source = _computable(source)
        lost = source.isfinite() & ~back.isfinite()
        if values.element_size() == 1:  # a quarter of eps above the largest is rounded down to it
            lost |= source.isfinite() & (source.abs() > info.max * (1 + info.eps / 4))
        if bool(lost.any()):
            raise SpecError(
                f"{self!r} cannot hold a value of {source[lost].abs().max().item():.4g} "
                f"(largest {info.max:.4g}) and give it back; use a wider type, or Raw()"
            )

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        if self.dtype is None or self.dtype == dtype:
            return dtype
        both_float = self.dtype.is_floating_point and dtype.is_floating_point
        if not (both_float or (self.dtype.is_complex and dtype.is_complex)):
            raise SpecError(
                f"Raw({self.dtype}) cannot stand for a tensor of {dtype}; use Raw() for it"
            )
        return self.dtype


def _computable(values: Tensor) -> Tensor:
    """Real numbers in a type that torch computes with: it has few operations for float8."""
    if values.is_complex():
        return torch.view_as_real(values.resolve_conj())
    return values.float() if values.element_size() == 1 else values
