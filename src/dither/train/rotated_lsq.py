"""Learned steps along the axes of a token table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither.core import Encoded, SpecError, Stats
from dither.encoders.coded_grid import in_steps
from dither.encoders.rotated import Rotated, principal_axes, stored_axes
from dither.formats import Factors
from dither.formats.factors import MOST_RANK
from dither.train.code_lengths import CodeLengths
from dither.train.lsq import LSQ, LearnedStep

KINDS = 16
"""Kinds of columns whose codes are counted apart: the coder has as many tables at most."""


@dataclass(frozen=True)
class RotatedLSQ(LSQ):
    """Learned steps of a token table, which is rounded along its principal axes.

    Columns of a table have much in common: along the eigenvectors of their second moments codes
    take fewer bytes at the same step, see :class:`~dither.encoders.rotated.Rotated`. The axes are
    those of the table as it was; the gradient passes straight through both rotations. Where there
    are no more rows than columns, or other axes than two, it is ``LSQ(bits=None)``.

    Attributes:
        bits: None, as a grid along axes has no ends.
    """

    name: ClassVar[str] = "rotated_lsq"

    bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bits, self.axis, self.group) != (None, None, None):
            raise SpecError(
                "RotatedLSQ rounds on a grid without ends, whose steps are the table's or those of "
                "classes of rows: leave bits, axis and group out, or use LSQ"
            )

    def begin(self, weight: Tensor) -> LearnedStep:
        is_table = weight.ndim == 2 and 0 < weight.shape[1] < min(len(weight), MOST_RANK)
        if is_table and bool(weight.isfinite().all()):
            return RotatedStep(self, weight)
        return LearnedStep(self, weight)


class RotatedStep(LearnedStep):
    """A table ``(rows, columns)`` on a grid along axes.

    Attributes:
        basis: orthonormal ``(columns, columns)`` float32, an axis in each column, the largest
            first.
        mend: what the file's axes differ by from these, ``(columns, columns)``, by the codes at the
            last look: they have the least error.
    """

    def __init__(self, spec: RotatedLSQ, weight: Tensor) -> None:
        super().__init__(spec, weight)
        del self.watch  # its integers are not those of its weights
        self._turn(weight.detach().float())

    def _turn(self, matrix: Tensor, worth: Tensor | None = None) -> None:
        """Axes of a table in steps; ``worth`` is what each row counts."""
        self.basis = principal_axes(matrix, worth)
        self.mend = torch.zeros_like(self.basis)
        columns = self.basis.shape[1]
        self._kinds = torch.arange(columns, device=matrix.device) * KINDS // columns

    def start(self, encoded: Encoded) -> None:
        """Take steps that were found along axes, and the axes of what was found."""
        if not isinstance(encoded.format, Factors):
            super().start(encoded)
            return
        if self.spec.step is not None:
            return
        held = encoded.format.params_of(encoded)
        # The grid of the axes is a power of two. The first has large codes, and so length 1.
        fine = 2.0 ** -round(math.log2(float(held["right"][0].double().norm())))
        steps = held["scale"].float() / fine
        table = in_steps(encoded.decode(), steps).to(self.basis.device)
        self._turn(table, steps.to(table.device) if len(steps) > 1 else None)
        self._take(steps)

    def noisy(self, weight: Tensor) -> Tensor:
        self._read = None
        return self._along(weight, self.steps())

    def _along(self, rows: Tensor, steps: Tensor) -> Tensor:
        """Rows rounded along the axes, as the file's axes give them back."""
        values = self._rounded(rows @ self.basis, steps)
        return values @ self.basis.T + values.detach() @ self.mend

    def noisy_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        return self._along(rows, self._read_steps(index))

    def reads_rows(self) -> bool:
        return True

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        steps = self._trimmed()
        steps = steps if self.classes is None else steps[self.classes]
        return Rotated(steps.bfloat16(), self.basis).encode(weight)

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        super().draw(weight, generator, step)
        if step % self.spec.refresh == 0:
            table = weight.float() / self.steps().detach()
            codes, axes = (table @ self.basis).round_(), self.basis.T.clone()
            used = codes.any(0)
            axes[used] = stored_axes(codes[:, used], table, axes[used])[0]
            self.mend = axes - self.basis.T

    def _place(self, weight: Tensor) -> Tensor:
        return (weight.float() @ self.basis) / self.steps().detach()

    def integers(self, weight: Tensor) -> Tensor:
        """The codes along the axes, float32, without a graph."""
        return self._place(weight.detach()).round_()

    @torch.no_grad()
    def _look(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place = self._place(weight)
        across = place.T.contiguous()
        lengths = CodeLengths.of(across, self._kinds)
        slopes = lengths.slopes(across, self._kinds).T
        to_log = self._share(place.mul_(slopes).neg_())
        value = torch.tensor(lengths.total, dtype=torch.float32, device=weight.device)
        to_weight = (slopes / self.steps()) @ self.basis.T
        self._rate = (value, to_weight.to(weight.dtype), to_log)
        return self._rate

    def aside(self) -> dict[str, Any]:
        return {"classes": self.classes, "rate": self._rate, "axes": (self.basis, self.mend)}

    def load_aside(self, state: Mapping[str, Any]) -> None:
        self.classes, self._rate = state["classes"], state["rate"]
        self.basis, self.mend = state["axes"]
