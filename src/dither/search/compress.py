"""The main job: a model and a budget in, one archive out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dither.archive import Archive
from dither.compiled import expect
from dither.core import SpecError
from dither.data import Data
from dither.model import Tensors, collect
from dither.progress import Hook, hooked
from dither.search.activation_trials import Sites
from dither.search.job import Job
from dither.search.knowledge import Sensitivity
from dither.search.sensitivity import data_free
from dither.search.size import parse_size
from dither.search.source import Source, weights_in
from dither.search.trials import Bench
from dither.search.with_data import with_data
from dither.team import Team, fingerprint, team_of

SECONDS = 1e-7
"""About what plain code takes for each value in loops that may be compiled."""


@torch.inference_mode(mode=False)  # under which nothing can be measured
def compress(
    source: Source,
    size: int | str,
    *,
    data: Data | Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    activations: Sites | None = None,
    sensitivity: Sensitivity = data_free,
    metadata: Mapping[str, Any] | None = None,
    progress: Hook | None = None,
) -> Archive:
    """Compress a model to a budget in file bytes.

    Floating-point tensors get entropy-coded grids whose steps minimise the predicted loss, squared
    error times sensitivity, of the whole; others are stored as they are, and tied ones once.

    With data (a few hundred samples, no labels) more is tried, in order of cost, and the best kept;
    ``archive.trials`` tells what each brought: the data-free search, also after cross-layer
    equalization where that applies; sensitivities, token frequencies and moments measured on data
    (:func:`~dither.search.calibrated`); layers in sequence, each making up for the errors of those
    before.

    All processes of a ``torch.distributed`` group share the work: see :mod:`dither.team`.

    Args:
        source: a model, in its wrappers or not; a dict of tensors by name; or the path of an
            archive, or of what :func:`~dither.checkpoint.read_checkpoint` reads.
        size: bytes, or ``"9MB"`` (10^6), ``"9MiB"``, ``"25%"``, ``"12x"`` of the tensors' own, or
            ``"3.2 bits"`` for each value. The file takes at most this and at least 98.5 % of it or
            all but 64 bytes, unless everything is already as accurate as float16.
        data: a loader, or :class:`~dither.Data`, which says how the model is called and what
            counts; the source must then be the model.
        evaluate: the score of a model, more is better, to choose by; without it, the distance of
            outputs on the data decides.
        activations: ``"int8"`` for what goes into modules with weights, or a plan of sites.
        sensitivity: what an error costs; by default read off the weights alone.
        metadata: JSON values to store in the file.
        progress: called with what is being done and its share; :mod:`dither.progress` says more.

    Raises:
        BudgetError: the size is not understood or cannot be reached.
        CheckpointError: the source holds something else than plain tensors, or cannot be read.
        SpecError: something needs data or the model, and there is none; the model is attached.

    >>> import torch
    >>> weights = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    >>> 4925 <= compress(weights, size="8x").nbytes <= 5000
    True
    """
    source = weights_in(source, "compress", run=data is not None)
    tensors = collect(source)
    values = sum(value.numel() for value in tensors.values.values())
    expect(values * SECONDS)
    budget = parse_size(size, tensors.nbytes, values)
    _check_given(data, evaluate=evaluate, activations=activations)
    with hooked(progress), _team(budget, tensors) as team:
        job = Job(budget, sensitivity, dict(metadata or {}), team)
        if data is None:
            return job.archive(tensors)
        return with_data(Bench(source, Data.of(data), evaluate, team), job, activations)


def _check_given(data: object, **others: object) -> None:
    """Refuse what goes with data, where there are none."""
    for name, value in others.items():
        if data is None and value is not None:
            raise SpecError(f"{name}= goes with data=; give a loader of a few hundred samples")


@contextmanager
def _team(budget: int, tensors: Tensors) -> Iterator[Team]:
    """The processes that do the job, once all are known to compress the same to the same size."""
    advice = "give all of them the same model and size"
    with team_of("compress") as team:
        team.same("sizes and tensors", (budget, fingerprint(tensors.values, team)), advice)
        yield team
