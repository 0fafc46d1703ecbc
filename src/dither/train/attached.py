"""What penalties and schedules see of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor, nn

from dither.train.surrogate import Surrogate


class Attached(Protocol):
    """A model in training, its weights read through surrogates; a :class:`Run` is one.

    Attributes:
        model: the user's model, its parameters where they were.
        surrogates: by the name of the weight; a tied weight has one.
        progress: share of the steps that is done, 0 to 1; 1 where no number of steps was given.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def surrogates(self) -> Mapping[str, Surrogate]: ...

    @property
    def progress(self) -> float: ...

    def weights(self) -> Iterator[tuple[str, Surrogate, Tensor]]:
        """Name, surrogate and parameter of every weight that is trained with noise."""
        ...

    def parameter(self, name: str) -> nn.Parameter:
        """The model's own parameter of a name."""
        ...

    def soft_bits(self) -> Tensor:
        """Differentiable estimate of the coded size in bits of all weights with noise, a scalar."""
        ...
