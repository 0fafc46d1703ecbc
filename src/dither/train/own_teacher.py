"""A pruned network whose pruned weights make it its own teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dither.core import SpecError
from dither.train.attached import Attached
from dither.train.pruned import Masked

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class FixMasks:
    """A schedule after which masks stay, and pruned weights are the teacher's alone.

    Attributes:
        after: share of the steps.
    """

    after: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.after <= 1:
            raise SpecError(f"FixMasks acts after a share of the steps, 0 to 1, not {self.after}")

    def __call__(self, run: Attached, step: int) -> None:
        if run.progress >= self.after:
            for surrogate in _masked(run):
                surrogate.is_fixed = True


class OwnTeacher:
    """The network with all its weights, as a teacher of the pruned one (PQK, Kim et al. 2021).

    While :meth:`teaching`, the model reads kept and pruned weights as they are, and batch norms
    have running statistics of their own. What is computed then reaches only the pruned weights by
    its gradient: those that are kept, and all other parameters, belong to the student.

    Args:
        run: of a plan with :class:`~dither.Pruned`.

    Raises:
        SpecError: nothing is pruned.
    """

    def __init__(self, run: Attached) -> None:
        self._run = run
        if not list(_masked(run)):
            raise SpecError("OwnTeacher needs weights that are pruned; the plan has no Pruned(...)")
        self._statistics = {
            f"{path}.{name}": value.clone()
            for path, module in run.model.named_modules()
            if isinstance(module, _BatchNorm)
            for name in _STATISTICS
            if (value := module._buffers.get(name)) is not None
        }

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Let the model be the teacher for a while."""
        model, masked = self._run.model, list(_masked(self._run))
        taught = {id(weight) for _, s, weight in self._run.weights() if isinstance(s, Masked)}
        others = [p for p in model.parameters() if id(p) not in taught and p.requires_grad]
        try:
            for surrogate in masked:
                surrogate.teaches = True
            for parameter in others:
                parameter.requires_grad_(False)  # noqa: FBT003 - torch's own signature
            self._exchange()
            yield
        finally:
            self._exchange()
            for parameter in others:
                parameter.requires_grad_(True)  # noqa: FBT003
            for surrogate in masked:
                surrogate.teaches = False

    def state_dict(self) -> dict[str, Tensor]:
        """The teacher's running statistics, for resuming."""
        return {name: value.clone() for name, value in self._statistics.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        if state.keys() != self._statistics.keys():
            raise SpecError("these statistics are of another model's batch norms")
        with torch.no_grad():
            for name, value in self._statistics.items():
                value.copy_(state[name])

    def _exchange(self) -> None:
        for name, value in self._statistics.items():
            path, _, local = name.rpartition(".")
            module = self._run.model.get_submodule(path)
            self._statistics[name] = module.get_buffer(local)
            module._buffers[local] = value.to(module.get_buffer(local).device)


def _masked(run: Attached) -> Iterator[Masked]:
    return (s for _, s, _ in run.weights() if isinstance(s, Masked))
