"""Forward passes that stop at the layer whose turn it is, so that each runs once for all layers."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Collection, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dither.calibrate.collect import Watch
from dither.calibrate.moments import Vectors
from dither.calibrate.spill import Tracked
from dither.core import SpecError
from dither.data import Data, floats_of
from dither.disk import Disk
from dither.model import evaluating

MOST_KEPT = 4 << 30
"""Bytes that the passes which wait may hold in memory, about."""

_HELD = 3
"""What a pass holds for each byte of the layer's input: that, a residual, what the layer makes."""

_MOST_THREADS = 2048
"""Of all passes, each with as many as torch computes with."""

_ENDING = 5.0


@dataclass(frozen=True)
class Room:
    """What passes may hold while they wait.

    Attributes:
        most: bytes in memory, about.
        disk: where the rest goes; without one, the passes of further batches run from the
            beginning for each layer.
        is_enough: whether nothing has to go to the disk, so that no pass is watched for that.
    """

    most: int
    disk: Disk | None = None
    is_enough: bool = False

    def fitting(self, model: nn.Module, data: Data, names: Collection[str]) -> tuple[Room, bool]:
        """What suits a model that is to stop at some weights, and whether passes can wait there.

        Where what they hold has to go to the disk, and they do not give the same then, the room has
        no disk.
        """
        if not self.most and self.disk is None:
            return self, False
        one = held_by_one(model, data, names, Room(MOST_KEPT))
        if one is None:
            return self, False
        fitting = replace(self, is_enough=2 * one * len(list(data)) <= self.most)
        if fitting.tracked() is not None and held_by_one(model, data, names, fitting) is None:
            fitting = Room(self.most)
        return fitting, fitting.most > 0 or fitting.disk is not None

    def share(self, count: int) -> Room:
        """The same for one of several models."""
        return replace(self, most=self.most // count)

    def tracked(self) -> Tracked | None:
        """What watches a pass that may have to leave memory."""
        return None if self.disk is None or self.is_enough else Tracked(self.disk)


class _End(BaseException):
    """Nothing more is wanted of a pass; no ordinary Exception, which a model might catch."""


class Pass:
    """One forward pass in a thread of its own, which runs only while :meth:`go_on` waits for it.

    Attributes:
        seen: names and input vectors of the layer at which it stands.
        nbytes: that it holds in memory, about.
        is_over: whether it came to its end.
        output: of the model, then.
    """

    def __init__(
        self,
        watch: Stops,
        data: Data,
        model: nn.Module,
        batch: object,
        tracked: Tracked | None = None,
    ) -> None:
        self._tracked = tracked
        self.seen: list[tuple[str, Vectors]] = []
        self.is_over = False
        self.nbytes = 0
        self.output: object = None
        self._error: BaseException | None = None
        self._call = (watch, data, model, batch)
        self._going, self._standing = threading.Semaphore(0), threading.Semaphore(0)
        self._is_ending = False
        self._thread: threading.Thread | None = None

    def go_on(self) -> None:
        """Run to the next layer that is open, or to the end."""
        self.seen = []
        if self._thread is None:
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)
            self._thread.start()
        elif not self.is_over:
            self._going.release()
        else:
            return
        self._standing.acquire()
        if self._error is not None:
            raise self._error

    def stand(self) -> None:
        """Wait until it is to go on: called within the pass."""
        self._standing.release()
        self._going.acquire()
        if self._is_ending:
            raise _End

    def count(self) -> int:
        """Know anew what it holds where it stands, if it is watched; the most that it ever held."""
        if self._tracked is None:
            return self.nbytes
        self._tracked.count()
        self.nbytes = self._tracked.nbytes
        return self._tracked.most

    def leave_memory(self) -> None:
        """Put all that it holds on its disk."""
        if self._tracked is not None:
            self._tracked.leave_memory()
            self.nbytes = 0

    def end(self) -> None:
        """Give up what is left of it."""
        if self._thread is not None and not self.is_over:
            self._is_ending = True
            self._going.release()
            self._thread.join(_ENDING)

    def _run(self) -> None:
        watch, data, model, batch = self._call
        watch.mask, watch.passes.here = data.shown(batch), self
        try:
            with torch.no_grad(), self._tracked or nullcontext():
                self.output = data.forward(model, batch)
        except _End:
            pass
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
        finally:
            self.is_over = True
            self._standing.release()


class _Passes(threading.local):
    """Which pass runs in this thread; none does in others."""

    here: Pass | None = None


class Stops(Watch):
    """Stops a pass where a module is called whose weights are open.

    Args:
        model: the model.
        names: of the weights at which to stop, until they are closed.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__(model, only=names)
        self.passes = _Passes()

    def close(self, names: Collection[str]) -> None:
        """Stop there no longer."""
        assert self._only is not None  # noqa: S101 - as constructed
        self._only -= set(names)

    def is_open(self, name: str) -> bool:
        """Whether to stop there."""
        return self._only is not None and name in self._only

    def note(self, name: str, vectors: Vectors) -> None:
        """Keep them, in the pass that comes by."""
        if self.passes.here is not None:
            self.passes.here.seen.append((name, vectors))

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (run := self.passes.here) is not None:
            super()._see(module, args, kwargs)
            if run.seen:
                run.nbytes = _HELD * sum(map(_nbytes, tree_leaves((args, kwargs))))
                run.stand()

    def _enter(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        """Stacks are seen after their owner ran, when it is too late to stop."""

    def _leave(self, module: nn.Module, _: tuple[Any, ...], __: object) -> None:
        """Likewise."""


class Lockstep:
    """All batches' passes through a model, which wait for each other at the open layers.

    A layer's inputs under what was encoded before it are those that a new pass from the beginning
    would bring, as long as nothing that ran already has changed since: weights are closed in the
    order of their use.

    Args:
        model: as it is changed while the passes wait.
        data: in memory.
        names: of the weights at which to stop.
        room: for what passes hold; without a disk, batches beyond it have none.

    Attributes:
        most_held: bytes that one pass held at most, about.
    """

    def __init__(self, model: nn.Module, data: Data, names: Collection[str], room: Room) -> None:
        self._model, self._data, self._room, self.most_held = model, data, room, 0
        self._stack = ExitStack()
        self.watch = Stops(model, names)
        self._passes: list[Pass | None] = []

    def __enter__(self) -> Self:
        self._stack.enter_context(evaluating(self._model))
        self._stack.enter_context(self.watch.hooks())
        self._stack.callback(self.restart)
        self.restart()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def restart(self) -> None:
        """Begin anew: what passes already used has changed."""
        for one in self._passes:
            if one is not None:
                one.end()
        threads, most = torch.get_num_threads(), _MOST_THREADS
        self._passes = [
            Pass(self.watch, self._data, self._model, batch, self._room.tracked())
            if number * threads < most
            else None
            for number, batch in enumerate(self._data)
        ]

    def close(self, names: Collection[str]) -> None:
        """Weights that are encoded now, or need no stop."""
        self.watch.close(names)

    def vectors(self, number: int, group: tuple[str, ...]) -> list[tuple[str, Vectors]] | None:
        """What one batch brings to a group of weights that are called once, together.

        Returns:
            Names and vectors, none where the pass has ended; None where only a pass from the
            beginning can say.
        """
        one = self._passes[number]
        if one is None:
            return None
        if not one.seen or not self.watch.is_open(one.seen[0][0]):
            one.go_on()
        if one.is_over:
            return []
        if one.seen[0][0] != group[0]:
            return None
        seen, one.seen = one.seen, []
        self._bound(number, one)
        return seen

    def finish(self) -> list[object]:
        """Let all passes come to their ends, in turns, and return their outputs."""
        passes = [one for one in self._passes if one is not None]
        while not all(one.is_over for one in passes):
            for one in passes:
                one.go_on()
                self._weigh(one)
        return [one.output for one in passes]

    def _weigh(self, one: Pass) -> bool:
        """Where passes hold too much, out of memory with this one; whether it can go at all."""
        self.most_held = max(self.most_held, one.count())
        if sum(each.nbytes for each in self._passes if each is not None) > self._room.most:
            one.leave_memory()
        return self._room.disk is not None and not self._room.is_enough

    def _bound(self, number: int, one: Pass) -> None:
        """Where passes hold too much and cannot leave memory, end the last ones."""
        if self._weigh(one):
            return
        fit = max(number + 1, self._room.most // max(one.nbytes, 1))
        for later, other in enumerate(self._passes[fit:], fit):
            if other is not None:
                other.end()
                self._passes[later] = None


def _nbytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def held_by_one(model: nn.Module, data: Data, names: Collection[str], room: Room) -> int | None:
    """Bytes that a waiting pass holds, about; None where passes cannot wait.

    They can if those of two batches, in turns, give what they give one after another. They do not
    where a model keeps something of a batch in itself from one layer to the next, draws random
    numbers, or does not run in another thread.
    """
    pair = data.first(2)
    with Lockstep(model, pair, names, room) as steps, torch.no_grad():
        try:
            outputs = steps.finish()
        except Exception:  # noqa: BLE001 - what is wrong in any thread is raised by what comes
            return None
        wanted = [data.forward(model, batch) for batch in pair]
        return steps.most_held if _equal(outputs, wanted) else None


def _equal(outputs: object, wanted: object) -> bool:
    try:
        pair = floats_of(outputs), floats_of(wanted)
    except SpecError:
        return False  # there is nothing to tell by
    return len(pair[0]) == len(pair[1]) and all(map(torch.equal, *pair))
