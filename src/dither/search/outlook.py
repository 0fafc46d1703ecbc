"""What sizes would do to a model, predicted before any of them is paid for."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dither.core import BudgetError, on_cpu
from dither.model import collect
from dither.progress import Hook, hooked, steps
from dither.search.coder import PROBE
from dither.search.forecast import Forecast
from dither.search.knowledge import Choice, Knowledge, Sensitivity, Weights
from dither.search.ledger import Ledger
from dither.search.predict import can_quantize, noise_of, why_exact
from dither.search.sensitivity import data_free, heads_of
from dither.search.size import parse_size
from dither.search.source import Source, weights_in

SIZES = ("4x", "8x", "12x", "16x")

_KINDS = ("vectors", "vectors", "matrices", "convolutions")

ERASED = 0.99
"""Noise to signal from which a tensor counts as erased."""

EXACT = 1e-12
"""Noise to signal of what is not rounded at all: 120 dB."""


@dataclass(frozen=True)
class SizeOutlook:
    """What is predicted of one size; nothing was encoded whole.

    Attributes:
        size: as it was asked for.
        budget: bytes.
        nbytes: of the file; above the budget where that cannot be reached.
        bits: for each value, names and shapes included.
        snr: signal to noise in dB, the mean over all values that are rounded.
        loss: what the search minimises; only its ratio from size to size means something.
        erased: tensors whose error is all that they are.
        kinds: bytes by kind of tensor.
        is_reachable: whether a file of this size is possible.
    """

    size: str
    budget: int
    nbytes: int
    bits: float
    snr: float
    loss: float
    erased: tuple[str, ...]
    kinds: Mapping[str, int]
    is_reachable: bool


@dataclass(frozen=True)
class Outlook:
    """What several sizes would do to a model.

    Attributes:
        original_nbytes: of the tensors as they are.
        values: how many there are.
        smallest: bytes of the smallest file, predicted.
        exact: why tensors are stored as they are, by name.
        seconds: that compressing to one of the sizes without data takes here, about.
        sizes: in the order in which they were asked for.
    """

    original_nbytes: int
    values: int
    smallest: int
    exact: Mapping[str, str]
    seconds: float
    sizes: tuple[SizeOutlook, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@torch.inference_mode(mode=False)
def plan(
    source: Source,
    sizes: Iterable[float | str] | float | str = SIZES,
    *,
    sensitivity: Sensitivity = data_free,
    progress: Hook | None = None,
) -> Outlook:
    """Predict what :func:`~dither.compress` without data does at several sizes; write nothing.

    A sample of each tensor gives the bytes and the error at every step. A sixth of the rows of
    large ones is coded at the middle size, which corrects the predictions and shows how long
    compressing takes. Bytes are accurate to a percent or two.

    Args:
        source: as :func:`~dither.compress` takes it.
        sizes: as it takes them, one or more.
        sensitivity: the same.
        progress: the same.

    Raises:
        BudgetError: a size is not understood, or there is none.
        CheckpointError: the source holds anything but plain tensors, or cannot be read.
        SpecError: the model is attached.

    >>> import torch
    >>> weights = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    >>> found = plan(weights, ["8x", "16x"])
    >>> [4900 < row.nbytes * ratio / 8 <= 5000 for ratio, row in zip([8, 16], found.sizes)]
    [True, True]
    """
    tensors = collect(weights_in(source, "plan"))
    values = sum(value.numel() for value in tensors.values.values())
    given = sizes if isinstance(sizes, Iterable) and not isinstance(sizes, str) else [sizes]
    budgets = {str(size): parse_size(size, tensors.nbytes, values) for size in given}
    if not budgets:
        raise BudgetError(f"no sizes are given; write for example {list(SIZES)}")
    start = time.perf_counter()
    values_here = {name: on_cpu(value)[0] for name, value in tensors.values.items()}
    found = sensitivity(
        Weights(values_here, tensors.stacks, heads=heads_of(values_here, tensors.aliases))
    )
    known = {name: found[name] for name in tensors.values}
    with hooked(progress):
        forecast = Forecast(known)
        overhead = Ledger(known, tensors.aliases, {}).expected_overhead
        seconds = time.perf_counter() - start
        middle = sorted(budgets.values())[len(budgets) // 2]
        seconds += _probe(forecast, forecast.plan(middle, overhead))
    least = [ladder.choices[0].nbytes for ladder in forecast.ladders().values()]
    rows = [
        _row(size, budget, forecast.plan(budget, overhead), known, overhead)
        for size, budget in budgets.items()
    ]
    exact = {name: why for name, k in known.items() if (why := why_exact(k.value))}
    smallest = math.ceil(sum(least) + overhead)
    return Outlook(tensors.nbytes, values, smallest, exact, seconds, tuple(rows))


def _probe(forecast: Forecast, chosen: Mapping[str, Choice]) -> float:
    """Correct predictions by what parts of tensors take; the seconds that all would take."""
    start = time.perf_counter()
    probed = forecast.probe(chosen)
    seconds = PROBE * (time.perf_counter() - start) if probed else 0.0
    sizes = {name: known.value.numel() for name, known in forecast.tensors.items()}
    others = sorted((n for n in chosen if n not in probed), key=lambda name: -sizes[name])
    tried = others[::PROBE]
    start = time.perf_counter()
    for name in steps("probing", tried, sizes.__getitem__):
        forecast.code(name, chosen[name])
    rest = sum(sizes[name] for name in others) / max(sum(sizes[name] for name in tried), 1)
    return seconds + rest * (time.perf_counter() - start)


def _row(
    size: str,
    budget: int,
    chosen: Mapping[str, Choice],
    tensors: Mapping[str, Knowledge],
    overhead: float,
) -> SizeOutlook:
    kinds: Counter[str] = Counter()
    decibels = loss = 0.0
    rounded, erased = 0, []
    for name, choice in chosen.items():
        known = tensors[name]
        kinds[kind_of(known)] += round(choice.nbytes)
        if not can_quantize(known.value):
            continue
        energy = float(known.relative().double().square().sum())
        noise = noise_of(known, choice.loss, energy)
        if noise >= ERASED * energy:
            erased.append(name)
        loss += known.sensitivity * noise
        noise = max(noise, energy * EXACT)
        decibels += known.value.numel() * 10 * math.log10(energy / noise)
        rounded += known.value.numel()
    kinds["names, shapes, checksums"] = round(overhead)
    nbytes = sum(kinds.values())
    return SizeOutlook(
        size=size,
        budget=budget,
        nbytes=nbytes,
        bits=8 * nbytes / max(sum(known.value.numel() for known in tensors.values()), 1),
        snr=decibels / max(rounded, 1),
        loss=loss,
        erased=tuple(erased),
        kinds=dict(kinds),
        is_reachable=nbytes <= budget,
    )


def kind_of(known: Knowledge) -> str:
    """What a tensor is, by what is known of it: how people ask where the bytes are."""
    if not can_quantize(known.value):
        return "kept exactly"
    if known.rows is not None:
        return "token tables"
    return _KINDS[min(known.value.ndim, len(_KINDS) - 1)]
