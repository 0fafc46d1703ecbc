"""Files that are tried, measured and compared at the model's output; the best is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dither.activations import Encodings, apply
from dither.archive import Archive, load_into
from dither.core import BudgetError, SpecError
from dither.data import Data, described, divergence, floats_of, has_nan, squared
from dither.disk import home_of
from dither.model import duplicate, evaluating, overlapping, separate, weights_of
from dither.progress import part_of, steps
from dither.search.held_out import MANY, Split, hold_out
from dither.team import ALONE, Team, fingerprint, nbytes_of

_SAME_BATCHES = "give all of them the same batches in the same order; seed a loader that shuffles"


@dataclass(frozen=True)
class Trial:
    """One way that was tried, and what came of it.

    Attributes:
        stage: what was done.
        nbytes: of the file; 0 if there is none.
        distance: of the model's outputs from the original's: on samples that were held out where
            these are few, else on all.
        score: by ``evaluate``, if there is one.
        seconds: that it took, evaluation included.
        kept: whether it was the best so far.
        error: why there is no file; empty if there is one.
        note: what else is to be said of it.
    """

    stage: str
    nbytes: int
    distance: float
    score: float | None
    seconds: float
    kept: bool = False
    error: str = ""
    note: str = ""

    def __str__(self) -> str:
        """One line for people."""
        if self.error:
            return f"{self.stage:28} failed after {self.seconds:.0f} s: {self.error}"
        score = "" if self.score is None else f"  score {self.score:.4g}"
        kept = "kept" if self.kept else "not kept"
        return (
            f"{self.stage:28} {self.nbytes:>13,} bytes  distance {self.distance:.4g}{score}"
            f"  {self.seconds:.0f} s  {kept}{self.note and f'  ({self.note})'}"
        )

    @property
    def merit(self) -> float:
        """More is better: the score, or else nearness; what is not a number is worst."""
        merit = -self.distance if self.score is None else self.score
        return -math.inf if math.isnan(merit) else merit


class Bench:
    """A model with data and the outputs that it gives, on which files are tried.

    Where samples are few, ways that are fitted to some of them are judged by the others, unless a
    score decides: see :mod:`dither.search.held_out`.

    Args:
        model: is left as it was.
        data: what it reads; kept in memory.
        evaluate: its score.
        team: processes that run it together, each on some of the batches.

    Attributes:
        model: the same, or a copy.
        data: all samples.
        part: those to fit to, or all.
        rows: samples in all, by the first axis of batches.
        held: samples that are held out.
        is_blind: whether none could be held out of few.
        note: what is to be said of the trials that follow.
        trials: all so far.
        best: the best file so far.
        failure: the first.
    """

    def __init__(
        self,
        model: object,
        data: Data,
        evaluate: Callable[[nn.Module], float] | None,
        team: Team = ALONE,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SpecError(
                "data runs through a model, and the source is a dict of tensors: give the model"
            )
        tensors = weights_of(model.state_dict())
        is_special = any(isinstance(t, Tensor) and t.is_inference() for t in tensors.values())
        if is_special or overlapping(tensors):
            model = duplicate(model)  # of those, no gradients are to be had, nor other values
            separate(weights_of(model.state_dict(keep_vars=True)))
        self.model, self._home = model, home_of(model)
        self.data = data.held()
        self.team, self._evaluate = team, evaluate
        team.same("data", fingerprint(list(self.data), team), _SAME_BATCHES)
        self.note = ""
        self.trials: list[Trial] = []
        self.best: Archive | None = None
        self.failure: Exception | None = None
        with evaluating(model), torch.no_grad():
            outputs = self._outputs_of(self.data)
        split = Split.of(self.data) if evaluate else hold_out(model, self.data)
        self.part, self.rows, self._judged = split.fit, split.rows, split.judge
        self.held = split.held
        self.is_blind = not split.held and not evaluate and split.rows < MANY
        if split.held:
            with evaluating(model), torch.no_grad():
                outputs = self._outputs_of(self._judged)
        self._outputs = outputs

    def _outputs_of(self, data: Data) -> dict[str, object]:
        """What the model gives for the batches that are this process's."""
        batches = _numbered(data)
        mine = self.team.mine(_costs(batches))
        return {n: self._output(data, n, batches[n]) for n in steps("running the model", mine)}

    def _output(self, data: Data, number: str, batch: object) -> object:
        """What of the model's output is compared; a batch that gives none is named.

        Raises:
            SpecError: the model does not run on the batch, or what it gives is not a number.
        """
        try:
            output = tree_map_only(Tensor, self._kept, data.output(self.model, batch))
            if data.distance in (squared, divergence):
                floats_of(output)
        except Exception as error:
            said = (
                str(error) if isinstance(error, SpecError) else f"{type(error).__name__}: {error}"
            )
            raise SpecError(
                f"the model does not run on batch {number}, {described(batch)}: {said}"
            ) from error
        if has_nan(output):
            raise SpecError(
                f"the model's output of batch {number} is not a number (NaN), so nothing can be "
                "compared with it; fix that batch or the model, or leave the batch out"
            )
        return output

    def _kept(self, output: Tensor) -> Tensor:
        """An output where the model is, in memory or on its disk."""
        return output if self._home is None else self._home.copy(output)

    def refit(self, make: Callable[[], Archive]) -> None:
        """Go the best way again with all samples, and keep its file.

        The distance is that on samples held out before: on those that a file is fitted to, another
        would say too much good of it.
        """
        start = time.monotonic()
        before = next(trial for trial in reversed(self.trials) if trial.kept)
        stage = f"{before.stage}, anew"
        note = f"fitted to all {self.rows} samples; distance as before"
        try:
            with self.team.section(stage), part_of(stage):
                archive = make()
        except Exception as error:
            if self.team.is_ended:
                raise
            self._fail(stage, error, start)
            return
        seconds = time.monotonic() - start
        self.trials.append(
            replace(before, stage=stage, nbytes=archive.nbytes, seconds=seconds, note=note)
        )
        self.best = archive

    def attempt(
        self, stage: str, make: Callable[[], Archive | None], *, keep: bool = False
    ) -> bool:
        """Make a file, measure it, and keep it if it is the best so far; whether it is kept.

        A way that fails is noted, and ends none of the others.

        Args:
            stage: what is done.
            make: gives the file, or None where this way does not apply.
            keep: keep it anyhow.

        Raises:
            BudgetError: the budget is impossible, and there is no file yet.
        """
        start = time.monotonic()
        try:
            with self.team.section(stage), part_of(stage):
                archive = make()
        except Exception as error:
            if self.team.is_ended or (self.best is None and isinstance(error, BudgetError)):
                raise
            self._fail(stage, error, start)
            return False
        return archive is not None and self._judge(stage, archive, start, keep=keep)

    def winner(self) -> Archive:
        """The best file.

        Raises:
            Exception: all ways failed: what the first of them said.
        """
        if self.best is None:
            raise self.failure or SpecError("nothing was tried")
        self.best.trials = tuple(self.trials)
        return self.best

    def _fail(self, stage: str, error: Exception, start: float) -> None:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        self.trials.append(Trial(stage, 0, math.nan, None, time.monotonic() - start, error=said))
        self.failure = self.failure or error

    def _judge(self, stage: str, archive: Archive, start: float, *, keep: bool) -> bool:
        with part_of(stage):
            distance, score = self._measure(archive)
        kept = next((trial.merit for trial in reversed(self.trials) if trial.kept), None)
        seconds = time.monotonic() - start
        trial = Trial(stage, archive.nbytes, distance, score, seconds, note=self.note)
        is_best = keep or kept is None or trial.merit > kept
        self.trials.append(replace(trial, kept=is_best))
        if is_best:
            self.best = archive
        return is_best

    def _measure(self, archive: Archive) -> tuple[float, float | None]:
        """Distance and score of a file, its sites included."""
        model = duplicate(self.model)
        if archive.sites:
            apply(model, Encodings.from_json(archive.sites))
        load_into(model, archive)
        batches = _numbered(self._judged)

        def distances(numbers: Sequence[str]) -> dict[str, float]:
            judge = self._judged
            return {
                n: self._distance(judge.output(model, batches[n]), self._outputs[n])
                for n in steps("comparing outputs", numbers)
            }

        with evaluating(model), torch.no_grad():
            each = self.team.collected("distances", distances, _costs(batches))
            score = None if self._evaluate is None else self._score(model)
        return float(torch.tensor(list(each.values()), dtype=torch.float64).mean()), score

    def _distance(self, output: object, original: object) -> float:
        found: object = self.data.distance(output, original)
        try:
            return float(found)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError) as error:
            said = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise SpecError(
                f"distance gave something {said}; it must return one number for two outputs, such "
                "as a mean"
            ) from error

    def _score(self, model: nn.Module) -> float:
        evaluate = self._evaluate
        assert evaluate is not None  # noqa: S101 - asked before
        score = self.team.first("scores", lambda: evaluate(model))
        try:
            return float(score)
        except (TypeError, ValueError) as error:
            raise SpecError(
                f"evaluate gave {score!r}; it must return a number, of which more is better"
            ) from error


def _numbered(data: Data) -> dict[str, object]:
    return {str(number): batch for number, batch in enumerate(data)}


def _costs(batches: Mapping[str, object]) -> dict[str, float]:
    return {number: nbytes_of(batch) for number, batch in batches.items()}
