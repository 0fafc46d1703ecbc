"""Samples to judge by: those that a file was fitted to say too much good of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dither.core import Stats
from dither.data import Data, device_of, floats_of
from dither.model import evaluating

MANY = 128
"""From so many samples on, none is held out: files are nearly as near to outputs of others.

What a file reports of those that it is fitted to is, of what others see, 0.02 for one sample, half
for 16 to 64, 0.7 to 0.9 for 256 (``benchmarks.held_out``): ways differ by more.
"""

SHARE = 1 / 4
"""Of fewer samples that is held out; the way that wins is gone again with all of them."""

LEAST = 8
"""Samples that are held out at least, but for half of what there is: one alone says little."""

VECTORS = 2
"""Input vectors, for each input of a weight, from which their second moments are known well."""

_CLOSE = 1e-3
"""Share of an output's size by which rows may differ that are computed together or not."""


@dataclass(frozen=True)
class Split:
    """Samples to fit to and samples to judge by.

    Attributes:
        fit: what files are fitted to.
        judge: what they are judged by; the same samples where none are held out.
        held: samples that are held out.
        rows: samples in all, by the first axis of batches.
    """

    fit: Data
    judge: Data
    held: int
    rows: int

    @classmethod
    def of(cls, data: Data) -> Split:
        """Without samples held out."""
        return cls(data, data, 0, sum(rows_of(batch) for batch in data))


def hold_out(model: nn.Module, data: Data, many: int = MANY) -> Split:
    """Hold out a share of few samples: some of each batch, or else whole batches.

    A batch is cut along the first axis of its tensors, where the model gives for each part what it
    gives for it in the whole: then its samples are indeed one for each row.

    Args:
        model: runs on the batches that are cut, and on their parts.
        data: with batches in memory.
        many: from so many samples on, none is held out.
    """
    batches = list(data)
    sizes = [rows_of(batch) for batch in batches]
    total = sum(sizes)
    if total >= many:
        return Split.of(data)
    share = min(max(SHARE, LEAST / total), 0.5)
    cuts = _shares(sizes, share)
    device = device_of(model)
    draws = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with evaluating(model), torch.no_grad(), draws:
        are_rows = all(
            _are_rows(model, data, batch, size - cut)
            for batch, size, cut in zip(batches, sizes, cuts, strict=True)
            if 0 < cut < size
        )
    if not are_rows:
        number = min(max(round(share * len(batches)), 1), len(batches) // 2)
        chosen = {(2 * i + 1) * len(batches) // (2 * number) for i in range(number)}
        cuts = [size if i in chosen else 0 for i, size in enumerate(sizes)]
    parts = list(zip(batches, sizes, cuts, strict=True))
    judge = [_part(batch, size, size - cut, size) for batch, size, cut in parts if cut]
    fit = [_part(batch, size, 0, size - cut) for batch, size, cut in parts if cut < size]
    if not judge or not fit:
        return Split.of(data)
    return Split(replace(data, loader=fit), replace(data, loader=judge), sum(cuts), total)


def _shares(sizes: list[int], share: float) -> list[int]:
    """A share of each size, such that what rounding leaves is made up for by the next ones."""
    found, due = [], 0.0
    for size in sizes:
        due += share * size
        found.append(min(int(due + 1e-9), size))
        due -= found[-1]
    return found


def enough(stats: Mapping[str, Stats], data: Data) -> int:
    """How many samples it takes until the moments of half of all weights are known well.

    Args:
        stats: of the weights, from samples; those without moments are passed over.
        data: the samples.

    >>> enough({"w": Stats(gram=torch.eye(64), samples=32)}, Data([torch.ones(8, 3)]))
    32
    """
    needs = sorted(
        (VECTORS * found.gram.shape[-1] / max(found.samples, 1), found.gram.numel())
        for found in stats.values()
        if found.gram is not None
    )
    half, passed = sum(size for _, size in needs) / 2, 0
    for need, size in needs:
        passed += size
        if passed >= half:
            return math.ceil(sum(map(rows_of, data)) * need)
    return 0


def rows_of(batch: object) -> int:
    """The common first axis of a batch's tensors, its samples; 1 where they have none."""
    sizes = {len(leaf) if leaf.ndim else 0 for leaf in _tensors(batch)}
    return sizes.pop() if len(sizes) == 1 and sizes != {0} else 1


def _are_rows(model: nn.Module, data: Data, batch: object, place: int) -> bool:
    """Whether a batch cut at some row gives what it gives in the whole."""
    size, found = rows_of(batch), []
    try:
        wanted = floats_of(data.forward(model, batch))
        if any(len(tensor) != size if tensor.ndim else True for tensor in wanted):
            return False
        for start, stop in ((0, place), (place, size)):
            part = _part(batch, size, start, stop)
            output = data.forward(model, part)
            data.counted(output, part)  # of padding alone there is nothing to compare
            found.append(floats_of(output))
        return all(_is_close(parts, whole) for *parts, whole in zip(*found, wanted, strict=True))
    except Exception:  # noqa: BLE001 - whatever a model raises that wants batches as they are
        return False


def _is_close(parts: list[Tensor], whole: Tensor) -> bool:
    if any(part.shape[1:] != whole.shape[1:] for part in parts):
        return False
    joined = torch.cat(parts)
    if joined.shape != whole.shape:
        return False
    difference = (joined.double() - whole.double()).masked_fill(joined == whole, 0.0)
    size = whole.double().masked_fill(whole.isinf(), 0.0).norm()
    return float(difference.norm()) <= _CLOSE * float(size)


def _part(batch: Any, size: int, start: int, stop: int) -> Any:  # noqa: ANN401 - as loaders give
    if stop - start == size:
        return batch
    return tree_map_only(Tensor, lambda tensor: tensor[start:stop], batch)


def _tensors(batch: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
