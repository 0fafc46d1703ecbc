"""Cyclical pruning (Srinivas et al. 2022, arXiv 2202.01290), around any way to quantize."""

from __future__ import annotations

from torch import nn

from dither.core import Encoder
from dither.formats import Raw
from dither.recipes.model_layers import Layer, layers, plan_of
from dither.recipes.recipe import Recipe
from dither.train.method import Method
from dither.train.pruned import Pruned, Together
from dither.train.sparsity import Cyclical


def recipe(
    model: nn.Module,
    sparsity: float = 0.9,
    cycles: int = 3,
    *,
    steps: int,
    inner: Encoder | Method | None = None,
    together: bool = True,
    keep_ends: bool = True,
) -> Recipe:
    """Sparsity climbs in each cycle, and what was pruned comes back at the begin of the next.

    Multiply the learning rate by ``Cyclical(sparsity, cycles).rate(run.progress)``: it restarts
    with each cycle, as in the paper.

    Args:
        model: any module.
        sparsity: share of zeros at the end of each cycle, of the pruned layers.
        cycles: three or four in the paper.
        steps: optimizer steps in all.
        inner: how the others are stored: as they are, or ``LSQ(None)`` with a budget of bits.
        together: whether magnitudes of all layers are ranked together.
        keep_ends: whether the first and the last layer are left whole.
    """
    schedule = Cyclical(sparsity, cycles)
    all_layers = layers(model)
    ends = {all_layers[0].name, all_layers[-1].name} if keep_ends and len(all_layers) > 2 else set()
    method = inner or Raw()

    def choose(layer: Layer) -> Encoder | Method:
        return method if layer.name in ends else Pruned(method, schedule)

    return Recipe(plan_of(model, choose), (), (Together(schedule),) if together else (), steps)
