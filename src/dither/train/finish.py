"""The last steps of a run: trim to the budget, and batch norm's statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dither.archive import CodedTensor, code, packed_nbytes
from dither.calibrate.data import call
from dither.core import BudgetError, Encoded

if TYPE_CHECKING:
    from dither.train.run import Run

_ENOUGH = 0.995
_SLACK_NBYTES = 64
_TRIES = 14
_FARTHEST = 6.0
"""Octaves by which steps may be made coarser to fit."""
_FINEST = -0.25
"""Octaves by which steps may be made finer to use a budget up: what was trained is kept."""


def trim_to(run: Run, budget: int, aliases: Mapping[str, str], slack: int = 0) -> int:
    """Choose one trim for all surrogates that have one, so that the file fits the budget.

    Args:
        run: sets ``trim`` of its surrogates.
        budget: bytes.
        aliases: of the archive.
        slack: how often the file came out too large before, when buffers changed afterwards.

    Raises:
        BudgetError: even the coarsest does not fit.
    """
    budget -= slack * _SLACK_NBYTES
    movable = {n: s for n, s in run.surrogates.items() if s.can_trim}
    fixed: dict[str, CodedTensor] = {
        name: code(encoded) for name, encoded in run.encode().items() if name not in movable
    }

    def measure(octaves: float) -> int:
        coded = dict(fixed)
        encoded = {}
        for name, surrogate in movable.items():
            surrogate.trim = octaves
            encoded[name] = run.encode_one(name)
            coded[name] = code(encoded[name])
        return packed_nbytes(coded, aliases, sites=run.sites())

    size = measure(0.0)
    if _fits(size, budget):
        return size
    if not movable:
        if size > budget:
            raise BudgetError(
                f"a file of {budget} bytes is impossible with this plan: it takes {size} bytes, "
                "and nothing in it can be made coarser; use learned sizes (LSQ(bits=None), "
                "DiffQ), fewer bits, or a larger budget",
                smallest=size,
            )
        return size
    low, high = (0.0, _FARTHEST) if size > budget else (_FINEST, 0.0)
    end = measure(high if size > budget else low)
    if size > budget and end > budget:
        raise BudgetError(
            f"a file of {budget} bytes is impossible with this plan: even far coarser than "
            f"trained it takes {end} bytes; ask for that or more",
            smallest=end,
        )
    if size <= budget and end <= budget:
        return end
    best = high
    for _ in range(_TRIES):
        middle = (low + high) / 2
        size = measure(middle)
        if size <= budget:
            best = high = middle
            if _fits(size, budget):
                return size
        else:
            low = middle
    return measure(best)


def _fits(size: int, budget: int) -> bool:
    return size <= budget and (size >= _ENOUGH * budget or size >= budget - _SLACK_NBYTES)


def reestimate(model: nn.Module, data: Iterable[Any]) -> None:
    """Batch norm's statistics, anew, with the weights as they are evaluated (Nagel et al. 2022).

    Everything else is in evaluation mode; modes and momenta are restored.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
            norm.training = True  # its surrogates stay in evaluation mode
        with torch.no_grad():
            for batch in data:
                call(model, batch)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def first_changed(
    model: nn.Module, finished: Mapping[str, Encoded], trained: set[str]
) -> str | None:
    """The first tensor without a surrogate that is no longer what the file would hold.

    Those of surrogates are read from the file's own objects. Sharded tensors are not looked at.
    """
    for name, value in model.state_dict().items():
        if name in finished and name not in trained and not hasattr(value, "full_tensor"):
            held = finished[name].decode().to(value.device, value.dtype)
            if not torch.equal(_bytes(held), _bytes(value)):
                return name
    return None


def _bytes(tensor: Tensor) -> Tensor:
    # A copy, because a single value may have a stride of 0, of which there is no view as bytes.
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
