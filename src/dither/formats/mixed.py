"""A width of its own for each group of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from dither.core import (
    MAX_ALPHABET,
    Codes,
    Encoded,
    Format,
    SpecError,
    Stats,
    code_dtype,
    expect_codes,
    expect_param,
    expect_parts,
)
from dither.formats.grid_rounding import Grid, require_floating, require_held, restore
from dither.formats.grouping import CHUNK, Grouping
from dither.formats.settings import check_choice, check_count, check_restored

WIDEST = 16
GRIDS = ("endpoint", "symmetric")
_START = 8


@dataclass(frozen=True)
class Mixed(Format):
    """Groups of consecutive flattened weights, each with 0 to 16 bits; 0 bits decode to 0.

    All groups share one range, so that widths are all that a group stores.

    * ``endpoint`` (DiffQ: Défossez et al. 2022): ``level * step + low`` with
      ``step = (high - low) / (2**b - 1)``; both ends of the range, no exact zero.
    * ``symmetric`` (Bayesian Bits: van Baalen et al. 2020): ``(level - 2**(b - 1)) * step`` with
      ``step = 2 * range / (2**b - 1)``. Doubling a width divides the step by ``2**b + 1``, so the
      grids of 2, 4, 8 and 16 bits are nested, and all hold 0. One bit gives
      ``-range / 2`` and ``+range / 2``.

    Parts: codes ``bits`` ``(groups,)`` over 17 symbols and for each width in use ``levels1`` to
    ``levels16``: the levels of its groups in order; params ``low`` and ``high``, or ``range``,
    ``(1,)`` in float32. Steps are computed in float64 and rounded to float32 once.

    Attributes:
        group: weights that share a width; the last group may be shorter.
        grid: ``"endpoint"`` or ``"symmetric"``.

    Raises:
        SpecError: settings or widths out of range, weights that are not finite.

    >>> fmt = Mixed(group=2)
    >>> weight = torch.tensor([-1.0, 1.0, 0.2, 0.5])
    >>> encoded = fmt.assign(weight, {"bits": torch.tensor([1, 2])})
    >>> encoded.decode()
    tensor([-1.0000,  1.0000,  0.3333,  0.3333])
    """

    name: ClassVar[str] = "mixed"

    group: int = 8
    grid: str = "endpoint"

    def __post_init__(self) -> None:
        """Refuse settings that make no sense."""
        check_count("Mixed", "group", self.group, 1, MAX_ALPHABET)
        check_choice("Mixed", "grid", self.grid, GRIDS)

    def groups(self, shape: tuple[int, ...]) -> int:
        """Number of groups of a tensor."""
        return -(-prod(shape) // self.group)

    def fit(self, weight: Tensor, stats: Stats | None = None) -> dict[str, Tensor]:
        """The tensor's range; 8 bits for every group, but 0 bits where all weights are 0."""
        del stats
        weight = require_floating(weight, self.name)
        grouping = Grouping((weight.numel(),), group=self.group)
        low, high = grouping.bounds(weight)
        used = (low != 0) | (high != 0)
        return {"bits": torch.where(used, _START, 0), **self.fit_range(weight)}

    def fit_range(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensor's least and greatest weight, or its largest magnitude."""
        low, high = (end.to(torch.float32) for end in Grouping(tuple(weight.shape)).bounds(weight))
        if self.grid == "endpoint":
            return {"low": low, "high": high}
        return {"range": torch.maximum(low.abs(), high.abs())}

    def assign(self, weight: Tensor, params: Mapping[str, Tensor]) -> Encoded:
        """Nearest levels at the given widths; a range that is not given is the weight's own.

        Args:
            weight: any shape.
            params: ``bits`` ``(groups,)``, rounded to integers; ``low`` and ``high``, or ``range``.

        Raises:
            SpecError: no widths, widths out of range or of the wrong number; a range that is not
                finite.
        """
        weight = require_floating(weight, self.name)
        shape, flat = tuple(weight.shape), weight.reshape(-1)
        bits = require_held(self, params, "bits", self.groups(shape)).to(flat.device)
        bits = bits.round() if bits.is_floating_point() else bits
        if not bool(((bits >= 0) & (bits <= WIDEST)).all()):
            raise SpecError(f"{self!r}: widths are 0 to {WIDEST} bits; clamp them first")
        bits = bits.to(torch.uint8)
        names = {"low", "high"} if self.grid == "endpoint" else {"range"}
        ends = dict(params) if names <= set(params) else self.fit_range(weight)
        held = {
            name: require_held(self, ends, name, 1).to(flat.device, torch.float32, copy=True)
            for name in sorted(names)
        }
        span = held["high"] - held["low"] if self.grid == "endpoint" else held["range"]
        if not all(bool(end.isfinite().all()) for end in (*held.values(), span)):
            raise SpecError(
                f"{self!r}: the range is not finite in float32; repair the weight, or use Raw()"
            )
        parts = {"bits": Codes(bits, WIDEST + 1)}
        for width, count in self._counts(bits, flat.numel()).items():
            grid, done = self._grid(held, width), 0
            codes = torch.empty(count, dtype=code_dtype(1 << width), device=flat.device)
            for box, mask in self._walk(flat, bits, width):
                chosen = box[mask]
                codes[done : done + len(chosen)] = grid.nearest(chosen, weight.dtype)
                done += len(chosen)
            parts[f"levels{width}"] = Codes(codes, 1 << width)
        return Encoded(self, shape, weight.dtype, parts, held)

    def decode(self, encoded: Encoded) -> Tensor:
        """Per width one float32 multiply and, for endpoint, one float32 add."""
        bits = encoded.codes["bits"].values
        out = torch.zeros(encoded.numel, dtype=encoded.dtype, device=bits.device)
        # torch fills no mask of float8, so that bytes are copied.
        cells = out.view(torch.uint8) if out.element_size() == 1 else out
        for width in self._counts(bits, encoded.numel):
            grid, done = self._grid(encoded.params, width), 0
            levels = encoded.codes[f"levels{width}"].values
            for box, mask in self._walk(cells, bits, width):
                count = int(mask.sum())
                values = grid.values(levels[done : done + count])
                box[mask] = restore(values, encoded.dtype).view(box.dtype)
                done += count
        return out.view(encoded.shape)

    def params_of(self, encoded: Encoded) -> dict[str, Tensor]:
        """Range and widths."""
        return {**encoded.params, "bits": encoded.codes["bits"].values}

    def check(self, encoded: Encoded) -> None:
        """One width per group, and exactly the levels that the widths call for."""
        check_restored(self.name, encoded.dtype)
        if "bits" not in encoded.codes:
            raise SpecError("format 'mixed' needs the code part 'bits', the width of each group")
        groups = self.groups(encoded.shape)
        expect_codes(encoded, "bits", (groups,), WIDEST + 1)
        bits = encoded.codes["bits"].values
        if groups and int(bits.max()) > WIDEST:
            raise SpecError(f"a group of format 'mixed' has {int(bits.max())} bits; 16 is the most")
        counts = self._counts(bits, encoded.numel)
        params = {"low", "high"} if self.grid == "endpoint" else {"range"}
        expect_parts(encoded, {"bits", *(f"levels{width}" for width in counts)}, params)
        for width, count in counts.items():
            expect_codes(encoded, f"levels{width}", (count,), 1 << width)
        for name in params:
            expect_param(encoded, name, (1,), torch.float32)

    def _counts(self, bits: Tensor, numel: int) -> dict[int, int]:
        """Weights of each width in use, 0 bits left out."""
        counts = torch.zeros(WIDEST + 1, dtype=torch.int64, device=bits.device)
        for part in bits.split(CHUNK):
            counts += torch.bincount(part.to(torch.int64), minlength=WIDEST + 1) * self.group
        if numel:
            counts[int(bits[-1])] -= len(bits) * self.group - numel
        return {width: count for width, count in enumerate(counts.tolist()) if width and count}

    def _walk(self, flat: Tensor, bits: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs of whole groups of a flat tensor, each with the mask of the weights of a width.

        A group too wide to be handled at once comes in pieces.
        """
        groups = max(1, CHUNK // self.group)
        for boxes, own in zip(flat.split(groups * self.group), bits.split(groups), strict=True):
            hit = own == width
            if not bool(hit.any()):
                continue
            for box in boxes.split(CHUNK) if groups == 1 else (boxes,):
                spread = hit.unsqueeze(1).expand(-1, min(self.group, CHUNK))
                yield box, spread.reshape(-1)[: len(box)]

    def _grid(self, held: Mapping[str, Tensor], width: int) -> Grid:
        """The grid of one width; its step is rounded to float32 once."""
        top = (1 << width) - 1
        double = {name: value.to(torch.float64) for name, value in held.items()}
        if self.grid == "endpoint":
            step = (double["high"] - double["low"]) / top
            return Grid(step.to(torch.float32), 0, held["low"], 1, 0, top)
        if width == 1:
            return Grid((double["range"] / 2).to(torch.float32), 1, None, 2, 0, 1)
        step = 2 * double["range"] / top
        return Grid(step.to(torch.float32), 1 << (width - 1), None, 1, 0, top)
