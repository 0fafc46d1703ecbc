"""What is known of a tensor, how it could be stored, and who says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dither.core import Encoded
from dither.encoders.coded_grid import in_steps
from dither.model import stacks_of

_STACK = 3


def keep_all() -> None:
    """What is done for tensors in memory once they were looked at: nothing."""


class Weights(dict[str, Tensor]):
    """Tensors by name, and which of them are stacks of matrices.

    Attributes:
        stacks: their names, see :func:`~dither.model.stacks_of`.
        heads: names of output layers, see :func:`~dither.search.sensitivity.heads_of`.
        facts: of a tensor, as :func:`~dither.search.sensitivity.facts_of` finds them, where some
            may be known from before.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        stacks: frozenset[str] | None = None,
        release: Callable[[], None] = keep_all,
        facts: Callable[[Tensor], tuple[bool, float]] | None = None,
        heads: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(values)
        self.stacks = stacks_of(values, values) if stacks is None else stacks
        self.facts, self._release, self.heads = facts, release, heads

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors; memory of files that hold them is given back after each."""
        for name, value in self.items():
            yield name, value
            self._release()


@dataclass(frozen=True)
class Knowledge:
    """A tensor and what is known about errors in it.

    Attributes:
        value: the tensor.
        sensitivity: loss for each unit of squared error.
        rows: where rows (first axis) differ, each row's step relative to the tensor's; the
            sensitivity is then that of a row whose relative step is 1.
        gram: second moments of the inputs, for error feedback: see :class:`~dither.GPTQ`. Of a
            tensor of three axes, moments of its last one alone make it a stack of matrices.
        axes: orthonormal ``(columns, columns)``, along which the rows of a table differ most.
        coarsest: the coarsest step that keeps the tensor of use; None for a common rule.
        least: values above this are not rounded to 0, unless all are; None where they may be.
        whole: what the tensor is a difference to make; None where it stands for itself.
        proposers: who proposes how to store it; None for :data:`~dither.search.PROPOSERS`.
    """

    value: Tensor
    sensitivity: float
    rows: Tensor | None = None
    gram: Tensor | None = None
    axes: Tensor | None = None
    coarsest: float | None = None
    least: float | None = None
    whole: Tensor | None = None
    proposers: tuple[Proposer, ...] | None = None

    @property
    def is_stack(self) -> bool:
        """Whether this is a stack of matrices, ``(matrices, outputs, inputs)``."""
        if self.gram is None or self.value.ndim != _STACK or self.value.shape[1] == 1:
            return False  # with a single channel it may be a convolution
        return self.gram.shape == (self.value.shape[2],) * 2

    def every(self, stride: int) -> Knowledge:
        """The same of every ``stride``-th row."""
        rows, whole = (t if t is None else t[::stride] for t in (self.rows, self.whole))
        return replace(self, value=self.value[::stride], rows=rows, whole=whole)

    def relative(self) -> Tensor:
        """The values in relative steps, along the axes: an error counts alike everywhere."""
        value = self.value.detach() if self.rows is None else in_steps(self.value, self.rows)
        return value if self.axes is None else value.float() @ self.axes

    def steps(self, step: float) -> Tensor:
        """A step, ``(1,)``, or one for each row."""
        steps = torch.tensor([step], dtype=torch.float32)
        return steps if self.rows is None else (steps * self.rows).bfloat16().float()


@dataclass(frozen=True)
class Choice:
    """One way to store one tensor.

    Attributes:
        nbytes: predicted.
        loss: predicted.
        proposer: carries it out.
        step: of a grid, which may be changed at will; None where there is none.
        fed: whether errors are fed on to the inputs behind; such a choice may be carried out anew
            when the tensor's turn comes among layers in sequence.
    """

    nbytes: float
    loss: float
    proposer: Proposer
    step: float | None = None
    fed: bool = False

    def encode(self, known: Knowledge) -> Encoded:
        """Carry it out."""
        return self.proposer.encode(known, self)

    def is_like(self, other: Choice) -> bool:
        """Whether both encode alike, whatever is predicted of them."""
        return (self.proposer, self.step, self.fed) == (other.proposer, other.step, other.fed)

    def finer(self, octaves: float) -> Choice:
        """The same with a step that many octaves finer, of a value that takes two bytes."""
        return self if self.step is None else self.at(short(self.step * 2.0**-octaves))

    def at(self, step: float) -> Choice:
        """The same with another step."""
        return replace(self, step=step)


class Proposer(Protocol):
    """Proposes ways to store a tensor, and carries out the one that is chosen.

    A frozen dataclass of its settings: choices by equal proposers with equal steps are the same.
    """

    def propose(self, known: Knowledge) -> Iterable[Choice]:
        """Choices, in any order; none where this proposer has nothing to offer."""
        ...

    def encode(self, known: Knowledge, choice: Choice) -> Encoded:
        """Carry a choice out, as it was proposed or with another step."""
        ...


Sensitivity = Callable[[Mapping[str, Tensor]], Mapping[str, Knowledge]]
"""Tensors by name in, each with what an error costs out."""


def short(step: float) -> float:
    """A step that takes two bytes in the file."""
    return short_all([step])[0]


def short_all(steps: Sequence[float]) -> list[float]:
    """The same of many."""
    found: list[float] = torch.tensor(steps, dtype=torch.float32).bfloat16().tolist()
    return found
