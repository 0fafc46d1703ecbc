"""Weights of which some are exactly zero, in training and in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither.core import Encoded, Encoder, SpecError, Stats
from dither.encoders.masks import largest, n_of_m, parse_pattern
from dither.formats.settings import check_count
from dither.train.attached import Attached
from dither.train.lsq import LSQ, LearnedStep
from dither.train.method import Method, begin
from dither.train.sparsity import Gradual, Sparsity, sparsity_from_json
from dither.train.surrogate import Surrogate, plain, straight_through

_RISE = Gradual(1 - 1e-9)
"""Of what is worth no code, how much is pruned."""


@dataclass(frozen=True)
class Pruned(Method):
    """Magnitude pruning around any other method or format.

    The smallest weights of each tensor are zero: what reads them sees 0, their gradient is 0, and
    in the file they are the code for 0, which costs what its frequency says. While sparsity climbs,
    what is pruned stays so; in a new cycle of :class:`~dither.train.Cyclical` it comes back with
    the value 0.

    Attributes:
        inner: how the others are stored; it must hold 0 exactly, as symmetric grids do.
        sparsity: share of zeros over training; with ``pattern="n:m"`` the pattern is the end. None,
            for learned steps: of each tensor what is worth no code other than 0 at the price that
            its step pays for a bit, so that a budget decides. It rises as with ``Gradual``, and
            what is pruned goes on training, as with ``regrow``.
        regrow: pruned weights go on training, by the gradient that their zeros get, and come back
            at any look at which they are among the largest (Kim et al. 2021).
        pattern: ``"n:m"``: at most n of m consecutive inputs of a row are kept, for kernels that
            read such weights; ``"channels"``: whole rows (first axis), by their norm; None: any.
        refresh: steps between two looks at the magnitudes.

    >>> from dither.train import LSQ, OneShot, attach
    >>> layer = torch.nn.Linear(4, 1)
    >>> run = attach(layer, {"weight": Pruned(LSQ(4), OneShot(0.5))}, steps=1)
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> run.step()
    >>> nbytes = run.finish()
    >>> int((run.archive["weight"] == 0).sum())
    2
    """

    name: ClassVar[str] = "pruned"

    inner: Encoder | Method
    sparsity: Sparsity | None = None
    pattern: str | None = None
    regrow: bool = False
    refresh: int = 10

    def __post_init__(self) -> None:
        check_count("Pruned", "refresh", self.refresh, 1, 1 << 30)
        decides = self.sparsity is None and isinstance(self.inner, LSQ)
        if not isinstance(self.sparsity, Sparsity) and not (decides and self.pattern is None):
            raise SpecError(
                f"Pruned(sparsity={self.sparsity!r}): give a schedule, as Gradual(0.9), "
                "Cyclical(0.9), Iterative(0.9) or OneShot(0.9); only single weights around learned "
                "steps need none"
            )
        if self.pattern in {None, "channels"}:
            return
        if parse_pattern(self.pattern or "") is None:
            raise SpecError(
                f'Pruned(pattern={self.pattern!r}): give "n:m" with n < m, as "2:4", "channels", '
                "or None"
            )

    def begin(self, weight: Tensor) -> Surrogate:
        return Masked(self, weight)

    def _written(self, value: object) -> object:
        return value.to_json() if isinstance(value, Sparsity) else super()._written(value)

    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, Mapping) and "sparsity" in value:
            return sparsity_from_json(value)
        return super()._read(value)


class Masked(Surrogate):
    """One weight under a mask, read through another surrogate.

    Attributes:
        inner: that one.
        mask: bool, of the weight's shape; True where it is kept.
        share: of zeros that is wanted instead of the schedule's, see :class:`Together`.
        regrows: whether pruned weights go on training.
        is_fixed: whether the mask stays from now on, and what it hides trains no more.
        teaches: whether all weights are read, as they are, see :class:`~dither.train.OwnTeacher`.
    """

    def __init__(self, spec: Pruned, weight: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.inner = begin(spec.inner, weight)
        self.can_trim, self.lr = self.inner.can_trim, self.inner.lr
        self.nudges = self.inner.nudges
        self.mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        self.share: float | None = None
        self.is_fixed = self.teaches = False
        self.regrows = spec.regrow or spec.sparsity is None
        self._cycle = 0
        self._before = 0.0  # progress at the last step

    def noisy(self, weight: Tensor) -> Tensor:
        if self.teaches:
            return torch.where(self.mask, weight.detach(), weight)
        kept = weight * self.mask
        if self.regrows and not self.is_fixed:
            kept = straight_through(kept, weight)
            return kept if self.inner.is_still else self.inner.noisy(kept)
        return (kept if self.inner.is_still else self.inner.noisy(kept)) * self.mask

    def forward(self, weight: Tensor) -> Tensor:
        """As for any surrogate; a teacher reads all weights in evaluation, too."""
        return self.noisy(weight) if self.teaches else super().forward(weight)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Encoded:
        self.inner.trim = self.trim
        encoded = self.inner.encode(weight * self.mask.to(weight.device), stats)
        if bool(encoded.decode()[~self.mask.cpu()].any()):
            raise SpecError(
                f"{self.spec.inner!r} does not hold 0 exactly, and pruned weights are 0: use a "
                "symmetric grid, as LSQ, Affine(4) or StraightThrough"
            )
        return encoded

    def soft_bits(self, weight: Tensor) -> Tensor:
        return self.inner.soft_bits(weight * self.mask)

    def draw(self, weight: Tensor, generator: torch.Generator, step: int) -> None:
        self.inner.progress, self.inner.active = self.progress, self.active
        schedule = self.spec.sparsity
        cycle = 0 if schedule is None else schedule.cycle(self.progress)
        has_ended = self.progress >= 1 > self._before
        is_due = step % self.spec.refresh == 0 or cycle != self._cycle or has_ended
        if is_due and not self.is_fixed:
            if cycle != self._cycle:
                weight.masked_fill_(~self.mask, 0.0)  # sharded weights come back as they were
                self.mask = torch.ones_like(self.mask)
                self._cycle = cycle
            seen = weight.float()
            mask = self._look(seen if self.regrows else seen * self.mask)
            if not torch.equal(mask, self.mask):
                self.reset()
            self.mask = mask
        self._before = self.progress
        self.inner.draw(weight * self.mask, generator, step)

    def _look(self, weight: Tensor) -> Tensor:
        """The mask for magnitudes, in which what was pruned is 0."""
        share = self._wanted(weight) if self.share is None else self.share
        if not weight.numel() or not share:
            return torch.ones_like(self.mask)
        if self.spec.pattern == "channels" and weight.ndim:
            norms = weight.reshape(len(weight), -1).norm(dim=1)
            rows = largest(norms, share)
            return rows.reshape([-1] + [1] * (weight.ndim - 1)).expand(weight.shape).clone()
        if self.spec.pattern is None or not weight.ndim:
            return largest(weight.abs().flatten(), share).reshape(weight.shape)
        keep, size = parse_pattern(self.spec.pattern) or (1, 1)
        end = self.spec.sparsity.end if self.spec.sparsity is not None else 0.0
        lost = min(share / end, 1.0) if end else 1.0
        return n_of_m(weight, size - round(lost * (size - keep)), size)

    def _wanted(self, weight: Tensor) -> float:
        if self.spec.sparsity is not None:
            return self.spec.sparsity.at(self.progress)
        assert isinstance(self.inner, LearnedStep)  # noqa: S101 - others need a schedule
        return _RISE.at(self.progress) * self.inner.worthless(weight)

    def renew(self) -> None:
        self.inner.renew()

    def nudge(self, octaves: float) -> None:
        self.inner.nudge(octaves)

    def start(self, encoded: Encoded) -> None:
        self.inner.start(encoded)

    def aside(self) -> dict[str, Any]:
        return {
            "mask": self.mask,
            "cycle": self._cycle,
            "share": self.share,
            "is_fixed": self.is_fixed,
            "inner": self.inner.aside(),
        }

    def load_aside(self, state: Mapping[str, Any]) -> None:
        self.mask, self._cycle, self.share = state["mask"], state["cycle"], state["share"]
        self.is_fixed = state["is_fixed"]
        self.inner.load_aside(state["inner"])


@dataclass(frozen=True)
class Together:
    """A schedule that ranks the weights of all pruned tensors together: global magnitude pruning.

    Attributes:
        sparsity: of all of them; the tensors' own schedules say only when cycles begin.
        refresh: steps between two looks, as that of the tensors.
    """

    sparsity: Sparsity
    refresh: int = 10

    def __call__(self, run: Attached, step: int) -> None:
        if step % self.refresh and run.progress < 1:
            return
        found = [(s, plain(w).float()) for _, s, w in run.weights() if isinstance(s, Masked)]
        if not found:
            raise SpecError("Together ranks pruned weights, and the plan has none; use Pruned(...)")
        with torch.no_grad():
            marks = [
                (value if surrogate.regrows else value * surrogate.mask).abs().flatten().cpu()
                for surrogate, value in found
            ]
            kept = largest(torch.cat(marks), self.sparsity.at(run.progress))
        for (surrogate, _), part in zip(found, kept.split([len(m) for m in marks]), strict=True):
            surrogate.share = 1 - float(part.float().mean())
