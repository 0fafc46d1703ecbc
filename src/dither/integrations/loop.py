"""What callbacks of any trainer do with a run, whose loop is the trainer's."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from dither.core import SpecError
from dither.train import Run

RUN_STATE = "dither_run.pt"
"""The state of a run in the folder of a checkpoint."""


def withhold_extras(run: Run) -> None:
    """Hide what surrogates learn from a trainer that makes an optimizer of all that learns.

    Its optimizer would decay them, and a wrapper for several processes would average them: a run
    does the latter itself, in :func:`add_penalty`.
    """
    for parameter in run.extras.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003 - torch's


def begin(run: Run, steps: int, withheld: list[nn.Parameter], optimizers: list[Optimizer]) -> None:
    """Take part in a training of ``steps`` optimizer steps.

    Args:
        run: the run; one without steps gets them.
        steps: that the trainer will do, those of earlier sessions included.
        withheld: what :func:`withhold_extras` hid.
        optimizers: the trainer's; what surrogates learn is left to them if they have it in groups
            of their own, as those have that were given to ``attach``.

    Raises:
        SpecError: the run was attached for another number of steps.
    """
    if run.controller is not None and run.steps != steps:
        raise SpecError(
            f"the run was attached for {run.steps} steps, and the trainer will do {steps}: "
            f"dither.attach(..., steps={steps})"
        )
    run.steps = steps
    for parameter in withheld:
        parameter.requires_grad_(True)  # noqa: FBT003 - torch's
    own = {id(parameter) for parameter in run.extras.parameters()}
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    alone = [group for group in groups if group and all(id(p) in own for p in group)]
    if own and sum(map(len, alone)) < len(own):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
        run.extras.train_alone()


def add_penalty(run: Run, scale: float = 1.0) -> None:
    """Add the gradient of the run's penalty to the model's, once for each optimizer step.

    So it counts once however many batches an optimizer step takes, and in full precision.

    Args:
        run: the run, after the loss's gradients are complete and before the optimizer steps.
        scale: by which gradients of what surrogates learn are too large, if a scaler of losses
            does not see them.
    """
    own = run.extras.parameters()
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    for parameter in own:
        if several and not hasattr(parameter, "full_tensor"):  # those of FSDP are averaged
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
        if scale != 1.0 and parameter.grad is not None:
            parameter.grad /= scale
    with torch.enable_grad():
        penalty = run.penalty()
    learned = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    if not penalty.requires_grad:
        return
    found = torch.autograd.grad(penalty, learned, allow_unused=True)
    for parameter, gradient in zip(learned, found, strict=True):
        if gradient is not None:
            before = parameter.grad
            parameter.grad = gradient if before is None else before + gradient
