"""Encode layer by layer: each weight under inputs that the encoded layers before it give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dither.calibrate.collect import Watch
from dither.calibrate.moments import MOST_INPUTS, Moments, Vectors
from dither.calibrate.quiet import Call, call, some_batches
from dither.core import Encoded, Encoder, SpecError, Stats
from dither.model import evaluating

Choose = Callable[[str, Tensor], Encoder | None]
"""Name and weight to the encoder of this weight; None leaves it as it is."""


def in_sequence(
    model: nn.Module,
    loader: Iterable[Any],
    encoders: Mapping[str, Encoder] | Choose,
    *,
    batches: int | None = None,
    forward: Call = call,
    most_inputs: int = MOST_INPUTS,
    corrected: bool = True,
) -> dict[str, Encoded]:
    """Encode the weights of linear layers and convolutions in the order in which they are used.

    Statistics of each are collected while all weights before it stand at their encoded values, so
    that it can make up for their errors. That takes a forward pass (up to the layer) for each
    weight, and two with ``corrected``. Only the moments of one weight are in memory at a time.

    Args:
        model: is left as it was, its weights included.
        loader: of batches, read again for every weight: no iterator.
        encoders: by name, or a function of name and weight.
        batches: how many to read, or all.
        forward: runs the model on a batch.
        most_inputs: of one Gram matrix.
        corrected: also give ``Stats.cross``: the moments of the original model's inputs with those
            of the encoded one, from a copy of the model.

    Returns:
        By name, in the order of use.

    Raises:
        SpecError: the loader is empty, or no weight named is ever used.
    """
    held = list(loader) if batches is None else list(some_batches(loader, batches))
    order = _order(model, held, forward)
    original = copy.deepcopy(model) if corrected else None
    parameters = dict(model.named_parameters())
    kept: dict[str, Tensor] = {}
    made: dict[str, Encoded] = {}
    try:
        for name in order:
            given = encoders.get(name) if isinstance(encoders, Mapping) else None
            encoder = encoders(name, parameters[name].detach()) if callable(encoders) else given
            if encoder is None:
                continue
            models = [model] if original is None else [model, original]
            stats = _measure(models, held, name, forward, most_inputs)
            made[name] = encoder.encode(parameters[name].detach(), stats)
            kept[name] = parameters[name].detach().clone()
            with torch.no_grad():
                parameters[name].copy_(made[name].decode())
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)
    if not made:
        raise SpecError(f"no weight was encoded; those in use are {order[:5]}")
    return made


def _order(model: nn.Module, held: list[Any], forward: Call) -> list[str]:
    """Names of weights with input vectors, in the order of their first use."""
    watch = _Keep(model)
    with evaluating(model), watch.hooks(), torch.no_grad():
        for batch in some_batches(held, 1):
            forward(model, batch)
    return list(dict.fromkeys(name for name, _ in watch.kept))


def _measure(
    models: list[nn.Module], held: list[Any], name: str, forward: Call, most: int
) -> Stats:
    """Stats of one weight of the first model, with cross moments where there is a second."""
    watches = [_Keep(model, name) for model in models]
    moments = Moments(most)
    for batch in held:
        for model, watch in zip(models, watches, strict=True):
            watch.kept.clear()
            with evaluating(model), watch.hooks(), torch.no_grad():
                forward(model, batch)
        for parts in zip(*(watch.kept for watch in watches), strict=True):
            moments.add(*(vectors for _, vectors in parts))
    watches[0].moments[name] = moments
    return watches[0].stats(name)


class _Keep(Watch):
    """Keeps the input vectors themselves, of one batch."""

    def __init__(self, model: nn.Module, only: str | None = None) -> None:
        super().__init__(model, only=None if only is None else [only])
        self.kept: list[tuple[str, Vectors]] = []

    def note(self, name: str, vectors: Vectors) -> None:
        """Keep them."""
        self.kept.append((name, vectors))
