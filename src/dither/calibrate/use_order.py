"""The order in which the weights of a model are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dither.calibrate.collect import Watch
from dither.calibrate.moments import Vectors
from dither.data import Forward
from dither.model import evaluating, memory_of


@dataclass(frozen=True)
class Order:
    """Weights with input vectors, in the order of their first use.

    Attributes:
        groups: names of weights; those of a group lie together and are encoded together.
        shared: whether all weights of a group read one and the same input.
        calls: how often modules of a group are called in one forward pass.
        together: groups of which all is known once the first of its modules is called: that is one
            module, or all read one input, and none is called again.
        outputs: the axis of each weight that counts outputs.
    """

    groups: tuple[tuple[str, ...], ...]
    shared: Mapping[tuple[str, ...], bool]
    calls: Mapping[tuple[str, ...], int]
    together: frozenset[tuple[str, ...]]
    outputs: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [name for group in self.groups for name in group]


def find_order(model: nn.Module, batch: object, forward: Forward) -> Order:
    """Run a batch and look."""
    watch = _Look(model)
    watch.run(forward, model, batch)
    made, modules = tuple(tuple(group) for group in watch.groups), watch.modules
    held = {group: {modules[name] for name in group} for group in made}
    shared = {group: len(held[group]) == len(group) for group in made}
    calls = {group: sum(watch.calls[module] for module in held[group]) for group in made}
    together = frozenset(
        group
        for group in made
        if calls[group] == len(held[group])
        and (shared[group] or len(held[group]) == 1)
        and not watch.stacks.intersection(group)  # seen when their module has run
        and not watch.counts.keys() & set(group)  # a table is tied to it, and read before
    )
    return Order(made, shared, calls, together, watch.outputs)


def _same(one: Vectors | None, other: Vectors) -> bool:
    """Whether both are one input; the first is still in memory, so that no other has its place."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return memory_of(one) == memory_of(other)


class _Enough(BaseException):
    """Everything that was to be seen was seen."""


class Keep(Watch):
    """Keeps the input vectors themselves, of one batch.

    Args:
        model: the model.
        only: names of the weights to watch, or all.
        most_calls: of their modules; then the forward pass ends. None lets it run.
    """

    def __init__(
        self, model: nn.Module, only: Iterable[str] | None = None, most_calls: int | None = None
    ) -> None:
        super().__init__(model, only=only)
        self.seen: list[tuple[str, Vectors, int]] = []
        self.calls: Counter[int] = Counter()
        self._most_calls = most_calls
        self._module = 0

    @property
    def kept(self) -> list[tuple[str, Vectors]]:
        """Names and vectors, in the order of use."""
        return [(name, vectors) for name, vectors, _ in self.seen]

    def run(self, forward: Forward, model: nn.Module, batch: object) -> None:
        """See one batch, and forget those before."""
        self.seen.clear()
        self.calls.clear()
        with evaluating(model), self.hooks(), torch.no_grad():
            try:
                forward(model, batch)
            except _Enough:
                return

    def note(self, name: str, vectors: Vectors) -> None:
        """Keep them."""
        self.seen.append((name, vectors, self._module))

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module, before = id(module), len(self.seen)
        super()._see(module, args, kwargs)
        self._called(module, before)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._module, before = id(module), len(self.seen)
        super()._leave(module, args, output)
        self._called(module, before)

    def _called(self, module: nn.Module, before: int) -> None:
        if len(self.seen) == before:
            return  # of a module that holds others
        self.calls[id(module)] += 1
        if self._most_calls is not None and self.calls.total() >= self._most_calls:
            raise _Enough


class _Look(Keep):
    """Groups weights as they are used, and keeps no vectors but the last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.groups: list[list[str]] = []
        self.modules: dict[str, int] = {}
        self._last: Vectors | None = None

    def note(self, name: str, vectors: Vectors) -> None:
        """Put a weight that was not seen before in the last group, or begin another."""
        self.seen.append((name, [], self._module))  # that there were some
        if name in self.modules:
            return
        self.modules[name] = self._module
        last = self.groups[-1] if self.groups else []
        if last and (_same(self._last, vectors) or self.modules[last[-1]] == self._module):
            last.append(name)
        else:
            self.groups.append([name])
        self._last = vectors
