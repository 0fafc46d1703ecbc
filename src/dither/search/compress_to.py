"""The main job with a file as its end: it may be larger than memory, and be interrupted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from dither.archive import Archive
from dither.core import BudgetError
from dither.data import Data
from dither.disk import Disk
from dither.progress import hooked, report
from dither.search.activation_trials import Sites
from dither.search.coder import Coder
from dither.search.compress import Asked, Beside, beside
from dither.search.job import Job
from dither.search.journal import Journal
from dither.search.sensitivity import data_free
from dither.search.source import Source
from dither.search.trials import Bench
from dither.search.with_data import with_data
from dither.team import Team


@torch.inference_mode(mode=False)
def compress_to(
    output: str | os.PathLike[str],
    source: Source,
    size: int | str,
    *,
    data: Data | Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    activations: Sites | None = None,
    **more: Unpack[Beside],
) -> Archive:
    """Compress a model straight to a file, with the bytes that :func:`~dither.compress` makes.

    Without data, a file or folder of safetensors is read one tensor at a time, twice: to predict,
    then to encode. Peak memory is at most 2.5 times the largest tensor in float32, plus 1 GB.

    A job of more than a few seconds keeps a journal beside the output, ``OUTPUT.journal``, until
    the output is complete. After any interruption, the same call resumes where the journal ends and
    makes the same file. The journal of another job is ignored, with a warning. With data, the
    journal holds encodings only: the model runs again. With several processes, each has its own
    journal (``OUTPUT.journal.1`` and so on).

    Args:
        output: the file, which appears whole or not at all; its folder must exist.
        source: this and all that follow are as for :func:`~dither.compress`.
        size: bytes, or a text such as ``"9MB"``.
        data: a loader, or :class:`~dither.Data`.
        evaluate: the score of a model.
        activations: ``"int8"``, or a plan of sites.
        more: ``metadata`` and ``progress``; a ``base`` is refused, as it would fill memory.

    Returns:
        The archive, open.

    Raises:
        BudgetError: the size is not understood or cannot be reached.
        CheckpointError: the source holds anything but plain tensors, or cannot be read.
        SpecError: something needs data or the model, and there is none; the model is attached.
        OSError: the output or its journal cannot be written.
    """
    told = beside(more, "compress_to")
    path = _within(Path(output))
    tune = more.get("tune") or None
    asked = Asked.of(source, size, data, evaluate=evaluate, activations=activations, tune=tune)
    about = _about(asked, dict(told.get("metadata") or {}), activations)
    trials: tuple[object, ...] = ()
    hook = hooked(told.get("progress"))
    with hook, asked.together() as team, _journal(path, about, team) as journal:
        coder, disk = Coder(journal, asked.release), asked.home or Disk(path.absolute().parent)
        job = Job(asked.budget, data_free, about["metadata"], team, coder, disk)
        if data is None:
            ledger = job.spend(asked.tensors)[1]
            team.first("writing", partial(ledger.write, path))
        else:
            bench = Bench(asked.source, Data.of(data), evaluate, team)
            archive = with_data(bench, job, activations, tunes=bool(tune))
            team.first("writing", partial(archive.save, path))
            trials = archive.trials
    return _with_trials(Archive.open(path), trials)


def _with_trials(archive: Archive, trials: tuple[object, ...]) -> Archive:
    archive.trials = trials
    return archive


def _within(path: Path) -> Path:
    """A path in a folder that exists: nobody wants to hear after hours that it does not."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} for the output; make it")
    return path


@contextmanager
def _journal(path: Path, about: Mapping[str, Any], team: Team) -> Iterator[Journal]:
    """A journal beside a file, one for each process; it goes with success."""
    name = f"{path.name}.journal"
    journal = Journal(path.with_name(f"{name}.{team.rank}" if team.rank else name), about)
    try:
        if journal.resumed:
            report(f"going on from {journal.path.name}", 0.0)
        yield journal
        journal.remove()
        if team.rank == 0:
            _clean(path.parent, f"{name}.", team.size)
    except BudgetError:
        journal.remove()
        raise
    finally:
        journal.close()


def _clean(folder: Path, begin: str, size: int) -> None:
    """Remove what an interrupted job of more processes than this one has left."""
    for left in folder.iterdir():
        number = left.name.removeprefix(begin)
        if left.name != number and number.isdigit() and int(number) >= size:
            left.unlink(missing_ok=True)


def _about(asked: Asked, metadata: dict[str, Any], activations: Sites | None) -> dict[str, Any]:
    """What tells a job from another; values of tensors and data are in the keys of results."""
    digest = hashlib.sha256()
    for name, value in asked.tensors.values.items():
        digest.update(repr((name, tuple(value.shape), value.dtype)).encode())
    digest.update(repr((dict(asked.tensors.aliases), sorted(asked.tensors.stacks))).encode())
    return {
        "tensors": digest.hexdigest(),
        "budget": asked.budget,
        "metadata": metadata,
        "activations": repr(activations),
        "torch": torch.__version__,
    }
