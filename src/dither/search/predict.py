"""Bytes and squared errors of grids, predicted from a sorted sample: nothing is encoded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dither.encoders.outputs import PIECE
from dither.encoders.rdo import Floats, Ints, count, find_thresholds, sorted_sample
from dither.search.knowledge import Knowledge

_SAMPLE = 1 << 15
GRID_INDEX_NBYTES = 11.0
"""Bytes in the index for the parts of a grid over those of raw values, about."""

GRID_NBYTES = GRID_INDEX_NBYTES + 5.0
"""The same and the payloads of zero point and step."""

BASIS_BITS = 4.0
"""Bits of an entry of a basis, about."""

TURNED_LEVEL = 0.7
"""What errors in a table that is rotated count, relative to those of other matrices of its size.

They count more the more of the table is lost: see :func:`what_counts`.
"""

BENT = 4
"""How late errors in matrices count more: 1 and 2 cost MiniLM and a voice-activity net more than
they brought, while a GRU that broke at 24x bends with each."""

_KINDS = 12
"""Kinds of columns that predictions tell apart along axes; the coder has up to 16."""

_LEAST_LEFT = 1e-3
_HALVINGS = 60
_COARSEST = 4.0
"""The coarsest step in root mean squares, short of dropping a tensor altogether."""
_COARSEST_FED = 3.0
"""The same with error feedback, whose error then nears the tensor's own energy."""
_USELESS, _DROPPED = 1e15, 1e30
"""Factors of the loss beyond the coarsest step, and of dropping a tensor: all others give first."""
_MOST_LEVELS = 1 << 20
"""Steps between 0 and the largest value, at most: codes beyond cost more than they are worth."""
_LARGEST_STEP = 3e38
_LEAST = 1e-30
"""Weights below this lie where float32 itself is coarse; they are stored as they are."""


@dataclass(frozen=True)
class Prediction:
    """What a grid with some step would take and lose, and whether that step is of use.

    Attributes:
        step: unrounded.
        nbytes: of codes, steps and what the index says of them.
        loss: squared error times sensitivity; more where all other tensors shall give first.
        is_useful: False for steps so coarse that they lead to dropping the tensor.
    """

    step: float
    nbytes: float
    loss: float
    is_useful: bool


def predict_grids(known: Knowledge) -> Iterator[Prediction]:
    """Ever finer steps down to the accuracy of float16, and those beyond the coarsest of use."""
    columns = _samples(known)
    numel = known.value.numel()
    rms = max(math.sqrt(float(np.square(part.sample).mean())) for part in columns)
    largest = max(max(-part.sample[0], part.sample[-1]) for part in columns)
    nothing = min(2.01 * largest, _LARGEST_STEP)  # all codes are 0
    usual = (_COARSEST if known.gram is None else _COARSEST_FED) * rms
    coarsest = min(known.coarsest or usual, nothing)
    half = half_step(known.value if known.whole is None else known.whole)
    half = min(half, coarsest / 2) if known.whole is None else min(half, nothing)
    finest = max(half, largest / _MOST_LEVELS)
    if finest > coarsest / 2:  # so small a step needs more codes than it is worth
        yield from _given_up(known, columns, finest, nothing)
        return
    per_octave, between = _density(numel)
    octaves = math.log2(coarsest / finest)
    knots = np.linspace(math.log2(coarsest), math.log2(finest), 1 + math.ceil(octaves * per_octave))
    predicted = [_predict_all(columns, 2.0**knot) for knot in knots]
    fine = np.linspace(knots[0], knots[-1], 1 + (len(knots) - 1) * between)[::-1]
    nbytes = np.interp(fine, knots[::-1], [p[0] for p in predicted][::-1])
    if known.gram is not None:
        # Fed errors spread evenly over a step, however coarse: weights do not fall to zero.
        least = [numel * 4.0**knot / 12 for knot in knots]
        predicted = [(p[0], max(p[1], error)) for p, error in zip(predicted, least, strict=True)]
    energy = sum(part.energy for part in columns)
    predicted = [(size, what_counts(known, error, energy)) for size, error in predicted]
    loss = np.exp2(np.interp(fine, knots[::-1], np.log2([p[1] for p in predicted])[::-1]))
    overhead = _overhead(known)
    for log_step, size, error in zip(fine, nbytes, loss, strict=True):
        cost = known.sensitivity * error
        yield Prediction(2.0**log_step, overhead + size, cost, is_useful=True)
    yield from _given_up(known, columns, coarsest, nothing)


def _given_up(
    known: Knowledge, columns: list[_Columns], coarsest: float, nothing: float
) -> Iterator[Prediction]:
    """Steps beyond the coarsest of use."""
    energy = sum(part.energy for part in columns)
    for step, penalty in _coarser(coarsest, nothing):
        size, error = _predict_all(columns, step)
        factor = penalty if known.whole is None else 1.0  # what it is a difference to is left
        cost = known.sensitivity * what_counts(known, error, energy) * factor
        yield Prediction(step, _overhead(known) + size, cost, is_useful=False)


def _overhead(known: Knowledge) -> float:
    """Bytes of a grid without its codes."""
    steps = 0.0 if known.rows is None else raw_nbytes(known.rows.to(torch.bfloat16))
    return GRID_NBYTES + steps


def can_quantize(value: Tensor) -> bool:
    """Whether rounding makes sense: real numbers, all finite, not all (nearly) zero."""
    if not value.dtype.is_floating_point or value.numel() == 0:
        return False
    low, high = (float(x) for x in torch.aminmax(value.detach().float()))
    return math.isfinite(low) and math.isfinite(high) and max(-low, high) > _LEAST


def why_exact(value: Tensor) -> str:
    """Why a tensor cannot be rounded; empty if it can, or if there is nothing in it to keep."""
    if value.is_complex():
        return "complex numbers, which no grid holds"
    if not value.is_floating_point():
        return f"{str(value.dtype).removeprefix('torch.')}: only floating point is rounded"
    if not value.numel() or is_finite(value):
        return ""
    finite = bool(value.isfinite().all())
    return "values beyond float32" if finite else "NaN or infinite values, which no grid holds"


def is_finite(value: Tensor) -> bool:
    """Whether there are numbers, all real and within float32."""
    if not value.is_floating_point() or not value.numel():
        return False
    parts = value.detach().reshape(-1).split(PIECE)
    return all(bool(part.float().isfinite().all()) for part in parts)


def half_step(value: Tensor) -> float:
    """The step whose root mean square error is that of float16, whatever the values' magnitude."""
    flat = value.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].to(torch.float64)
    rms = float(sample.square().mean().sqrt())
    if rms == 0:
        return float(flat.abs().max()) * 2.0**-11
    # A power of two brings them to where float16 is neither too small nor too large.
    unit = 2.0 ** round(math.log2(rms))
    error = float(((sample / unit).half().double() * unit - sample).square().mean().sqrt())
    return math.sqrt(12) * max(error if math.isfinite(error) else 0.0, rms * 2.0**-13)


def raw_nbytes(value: Tensor) -> float:
    """Bytes of values stored as they are, by the histogram of each of their byte planes."""
    flat = value.detach().reshape(-1)
    if flat.numel() == 0:
        return 0.0
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].clone(memory_format=torch.contiguous_format)
    planes = sample.cpu().view(torch.uint8).reshape(len(sample), -1).numpy()
    ratio = flat.numel() / len(sample)
    estimates = [coded_nbytes(np.bincount(plane) * ratio) for plane in planes.T]
    return sum(min(float(flat.numel()), estimate) for estimate in estimates)


def coded_nbytes(counts: Floats, levels: int | None = None) -> float:
    """Bytes by the entropy, with a table that costs a few bits for each symbol in use.

    Args:
        counts: of each symbol.
        levels: symbols in all, where those that do not occur are left out of the counts.

    Good to a percent or two; what is measured later corrects it.
    """
    used = counts[counts > 0]
    total = float(used.sum())
    bits = total * math.log2(total) - float((used * np.log2(used)).sum())
    width = math.ceil(math.log2(max(levels or len(counts), 1)))
    return min(bits / 8 + 4 + 0.4 * len(used), total * width / 8)


@dataclass(frozen=True)
class _Columns:
    """Columns that are alike, as predictions see them.

    Attributes:
        sample: some of their values in relative steps, sorted.
        numel: how many there are.
        axes: that these columns need, each of ``width`` entries; 0 without any.
        width: columns of the tensor.
    """

    sample: Floats
    numel: int
    axes: int = 0
    width: int = 0

    @property
    def energy(self) -> float:
        """The sum of their squares."""
        return float(np.square(self.sample).mean()) * self.numel

    def predict(self, step: float) -> tuple[float, float]:
        """Bytes and squared error at a step."""
        nbytes, error = _predict(self.sample, step, self.numel, refitted=self.axes > 0)
        if self.axes and max(-self.sample[0], self.sample[-1]) > step / 2:
            nbytes += self.axes * self.width * BASIS_BITS / 8
        return nbytes, error


def _samples(known: Knowledge) -> list[_Columns]:
    """The values, all together; those along axes by columns of like size, which are coded apart."""
    value = known.value
    if known.axes is None:
        return [_Columns(sorted_sample(known.relative(), _SAMPLE), value.numel())]
    width = value.shape[1]
    stride = max(1, value.numel() // (_KINDS * _SAMPLE // 4))
    places = known.every(stride).relative()
    order = places.square().mean(0).argsort(descending=True)
    return [
        _Columns(sorted_sample(places[:, part], _SAMPLE), len(value) * len(part), len(part), width)
        for part in order.tensor_split(min(_KINDS, width))
    ]


def _coarser(coarsest: float, nothing: float) -> list[tuple[float, float]]:
    """Steps from the coarsest one of use to dropping the tensor, and their penalties.

    These rise geometrically, so that the ladder stays convex and all tensors give way together.
    """
    count = math.ceil(6 * math.log2(nothing / coarsest))
    steps = np.geomspace(coarsest, nothing, max(count, 1) + 1)[1:-1]
    shares = np.arange(1, len(steps) + 1) / (len(steps) + 1)
    return [*zip(steps.tolist(), (_USELESS**shares).tolist(), strict=True), (nothing, _DROPPED)]


def _density(numel: int) -> tuple[int, int]:
    """Predictions in each octave of steps, and how many choices each gap is cut into."""
    if numel >= 1 << 12:
        return 4, 8
    return (2, 2) if numel >= 1 << 6 else (1, 1)


def _predict(
    sample: Floats, step: float, numel: int, *, refitted: bool = False
) -> tuple[float, float]:
    """Bytes and squared error of a tensor of ``numel`` values from a sorted sample of it.

    Where the step is ``refitted``, decoding multiplies codes by what leaves the least error.
    """
    scaled = sample / step
    codes, counts, levels = _counted(scaled)
    ratio = numel / len(sample)
    nearest = np.repeat(codes, counts)
    if refitted:
        own = float(np.square(nearest).sum())
        scaled = scaled - nearest * (float((nearest * scaled).sum()) / own if own else 0.0)
    else:
        scaled = scaled - nearest
    error = float(np.square(scaled).sum()) * step * step * ratio
    return coded_nbytes(counts * ratio, levels), max(error, 1e-300)


def _counted(scaled: Floats) -> tuple[Ints, Ints, int]:
    """The codes in use, how often each is, and how many levels they span, of sorted values."""
    low, high = (int(np.rint(scaled[i])) for i in (0, -1))
    if high - low >= len(scaled):  # few are in use
        codes, times = np.unique(np.rint(scaled).astype(np.int64), return_counts=True)
        return codes, times, high - low + 1
    found = find_thresholds(scaled, 0.0)
    counts = count(scaled, found.edges)
    used = counts > 0
    return found.codes[used], counts[used], len(counts)


def _predict_all(columns: list[_Columns], step: float) -> tuple[float, float]:
    """Bytes and squared error."""
    parts = [part.predict(step) for part in columns]
    nbytes, error = (sum(part) for part in zip(*parts, strict=True))
    return nbytes, error


def what_counts(known: Knowledge, error: float, energy: float) -> float:
    """What counts as squared error: in matrices, more where little is left of them.

    Of an error that is the share e of all, there is e / (1 - e ** 4) (:data:`BENT`): as it is up to
    some 4 dB of signal to noise, and without bound where a matrix is given up, so that no network
    breaks at one of them while others can give way. What follows a rotated token table sees
    directions: there it is e / (1 - e) from the first.
    """
    if known.value.ndim < 2 or known.whole is not None:
        return error
    share = min(error / energy, 1.0)
    if known.axes is not None:
        return TURNED_LEVEL * error / max(1 - share, _LEAST_LEFT)
    return error / max(1 - share**BENT, _LEAST_LEFT)


def noise_of(known: Knowledge, loss: float, energy: float) -> float:
    """The squared error, at most the energy, that was predicted where some loss is.

    Args:
        known: the tensor.
        loss: what :class:`Prediction` says.
        energy: squares of its values in relative steps.
    """
    wanted, low, high = loss / known.sensitivity, 0.0, energy
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if what_counts(known, middle, energy) < wanted else (low, middle)
    return high
