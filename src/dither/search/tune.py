"""A file made better at its size: numbers that take no further bytes are trained, codes stay."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dither.archive import Archive, code, load_into, pack, packed_nbytes
from dither.calibrate.tuning import Course, Student, apart, judged, outputs_of, train
from dither.core import Encoded, SpecError
from dither.data import Data
from dither.formats import Affine
from dither.model import duplicate, refuse_attached
from dither.progress import Hook, hooked
from dither.search.held_out import hold_out
from dither.search.trials import Trial

COARSER = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
"""Octaves by which steps of vectors are made coarser until a tuned file fits.

Mostly a byte or two of the index are too many, whose checksums are other ones at each."""


@torch.inference_mode(mode=False)
def tune(
    model: nn.Module,
    archive: Archive,
    data: Data | Iterable[Any],
    *,
    nbytes: int | None = None,
    course: Course | None = None,
    progress: Hook | None = None,
) -> Archive:
    """Train everything a compressed file holds except its codes, at no cost in bytes.

    Scales of tensors, rows and columns, biases, norms and centroids are trained on samples without
    labels to bring the outputs closer to the original's; the codes of matrices stay fixed. This
    takes minutes on a CPU: each pass about three times as long as running the model on the samples.

    A quarter of the samples is held out: if the result is no better on these, the archive is
    returned unchanged.

    Args:
        model: the original; it is not changed.
        archive: made of it by :func:`dither.compress` or a finished run.
        data: a loader, or :class:`~dither.Data`, whose distance must have a gradient.
        nbytes: the most the file may take; by default its present size.
        course: how long and how fast to train: see :class:`~dither.search.Course`.
        progress: called with what is being done and the share that is done.

    Returns:
        A new archive, or the given one. Its ``trials`` say which, and by how much it gained.

    Raises:
        SpecError: there is nothing to tune, the distance has no gradient, or the file quantizes
            activations: tune before that.

    >>> import dither
    >>> model, batches = nn.Linear(32, 32), [torch.randn(16, 32) for _ in range(4)]
    >>> archive = dither.compress(model, "10x")
    >>> tune(model, archive, batches, course=Course(passes=2)).nbytes <= archive.nbytes
    True
    """
    refuse_attached(model, "tune")
    if archive.sites:
        raise SpecError("this file quantizes activations: tune first, and add them afterwards")
    if archive.base is not None:
        raise SpecError("this file holds differences to a base: compress without it, and tune that")
    start, room = time.monotonic(), archive.nbytes if nbytes is None else nbytes
    with hooked(progress):
        samples = Data.of(data).held()
        made, before, after = tuned(model, archive, samples, room, course or Course())
    seconds, is_better = time.monotonic() - start, made is not None
    trial = Trial("tuned", (made or archive).nbytes, after, None, seconds, kept=is_better)
    found = archive if made is None else made
    found.trials = (*archive.trials, replace(trial, note=f"distance {before:.4g} before"))
    return found


def tuned(
    model: nn.Module, archive: Archive, samples: Data, nbytes: int, course: Course
) -> tuple[Archive | None, float, float]:
    """The file tuned, if it fits and is better; distances on held-out samples before and after."""
    split = hold_out(model, samples, many=sys.maxsize)
    copy = duplicate(model)
    load_into(copy, archive)
    held = {name: archive.encoded(name) for name in archive.entries}
    student = Student(copy, held)
    if not student.parts:
        raise SpecError(
            "the file holds nothing that can be tuned: no parameter of this model with steps or "
            "centroids, and no vector; give the model that was compressed"
        )
    wanted = outputs_of(model, split.judge)
    before = judged(student, split.judge, wanted)
    train(student, split.fit, split.judge, model, course)
    made = fitted(archive, held, student.encoded(), nbytes)
    if made is None:
        return None, before, math.inf
    fresh = duplicate(model)
    load_into(fresh, made)
    after = apart(fresh, split.judge, wanted)
    return (made if after < before else None), before, after


def fitted(
    archive: Archive, held: dict[str, Encoded], learned: dict[str, Encoded], nbytes: int
) -> Archive | None:
    """A file that takes no more, with what was learned; vectors on coarser grids, if need be.

    Args:
        archive: as it is.
        held: all its tensors.
        learned: those of them that are others now.
        nbytes: that the file may take.
    """
    about = (archive.aliases, archive.metadata, archive.sites)
    coded = {name: code(one) for name, one in (held | learned).items()}
    for octaves in COARSER:
        for name, one in learned.items():
            fmt = one.format
            if octaves and len(one.shape) < 2 and isinstance(fmt, Affine) and fmt.bits is None:
                scale = one.params["scale"] * 2.0**octaves
                coded[name] = code(fmt.assign(one.decode(), {"scale": scale}))
        if packed_nbytes(coded, *about) <= nbytes:
            return pack(coded, *about)
    return None
