"""Distillation: losses that make a compressed model agree with the original.

Each returns a scalar to be added to, or used as, the loss. The teacher is called beside the
student::

    teacher = Teacher(model)  # before attach
    run = dither.attach(model, plan)
    loss = soft_targets(model(inputs), teacher(inputs), hard_labels=labels) + run.penalty()
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dither.core import SpecError
from dither.train.shadow import is_shadowed


class Teacher:
    """A frozen copy of a model, in evaluation mode and without gradients, to learn from.

    It is no module, so that a student which keeps it does not train, save or quantize it.

    Attributes:
        model: the teacher.
    """

    def __init__(self, model: nn.Module, *, keep: bool = False) -> None:
        """Take a copy of ``model``, or with ``keep=True`` the model itself, for good.

        Raises:
            SpecError: the model is attached: it would answer with quantized weights.
        """
        if any(is_shadowed(module) for module in model.modules()):
            raise SpecError("make the Teacher before attach(): this model is attached already")
        self.model = (model if keep else copy.deepcopy(model)).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad = False

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, without a graph."""
        return self.model(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Teacher:
        """Move the model; returns the teacher."""
        self.model.to(*args, **kwargs)
        return self


def soft_targets(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 2.0,
    hard_labels: Tensor | None = None,
    mix: float = 0.7,
    ignore_index: int = -100,
) -> Tensor:
    """Distillation loss on a teacher's probabilities (Hinton et al. 2015; Polino et al. 2018).

    ``mix * T**2 * KL(teacher || student) + (1 - mix) * cross entropy``, both in float32 and
    averaged over examples; the first term alone, with factor 1, without labels. ``T**2`` keeps the
    gradient's size from depending on the temperature.

    Args:
        student: logits, ``(..., classes)``.
        teacher: logits of the same shape; no gradient reaches them.
        temperature: by which logits are divided, 2 for images in the paper.
        hard_labels: classes, ``(...)``.
        mix: share of the teacher.
        ignore_index: examples with this label count in neither term, as in ``cross_entropy``.

    Raises:
        SpecError: shapes that differ, a temperature that is not positive.

    >>> logits = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> float(soft_targets(logits, logits + 5)) < 1e-6
    True
    """
    if student.shape != teacher.shape:
        raise SpecError(
            f"student and teacher give logits of one shape, not {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if temperature <= 0:
        raise SpecError(f"a temperature is positive, not {temperature}")
    own = student.reshape(-1, student.shape[-1]).float()
    other = teacher.detach().reshape(own.shape).float()
    if hard_labels is not None:
        labels = hard_labels.reshape(-1)
        valid = labels != ignore_index
        own, other, labels = own[valid], other[valid], labels[valid]
    distance = functional.kl_div(
        functional.log_softmax(own / temperature, 1),
        functional.log_softmax(other / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    soft = temperature**2 * distance
    if hard_labels is None:
        return soft
    return mix * soft + (1 - mix) * functional.cross_entropy(own, labels)


def hidden_states(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    normalize: bool = False,
    projection: nn.Module | Sequence[nn.Module] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared error of features (Romero et al. 2015, FitNets; Jiao et al. 2020, TinyBERT).

    Args:
        student: features of one layer, ``(..., features)``, or of several; the mean is over layers.
        teacher: as many; no gradient reaches them.
        normalize: compare directions only: both are divided by their length first.
        projection: applied to the student's features, where its width differs: one module, or one
            for each layer. Give its parameters to the optimizer.
        mask: positions that count, ``(...)``, such as an attention mask; all by default.

    Raises:
        SpecError: another number of layers, or shapes that differ.
    """
    own = [student] if isinstance(student, Tensor) else list(student)
    other = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    maps = projection if isinstance(projection, Sequence) else [projection] * len(own)
    if not len(own) == len(other) == len(maps) or not own:
        raise SpecError(
            "hidden_states compares layer with layer: there are "
            f"{len(own)} of the student, {len(other)} of the teacher, {len(maps)} projections"
        )
    terms = []
    for features, goal, move in zip(own, other, maps, strict=True):
        seen = features if move is None else move(features)
        if seen.shape != goal.shape:
            raise SpecError(
                f"features of shapes {tuple(seen.shape)} and {tuple(goal.shape)} cannot be "
                "compared; give a projection, such as nn.Linear"
            )
        pair = (seen.float(), goal.detach().float())
        if normalize:
            pair = (functional.normalize(pair[0], dim=-1), functional.normalize(pair[1], dim=-1))
        terms.append(_squared(*pair, mask))
    return torch.stack(terms).mean()


def _squared(own: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    error = (own - other).square().mean(-1)
    if mask is None:
        return error.mean()
    count = mask.to(error.dtype)
    return (error * count).sum() / count.sum().clamp(min=1)


def embeddings(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of each student's and teacher's embedding, averaged.

    For sentence encoders: directions are all that their similarities read.

    Args:
        student: ``(..., features)``.
        teacher: of the same shape; no gradient reaches it.
    """
    cosine = functional.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)
    return (1 - cosine).mean()


def similarities(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the cosines within a batch (Tung and Mori 2019; Park et al. 2019).

    Widths may differ: only what is near to what is compared. The diagonal, always 1, is left out.

    Args:
        student: one embedding for each example, ``(batch, features)``.
        teacher: ``(batch, other features)``; no gradient reaches it.

    Raises:
        SpecError: another batch, or fewer than two examples.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise SpecError(
            "similarities compares two or more examples with each other, the same ones of student "
            f"and teacher, not {len(student)} and {len(teacher)}"
        )
    own = functional.normalize(student.float(), dim=-1)
    other = functional.normalize(teacher.detach().float(), dim=-1)
    error = (own @ own.T - other @ other.T).square()
    count = len(student)
    return (error.sum() - error.diagonal().sum()) / (count * (count - 1))
