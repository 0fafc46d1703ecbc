"""What the page about an archive shows: bytes, bits, errors and histograms of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dither.archive import Archive, Entry, describe
from dither.core import DTYPES
from dither.progress import steps
from dither.report.signal_noise import Noise

BINS = 96
HISTOGRAMS = 6
"""Tensors, the largest in the file, of which the page shows how values are distributed."""

_LEAST = 64
"""Values of which a histogram makes sense."""
_REACH = 4.5
"""A histogram reaches this many standard deviations from the mean."""


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each of :data:`BINS` bins of equal width.

    Attributes:
        low: left end of the first bin.
        high: right end of the last.
        after: shares of the values in the file.
        before: of the checkpoint's, if there is one.
        outside: share of the values (the checkpoint's, if there is one) beyond both ends.
    """

    low: float
    high: float
    after: tuple[float, ...]
    before: tuple[float, ...] | None
    outside: float


@dataclass(frozen=True)
class Stored:
    """One tensor of the file.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: what it is restored to.
        spec: format and settings.
        nbytes: bytes of its payloads.
        numel: its values.
        sqnr: signal to quantization noise ratio in dB, infinite where all is equal; None without a
            checkpoint, or one that has no such tensor.
        sensitivity: what the file's metadata says, if it does.
        histogram: of the largest tensors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    nbytes: int
    numel: int
    sqnr: float | None = None
    sensitivity: float | None = None
    histogram: Histogram | None = None

    @property
    def bits(self) -> float | None:
        """Bits in the file for each value."""
        return 8 * self.nbytes / self.numel if self.numel else None


@dataclass(frozen=True)
class Contents:
    """One file.

    Attributes:
        title: what to call it.
        nbytes: of the file.
        original_nbytes: of its tensors once decoded.
        tensors: in the order of the file.
        aliases: second names of tensors.
        metadata: the user's own JSON values, sensitivities left out.
        sites: bits of quantized activations by site, None where the file does not say.
        against: what to call the checkpoint, if there is one.
        sqnr: of all tensors that both have, in dB; integers are left out.
        lacking: tensors that the checkpoint lacks, or has in another shape.
    """

    title: str
    nbytes: int
    original_nbytes: int
    tensors: tuple[Stored, ...]
    aliases: Mapping[str, str]
    metadata: Mapping[str, Any]
    sites: Mapping[str, int | None]
    against: str | None
    sqnr: float | None
    lacking: tuple[str, ...]

    @property
    def overhead(self) -> int:
        """Bytes of names, shapes and checksums."""
        return self.nbytes - sum(tensor.nbytes for tensor in self.tensors)


def contents(
    archive: Archive,
    title: str,
    against: tuple[str, Mapping[str, Tensor]] | None = None,
) -> Contents:
    """Read what the page shows, one tensor at a time.

    Args:
        archive: the file; without a checkpoint only its largest tensors are decoded. Metadata
            ``sensitivity`` may give a number by the name of a tensor.
        title: what to call it.
        against: name and tensors of what was compressed.

    Raises:
        ArchiveError: the file is damaged.
    """
    known = archive.metadata.get("sensitivity")
    sensitivities = known if isinstance(known, Mapping) else {}
    largest = sorted(filter(_is_shown, archive.entries.values()), key=lambda e: -e.nbytes)
    shown = {entry.name for entry in largest[:HISTOGRAMS]}
    total = Noise()
    found: list[Stored] = []
    lacking: list[str] = []
    sizes = {name: entry.decoded_nbytes for name, entry in archive.entries.items()}
    for name in steps("reading", sizes, sizes.__getitem__):
        entry = archive.entries[name]
        before = None if against is None else against[1].get(name)
        if against is not None and (before is None or tuple(before.shape) != entry.shape):
            lacking.append(name)
            before = None
        values = archive[name] if before is not None or name in shown else None
        sqnr, histogram = None, None
        if before is not None and values is not None:
            own = Noise()
            for noise in (own, total) if _is_signal(entry) else (own,):
                noise.add(before, values)
            sqnr = own.decibels
        if name in shown and values is not None:
            histogram = histogram_of(values, before)
        found.append(_stored(entry, sqnr, _number(sensitivities.get(name)), histogram))
    return Contents(
        title,
        archive.nbytes,
        archive.original_nbytes,
        tuple(found),
        archive.aliases,
        {key: value for key, value in archive.metadata.items() if key != "sensitivity"},
        {site: _bits(grid.get("bits", 8)) for site, grid in archive.sites.items()},
        None if against is None else against[0],
        total.decibels if total.count else None,
        tuple(lacking),
    )


def histogram_of(after: Tensor, before: Tensor | None) -> Histogram | None:
    """Shares of values in bins around the mean, or None where all values are alike."""
    base = (after if before is None else before).detach().reshape(-1).float()
    base = base[base.isfinite()]
    if not base.numel():
        return None
    unit = float(base.abs().max()) or 1.0  # squares, and bins beyond the greatest, must be finite
    base = base / unit
    reach = _REACH * float(base.std(correction=0))
    middle = float(base.mean())
    low = max(float(base.min()), middle - reach)
    high = min(float(base.max()), middle + reach)
    if not low < high:
        return None
    margin = (high - low) / BINS  # a grid's last step may lie just beyond
    low, high = low - margin, high + margin

    def shares(values: Tensor) -> tuple[float, ...]:
        flat = values.detach().reshape(-1).float().cpu() / unit
        counts = torch.histc(flat[flat.isfinite()], BINS, low, high)
        return tuple((counts / max(flat.numel(), 1)).tolist())

    outside = float(((base < low) | (base > high)).double().mean())
    held = None if before is None else shares(before)
    return Histogram(low * unit, high * unit, shares(after), held, outside)


def _is_signal(entry: Entry) -> bool:
    """Not indices and counters: exact and large, they would drown the noise of weights."""
    return DTYPES[entry.dtype].is_floating_point or DTYPES[entry.dtype].is_complex


def _is_shown(entry: Entry) -> bool:
    return DTYPES[entry.dtype].is_floating_point and entry.numel >= _LEAST


def _stored(
    entry: Entry, sqnr: float | None, sensitivity: float | None, histogram: Histogram | None
) -> Stored:
    return Stored(
        entry.name,
        entry.shape,
        entry.dtype,
        describe(entry),
        entry.nbytes,
        entry.numel,
        sqnr,
        sensitivity,
        histogram,
    )


def _number(value: object) -> float | None:
    """A finite number of a file that anyone may have made."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def _bits(value: object) -> int | None:
    """A width of a file that anyone may have made."""
    return value if type(value) is int and 0 < value <= 64 else None
