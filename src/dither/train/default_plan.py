"""The plan of a user who only names the bytes."""

from __future__ import annotations

from torch import nn

from dither.core import SpecError
from dither.model import collect
from dither.search import can_quantize
from dither.train.fine_grid import Fine
from dither.train.lsq import LSQ
from dither.train.plan import Plan, Spec, literal


def default_plan(model: nn.Module) -> Plan:
    """Every floating-point tensor on an entropy-coded grid.

    Matrices learn their steps, beginning where the data-free search for the budget puts them;
    vectors (biases, norms) end on fine grids.

    Raises:
        SpecError: the model has nothing to quantize.
    """
    rules: dict[str, Spec] = {}
    tensors = collect(model)
    for name, value in tensors.values.items():
        if value.ndim > 1 and can_quantize(value):
            rules[literal(name)] = LSQ(bits=None)
        elif value.ndim <= 1 and value.is_floating_point() and bool(value.isfinite().all()):
            rules[literal(name)] = Fine()
    # A plan treats all names of a tied tensor alike.
    for alias, name in tensors.aliases.items():
        if literal(name) in rules:
            rules[literal(alias)] = rules[literal(name)]
    if not rules:
        raise SpecError("the model has no finite floating-point tensor to quantize")
    return Plan(rules)
