"""Tensors that a base has, too: what is coded of them is the difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dither.archive import Base, CodedTensor, resting
from dither.archive.base import wide
from dither.core import SpecError, dtype_name
from dither.formats import Raw
from dither.search.knowledge import Knowledge
from dither.search.predict import is_finite
from dither.search.sensitivity import counted, token_axes

_REACH = 2.0**16
"""Differences up to so many times the least value that must not vanish are coded as such."""


@dataclass(frozen=True)
class Differences:
    """Which tensors rest on a base, and how.

    A tensor rests on the base's of its name and shape where that is nearer to it than zero is: then
    the base saves bits at every step. Others are stored whole.

    Attributes:
        base: has them, too.
        same: names of tensors that are equal to the base's, which take no codes.
        values: differences to the base's, float32 or, of float64, that, by name.
        dtypes: of all that rest on the base, by name.
    """

    base: Base
    same: frozenset[str]
    values: Mapping[str, Tensor]
    dtypes: Mapping[str, str]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], base: Base) -> Differences:
        """Those of some tensors, on the CPU, to a base's."""
        same, values, dtypes = set(), {}, {}
        for name, value in tensors.items():
            own = base.tensors.get(name)
            if own is None or own.shape != value.shape:
                continue
            dtype = dtype_name(value.dtype)
            both_float = own.is_floating_point() and value.is_floating_point()
            if own.dtype != value.dtype and not both_float:
                continue
            if _same_bytes(resting(own, None, dtype), value):
                same.add(name)
            elif both_float:
                difference = _difference(own, value, dtype)
                if difference is None:
                    continue
                values[name] = difference
            else:
                continue
            dtypes[name] = dtype
        return cls(base, frozenset(same), values, dtypes)

    def known(
        self, whole: Mapping[str, Knowledge], values: Mapping[str, Tensor]
    ) -> dict[str, Knowledge]:
        """What is to be coded, and what errors in it cost: as much as in the whole tensors.

        Args:
            whole: the same of these.
            values: these.

        Raises:
            SpecError: the sensitivity has others in their place.
        """
        for name, value in values.items():
            if whole[name].value is not value and not torch.equal(whole[name].value, value):
                raise SpecError(
                    f"the sensitivity changes {name!r}, as pruning does, and differences to a base "
                    "are those of what is given: change the model first, or leave the base out"
                )
        coded = {name: known for name, known in whole.items() if name not in self.same}
        return coded | {name: self._resting(name, whole[name]) for name in self.values}

    def _resting(self, name: str, whole: Knowledge) -> Knowledge:
        value = self.values[name]
        axes = None if whole.axes is None or whole.rows is None else token_axes(value, whole.rows)
        return replace(
            whole,
            value=value,
            axes=axes,
            coarsest=None,
            least=None,
            whole=whole.value.to(value.dtype),
        )

    def placed(
        self, coded: Mapping[str, CodedTensor], names: tuple[str, ...]
    ) -> dict[str, CodedTensor]:
        """Tensors in the order of names as a file holds them, also those that are the base's."""
        found = {}
        for name in names:
            if name in self.same:
                shape = tuple(self.base.tensors[name].shape)
                found[name] = CodedTensor(Raw(), shape, self.dtypes[name], {}, on_base=True)
            elif name in coded:
                own = coded[name]
                rests = name in self.values
                found[name] = own._replace(dtype=self.dtypes[name], on_base=True) if rests else own
        return found


def _difference(own: Tensor, value: Tensor, dtype: str) -> Tensor | None:
    """What added to a base's tensor gives a value; None where the base is no help."""
    if not is_finite(own) or not is_finite(value):
        return None
    kind = wide(dtype)
    difference = value.to(kind) - own.to(kind)
    if not is_finite(difference):
        return None
    energies = [float(part.double().square().sum()) for part in (difference, value)]
    positive = counted(value)
    is_far = positive.numel() and float(difference.abs().max()) > _REACH * float(positive.min())
    return None if energies[0] >= energies[1] or (value.ndim < 2 and is_far) else difference


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    pairs = (part.detach().contiguous().reshape(-1).view(torch.uint8) for part in (one, other))
    return torch.equal(*pairs)
