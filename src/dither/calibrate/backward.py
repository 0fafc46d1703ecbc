"""Gradients of one batch, one weight after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dither.calibrate.collect import check_loss
from dither.data import Forward
from dither.disk import Disk, disk_of, home_of

_SMALL = 1 << 16
"""Bytes of a tensor that is not worth a place on a disk."""


def square_sums(
    model: nn.Module, batch: object, loss: Callable[[Any, Any], Tensor], forward: Forward
) -> dict[str, float]:
    """Sums of squared gradients by the name of the parameter, of those that have a gradient.

    Each gradient is looked at when it is complete, and dropped. Of a model on a disk, what the
    forward pass keeps for the backward pass goes there, too, once it takes more than the disk has
    room for in memory.

    Args:
        model: parameters and their ``grad`` are left as they are.
        batch: as ``forward`` takes it.
        loss: of an output and the batch, a scalar.
        forward: runs the model.

    Raises:
        SpecError: the loss is no scalar, or has no gradient.
    """
    found: dict[str, float] = {}
    disk = home_of(model)
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    saved = nullcontext() if disk is None else _Saved(disk).hooks()
    with _wanting(named, found), torch.enable_grad(), saved:
        value = loss(forward(model, batch), batch)
        check_loss(value)
        torch.autograd.backward(value, inputs=[parameter for _, parameter in named])
    return found


@contextmanager
def _wanting(named: list[tuple[str, nn.Parameter]], found: dict[str, float]) -> Iterator[None]:
    """Let parameters have gradients for a while, and note the sum of squares of each."""

    def note(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            with torch.no_grad():
                found[name] = float(gradient.float().square().sum(dtype=torch.float64))

    before = [(parameter.requires_grad, parameter.grad) for _, parameter in named]
    with ExitStack() as hooks:
        try:
            for name, parameter in named:
                parameter.requires_grad_(True)  # noqa: FBT003 - torch's own signature
                parameter.grad = None
                handle = parameter.register_post_accumulate_grad_hook(
                    lambda given, name=name: note(name, given)
                )
                hooks.callback(handle.remove)
            yield
        finally:
            for (_, parameter), (flag, gradient) in zip(named, before, strict=True):
                parameter.grad = gradient
                parameter.requires_grad_(flag)


class _Saved:
    """What a forward pass keeps: in memory up to a limit, then on a disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._left = disk, disk.room

    def hooks(self) -> saved_tensors_hooks:
        """Look at all that is kept meanwhile."""
        return saved_tensors_hooks(self._keep, self._give)

    def _keep(self, value: Tensor) -> Tensor:
        is_plain = value.layout == torch.strided and value.device.type == "cpu"
        if not is_plain or value.nbytes < _SMALL or disk_of(value) is not None:
            return value.detach()
        self._left -= value.nbytes
        return value.detach() if self._left >= 0 else self._disk.copy(value)

    def _give(self, value: Tensor) -> Tensor:
        if disk_of(value) is self._disk:
            self._disk.use(value.nbytes)
        return value
