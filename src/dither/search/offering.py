"""Further ways to store tensors, beside the usual ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dither.search.knowledge import Knowledge, Proposer, Sensitivity
from dither.search.proposers import PROPOSERS
from dither.search.sensitivity import data_free


@dataclass(frozen=True)
class Offering:
    """A sensitivity whose tensors are offered one more way to be stored.

    Attributes:
        proposer: of that way, as ``SparseProducts()``.
        sensitivity: what an error costs.
    """

    proposer: Proposer
    sensitivity: Sensitivity = data_free

    def __call__(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Knowledge]:
        return {
            name: replace(known, proposers=(*(known.proposers or PROPOSERS), self.proposer))
            for name, known in self.sensitivity(tensors).items()
        }
