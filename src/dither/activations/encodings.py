"""What a model and a file hold of quantized activations: a grid for each site, as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from dither.activations.quantizer import Quantizer
from dither.activations.site_spec import Activation
from dither.core import SpecError

_LIMIT = 1 << 24


@dataclass(frozen=True)
class Encoding:
    """One site's grid.

    Attributes:
        spec: how it was found, and how many bits it has.
        scale: a float32 number for each group; empty for a dynamic range.
        zero: an integer for each group.
        order: the permutation of the dimensions, for groups sorted by range.
    """

    spec: Activation
    scale: tuple[float, ...] = ()
    zero: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no grid."""
        spec = self.spec
        count = 0 if spec.is_dynamic else spec.groups
        if len(self.scale) != count or len(self.zero) != count:
            raise SpecError(
                f"{spec!r} has {count} scales and zero points, not {len(self.scale)} and "
                f"{len(self.zero)}"
            )
        if not all(type(s) is float and _is_scale(s) for s in self.scale):
            raise SpecError(f"scales are positive float32 numbers, not {self.scale[:4]}")
        top = (1 << spec.bits) - 1
        if not all(type(z) is int and 0 <= z <= top for z in self.zero):
            raise SpecError(f"zero points are integers from 0 to {top}, not {self.zero[:4]}")
        whole = all(type(i) is int for i in self.order)
        if not whole or sorted(self.order) != list(range(len(self.order))):
            raise SpecError("the order of dimensions is no permutation")
        if bool(self.order) != spec.is_sorted or len(self.order) % spec.groups:
            raise SpecError(
                f"{spec!r} needs an order of dimensions that its groups divide, if they are sorted "
                f"by range, and else none; this one has {len(self.order)}"
            )

    @classmethod
    def of(cls, quantizer: Quantizer) -> Self:
        """The grid that a quantizer uses in evaluation.

        Raises:
            SpecError: it has none yet.
        """
        order = tuple(quantizer.order.tolist())
        if quantizer.spec.is_dynamic:
            return cls(quantizer.spec, order=order)
        scale, zero = quantizer.grid()
        return cls(quantizer.spec, tuple(scale.tolist()), tuple(map(int, zero.tolist())), order)

    @classmethod
    def covering(cls, spec: Activation, low: float, high: float) -> Self:
        """The grid from ``low`` to ``high``, and 0; of a spec of one static range."""
        quantizer = Quantizer(spec)
        quantizer.set(torch.tensor([low]), torch.tensor([high]))
        return cls.of(quantizer)

    def quantizer(self) -> Quantizer:
        """A module that computes with this grid, bit for bit."""
        made = Quantizer(self.spec)
        if self.order:
            made.set_order(torch.tensor(self.order))
        if self.scale:
            made.set_grid(self._tensor(self.scale), self._tensor(self.zero))
        return made

    def to_json(self) -> dict[str, Any]:
        """As JSON values; float32 numbers survive them."""
        values = self.spec.to_json()
        lists = {"scale": self.scale, "zero": self.zero, "order": self.order}
        return values | {name: list(items) for name, items in lists.items() if items}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """The inverse of :meth:`to_json`.

        Raises:
            SpecError: it is damaged.
        """
        if not isinstance(values, Mapping):
            raise SpecError(f"an encoding is an object, not {str(values)[:80]}")
        settings = dict(values)
        lists = [settings.pop(name, []) for name in ("scale", "zero", "order")]
        if not all(isinstance(items, list) and len(items) < _LIMIT for items in lists):
            raise SpecError("scale, zero and order of an encoding are arrays")
        return cls(Activation.from_json(settings), *(tuple(items) for items in lists))

    def _tensor(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)


def _is_scale(value: float) -> bool:
    if not (math.isfinite(value) and torch.finfo(torch.float32).tiny <= value <= 3.4e38):
        return False
    return float(torch.tensor(value, dtype=torch.float32)) == value


@dataclass(frozen=True)
class Encodings(Mapping[str, Encoding]):
    """The grids of all quantized sites of a model, by site.

    >>> encodings = Encodings({"fc@in": Encoding(Activation(8), (0.5,), (3,))})
    >>> Encodings.from_json(encodings.to_json()) == encodings
    True
    """

    sites: Mapping[str, Encoding] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Encoding:
        """The grid of a site."""
        return self.sites[site]

    def __iter__(self) -> Iterator[str]:
        """Names of sites."""
        return iter(self.sites)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self.sites)

    @property
    def parameters(self) -> int:
        """Numbers that the grids take: scales, zero points and permutations."""
        return sum(len(e.scale) + len(e.zero) + len(e.order) for e in self.sites.values())

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for the field ``sites`` of an archive."""
        return {site: encoding.to_json() for site, encoding in self.sites.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`.

        Raises:
            SpecError: an encoding is damaged; the text names its site.
        """
        sites = {}
        for site, item in values.items():
            try:
                sites[site] = Encoding.from_json(item)
            except (SpecError, TypeError, ValueError) as error:
                raise SpecError(f"the encoding of site {site!r} cannot be used: {error}") from error
        return cls(sites)
