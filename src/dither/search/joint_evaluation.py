"""Files of a joint search, made and judged one after another, or in processes side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import nn

from dither.archive import Archive, load_into
from dither.core import SpecError
from dither.model import duplicate, evaluating
from dither.rewrite import remove_channels
from dither.search.joint_files import Files
from dither.search.joint_layers import Kernels
from dither.search.joint_space import Point, Widths

_LOST = "the process that judged it ended without a result"


@dataclass(frozen=True)
class Candidate:
    """One file that is judged.

    Attributes:
        model: computes with the file's numbers, in evaluation mode; a copy that may be changed.
        archive: the file.
        widths: by weight the bits of each kernel, 0 where it is pruned; of the allocator's file
            nothing.
        kernels: what is known of each layer, such as its multiplications.
    """

    model: nn.Module
    archive: Archive
    widths: Widths
    kernels: tuple[Kernels, ...]

    def without_pruned(self) -> nn.Module:
        """The model without the channels that are pruned; its own is changed."""
        remove_channels(self.model)
        return self.model

    def bit_operations(self) -> float:
        """Multiplications for one sample, each times the bits of its weight.

        Needs data to know how often weights are used; a kernel of 0 bits costs nothing. What its
        absence saves in the layers that read it is left out.
        """
        return sum(k.macs / k.count * sum(self.widths.get(k.name, ())) for k in self.kernels)


Score = Callable[[nn.Module], float]
"""Of a model, more is better."""

Cost = Callable[[Candidate], float]
"""Of a candidate, in units of the score, from which it is taken: latency, energy, anything."""


class Judged(NamedTuple):
    """What came of a file.

    Attributes:
        reward: score less cost; NaN where it failed.
        nbytes: of the file; 0 if there is none.
        error: why there is no reward, in one line; empty if there is one.
    """

    reward: float
    nbytes: int
    error: str = ""


@dataclass(frozen=True)
class Judge:
    """Makes files and judges them.

    Attributes:
        files: makes them.
        model: with the weights as they were.
        score: of a model that computes with a file's numbers.
        cost: is taken from the score.
    """

    files: Files
    model: nn.Module
    score: Score
    cost: Cost | None = None

    def archive(self, point: Point | None) -> tuple[Archive, Widths]:
        """The file of a point, or that of the allocator, and the bits of its kernels."""
        if point is None:
            return self.files.allocated().archive(), {}
        ledger, widths = self.files.fill(self.files.layout.widths(point))
        return ledger.archive(), widths

    def __call__(self, point: Point | None) -> Judged:
        """Make a file and judge it; whatever fails is said in one line."""
        nbytes = 0
        try:
            archive, widths = self.archive(point)
            nbytes = archive.nbytes
            model = duplicate(self.model)
            load_into(model, archive)
            with evaluating(model), torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)  # a score that draws draws the same for every file
                reward = _number(self.score(model), "score")
                if self.cost is not None:
                    candidate = Candidate(model, archive, widths, self.files.layout.kernels)
                    reward -= _number(self.cost(candidate), "cost")
        except Exception as error:  # noqa: BLE001 - whatever a score raises
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            return Judged(math.nan, nbytes, said)
        return Judged(reward, nbytes, "it is not a number (NaN)" if math.isnan(reward) else "")


def _number(value: object, what: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise SpecError(f"{what} gave {value!r}; it must return a number") from error


class Workers:
    """Judges points in this process, or in several; what comes of each is the same.

    Each process has as many threads as this one, since sums may depend on them; call
    ``torch.set_num_threads(1)`` before where there are as many processes as cores.

    Args:
        judge: goes to all processes, and must then be picklable.
        processes: how many.
    """

    def __init__(self, judge: Judge, processes: int) -> None:
        self._judge, self._processes = judge, processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Begin; processes start with the first points."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __call__(self, points: Sequence[Point | None], note: Callable[[int, Judged], None]) -> None:
        """Judge points.

        Args:
            points: any number of them.
            note: called with the place of each and what came of it, in no order.

        Raises:
            SpecError: the model or the score cannot be sent to other processes.
        """
        if self._processes == 1 or len(points) < 2:
            for place, point in enumerate(points):
                note(place, self._judge(point))
            return
        left = dict(enumerate(points))
        try:
            self._share(left, note, self._processes)
        except BrokenProcessPool:
            # One of them took its process with it, and all that ran beside it: each by itself.
            for place, point in [*left.items()]:
                try:
                    self._share({place: point}, note, 1)
                except BrokenProcessPool:
                    note(place, Judged(math.nan, 0, _LOST))

    def _share(
        self, points: dict[int, Point | None], note: Callable[[int, Judged], None], count: int
    ) -> None:
        """Judge points in a pool, and take those out that are done."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                count,
                mp_context=get_context("spawn"),  # threads do not survive a fork
                initializer=_begin,
                initargs=(self._judge, torch.get_num_threads()),
            )
        try:
            futures = {place: self._pool.submit(_judged, point) for place, point in points.items()}
            for place, future in futures.items():
                note(place, future.result())
                del points[place]
        except BrokenProcessPool:
            self.__exit__(None, None, None)
            raise
        except (AttributeError, TypeError, RuntimeError) as error:
            raise SpecError(
                f"the model or the score cannot be sent to other processes ({error}); define the "
                "score at the top of a module, or use processes=1"
            ) from error


_AT_WORK: list[Judge] = []


def _begin(judge: Judge, threads: int) -> None:
    """Prepare a process."""
    torch.set_num_threads(threads)
    _AT_WORK[:] = [judge]


def _judged(point: Point | None) -> Judged:
    return _AT_WORK[0](point)
