"""The main job: a model and a budget in, one archive out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from dither.archive import Archive, Base, BaseSource, base_of
from dither.checkpoint import Pages
from dither.compiled import expect
from dither.core import SpecError
from dither.data import Data
from dither.disk import Disk, home_of
from dither.model import Tensors, collect
from dither.progress import Hook, hooked
from dither.search.activation_trials import Sites
from dither.search.coder import Coder
from dither.search.job import Job
from dither.search.knowledge import Sensitivity
from dither.search.norm_means import correct_means, refuse_without_order
from dither.search.sensitivity import data_free
from dither.search.size import parse_size
from dither.search.source import Source, weights_in
from dither.search.trials import Bench
from dither.search.with_data import with_data
from dither.team import Team, fingerprint, team_of

SECONDS = 1e-7
"""About what plain code takes for each value in loops that may be compiled."""


class Beside(TypedDict, total=False):
    """What a job takes beside the model, its size and what errors cost.

    Attributes:
        base: weights that those who load the file have: a model, tensors by name, or the path of a
            checkpoint or an archive. Tensors that it has, too, are stored as differences to it, and
            those that are equal take no codes. With data, the search by sensitivities is then the
            last that is tried.
        metadata: JSON values to store in the file.
        progress: called with what is being done and its share; :mod:`dither.progress` says more.
        norms: without data, whether the means that codes move are taken back by what batch norms
            say: see :func:`~dither.search.correct_means`. The source must be the model.
        tune: with data, whether numbers that take no further bytes are trained in the end: see
            :func:`~dither.tune`. Not with a base.
    """

    norms: bool
    tune: bool
    base: BaseSource | None
    metadata: Mapping[str, Any] | None
    progress: Hook | None


def beside(given: Beside, what: str) -> Beside:
    """The same, if all of it is known.

    Raises:
        TypeError: it is not.
        SpecError: a base for what reads one tensor at a time.
    """
    if unknown := sorted(set(given) - set(Beside.__annotations__)):
        raise TypeError(f"{what}() got an unexpected keyword argument {unknown[0]!r}")
    if given.get("base") is not None and what == "compress_to":
        raise SpecError(
            "compress_to reads one tensor at a time, and a base is compared as a whole: use "
            "dither.compress(source, size, base=...).save(output)"
        )
    if given.get("base") is not None and given.get("tune"):
        raise SpecError("a file with a base is not tuned; leave one of them out")
    if given.get("norms") and (what == "compress_to" or given.get("base") is not None):
        raise SpecError("norms=True is for compress, of a model and without a base")
    return given


def refuse_together(told: Beside, source: object, data: object, activations: object) -> None:
    """Refuse what does not go together.

    Raises:
        SpecError: it does not.
    """
    if told.get("norms") and data is not None:
        raise SpecError("with data, samples say what means are: leave norms=True out")
    if told.get("norms"):
        refuse_without_order(source)
    if told.get("base") is not None and activations is not None:
        raise SpecError("activations are not searched for with a base; leave one of them out")


@torch.inference_mode(mode=False)  # under which nothing can be measured
def compress(
    source: Source,
    size: int | str,
    *,
    data: Data | Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    activations: Sites | None = None,
    sensitivity: Sensitivity = data_free,
    **more: Unpack[Beside],
) -> Archive:
    """Compress a model to a budget in file bytes.

    Floating-point tensors get entropy-coded grids whose steps minimise the predicted loss, squared
    error times sensitivity, over the whole model; others are stored raw, and tied ones once.

    With data (a few hundred samples, no labels), several ways are tried in order of cost, and the
    best is kept; ``archive.trials`` has them: the data-free search, also after cross-layer
    equalization where that applies; sensitivities, token frequencies and moments measured on data
    (:func:`~dither.search.calibrated`); layers in sequence, each compensating for earlier errors.

    All processes of a ``torch.distributed`` group share the work: see :mod:`dither.team`.

    Args:
        source: a model, wrapped or not; a dict of tensors by name; or the path of an archive, or of
            anything that :func:`~dither.checkpoint.read_checkpoint` reads.
        size: bytes; ``"9MB"`` (10^6) or ``"9MiB"``; ``"25%"`` or ``"12x"`` of the tensors' own
            bytes; or ``"3.2 bits"`` per value. The file takes at most this, and at least 98.5 % of
            it or all but 64 bytes, unless everything is already as accurate as float16.
        data: a loader, or :class:`~dither.Data`, which says how the model is called and what
            counts; the source must then be the model.
        evaluate: a function that scores a model (higher is better), to select by; without it, the
            distance of outputs on the data decides.
        activations: ``"int8"`` for the inputs of modules with weights, or a plan of sites.
        sensitivity: the cost of errors; by default estimated from the weights alone.
        more: ``base``, ``norms``, ``tune``, ``metadata`` and ``progress``: see :class:`Beside`.

    Raises:
        BudgetError: the size is not understood or cannot be reached.
        CheckpointError: the source holds anything but plain tensors, or cannot be read.
        SpecError: something needs data or the model, and there is none; the model is attached.

    >>> import torch
    >>> weights = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    >>> 4925 <= compress(weights, size="8x").nbytes <= 5000
    True
    """
    told, tune = beside(more, "compress"), more.get("tune") or None
    refuse_together(told, source, data, activations)
    asked = Asked.of(source, size, data, evaluate=evaluate, activations=activations, tune=tune)
    base = None if (given := told.get("base")) is None else base_of(given)
    with hooked(told.get("progress")), asked.together(base) as team:
        about, coder = dict(told.get("metadata") or {}), Coder(release=asked.release)
        job = Job(asked.budget, sensitivity, about, team, coder, asked.home, base)
        if data is None:
            found = job.archive(asked.tensors)
            if told.get("norms") and isinstance(source, nn.Module):
                return correct_means(source, found, nbytes=asked.budget)
            return found
        bench = Bench(asked.source, Data.of(data), evaluate, team)
        return with_data(bench, job, activations, tunes=bool(tune))


@dataclass(frozen=True)
class Asked:
    """What is to be compressed.

    Attributes:
        source: a model, or tensors by name.
        tensors: of it.
        budget: bytes.
        pages: memory of files that nobody else has seen, and which can be given back.
        home: the disk that the model is on, if it is on one.
    """

    source: nn.Module | Mapping[str, Tensor]
    tensors: Tensors
    budget: int
    pages: Pages
    home: Disk | None = None

    def release(self) -> None:
        """Give back the memory of files."""
        self.pages.release()
        if self.home is not None:
            self.home.release()

    @classmethod
    def of(
        cls,
        source: Source,
        size: int | str,
        data: object,
        **needs: object,
    ) -> Asked:
        """Read the source; refuse what does not go together."""
        found = weights_in(source, "compress", run=data is not None)
        tensors = collect(found)
        values = sum(value.numel() for value in tensors.values.values())
        expect(values * SECONDS)
        budget = parse_size(size, tensors.nbytes, values)
        for name, value in needs.items():
            if data is None and value is not None:
                raise SpecError(f"{name}= goes with data=; give a loader of a few hundred samples")
        is_own = isinstance(source, str | os.PathLike)
        pages = Pages.of(tensors.values.values() if is_own else ())
        home = home_of(found) if isinstance(found, nn.Module) else None
        return cls(found, tensors, budget, pages, home)

    @contextmanager
    def together(self, base: Base | None = None) -> Iterator[Team]:
        """The processes that do the job, once all are known to compress the same to a size."""
        advice = "give all of them the same model and size"
        with team_of("compress") as team:
            values = fingerprint(self.tensors.values, team)
            team.same("sizes and tensors", (self.budget, values), advice)
            team.same("bases", None if base is None else base.digest, "give all of them the same")
            yield team
