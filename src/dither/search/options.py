"""What each tensor could cost and lose: predictions from a sorted sample, no encoding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dither.core import Encoded, Stats
from dither.encoders.coded_grid import in_steps
from dither.encoders.gptq import GPTQ
from dither.encoders.rdo import Floats, count, find_thresholds, sorted_sample
from dither.encoders.rotated import Rotated
from dither.encoders.viterbi import Viterbi
from dither.formats import Raw

_SAMPLE = 1 << 15
GRID_INDEX_NBYTES = 11.0
"""Bytes in the index for the parts of a grid over those of raw values, about."""

_GRID_NBYTES = GRID_INDEX_NBYTES + 5.0
"""The same and the payloads of zero point and step."""
_KINDS = 12
"""Kinds of columns that predictions tell apart where there is a basis; the coder has up to 16."""

_LEAST_LEFT = 1e-3

TURNED_LEVEL = 0.7
"""What errors in a table that is rotated count, relative to those of other matrices of its size.

They count more the more of the table is lost: see :func:`_predict_all`.
"""

BASIS_BITS = 4.0
"""Bits of an entry of a basis, about."""
_DAMPING = 32.0
_MOST_EXACT = 1 << 15
_COARSEST = 4.0
"""The coarsest step in root mean squares, short of dropping a tensor altogether."""
_COARSEST_FED = 3.0
"""The same with error feedback, whose error then nears the tensor's own energy."""
_USELESS, _DROPPED = 1e15, 1e30
"""Factors of the loss beyond the coarsest step, and of dropping a tensor: all others give first."""
_LARGEST_STEP = 3e38
_LARGEST_HALF = 65504.0
_LEAST_HALF = 2.0**-8
_LEAST = 1e-30
"""Weights below this lie where float32 itself is coarse; they are stored as they are."""


@dataclass(frozen=True)
class Weighted:
    """A tensor and what an error in it costs.

    Attributes:
        value: the tensor.
        sensitivity: loss for each unit of squared error.
        rows: where rows (first axis) differ, each row's step relative to the tensor's; the
            sensitivity is then that of a row whose relative step is 1.
        gram: second moments of the inputs, for error feedback: see :class:`GPTQ`.
        coarsest: the coarsest step that keeps the tensor of use; None for a common rule.
        trellis: how codes are searched for on a trellis, whose step is then half that of the
            option; its own step is not used. None for a scalar grid.
        basis: orthonormal ``(columns, columns)``, in which a table of many rows is rounded: see
            :class:`Rotated`. Then ``gram`` and ``trellis`` are not used.
        refit: whether steps are fitted to their codes afterwards, as :class:`GPTQ` does it.
    """

    value: Tensor
    sensitivity: float
    rows: Tensor | None = None
    gram: Tensor | None = None
    coarsest: float | None = None
    trellis: Viterbi | None = None
    basis: Tensor | None = None
    refit: bool = False

    def every(self, stride: int) -> Weighted:
        """The same of every ``stride``-th row."""
        rows = None if self.rows is None else self.rows[::stride]
        return replace(self, value=self.value[::stride], rows=rows)

    def relative(self) -> Tensor:
        """The values in relative steps, in the basis: an error counts alike everywhere."""
        value = self.value.detach() if self.rows is None else in_steps(self.value, self.rows)
        return value if self.basis is None else value.float() @ self.basis


@dataclass(frozen=True)
class Option:
    """One way to store one tensor: predicted bytes and loss.

    ``step`` is the grid's step; without one, the values are stored raw in ``dtype``. Where errors
    are not ``fed`` to the inputs behind, values are rounded to nearest.
    """

    nbytes: float
    loss: float
    step: float | None = None
    dtype: torch.dtype | None = None
    fed: bool = True

    def steps(self, tensor: Weighted) -> Tensor:
        """The step, ``(1,)``, or one for each row."""
        step = torch.tensor([self.step or 0.0])
        return step if tensor.rows is None else (step * tensor.rows).bfloat16().float()

    def encode(self, tensor: Weighted) -> Encoded:
        """Carry it out."""
        if self.step is None:
            return Raw(self.dtype).encode(tensor.value)
        steps = self.steps(tensor)
        if tensor.basis is not None:
            return Rotated(steps, tensor.basis).encode(tensor.value)
        stats = Stats(gram=tensor.gram) if self.fed else None
        if tensor.trellis is not None and self.fed:
            return replace(tensor.trellis, step=steps / 2).encode(tensor.value, stats)
        return GPTQ(steps, refit=tensor.refit and self.fed).encode(tensor.value, stats)


@dataclass(frozen=True)
class Ladder:
    """The options worth choosing, bytes rising and loss falling along a convex curve."""

    options: tuple[Option, ...]

    def predict(self, step: float) -> float:
        """Predicted bytes of the grid whose step is nearest."""
        grids = (option for option in self.options if option.step is not None)
        return min(grids, key=lambda o: abs(math.log2((o.step or step) / step))).nbytes

    def corrected(self, measured: Mapping[float, float]) -> Ladder:
        """The same with the bytes of grids corrected by what some of them turned out to take.

        Args:
            measured: bytes by step. Between measured steps the correction is interpolated.
        """
        if not measured:
            return self
        steps = sorted(measured)
        known = [math.log2(step) for step in steps]
        ratios = [(measured[step] + _DAMPING) / (self.predict(step) + _DAMPING) for step in steps]

        def correct(option: Option) -> Option:
            if option.step is None:
                return option
            ratio = float(np.interp(math.log2(option.step), known, ratios))
            return replace(option, nbytes=(option.nbytes + _DAMPING) * ratio - _DAMPING)

        return Ladder(_convex([correct(option) for option in self.options]))


def build_ladder(tensor: Weighted) -> Ladder:
    """Predict bytes and loss over the whole range of steps, raw storage included."""
    options = [Option(_raw_nbytes(tensor.value), 0.0)]
    if can_quantize(tensor.value):
        options += _half(tensor) + _grids(tensor, _samples(tensor)) + _exact(tensor)
    return Ladder(_convex(options))


def can_quantize(value: Tensor) -> bool:
    """Whether rounding makes sense: real numbers, all finite, not all (nearly) zero."""
    if not value.dtype.is_floating_point or value.numel() == 0:
        return False
    low, high = (float(x) for x in torch.aminmax(value.detach().float()))
    return math.isfinite(low) and math.isfinite(high) and max(-low, high) > _LEAST


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


def _half(tensor: Weighted) -> list[Option]:
    value = tensor.value
    if value.element_size() <= 2 or not _LEAST_HALF < float(value.abs().max()) < _LARGEST_HALF:
        return []
    error = half_step(value) ** 2 / 12
    if tensor.rows is not None:
        error *= float(tensor.rows.square().reciprocal().mean())
    loss = tensor.sensitivity * error * value.numel()
    nbytes = _raw_nbytes(value.half())
    return [Option(nbytes, loss, dtype=torch.float16)]


@dataclass(frozen=True)
class _Columns:
    """Columns that are alike, as predictions see them.

    Attributes:
        sample: some of their values in relative steps, sorted.
        numel: how many there are.
        rows: of the basis that these columns need, each of ``width`` entries; 0 without one.
        width: columns of the tensor.
    """

    sample: Floats
    numel: int
    rows: int = 0
    width: int = 0

    @property
    def energy(self) -> float:
        """The sum of their squares."""
        return float(np.square(self.sample).mean()) * self.numel

    def predict(self, step: float) -> tuple[float, float]:
        """Bytes and squared error at a step."""
        nbytes, error = _predict(self.sample, step, self.numel, refitted=self.rows > 0)
        if self.rows and max(-self.sample[0], self.sample[-1]) > step / 2:
            nbytes += self.rows * self.width * BASIS_BITS / 8
        return nbytes, error


def _samples(tensor: Weighted) -> list[_Columns]:
    """The values, all together; those in a basis by columns of like size, which are coded apart."""
    value = tensor.value
    if tensor.basis is None:
        return [_Columns(sorted_sample(tensor.relative(), _SAMPLE), value.numel())]
    width = value.shape[1]
    stride = max(1, value.numel() // (_KINDS * _SAMPLE // 4))
    places = tensor.every(stride).relative()
    order = places.square().mean(0).argsort(descending=True)
    return [
        _Columns(sorted_sample(places[:, part], _SAMPLE), len(value) * len(part), len(part), width)
        for part in order.tensor_split(min(_KINDS, width))
    ]


def _grids(tensor: Weighted, columns: list[_Columns]) -> list[Option]:
    """Options with ever finer steps, down to the accuracy of float16."""
    numel = tensor.value.numel()
    rms = max(math.sqrt(float(np.square(part.sample).mean())) for part in columns)
    largest = max(max(-part.sample[0], part.sample[-1]) for part in columns)
    nothing = min(2.01 * largest, _LARGEST_STEP)  # all codes are 0
    usual = (_COARSEST if tensor.gram is None else _COARSEST_FED) * rms
    coarsest = min(tensor.coarsest or usual, nothing)
    finest = min(half_step(tensor.value), coarsest / 2)
    per_octave, between = _density(numel)
    octaves = math.log2(coarsest / finest)
    knots = np.linspace(math.log2(coarsest), math.log2(finest), 1 + math.ceil(octaves * per_octave))
    predicted = [_predict_all(columns, 2.0**knot) for knot in knots]
    fine = np.linspace(knots[0], knots[-1], 1 + (len(knots) - 1) * between)[::-1]
    nbytes = np.interp(fine, knots[::-1], [p[0] for p in predicted][::-1])
    if tensor.gram is not None:
        # Fed errors spread evenly over a step, however coarse: weights do not fall to zero.
        least = [numel * 4.0**knot / 12 for knot in knots]
        predicted = [(p[0], max(p[1], error)) for p, error in zip(predicted, least, strict=True)]
    loss = np.exp2(np.interp(fine, knots[::-1], np.log2([p[1] for p in predicted])[::-1]))
    overhead, fed = _GRID_NBYTES, tensor.basis is None
    if tensor.rows is not None:
        overhead += _raw_nbytes(tensor.rows.to(torch.bfloat16))
    options = [
        Option(overhead + size, tensor.sensitivity * error, _short(2.0**log_step), fed=fed)
        for log_step, size, error in zip(fine, nbytes, loss, strict=True)
    ]
    return options + [
        Option(overhead + size, tensor.sensitivity * error * penalty, _short(step), fed=False)
        for step, penalty in _coarser(coarsest, nothing)
        for size, error in [_predict_all(columns, step)]
    ]


def _coarser(coarsest: float, nothing: float) -> list[tuple[float, float]]:
    """Steps from the coarsest one of use to dropping the tensor, and their penalties.

    These rise geometrically, so that the ladder stays convex and all tensors give way together.
    """
    count = math.ceil(6 * math.log2(nothing / coarsest))
    steps = np.geomspace(coarsest, nothing, max(count, 1) + 1)[1:-1]
    shares = np.arange(1, len(steps) + 1) / (len(steps) + 1)
    return [*zip(steps.tolist(), (_USELESS**shares).tolist(), strict=True), (nothing, _DROPPED)]


def _exact(tensor: Weighted) -> list[Option]:
    """The grid that loses nothing, where the values are few multiples of the smallest one.

    So are masks, signs, and weights that somebody has rounded already.
    """
    flat = tensor.value.detach().reshape(-1).float()
    if tensor.rows is not None or tensor.basis is not None or flat.numel() < 2:
        return []
    for part in (flat[: 1 << 12], flat):
        magnitudes = part.abs()
        step = float(magnitudes[magnitudes > 0].min()) if bool(magnitudes.any()) else 1.0
        codes = part / step
        if float(codes.abs().max()) > _MOST_EXACT or not bool((codes.round() * step == part).all()):
            return []
    counts = np.bincount((codes - codes.min()).long().cpu().numpy())
    nbytes = _GRID_NBYTES + _coded_nbytes(counts.astype(np.float64))
    return [Option(nbytes, 0.0, step=step, fed=False)]


def _density(numel: int) -> tuple[int, int]:
    """Predictions in each octave of steps, and how many options each gap is cut into."""
    if numel >= 1 << 12:
        return 4, 8
    return (2, 2) if numel >= 1 << 6 else (1, 1)


def _short(step: float) -> float:
    """A step that takes two bytes in the file."""
    return float(torch.tensor(step).bfloat16())


def _predict(
    sample: Floats, step: float, numel: int, *, refitted: bool = False
) -> tuple[float, float]:
    """Bytes and squared error of a tensor of ``numel`` values from a sorted sample of it.

    Where the step is ``refitted``, decoding multiplies codes by what leaves the least error.
    """
    scaled = sample / step
    found = find_thresholds(scaled, 0.0)
    counts = count(scaled, found.edges)
    ratio = numel / len(sample)
    used = counts > 0
    nearest = np.repeat(found.codes[used], counts[used])
    if refitted:
        own = float(np.square(nearest).sum())
        scaled = scaled - nearest * (float((nearest * scaled).sum()) / own if own else 0.0)
    else:
        scaled = scaled - nearest
    error = float(np.square(scaled).sum()) * step * step * ratio
    return _coded_nbytes(counts * ratio), max(error, 1e-300)


def _predict_all(columns: list[_Columns], step: float) -> tuple[float, float]:
    """Bytes, and what counts as squared error."""
    parts = [part.predict(step) for part in columns]
    nbytes, error = (sum(part) for part in zip(*parts, strict=True))
    if not columns[0].rows:
        return nbytes, error
    # Axes fitted to their codes leave rows shorter by their error. What follows a token table sees
    # directions: of an error that is the share e of all, there is e / (1 - e) to what is left.
    energy = sum(part.energy for part in columns)
    return nbytes, TURNED_LEVEL * error / max(1 - error / energy, _LEAST_LEFT)


def _raw_nbytes(value: Tensor) -> float:
    """Bytes of values stored as they are, by the histogram of each of their byte planes."""
    flat = value.detach().reshape(-1)
    if flat.numel() == 0:
        return 0.0
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].clone(memory_format=torch.contiguous_format)
    planes = sample.cpu().view(torch.uint8).reshape(len(sample), -1).numpy()
    ratio = flat.numel() / len(sample)
    estimates = [_coded_nbytes(np.bincount(plane) * ratio) for plane in planes.T]
    return sum(min(float(flat.numel()), estimate) for estimate in estimates)


def _coded_nbytes(counts: Floats) -> float:
    """Bytes by the entropy, with a table that costs a few bits for each symbol in use.

    Good to a percent or two; what is measured later corrects it.
    """
    used = counts[counts > 0]
    total = float(used.sum())
    bits = total * math.log2(total) - float((used * np.log2(used)).sum())
    return min(
        bits / 8 + 4 + 0.4 * len(used), total * math.ceil(math.log2(max(len(counts), 1))) / 8
    )


def _convex(options: list[Option]) -> tuple[Option, ...]:
    """Those on the lower convex hull of (bytes, loss), from the fewest bytes on."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return tuple(hull)


def _slope(a: Option, b: Option) -> float:
    return (b.loss - a.loss) / max(b.nbytes - a.nbytes, 1e-9)
