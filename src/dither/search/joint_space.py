"""What a joint search may choose: sparsity of layers and bits of kernels, as numbers of 0 to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dither.core import SpecError
from dither.search.joint_layers import Kernels

Point = tuple[float, ...]
"""A number from 0 to 1 for each choice: by layer the sparsity, then a width for each group."""

Widths = Mapping[str, tuple[float, ...]]
"""By weight the bits of each kernel, in the kernels' order; 0 is pruned."""

FINEST = 14.0
"""Bits beyond which no step is made finer."""


@dataclass(frozen=True)
class Space:
    """For each layer a sparsity, and widths of the kernels that are left.

    Widths are relative: in the end the steps of all kernels are moved by one factor, so that the
    file fills its budget.

    Attributes:
        lowest: bits of a kernel.
        highest: bits of a kernel.
        grain: widths are multiples of it. On entropy-coded grids they need not be whole.
        groups: kernels of a layer, by importance, are cut into so many groups, each of one width;
            1 is the paper's fixed precision.
        sparsity: the largest share of a layer's kernels that get 0 bits. Half of the numbers that
            stand for a sparsity mean none.
        norm: a kernel's importance: 1 for the sum of magnitudes, 2 for that of squares.

    Raises:
        SpecError: settings that make no sense.
    """

    lowest: float = 1.0
    highest: float = 8.0
    grain: float = 0.5
    groups: int = 4
    sparsity: float = 0.5
    norm: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        if not 0 < self.grain <= self.lowest <= self.highest <= FINEST:
            raise SpecError(
                f"{self!r}: widths are multiples of a grain above 0, from a lowest of at least "
                f"that to a highest of {FINEST:.0f} bits at most"
            )
        if self.groups < 1 or not 0 <= self.sparsity < 1 or self.norm not in {1, 2}:
            raise SpecError(
                f"{self!r}: groups are 1 or more, the sparsity is 0 or more and below 1, the norm "
                "is 1 or 2"
            )

    def kept(self, kernels: Kernels, number: float) -> int:
        """How many kernels of a layer are left."""
        share = self.sparsity * max(0.0, 2 * number - 1) if kernels.can_prune else 0.0
        return max(1, kernels.count - int(share * kernels.count))

    def width(self, number: float) -> float:
        """The bits that a number stands for."""
        width = self.lowest + (self.highest - self.lowest) * number
        return min(self.grain * round(width / self.grain), self.highest)

    def number(self, width: float) -> float:
        """What stands for a width, or for the nearest that there is."""
        span = self.highest - self.lowest
        return min(max((width - self.lowest) / span, 0.0), 1.0) if span else 0.5


@dataclass(frozen=True)
class Layout:
    """What a policy sees of a problem.

    Attributes:
        kernels: of all layers.
        space: what may be chosen.
        start: the point that is nearest to what the allocator has chosen.
    """

    kernels: tuple[Kernels, ...]
    space: Space
    start: Point = ()

    @property
    def each(self) -> int:
        """How many numbers a layer has."""
        return 1 + self.space.groups

    @property
    def size(self) -> int:
        """How many numbers a point has."""
        return len(self.kernels) * self.each

    @property
    def uniform(self) -> Point:
        """The point of equal widths, nothing pruned."""
        return (0.0, *[0.5] * self.space.groups) * len(self.kernels)

    def widths(self, point: Sequence[float]) -> Widths:
        """Relative bits of all kernels.

        Raises:
            SpecError: the point is of another size, or beyond 0 to 1.
        """
        if len(point) != self.size or not all(0 <= number <= 1 for number in point):
            beyond = [number for number in point if not 0 <= number <= 1]
            raise SpecError(
                f"a point has {self.size} numbers of 0 to 1; this one has {len(point)}, of which "
                f"{len(beyond)} are beyond"
            )
        each = self.each
        parts = [point[n * each : (n + 1) * each] for n in range(len(self.kernels))]
        pairs = zip(self.kernels, parts, strict=True)
        return {kernels.name: self._spread(kernels, part) for kernels, part in pairs}

    def _spread(self, kernels: Kernels, part: Sequence[float]) -> tuple[float, ...]:
        kept = self.space.kept(kernels, part[0])
        widths = [0.0] * kernels.count
        for place, kernel in enumerate(kernels.order[:kept]):
            widths[kernel] = self.space.width(part[1 + place * self.space.groups // kept])
        return tuple(widths)
