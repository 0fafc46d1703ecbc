"""Whole layers: dropped at random while training, shared, or left out of what is shipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dither.core import SpecError
from dither.formats.settings import check_count
from dither.train.attached import Attached
from dither.train.noise import Noise
from dither.train.ramp import Ramp, value_at
from dither.train.shadow import base_of, is_shadowed, rebase

_STATE = "dither_dropped"


class DroppingList(nn.ModuleList):
    """A ModuleList that passes over its dropped layers while training."""

    def __iter__(self) -> Iterator[nn.Module]:
        return _kept(self)

    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            return self._modules[self._get_abs_string_index(index)]  # type: ignore[no-untyped-call]
        some = list(self._modules.values())[index]
        names = set(list(self._modules)[index])
        dropped = _dropped(self) & names
        numbers = {name: str(n) for n, name in enumerate(list(self._modules)[index])}
        made = DroppingList(some).train(self.training)
        made.__dict__[_STATE] = frozenset(numbers[name] for name in dropped)
        return made


class DroppingSequential(nn.Sequential):
    """A Sequential that passes over its dropped layers while training."""

    def __iter__(self) -> Iterator[nn.Module]:
        return _kept(self)


def _dropped(layers: nn.Module) -> frozenset[str]:
    found: frozenset[str] = layers.__dict__.get(_STATE, frozenset())
    return found


def _kept(layers: nn.Module) -> Iterator[nn.Module]:
    dropped = _dropped(layers) if layers.training else frozenset()
    return iter([layer for name, layer in layers._modules.items() if layer and name not in dropped])


class LayerDrop:
    """Drop whole layers at random while training (Fan, Grave, Joulin 2020, arXiv 1909.11556).

    A schedule: each chunk of layers is dropped with probability ``rate``, anew after each step, as
    a function of seed and step. A model that iterates over its layers, as models do, then passes
    over the dropped ones; in evaluation all layers are there. Parameters and names stay as they
    are. Under DDP, give it ``find_unused_parameters=True``.

    Args:
        layers: a ModuleList or Sequential of layers whose outputs are like their inputs.
        rate: the probability, 0 to 1, or a ramp. Published: 0.1 to 0.2; where the shipped
            model leaves out every other layer, 0.5 suits better.
        chunk: layers that are dropped together, as for :func:`share_layers`.
        seed: of the draws.

    Raises:
        SpecError: settings out of range, or no list of layers.

    >>> layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    >>> drop = LayerDrop(layers, 0.5)
    >>> len(list(layers)) < 6 and len(list(layers.eval())) == 6
    True
    """

    def __init__(
        self, layers: nn.Module, rate: float | Ramp, *, chunk: int = 1, seed: int = 0
    ) -> None:
        kinds: dict[type, type] = {nn.ModuleList: DroppingList, nn.Sequential: DroppingSequential}
        kind = kinds.get(base_of(layers), base_of(layers))
        if kind not in kinds.values():
            raise SpecError(
                "LayerDrop takes a ModuleList or a Sequential of layers, not a "
                f"{type(layers).__name__}"
            )
        ends = (rate.start, rate.end) if isinstance(rate, Ramp) else (rate,)
        if not all(0 <= end <= 1 for end in ends):
            raise SpecError(f"LayerDrop drops with a probability of 0 to 1, not {rate}")
        check_count("LayerDrop", "chunk", chunk, 1, 1 << 20)
        rebase(layers, kind)
        self.layers = layers
        self.rate = rate
        self.chunk = chunk
        self.seed = seed
        self._draw(0, 0.0)

    def __call__(self, run: Attached, step: int) -> None:
        """Draw for the next step."""
        self._draw(step, run.progress)

    @property
    def dropped(self) -> list[int]:
        """Indices of the layers that are dropped at this step."""
        return sorted(int(name) for name in _dropped(self.layers))

    def detach(self) -> None:
        """Give the layers their plain class back."""
        is_list = isinstance(self.layers, nn.ModuleList)
        rebase(self.layers, nn.ModuleList if is_list else nn.Sequential)
        self.layers.__dict__.pop(_STATE, None)

    def _draw(self, step: int, progress: float) -> None:
        names = list(self.layers._modules)
        generator = Noise(self.seed).generator(step, "LayerDrop", torch.device("cpu"))
        draws = torch.rand(-(-len(names) // self.chunk), generator=generator)
        falls = (draws < value_at(self.rate, progress)).tolist()
        dropped = frozenset(name for n, name in enumerate(names) if falls[n // self.chunk])
        self.layers.__dict__[_STATE] = dropped


def share_layers(layers: nn.ModuleList | nn.Sequential, chunk: int = 2) -> None:
    """Let each ``chunk`` adjacent layers have the parameters of the first of them (Fan 2021).

    Files hold shared parameters once. Share before making the optimizer and before attaching.

    Raises:
        SpecError: layers of a chunk that differ, or the model is attached.

    >>> layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    >>> share_layers(layers)
    >>> layers[0].weight is layers[1].weight, layers[1].weight is layers[2].weight
    (True, False)
    """
    check_count("share_layers", "chunk", chunk, 1, 1 << 20)
    every = list(layers._modules.values())
    if any(is_shadowed(module) for module in layers.modules()):
        raise SpecError("share layers before attaching: surrogates stand in for weights")
    for start in range(0, len(every), chunk):
        first, *others = every[start : start + chunk]
        for other in others:
            _share(first, other, start)


def _share(first: nn.Module | None, other: nn.Module | None, start: int) -> None:
    if first is None or other is None:
        raise SpecError(f"there is no layer at {start} or after it")
    shapes = [
        {name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in (first, other)
    ]
    if shapes[0] != shapes[1]:
        differ = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise SpecError(
            f"layer {start} cannot share with a layer that differs in {differ[0][0]!r}; choose "
            "layers that are alike"
        )
    for name, parameter in first.named_parameters(remove_duplicate=False):
        path, _, local = name.rpartition(".")
        other.get_submodule(path)._parameters[local] = parameter


def drop_layers(
    layers: nn.ModuleList | nn.Sequential, every: int = 2, *, chunk: int = 1
) -> list[int]:
    """Leave out the last of each ``every`` chunks of layers, for a smaller model to ship.

    What remains is numbered anew. Drop after ``run.detach()``, or before attaching; a model whose
    configuration counts its layers needs the new count.

    Returns:
        Former indices of the layers that remain.

    Raises:
        SpecError: the model is attached.

    >>> layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    >>> drop_layers(layers), len(layers)
    ([0, 2, 4], 3)
    """
    check_count("drop_layers", "every", every, 2, 1 << 20)
    check_count("drop_layers", "chunk", chunk, 1, 1 << 20)
    if any(is_shadowed(module) for module in layers.modules()):
        raise SpecError("drop layers before attaching, or after run.detach()")
    old = list(layers._modules.values())
    kept = [n for n in range(len(old)) if n // chunk % every != every - 1]
    layers._modules.clear()
    for number, index in enumerate(kept):
        layers.add_module(str(number), old[index])
    layers.__dict__.pop(_STATE, None)
    return kept
