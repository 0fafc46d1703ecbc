"""Layer by layer: each weight under inputs that the encoded layers before it give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dither.calibrate.lockstep import MOST_KEPT, Lockstep, Room
from dither.calibrate.mean_shift import Receiver, centered, find_receivers, mean_outputs
from dither.calibrate.moments import MOST_INPUTS, Moments, Vectors
from dither.calibrate.together import Inputs, moments_together
from dither.calibrate.use_order import Keep, Order, find_order
from dither.core import Encoded, Encoder, SpecError, Stats, on_cpu
from dither.data import Data
from dither.disk import Disk, copied, home_of, touched
from dither.model import duplicate, evaluating, weights_of
from dither.team import ALONE, Team, nbytes_of


def in_sequence(
    model: nn.Module,
    data: Data | Iterable[Any],
    encoders: Mapping[str, Encoder] | Callable[[str, Tensor], Encoder | None],
    *,
    most_inputs: int = MOST_INPUTS,
    corrected: bool = True,
) -> dict[str, Encoded]:
    """Encode the weights of linear layers and convolutions in the order in which they are used.

    Statistics of each are collected while all weights before it stand at their encoded values, so
    that it can make up for their errors. Passes of all batches wait at the layer whose turn it is,
    see :class:`Layerwise`, so that each batch runs once for all layers, and twice with
    ``corrected``. Only moments of weights that read the same input are in memory at a time.

    Args:
        model: is left as it was, its weights included.
        data: a loader of batches, or :class:`~dither.Data`; kept in memory.
        encoders: by name, or a function of name and weight that gives one, or None to leave the
            weight as it is.
        most_inputs: of one Gram matrix.
        corrected: also give ``Stats.cross``: the moments of the original model's inputs with those
            of the encoded one, from a copy of the model.

    Returns:
        By name, in the order of use.

    Raises:
        SpecError: the loader is empty, or no weight named is ever used.
    """
    layers = Layerwise(model, data, most_inputs=most_inputs)
    weights = dict(model.named_parameters(remove_duplicate=False))
    choose = encoders if callable(encoders) else lambda name, _: encoders.get(name)
    found = {name: choose(name, weights[name].detach()) for name in layers.order.names}
    chosen = {name: encoder for name, encoder in found.items() if encoder is not None}
    if not chosen:
        raise SpecError(f"no weight was encoded; those in use are {layers.order.names[:5]}")
    made: dict[str, Encoded] = {}
    with layers.walk(chosen, corrected=corrected) as walk:
        for layer in walk:
            made[layer.name] = chosen[layer.name].encode(layer.weight, layer.stats)
            layer.commit(made[layer.name])
    return made


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight whose turn it is, to be encoded and committed.

    Attributes:
        name: of the weight.
        weight: a copy of it, on the CPU, as are its moments.
        stats: of its inputs, as the layers committed before make them; about their means where a
            bias or a running mean makes up for the change of mean outputs.
    """

    name: str
    weight: Tensor
    stats: Stats
    _walk: Walk
    _shifts: tuple[Receiver, Tensor, Tensor] | None

    def commit(self, encoded: Encoded) -> None:
        """Put the encoded weight in its place, for all layers behind it."""
        value = encoded.decode()
        if self._shifts is not None:
            receiver, mean, before = self._shifts
            self._walk.move(receiver, mean_outputs(value, mean) - before)
        _write(self._walk.places[self.name], value)


class Layerwise:
    """The layers of a model in the order of use, to be walked through once or several times.

    A walk runs each batch once through the model and once through its original: passes wait at the
    layer whose turn it is, with what they hold in memory up to ``most_kept``, and then on the disk.
    They begin anew for each layer where that is not possible: for batches beyond ``most_kept``,
    without a disk; for layers that are called several times or hold stacks of matrices; and for all
    layers of a model that draws random numbers, or keeps something of a batch in itself from one
    layer to the next. The statistics are the same.

    Args:
        model: is left as it was after each walk.
        data: a loader of batches, or :class:`~dither.Data`; kept in memory.
        most_inputs: of one Gram matrix.
        most_kept: bytes that waiting passes may hold in memory, about; without a disk, 0 lets none
            wait. Of a model on a disk, they hold no more than that has room for.
        team: processes that each run some of the batches, and commit the same weights.
        disk: where the rest of what they hold goes; by default that of the model, if it is on one.

    Attributes:
        order: of the weights.
        waiting: whether passes wait.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data | Iterable[Any],
        *,
        most_inputs: int = MOST_INPUTS,
        most_kept: int = MOST_KEPT,
        team: Team = ALONE,
        disk: Disk | None = None,
    ) -> None:
        self.model, self.data = model, Data.of(data).held()
        self.most_inputs, self.team, home = most_inputs, team, home_of(model)
        self.room = Room(most_kept, disk) if home is None else Room(min(most_kept, home.room), home)
        first = next(iter(self.data))
        self.order: Order = find_order(model, first, self.data.forward)
        self.receivers = find_receivers(model, first, self.data.forward)
        together = {name for group in self.order.together for name in group}
        self.room, self.waiting = self.room.fitting(model, self.data, together)

    @contextmanager
    def walk(
        self,
        names: Collection[str],
        *,
        start: Iterable[tuple[str, Tensor]] = (),
        corrected: bool = True,
        biases: bool = False,
        batches: int | None = None,
    ) -> Iterator[Walk]:
        """Go through some weights in the order of use; each is to be committed when it is given.

        The model's weights are put back at the end, whatever happens.

        Args:
            names: of the weights; others stay as they are.
            start: names and values of other tensors that stand from the beginning.
            corrected: give ``Stats.cross``.
            biases: move the bias behind each weight, or the running mean of the batch norm, so
                that mean outputs stay, and give moments about the mean there, which are all that
                weights then need to care for. Implies ``corrected``.
            batches: how many to use, or all.
        """
        original = duplicate(self.model) if corrected or biases else None
        with _put_back(self.model, original) as places, torch.no_grad():
            for name, value in start:
                _write(places[name], value)
            data = self.data.first(batches)
            walk = Walk(self, data, original, places, frozenset(names), biases=biases)
            with walk.stops():
                yield walk


class Walk:
    """One walk through the layers; made by :meth:`Layerwise.walk`.

    Attributes:
        places: parameters and buffers as they stand now.
        moved: biases and running means that make up for what encoding did to mean outputs.
    """

    def __init__(
        self,
        layers: Layerwise,
        data: Data,
        original: nn.Module | None,
        places: Mapping[str, Tensor],
        names: frozenset[str],
        *,
        biases: bool,
    ) -> None:
        self.places = places
        self.moved: dict[str, Tensor] = {}
        self._layers, self._data, self._names = layers, data, names
        self._models = [layers.model, *([] if original is None else [original])]
        self._receivers = layers.receivers if biases else {}
        self._steps: list[Lockstep] = []
        holders = Counter(
            id(p)
            for m in layers.model.modules()
            for p in m._parameters.values()  # noqa: SLF001
        )
        self._tied = {name for name, place in places.items() if holders[id(place)] > 1}

    @contextmanager
    def stops(self) -> Iterator[None]:
        """Let passes wait, while it lasts."""
        layers, groups = self._layers, [g for g in self._layers.order.together if self._wanted(g)]
        names, room = {name for group in groups for name in group}, layers.room
        with ExitStack() as stack:
            for model in self._models if layers.waiting else ():
                steps = Lockstep(model, self._data, names, room.share(len(self._models)))
                self._steps.append(stack.enter_context(steps))
            yield

    def __iter__(self) -> Iterator[Layer]:
        for group in self._layers.order.groups:
            if wanted := self._wanted(group):
                moments, watch = self._measure(group)
                for steps in self._steps:
                    steps.close(group)
                for name in wanted:
                    # None where the encoded model does not come to use it
                    seen = moments.get(name) or moments.get(group[0])
                    if seen is not None:
                        watch.moments[name] = seen
                    yield self._layer(name, watch)
                if self._steps and not self._tied.isdisjoint(wanted):
                    self._steps[0].restart()  # another module may have read it already

    def _wanted(self, group: tuple[str, ...]) -> list[str]:
        return [name for name in group if name in self._names]

    def move(self, receiver: Receiver, shift: Tensor) -> None:
        """Take a shift of mean outputs out of a bias, or into a running mean."""
        place = self.places[receiver.name]
        place.add_(receiver.sign * shift.to(place))
        self.moved[receiver.name] = place.detach().clone()

    def _layer(self, name: str, watch: Keep) -> Layer:
        weight, _ = on_cpu(self.places[name].detach().clone())
        if name not in watch.moments:
            return Layer(name, weight, Stats(), self, None)
        stats = watch.stats(name).to("cpu")
        receiver, aim = self._receivers.get(name), watch.moments[name].wanted()
        if aim is None and len(self._models) > 1:  # it made other calls: the weight is its own aim
            stats, aim = replace(stats, cross=stats.gram), stats.mean
        if receiver is None or stats.mean is None or aim is None:
            return Layer(name, weight, stats, self, None)
        aim = aim.cpu()
        shifts = (receiver, stats.mean, mean_outputs(weight, aim))
        return Layer(name, weight, centered(stats, aim), self, shifts)

    def _measure(self, group: tuple[str, ...]) -> tuple[dict[str, Moments], Keep]:
        """Moments of a group's inputs in the first model, and how they lie to the second's."""
        order, team, most = self._layers.order, self._layers.team, self._layers.most_inputs
        watches = [Keep(model, group, order.calls[group]) for model in self._models]
        watches[0].outputs |= order.outputs
        names = group[:1] if order.shared[group] else group
        batches = {str(number): batch for number, batch in enumerate(self._data)}
        own = team.mine({number: nbytes_of(batch) for number, batch in batches.items()})
        each = ((int(n), self._seen(names, group, int(n), batches[n], watches)) for n in own)
        if team.size > 1:
            return moments_together(dict(each), names, most, team), watches[0]
        moments: dict[str, Moments] = {}
        for _, inputs in each:
            for name, vectors, wanted in inputs:
                moments.setdefault(name, Moments(most)).add(vectors, wanted)
        return moments, watches[0]

    def _seen(
        self,
        names: Collection[str],
        group: tuple[str, ...],
        number: int,
        batch: object,
        watches: list[Keep],
    ) -> Inputs:
        """What a batch brings to some weights of a group."""
        return [
            # Experts are given other tokens, even where they are given as many.
            (name, vectors, None if name in watches[0].stacks else wanted)
            for name, vectors, wanted in _paired(*self._inputs(group, number, batch, watches))
            if name in names
        ]

    def _inputs(
        self, group: tuple[str, ...], number: int, batch: object, watches: list[Keep]
    ) -> list[list[tuple[str, Vectors]]]:
        """Of one batch, for each model."""
        if group in self._layers.order.together:
            found = [steps.vectors(number, group) for steps in self._steps]
            kept = [vectors for vectors in found if vectors is not None]
            if kept and len(kept) == len(found):
                return kept
        for model, watch in zip(self._models, watches, strict=True):
            watch.mask = self._data.shown(batch)
            watch.run(self._data.forward, model, batch)
        return [watch.kept for watch in watches]


def _paired(
    kept: list[tuple[str, Vectors]], *originals: list[tuple[str, Vectors]]
) -> Iterator[tuple[str, Vectors, Vectors | None]]:
    """Names, vectors, and what these should be; None where the original made other calls.

    The number of steps, or the tokens that an expert gets, may depend on values.
    """
    original = originals[0] if originals else []
    is_same = len(original) == len(kept) and all(
        one[0] == other[0] and _sizes(one[1]) == _sizes(other[1])
        for one, other in zip(kept, original, strict=True)
    )
    for number, (name, vectors) in enumerate(kept):
        yield name, vectors, original[number][1] if is_same else None


def _sizes(vectors: Vectors) -> list[int]:
    return [len(some) for some in vectors]


def _write(place: Tensor, value: Tensor) -> None:
    touched(place)
    place.copy_(value)


@contextmanager
def _put_back(model: nn.Module, original: nn.Module | None) -> Iterator[dict[str, Tensor]]:
    """Parameters and buffers by name; on leaving, all hold what they held, and a copy holds."""
    places = weights_of(model.state_dict(keep_vars=True))
    kept = {} if original is None else weights_of(original.state_dict())
    for name, place in places.items():
        if name not in kept or kept[name].shape != place.shape:
            kept[name] = copied(place)
    try:
        with evaluating(model):
            yield places
    finally:
        with torch.no_grad():
            for name, place in places.items():
                _write(place, kept[name])
