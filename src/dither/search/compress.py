"""The main job: a model and a budget in, one archive out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dither.archive import Archive, pack
from dither.core import BudgetError, SpecError
from dither.model import Tensors, collect
from dither.search.budget import BudgetSearch, Progress
from dither.search.options import Weighted
from dither.search.sensitivity import Sensitivity, data_free
from dither.search.size import parse_size


def compress(
    source: nn.Module | Mapping[str, Tensor],
    size: int | str | None = None,
    *,
    bits: float | None = None,
    sensitivity: Sensitivity = data_free,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Archive:
    """Compress a model to a budget in file bytes, without data.

    Every floating-point tensor gets an entropy-coded uniform grid whose step minimises the
    predicted loss, squared error times sensitivity, of the whole; other tensors are stored as
    they are. Tied tensors are stored once.

    Args:
        source: a model, or a dict of tensors by name.
        size: the budget: bytes, or ``"9MB"`` (10^6), ``"9MiB"``, or ``"25%"``, ``"12x"`` of the
            tensors' own bytes. The file takes at most the budget and at least 98.5 % of it or
            all but 64 bytes, unless everything is already as accurate as float16.
        bits: instead of ``size``, mean bits of the file for each value.
        sensitivity: what an error costs; the default reads it off the weights alone.
        metadata: JSON values to store in the file.
        progress: called with a stage and the share of it that is done.

    Returns:
        The archive, in memory: :meth:`~dither.Archive.save` writes it.

    Raises:
        BudgetError: the size is not understood or cannot be reached.
        CheckpointError: the source holds something else than plain tensors.

    >>> import torch
    >>> weights = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    >>> 4925 <= compress(weights, size="8x").nbytes <= 5000
    True
    """
    tensors = collect(source)
    if (size is None) == (bits is None):
        raise BudgetError('say either size (such as "9MB") or bits (such as 3.2), not both')
    budget = _bits_budget(bits, tensors) if size is None else parse_size(size, tensors.nbytes)
    weighted = _weigh(tensors.values, sensitivity)
    stored = dict(metadata or {})
    search = BudgetSearch(weighted, tensors.aliases, stored, progress or _silent)
    return pack(search.run(budget), tensors.aliases, stored)


def _bits_budget(bits: float | None, tensors: Tensors) -> int:
    values = sum(value.numel() for value in tensors.values.values())
    if bits is None or not math.isfinite(bits) or bits <= 0:
        raise BudgetError(f"bits is a positive number of bits for each value, not {bits!r}")
    return math.ceil(bits * values / 8)


def _weigh(values: Mapping[str, Tensor], sensitivity: Sensitivity) -> dict[str, Weighted]:
    weighted = sensitivity(values)
    if missing := sorted(set(values) - set(weighted)):
        raise SpecError(f"the sensitivity gives no value for {missing[:5]}; give one for each")
    return {name: weighted[name] for name in values}


def _silent(stage: str, share: float) -> None:
    """Show nothing."""
