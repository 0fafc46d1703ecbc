"""How peers that train do so: from the same weights as ours, on the same batches, for as long.

On the tasks whose model is trained here, that is what ``benchmarks.measure`` does, with its labels
and on batches that the model has not seen:
a learning rate that falls along half a cosine, here after a short rise. ResNet-20 is trained with
labels, for two epochs, as the DiffQ package is (``diffq_peer.py``); ours has three, without labels.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.contract import Task
from benchmarks.tasks import unseen

TASKS = ("resnet20_cifar10", "minilm_sst2", "lm_ptb")
"""Tasks that have labels to train on."""
RESNET_ROWS, RESNET_EPOCHS, RESNET_RATE, WARM_STEPS = 128, 2, 1e-3, 20
Loss = Callable[[nn.Module, Any], Tensor]


def _resnet(seed: int) -> tuple[Iterator[Any], Loss, int, float]:
    module = importlib.import_module("benchmarks.tasks.resnet20_cifar10")
    batches = module.Batches(RESNET_ROWS, seed)
    steps = RESNET_EPOCHS * batches.per_epoch

    def loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        images = batch[0].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(images)
        return nn.functional.cross_entropy(found.float(), batch[1])

    return (batches[step] for step in range(steps)), loss, steps, RESNET_RATE


def course(task: Task) -> tuple[Iterator[Any], Loss, int, float]:
    """Batches, the loss of a model on one, steps, and Adam's learning rate."""
    if task.name == "resnet20_cifar10":
        return _resnet(task.seed)
    module = importlib.import_module(f"benchmarks.tasks.{task.name}")
    batches = module.batches(module.ROWS, unseen(task.seed))
    return batches, module.loss_of, module.STEPS, module.RATE


def train(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    penalty: Callable[[], Tensor] | None = None,
    others: Sequence[torch.optim.Optimizer] = (),
    masters: Sequence[Tensor] = (),
    share: float = 1.0,
) -> None:
    """Train a model in place.

    Args:
        task: what to train on.
        model: begins with the task's weights; left in evaluation mode.
        optimizer: of its weights; its learning rates fall from their own to 0.
        penalty: added to the loss.
        others: optimizers whose learning rates are their own business.
        masters: weights that a call of the model overwrites; the optimizer gets them as they were.
        share: of the steps.
    """
    batches, loss_of, steps, _ = course(task)
    steps = round(steps * share)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / WARM_STEPS)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        kept = [weight.detach().clone() for weight in masters]
        loss = loss_of(model, next(batches))
        if penalty is not None:
            loss = loss + penalty()
        for one in (optimizer, *others):
            one.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for weight, value in zip(masters, kept, strict=True):
            weight.data.copy_(value)
        for one in (optimizer, *others):
            one.step()
    model.eval()
