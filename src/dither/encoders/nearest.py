"""Rounding to nearest at a given step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dither.core import Encoded, SpecError, Stats, on_cpu
from dither.formats import Affine
from dither.formats.settings import check_kind, check_number


@dataclass(frozen=True)
class Nearest:
    """Nearest codes on a symmetric grid of a given step, the same for all scales.

    A format alone rounds to nearest with a step of its own choice; here the step is the setting,
    as in a search over steps of ``Affine(None)`` with an entropy coder behind.

    Attributes:
        format: a symmetric :class:`Affine`, bounded (then it clips) or not.
        step: in the unit of the weight; above 0.

    Raises:
        SpecError: another grid, or a step that is not positive and finite.

    >>> encoded = Nearest(Affine(None), step=0.5).encode(torch.tensor([-0.6, 0.1, 1.3]))
    >>> encoded.codes["levels"].values.tolist(), encoded.decode().tolist()
    ([0, 1, 4], [-0.5, 0.0, 1.5])
    """

    format: Affine
    step: float

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_kind("Nearest", self.format, (Affine,))
        check_number("Nearest", "step", self.step)
        if self.format.grid != "symmetric":
            raise SpecError(
                f"Nearest(format={self.format!r}): give a symmetric Affine; other grids encode to "
                "nearest by themselves"
            )

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        """Nearest codes at the step; ``stats`` is not read."""
        weight, _ = on_cpu(weight)
        count = self.format.grouping(tuple(weight.shape)).count
        scale = torch.full((count,), float(self.step), dtype=torch.float64)
        return self.format.assign(weight, {"scale": scale})
