"""What an error in each tensor costs, read off the weights alone.

The rule was found by measuring true sensitivities (noise in one tensor at a time) of a sentence
encoder and of two convolutional networks, and asking what explains them. ``docs/sensitivity.md``
gives the reasons, and what each part of the rule brings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dither.core import SpecError
from dither.encoders.coded_grid import in_steps
from dither.encoders.rotated import principal_axes
from dither.model import TABLE_NAMES
from dither.search.knowledge import Knowledge, Sensitivity, Weights
from dither.search.predict import BASIS_BITS, can_quantize, is_finite
from dither.search.priors import prior_gram
from dither.search.row_steps import FREQUENT, notched

SIZE_EXPONENT = 2 / 3
"""Sensitivity falls with this power of a matrix's size: steps grow with its cube root.

Two plain rules bracket it. If a unit of squared error cost the same everywhere, all steps would be
equal; if only errors relative to the whole tensor counted, as with a norm behind each layer, steps
would grow with the square root of its size.
"""

VECTOR_PRECISION = 0.1
"""Steps of vectors (biases, norms) relative to those of matrices, both in standard deviations.

They are few, and an error in one reaches every position.
"""

NEGLIGIBLE = 1e-9
"""Far below what norms add to variances, of which 1e-8 is the least that is in use."""

RANGE = 2.0**-16
"""Values smaller than this share of the largest do not count if they are also negligible."""

MOST_COLUMNS = 1024
"""Wider token tables are not rotated: decoding one takes a product of matrices."""

BASIS_POWER = 1.0
"""With which power of its relative step a row counts less in the choice of axes."""

USUAL_ERROR = 1 / 8
"""Squared error over mean square of a token table in a usual file, for predictions."""

HEAD = 12.0
"""How much more an error counts in a token table from which a model's scores are read.

Found on SmolLM2-135M and a small model of words: see the lab.
"""

_TOKEN_NAMES = (*TABLE_NAMES, "lm_head")
_TOKEN_ROWS = 2048
_ROWS_PER_COLUMN = 4


def data_free(tensors: Mapping[str, Tensor]) -> dict[str, Knowledge]:
    """Sensitivities without data or a forward pass.

    * Matrices and convolutions: ``size ** -2/3`` (:data:`SIZE_EXPONENT`), and second moments of
      their inputs for error feedback (:mod:`dither.search.priors`). A stack of matrices, as
      experts are, counts as so many single ones.
    * Token tables: rows further down are rarer. Tokenizers number tokens by falling frequency,
      about as Zipf and Mandelbrot say, ``1 / (row + rows / 16)``, and a row that is seen half as
      often may have twice the squared error.
    * Output layers over a vocabulary, tied to a token table or of as many rows: an error counts
      :data:`HEAD` times, as nothing behind them makes up for it.
    * Vectors: finer steps than matrices (:data:`VECTOR_PRECISION`).
    """
    weights = tensors if isinstance(tensors, Weights) else Weights(tensors)
    floats: set[str] = set()
    weighted, variances = {}, {}
    facts = weights.facts or facts_of
    for name, value in weights.each():
        finite, variance = facts(value)
        if not finite:
            weighted[name] = Knowledge(value, 1.0)
        elif value.ndim > 1:
            weighted[name] = _stack(value) if name in weights.stacks else _matrix(name, value)
            if name in weights.heads:
                cost = HEAD * weighted[name].sensitivity
                weighted[name] = replace(weighted[name], sensitivity=cost)
            variances[name] = variance
        else:
            floats.add(name)
    # The mean cost of an error of one standard deviation in each weight of a matrix.
    total = sum(tensors[name].numel() for name in variances)
    typical = sum(
        tensors[name].numel() * _of_size(tensors[name]) * variance
        for name, variance in variances.items()
    )
    unit = typical / total if total and typical > 0 else 1.0
    weighted |= {name: of_vector(tensors[name], unit) for name in floats}
    return {name: weighted[name] for name in tensors}


def facts_of(value: Tensor) -> tuple[bool, float]:
    """Whether there are finite numbers only, and then the variance of a matrix: all are read."""
    finite = is_finite(value)
    return finite, _variance(value) if finite and value.ndim > 1 else 0.0


def heads_of(values: Mapping[str, Tensor], aliases: Mapping[str, str]) -> frozenset[str]:
    """Names of matrices that give a score to each token of a vocabulary.

    That is a token table that has another name, which is none of a table; or another matrix of as
    many rows as a token table has.

    Args:
        values: by their first names.
        aliases: further names of tied tensors, ``{alias: name}``.

    >>> table, head = torch.ones(4096, 8), torch.ones(4096, 8)
    >>> sorted(heads_of({"embed.weight": table}, {"out.weight": "embed.weight"}))
    ['embed.weight']
    >>> sorted(heads_of({"embed.weight": table, "out.weight": head}, {}))
    ['out.weight']
    """
    names = {name: [name] for name, value in values.items() if _is_wide_table(value)}
    for alias, name in aliases.items():
        if name in names:
            names[name].append(alias)
    by_name = {
        name: [any(part in own.lower() for part in TABLE_NAMES) for own in all_names]
        for name, all_names in names.items()
    }
    rows = {len(values[name]) for name, found in by_name.items() if any(found)}
    return frozenset(
        name
        for name, found in by_name.items()
        if not all(found) and (any(found) or len(values[name]) in rows)
    )


def _is_wide_table(value: Tensor) -> bool:
    return value.ndim == 2 and len(value) >= _TOKEN_ROWS and value.is_floating_point()


def of_vector(value: Tensor, unit: float) -> Knowledge:
    """What is known of a bias or a norm.

    Args:
        value: finite, floating point.
        unit: what an error of one standard deviation in a weight of a matrix costs, on average.
    """
    spread, positive = _spread(value), counted(value)
    # What a norm divides by must stay, however small beside the others.
    least = float(positive.min()) / 2 if positive.numel() else None
    cost = unit / VECTOR_PRECISION**2 / spread
    return Knowledge(value, cost, coarsest=spread**0.5, least=least)


def unit_of(tensors: Iterable[Knowledge]) -> float:
    """The unit for :func:`of_vector`, by what is known of matrices."""
    matrices = [known for known in tensors if known.value.ndim > 1 and is_finite(known.value)]
    total = sum(known.value.numel() for known in matrices)
    costs = [k.value.numel() * k.sensitivity * _variance(k.value) for k in matrices]
    return sum(costs) / total if total and sum(costs) > 0 else 1.0


def token_counts(counts: Mapping[str, Tensor], sensitivity: Sensitivity = data_free) -> Sensitivity:
    """The rule for token tables, with rows in the order in which they were seen to be read.

    Only the order is taken: counts of a sample would make rows that it lacks worthless, and they
    will be read one day.

    Args:
        counts: how often each row was read, ``(rows,)``, by the name of its table. Rows with equal
            counts share their mean rank.
        sensitivity: for everything else.

    >>> table = torch.randn(4096, 8)
    >>> seen = torch.arange(4096)  # the last row is read most
    >>> rows = token_counts({"t": seen})({"t": table})["t"].rows
    >>> bool((rows.diff() <= 0).all()) and bool(rows[0] < 4.2 * rows[-1])
    True
    """

    def counted(tensors: Mapping[str, Tensor]) -> Mapping[str, Knowledge]:
        weighted = dict(sensitivity(tensors))
        for name, seen in counts.items():
            if name not in weighted or tuple(seen.shape) != tuple(weighted[name].value.shape[:1]):
                raise SpecError(
                    f"counts for {name!r} of shape {tuple(seen.shape)} fit no table; give one "
                    "number for each of its rows, under its name"
                )
            _, group, sizes = seen.unique(return_inverse=True, return_counts=True)
            before = sizes.flip(0).cumsum(0).flip(0).double() - (sizes + 1) / 2
            rows = _by_rank(before[group])
            axes = token_axes(weighted[name].value, rows)
            weighted[name] = replace(weighted[name], rows=rows, gram=None, axes=axes)
        return weighted

    return counted


def is_rotated(name: str, value: Tensor) -> bool:
    """Whether the data-free rule rounds a tensor along axes: a large token table, if they pay."""
    return _is_table(name, value) and _matrix(name, value).axes is not None


def _is_table(name: str, value: Tensor) -> bool:
    return value.ndim == 2 and any(part in name.lower() for part in _TOKEN_NAMES)


def _matrix(name: str, value: Tensor) -> Knowledge:
    if _is_table(name, value):
        rows = _token_steps(value)
        axes = None if rows is None else token_axes(value, rows)
        return Knowledge(value, _of_size(value), rows=rows, axes=axes)
    return Knowledge(value, _of_size(value), gram=prior_gram(value))


def _stack(value: Tensor) -> Knowledge:
    """Of matrices, each with inputs of its own: as if each stood alone."""
    return Knowledge(value, _of_size(value[0]), gram=prior_gram(value[0]))


def _token_steps(value: Tensor) -> Tensor | None:
    """Relative steps of the rows of a token table, geometric mean 1; None for a small table."""
    count, columns = value.shape
    if count < _TOKEN_ROWS or count < _ROWS_PER_COLUMN * columns:
        return None
    return _by_rank(torch.arange(count, dtype=torch.float64))


def token_axes(value: Tensor, rows: Tensor) -> Tensor | None:
    """Axes along which the rows of a token table are rounded; None where they do not pay.

    They pay where the columns have so much in common that what codes save at a usual size (a
    coarser step has more axes without any codes) exceeds what the axes take.

    Args:
        value: ``(rows, columns)``.
        rows: relative steps.
    """
    count, columns = value.shape
    if not 2 <= columns <= MOST_COLUMNS or not can_quantize(value):
        return None
    scaled = in_steps(value, rows)
    axes = principal_axes(scaled, rows ** (2 - BASIS_POWER))
    plain = scaled.square().mean(0).double()
    turned = (scaled @ axes).square_().mean(0).double()
    floor = float(plain.mean()) * USUAL_ERROR
    gains = [part.clamp(min=floor).log2().sum() / 2 for part in (plain, turned)]
    saved = count * float(gains[0] - gains[1])
    return axes if saved > columns * columns * BASIS_BITS else None


def _by_rank(ranks: Tensor) -> Tensor:
    """Relative steps of rows by how many are read more often, geometric mean 1."""
    rarity = ranks.double() / len(ranks) + FREQUENT
    return notched(rarity.log2() / 2)


def _of_size(value: Tensor) -> float:
    return float(value.numel() ** -SIZE_EXPONENT)


def _spread(value: Tensor) -> float:
    """The variance of a vector, or less where none is negative: then errors count by ratio.

    So it is with the variances of a batch norm, whose least ones must not become 0.
    """
    spread = min(_variance(value), by_ratio(value) ** 2)
    return max(spread, 1e-30)


def by_ratio(value: Tensor) -> float:
    """Root harmonic mean square of the values that count, see :func:`counted`; infinite for none.

    >>> by_ratio(torch.tensor([3.0, 3.0, 5.6e-45]))
    3.0
    """
    values = counted(value)
    return float(values.reciprocal().square().mean()) ** -0.5 if values.numel() else math.inf


def counted(value: Tensor) -> Tensor:
    """The values of which errors count by ratio, a float64 vector: those above 0, if none is below.

    A dead channel has a variance of nearly 0, where a norm divides by what it adds to it: what is
    far below all such numbers (:data:`NEGLIGIBLE`) and below the largest value counts not at all.
    """
    double = value.detach().double().reshape(-1)
    if not double.numel() or bool((double < 0).any()):
        return double[:0]
    return double[double > min(NEGLIGIBLE, float(double.max()) * RANGE)]


def _variance(value: Tensor) -> float:
    """Variance; of a single or constant value its square, so that it is 0 for zeros only."""
    flat = value.detach().reshape(-1).float()
    variance = float(flat.var(correction=0))
    if not math.isfinite(variance):
        variance = float(flat.double().var(correction=0))
    return variance if variance > 0 else float(flat[0]) ** 2
