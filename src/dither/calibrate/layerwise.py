"""Encode layer by layer: each weight under inputs that the encoded layers before it give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dither.calibrate.data import Call, call, some_batches
from dither.calibrate.mean_shift import Receiver, centered, find_receivers, mean_outputs
from dither.calibrate.moments import MOST_INPUTS, Moments
from dither.calibrate.use_order import Keep, Order, find_order
from dither.core import Encoded, Encoder, SpecError
from dither.model import evaluating, weights_of

Choose = Callable[[str, Tensor], Encoder | None]
"""Name and weight to the encoder of this weight; None leaves it as it is."""


@dataclass(frozen=True)
class Sequenced:
    """What came out of a pass over the layers.

    Attributes:
        encoded: weights by name, in the order of use.
        moved: biases and running means that make up for what encoding did to mean outputs.
    """

    encoded: dict[str, Encoded] = field(default_factory=dict)
    moved: dict[str, Tensor] = field(default_factory=dict)


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
    that it can make up for their errors. That takes a forward pass up to the layer for all weights
    that read the same input, and two with ``corrected``. Only their moments are in memory at a
    time.

    Args:
        model: is left as it was, its weights included.
        loader: of batches, kept in memory.
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
    held = list(some_batches(loader, batches))
    sequence = Sequence(model, held, forward=forward, most_inputs=most_inputs)
    choose = encoders if callable(encoders) else lambda name, _: encoders.get(name)
    made = sequence.run(choose, corrected=corrected).encoded
    if not made:
        raise SpecError(f"no weight was encoded; those in use are {sequence.order.names[:5]}")
    return made


class Sequence:
    """The layers of a model in the order of use, to be encoded once or several times.

    Args:
        model: is left as it was after each run.
        held: batches.
        forward: runs the model on a batch.
        most_inputs: of one Gram matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        held: list[Any],
        *,
        forward: Call = call,
        most_inputs: int = MOST_INPUTS,
    ) -> None:
        self._model, self._held = model, held
        self._forward, self._most = forward, most_inputs
        first = next(some_batches(held, 1))
        self.order: Order = find_order(model, first, forward)
        self._receivers = find_receivers(model, first, forward)

    def run(
        self,
        choose: Choose,
        *,
        start: Mapping[str, Tensor] | None = None,
        corrected: bool = True,
        biases: bool = False,
        batches: int | None = None,
    ) -> Sequenced:
        """Encode the layers one after another.

        Args:
            choose: the encoder of each weight, asked for when its turn comes.
            start: values of other tensors, by name, that stand from the beginning.
            corrected: give ``Stats.cross``.
            biases: move the bias behind each weight, or the running mean of the batch norm, so
                that mean outputs stay, and give moments about the mean there, which are all that
                weights then need to care for. Implies ``corrected``.
            batches: how many to use, or all.
        """
        original = copy.deepcopy(self._model) if corrected or biases else None
        found = Sequenced()
        with _put_back(self._model) as places, torch.no_grad():
            for name, value in (start or {}).items():
                places[name].copy_(value)
            for group in self.order.groups:
                self._encode(group, choose, original, found, places, biases, batches)
        return found

    def _encode(
        self,
        group: tuple[str, ...],
        choose: Choose,
        original: nn.Module | None,
        found: Sequenced,
        places: Mapping[str, Tensor],
        biases: bool,  # noqa: FBT001
        batches: int | None,
    ) -> None:
        chosen = {name: choose(name, places[name].detach()) for name in group}
        wanted = {name: encoder for name, encoder in chosen.items() if encoder is not None}
        if not wanted:
            return
        models = [self._model] if original is None else [self._model, original]
        moments, watch = self._measure(models, group, batches)
        for name, encoder in wanted.items():
            seen = moments.get(name) or moments[group[0]]
            watch.moments[name] = seen
            stats, receiver = watch.stats(name), self._receivers.get(name) if biases else None
            weight, aim = places[name].detach().clone(), seen.wanted()
            if receiver is None or stats.mean is None or aim is None:
                encoded = encoder.encode(weight, stats)
            else:
                encoded = encoder.encode(weight, centered(stats, aim))
                before = mean_outputs(weight, aim)
                shift = mean_outputs(encoded.decode(), stats.mean) - before
                _move(receiver, shift, places, found)
            found.encoded[name] = encoded
            places[name].copy_(encoded.decode())

    def _measure(
        self, models: list[nn.Module], group: tuple[str, ...], batches: int | None
    ) -> tuple[dict[str, Moments], Keep]:
        """Moments of a group's inputs in the first model, and how they lie to the second's."""
        watches = [Keep(model, group, self.order.calls[group]) for model in models]
        moments: dict[str, Moments] = {}
        for batch in self._held[:batches]:
            for model, watch in zip(models, watches, strict=True):
                watch.run(self._forward, model, batch)
            for parts in zip(*(watch.kept for watch in watches), strict=True):
                name = parts[0][0]
                if name == group[0] or not self.order.shared[group]:
                    moments.setdefault(name, Moments(self._most)).add(*(v for _, v in parts))
        return moments, watches[0]


def _move(
    receiver: Receiver, shift: Tensor, places: Mapping[str, Tensor], found: Sequenced
) -> None:
    """Take a shift of mean outputs out of a bias, or into a running mean."""
    place = places[receiver.name]
    place.add_(receiver.sign * shift.to(place.dtype))
    found.moved[receiver.name] = place.detach().clone()


@contextmanager
def _put_back(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Parameters and buffers by name; on leaving, all hold what they held."""
    places = weights_of(model.state_dict(keep_vars=True))
    kept = {name: place.detach().clone() for name, place in places.items()}
    try:
        with evaluating(model):
            yield places
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                places[name].copy_(value)
