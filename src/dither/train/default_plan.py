"""The plan of a user who only names the bytes."""

from __future__ import annotations

from torch import nn

from dither.core import SpecError
from dither.model import collect
from dither.search import can_quantize, is_rotated
from dither.train.fine_grid import Fine
from dither.train.lsq import LSQ
from dither.train.plan import Plan, Spec, literal
from dither.train.rotated_lsq import RotatedLSQ

_FARTHEST = 10.0
"""Sum of the learning rates of a step's logarithm over a training: it goes a part of that way."""


def step_rate(steps: int | None) -> float:
    """Learning rate of logarithms of steps (Adam), by how many optimizer steps there are.

    In few steps they have to go as far as in many.

    >>> step_rate(250), step_rate(2500), step_rate(None)
    (0.01, 0.004, 0.001)
    """
    return 1e-3 if not steps else min(max(_FARTHEST / steps, 1e-3), 1e-2)


def default_plan(model: nn.Module, *, steps: int | None = None) -> Plan:
    """Every floating-point tensor on an entropy-coded grid.

    Matrices learn their steps, beginning where the search for the budget puts them, large token
    tables along their axes; vectors (biases, norms) end on fine grids.

    Args:
        model: its tensors are looked at.
        steps: optimizer steps that training will take; the fewer, the faster steps are learned.

    Raises:
        SpecError: the model has nothing to quantize.
    """
    rules: dict[str, Spec] = {}
    tensors = collect(model)
    for name, value in tensors.values.items():
        if value.ndim > 1 and can_quantize(value):
            kind = RotatedLSQ if is_rotated(name, value) else LSQ
            rules[literal(name)] = kind(bits=None, lr=step_rate(steps))
        elif value.ndim <= 1 and value.is_floating_point() and bool(value.isfinite().all()):
            rules[literal(name)] = Fine()
    # A plan treats all names of a tied tensor alike.
    for alias, name in tensors.aliases.items():
        if literal(name) in rules:
            rules[literal(alias)] = rules[literal(name)]
    if not rules:
        raise SpecError("the model has no finite floating-point tensor to quantize")
    return Plan(rules)
