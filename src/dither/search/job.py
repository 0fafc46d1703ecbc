"""What is asked for, and the plain way to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dither.archive import Archive, Base
from dither.core import SpecError, on_cpu
from dither.disk import Disk
from dither.model import Tensors
from dither.progress import report
from dither.search.coder import Coder
from dither.search.differences import Differences
from dither.search.forecast import Forecast
from dither.search.greedy import Greedy
from dither.search.knowledge import Sensitivity, Weights
from dither.search.ledger import Ledger
from dither.search.sensitivity import heads_of
from dither.team import ALONE, Team


@dataclass(frozen=True)
class Job:
    """A budget in bytes, and how to spend it.

    Attributes:
        budget: bytes.
        sensitivity: what an error costs, where nothing else is measured.
        metadata: of the file.
        team: processes that do the job together.
        coder: predicts and codes single tensors.
        disk: where files that are tried are kept, and what passes through a model hold, beyond what
            may be in memory.
        base: what tensors may rest on.
    """

    budget: int
    sensitivity: Sensitivity
    metadata: Mapping[str, Any]
    team: Team = ALONE
    coder: Coder = field(default_factory=Coder)
    disk: Disk | None = None
    base: Base | None = None

    def spend(
        self, tensors: Tensors, sensitivity: Sensitivity | None = None
    ) -> tuple[Forecast, Ledger]:
        """A full ledger for some tensors, and what was learned on the way.

        Raises:
            BudgetError: the budget is impossible.
            SpecError: a tensor is without a sensitivity.
        """
        values = {name: on_cpu(value)[0] for name, value in tensors.values.items()}
        report("reading weights", 0.0)
        heads = heads_of(values, tensors.aliases)
        weights = Weights(values, tensors.stacks, self.coder.release, self.coder.facts, heads)
        found = (sensitivity or self.sensitivity)(weights)
        if missing := sorted(set(tensors.values) - set(found)):
            raise SpecError(f"the sensitivity gives no value for {missing[:5]}; give one for each")
        known = {name: found[name] for name in tensors.values}
        differences = None if self.base is None else Differences.of(values, self.base)
        ledger = Ledger(known, tensors.aliases, self.metadata, differences)
        known = known if differences is None else differences.known(known, values)
        forecast = Forecast({name: known[name] for name in ledger.names}, self.team, self.coder)
        Greedy(forecast, ledger).spend(self.budget)
        return forecast, ledger

    def archive(self, tensors: Tensors) -> Archive:
        """The file for some tensors, without data."""
        return self.file(self.spend(tensors)[1])

    def file(self, ledger: Ledger) -> Archive:
        """The file of a full ledger: in memory, or on the disk if that has no room in memory."""
        is_large = self.disk is not None and ledger.nbytes > self.disk.room
        return ledger.archive(self.disk if is_large else None)
