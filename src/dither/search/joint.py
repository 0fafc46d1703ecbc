"""Sparsity of layers and bits of kernels, searched together by what files really score.

As in Tang, Wei and Li 2020 (arXiv 2011.06231), to prune a kernel is to give it 0 bits. A policy
says how many kernels of each layer get 0 bits, and how many bits the others have; their steps are
then moved by one factor until the coded file fills the budget; the file is loaded, and its score
is the policy's reward. Nothing is trained in between. Unlike in the paper, every file is exactly
what was evaluated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dither.archive import Archive
from dither.core import SpecError
from dither.data import Data
from dither.model import collect, inner, refuse_attached
from dither.progress import report
from dither.search.job import Job
from dither.search.joint_evaluation import Cost, Judge, Judged, Score, Workers
from dither.search.joint_files import Files
from dither.search.joint_layers import kernels_of
from dither.search.joint_space import Point, Space, Widths
from dither.search.journal import Journal
from dither.search.knowledge import Sensitivity
from dither.search.policies import POLICIES, Evolution, Policy
from dither.search.sensitivity import data_free
from dither.search.size import parse_size


@dataclass(frozen=True)
class Aim:
    """What a joint search is for.

    Attributes:
        score: of a model, more is better: accuracy on some labelled samples, say.
        cost: of a candidate, taken from the score: its latency, its energy.
        space: what may be chosen.
        data: samples, of which one batch tells how large the inputs of layers are: policies may
            use that, and costs.
    """

    score: Score
    cost: Cost | None = None
    space: Space = field(default_factory=Space)
    data: Data | Iterable[Any] | None = None
    sensitivity: Sensitivity = data_free


@dataclass(frozen=True)
class Evaluation:
    """One file that was tried.

    Attributes:
        number: 0 is the allocator's file.
        reward: score less cost; NaN where it failed.
        nbytes: of the file; 0 if there is none.
        kept: whether it was the best so far.
        error: why there is no reward; empty if there is one.
        point: what the policy asked for, by layer a sparsity and widths, all from 0 to 1.
    """

    number: int
    reward: float
    nbytes: int
    kept: bool = False
    error: str = ""
    point: Point | None = None

    def __str__(self) -> str:
        """One line for people."""
        if self.error:
            return f"{self.number:5} failed: {self.error}"
        kept = "  kept" if self.kept else ""
        return f"{self.number:5} {self.nbytes:>13,} bytes  {self.reward:.4g}{kept}"


@dataclass(frozen=True)
class Joint:
    """What a joint search has found.

    Attributes:
        archive: the best file.
        widths: by weight the bits of each kernel, 0 where it is pruned; nothing where the
            allocator's file is the best.
        history: all that was tried.
        policy: that said what to try.
    """

    archive: Archive
    widths: Widths
    history: tuple[Evaluation, ...]
    policy: Policy

    @property
    def best(self) -> Evaluation:
        """What came of the best file."""
        return next(row for row in reversed(self.history) if row.kept)

    def curve(self, *, allocated: bool = True) -> list[float]:
        """The best reward so far, by evaluation; -inf before there is one.

        Args:
            allocated: whether the allocator's file, which comes first, counts.
        """
        best, found = -math.inf, []
        for row in self.history if allocated else self.history[1:]:
            best = best if row.error else max(best, row.reward)
            found.append(best)
        return found

    def to_json(self) -> dict[str, Any]:
        """Policy, widths and history as JSON values."""
        rows = [asdict(row) | ({"reward": None} if row.error else {}) for row in self.history]
        return {"policy": repr(self.policy), "widths": dict(self.widths), "history": rows}


FROM_ALLOCATOR: Policy = Evolution(from_allocator=True)


def joint(
    model: nn.Module,
    size: int | str,
    aim: Score | Aim,
    *,
    policy: str | Policy = FROM_ALLOCATOR,
    evaluations: int = 100,
    seed: int = 0,
    processes: int = 1,
    journal: str | os.PathLike[str] | None = None,
) -> Joint:
    """Search the sparsity of layers and the bits of kernels together, by the scores of files.

    A policy says how many kernels of each layer get 0 bits (are pruned), and how many the others;
    the coded file fills the budget, and its score is the policy's reward. The first file is that of
    :func:`dither.compress` without data, so that the best is never worse.

    Args:
        model: stays as it is.
        size: as for :func:`dither.compress`.
        aim: the score of a model, or more: :class:`Aim`.
        policy: by default evolution that begins with the first file, the best of what was measured;
            or ``"ajpq"``, ``"evolution"``, ``"random"``, ``"tpe"`` or ``"cma-es"`` (these two by
            Optuna: ``pip install "dither[search]"``), ``"allocator"`` for nothing but the first
            file; or one with settings, as :class:`~dither.search.AJPQ`.
        evaluations: files to be made and judged, the first among them.
        seed: of what the policy draws. One seed gives one answer, in any number of processes.
        processes: that make and judge files. With more than one, the score must be defined at the
            top of a module, and a script needs ``if __name__ == "__main__":``.
        journal: a file that remembers what was judged: the same call goes on where it was
            interrupted, with the answer that it would have had; and with more evaluations it goes
            on from the last.

    Raises:
        BudgetError: the size cannot be reached.
        SpecError: the policy is unknown; the model has nothing to search; no file has a score.

    >>> torch.manual_seed(0) and None
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> inputs = torch.randn(32, 64)
    >>> wanted = model(inputs).detach()
    >>> def score(model: nn.Module) -> float:
    ...     return -float((model(inputs) - wanted).square().mean())
    >>> found = joint(model, "8x", score, evaluations=6)
    >>> found.archive.nbytes <= 4680 * 4 / 8, found.best.reward >= found.history[0].reward
    (True, True)
    """
    chosen = _policy_of(policy)
    wanted = aim if isinstance(aim, Aim) else Aim(aim)
    if evaluations < 1 or processes < 1:
        raise SpecError(f"evaluations={evaluations}, processes={processes}: give 1 or more of each")
    judge, about = prepared(model, size, wanted)
    about |= {"policy": repr(chosen), "seed": seed}
    search = _Search(judge, chosen, seed, _journal(journal, about))
    try:
        with Workers(judge, processes) as workers:
            search.go(workers, evaluations)
    finally:
        search.close()
    return search.found()


def _policy_of(policy: str | Policy) -> Policy:
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise SpecError(f"there is no policy {policy!r}; known are {', '.join(POLICIES)}")
    return POLICIES[policy]


def prepared(model: nn.Module, size: int | str, aim: Aim) -> tuple[Judge, dict[str, Any]]:
    """What makes and judges files, and what they depend on."""
    if not isinstance(model, nn.Module):
        raise SpecError(f"joint takes a model, which is run, not {type(model).__name__}")
    refuse_attached(model, "joint")
    model = inner(model)
    tensors = collect(model)
    values = sum(value.numel() for value in tensors.values.values())
    budget = parse_size(size, tensors.nbytes, values)
    data = None if aim.data is None else Data.of(aim.data)
    kernels = kernels_of(model, tensors, aim.space.norm, data)
    forecast, ledger = Job(budget, aim.sensitivity, {}).spend(tensors)
    files = Files(kernels, forecast.tensors, ledger, budget, aim.space)
    digest = hashlib.sha256()
    for name, value in tensors.values.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    about = {"joint": digest.hexdigest(), "budget": budget, "space": repr(aim.space)}
    return Judge(files, model, aim.score, aim.cost), about | {"data": aim.data is not None}


def _journal(path: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> Journal | None:
    if path is None:
        return None
    Path(path).touch()  # from the first evaluation on, however short they are
    return Journal(Path(path), about)


class _Search:
    """Asks a policy, has its points judged, and tells it what came of them.

    Where a journal remembers what came of a point, it is not judged again: an interrupted search
    is gone through anew up to where it was.
    """

    def __init__(self, judge: Judge, policy: Policy, seed: int, journal: Journal | None) -> None:
        self._judge, self._policy, self._journal = judge, policy, journal
        self._learner = policy.begin(judge.files.layout, seed)
        self._history: list[Evaluation] = []

    def go(self, workers: Workers, evaluations: int) -> None:
        """Judge so many files, the allocator's first."""
        self._judged([None], workers)
        while (left := evaluations - len(self._history)) > 0:
            report("searching", len(self._history) / evaluations)
            # A part of a batch would be another batch: what is asked does not depend on the end.
            points = self._learner.ask(self._policy.batch)
            if not points:
                break
            found = self._judged(points[:left], workers)
            if len(found) == len(points):
                self._learner.tell(points, [row.reward for row in found])

    def _judged(self, points: Sequence[Point | None], workers: Workers) -> list[Judged]:
        """What comes of points, as it is remembered or found now."""
        first = len(self._history)
        keys = [_key(first + place, point) for place, point in enumerate(points)]
        rows = [self._recall(key) for key in keys]
        new = [place for place, row in enumerate(rows) if row is None]

        def note(index: int, row: Judged) -> None:
            rows[new[index]] = row
            if self._journal is not None and self._journal.is_kept():
                reward = None if row.error else row.reward
                self._journal.note(keys[new[index]], [reward, row.nbytes, row.error])

        workers([points[place] for place in new], note)
        done = [row for row in rows if row is not None]
        for point, row in zip(points, done, strict=True):
            best = max((r.reward for r in self._history if not r.error), default=-math.inf)
            kept = not row.error and (row.reward > best or best == -math.inf)
            number = len(self._history)
            self._history.append(Evaluation(number, *row[:2], kept, row.error, point))
        return done

    def _recall(self, key: bytes) -> Judged | None:
        said = None if self._journal is None else self._journal.recall(key)
        if said is None:
            return None
        reward, nbytes, error = said
        return Judged(math.nan if reward is None else reward, nbytes, error)

    def found(self) -> Joint:
        """The best file.

        Raises:
            SpecError: none has a score.
        """
        kept = [row for row in self._history if row.kept]
        if not kept:
            raise SpecError(
                f"none of {len(self._history)} files has a score: {self._history[0].error}"
            )
        archive, widths = self._judge.archive(kept[-1].point)
        return Joint(archive, widths, tuple(self._history), self._policy)

    def close(self) -> None:
        """Leave the journal to a later call."""
        if self._journal is not None:
            self._journal.close()


def _key(number: int, point: Point | None) -> bytes:
    """Under what a journal remembers an evaluation."""
    return hashlib.sha256(json.dumps([number, point]).encode()).digest()
