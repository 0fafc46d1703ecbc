"""What the inputs of layers say about errors of their weights, while a network is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dither.calibrate.collect import Watch
from dither.calibrate.moments import Vectors
from dither.data import Data
from dither.model import evaluating
from dither.train.shadow import in_place
from dither.train.surrogate import Surrogate


class _BlockMoments(Watch):
    """Second moments of inputs, summed over the blocks of a weight, ``(block, block)`` float64."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, int]) -> None:
        super().__init__(model, only=blocks)
        self.blocks = blocks
        self.found: dict[str, Tensor] = {}

    def note(self, name: str, vectors: Vectors) -> None:
        block = self.blocks[name]
        for some in [vectors] if isinstance(vectors, Tensor) else vectors:
            if some.shape[-1] % block == 0:
                rows = some.reshape(-1, block)
                moment = (rows.T @ rows).double()
                self.found[name] = self.found[name] + moment if name in self.found else moment


def input_metrics(
    model: nn.Module,
    surrogates: Mapping[str, Surrogate],
    blocks: Mapping[str, int],
    data: Data | Iterable[Any],
) -> dict[str, Tensor]:
    """Second moments of inputs, summed over blocks: ``(block, block)`` for each weight.

    The network runs as it is quantized so far, without noise and as in evaluation. Weights are
    left out whose inputs :class:`~dither.calibrate.collect.Watch` does not know, whose inputs the
    block does not divide, or whose blocks lie along their outputs.

    Args:
        model: attached.
        surrogates: all of the model's.
        blocks: length of the blocks, by name of the weight.
        data: the batches.
    """
    watch, samples = _BlockMoments(model, blocks), Data.of(data)
    # Their inner inputs are computed before `forward`, from the weights that they have then.
    inner = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)]
    with torch.no_grad(), _quiet(model, surrogates), in_place(inner), watch.hooks():
        for batch in samples:
            watch.mask = samples.shown(batch)
            samples.forward(model, batch)
    return {name: m for name, m in watch.found.items() if not _across(watch, model, name)}


def _across(watch: _BlockMoments, model: nn.Module, name: str) -> bool:
    """Whether the blocks of a weight lie along its outputs: not where they are within a kernel."""
    kernel = math.prod(model.get_parameter(name).shape[2:])
    return watch.outputs[name] == 1 and kernel % watch.blocks[name] != 0


@contextmanager
def _quiet(model: nn.Module, surrogates: Mapping[str, Surrogate]) -> Iterator[None]:
    """The model as in evaluation, but with weights that are not placed as they are trained."""
    active = {surrogate: surrogate.active for surrogate in surrogates.values()}
    with evaluating(model):
        for surrogate in active:
            surrogate.training = True
            surrogate.active = getattr(surrogate, "is_placed", False)
        try:
            yield
        finally:
            for surrogate, was in active.items():
                surrogate.active = was
