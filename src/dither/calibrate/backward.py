"""Gradients of one batch, one weight after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dither.core import SpecError
from dither.data import Forward
from dither.disk import Disk, disk_of, home_of

_SMALL = 1 << 16
"""Bytes of a tensor that is not worth a place on a disk."""


Loss = Callable[[Any, Any], Tensor]
"""A model's output and the batch to a scalar."""


def squared_gradients(
    model: nn.Module,
    batch: object,
    loss: Loss,
    forward: Forward,
    use: Callable[[str, Tensor], None],
) -> None:
    """Squared gradients of one batch, each as soon as it is complete; then it is dropped.

    Of a model on a disk, what the forward pass keeps for the backward pass goes there, too, once it
    takes more than the disk has room for in memory.

    Args:
        model: parameters and their ``grad`` are left as they are.
        batch: as ``forward`` takes it.
        loss: of an output and the batch.
        forward: runs the model.
        use: is given the name of a parameter and the square of its gradient, float32.

    Raises:
        SpecError: the loss is no scalar, or has no gradient.
    """
    disk = home_of(model)
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    saved = nullcontext() if disk is None else _Saved(disk).hooks()
    with _wanting(named, use), torch.enable_grad(), saved:
        value = loss(forward(model, batch), batch)
        if value.ndim:
            raise SpecError(f"a loss is a scalar, not of shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise SpecError(
                "the loss has no gradient: the model runs under torch.no_grad, or detaches its "
                "output; give a forward that does not"
            )
        torch.autograd.backward(value, inputs=[parameter for _, parameter in named])


@contextmanager
def _wanting(
    named: list[tuple[str, nn.Parameter]], use: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Let parameters have gradients for a while, and look at each."""

    def look(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            with torch.no_grad():
                use(name, gradient.float().square())

    before = [(parameter.requires_grad, parameter.grad) for _, parameter in named]
    with ExitStack() as hooks:
        try:
            for name, parameter in named:
                parameter.requires_grad_(True)  # noqa: FBT003 - torch's own signature
                parameter.grad = None
                hook = partial(look, name)
                hooks.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
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
