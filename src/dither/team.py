"""Processes that do one job together: each computes a share of it, and all know all results.

The processes of an initialised ``torch.distributed`` group run the same program on the same input.
What costs time is done in shares, whose owners are chosen by bin packing, and then exchanged; all
else every process does for itself. No process can tell from what it gets who computed it, so that
results are those of one process, to the last bit. There is no exchange inside a solver.

There is one kind of exchange, in which every process takes part. It carries what is being done,
so that processes that go different ways are told so, and an error where a process met one: it is
then raised in all of them.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves

from dither.core import DitherError, SpecError
from dither.terminal import printable

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(hours=1)
"""How long processes wait for one that still lives; one that ended is missed at once."""

MEETING = timedelta(minutes=10)
"""How long they wait for all to come to a job."""

_current: ContextVar[Team | None] = ContextVar("team", default=None)
"""What jobs within are done by, whatever the default group."""


class TeamError(DitherError):
    """A process of several is gone, or does something else than the others."""


@contextmanager
def alone() -> Iterator[None]:
    """Within it a process works for itself, although it belongs to a group.

    For programs that call :func:`dither.compress` in one process of several.
    """
    token = _current.set(ALONE)
    try:
        yield
    finally:
        _current.reset(token)


def is_alone() -> bool:
    """Whether that is so, here."""
    return _current.get() is ALONE


class Team:
    """The processes of a group; or a process alone, for which everything below is free.

    Args:
        group: of ``torch.distributed``, on the CPU; None for a process alone.

    Attributes:
        rank: of this process.
        size: of the team.

    >>> ALONE.map("squares", lambda n: n * n, {"a": 2, "b": 3}, {"a": 1, "b": 1})
    {'a': 4, 'b': 9}
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.size = 1 if group is None else distributed.get_world_size(group)
        self._is_broken = False
        self._raised: BaseException | None = None
        self._depth = 0  # of sections
        self._ended = sys.maxsize  # the outermost section that the last error ends

    @property
    def ranks(self) -> range:
        """Of all processes."""
        return range(self.size)

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Who computes what: the dearest first, each to the process that has least to do."""
        loads = [0.0] * self.size
        found: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owner = min(range(self.size), key=loads.__getitem__)
            found[name] = owner
            loads[owner] += costs[name]
        return {name: found[name] for name in costs}

    def mine(self, costs: Mapping[str, float]) -> list[str]:
        """What this process computes."""
        return [name for name, owner in self.owners(costs).items() if owner == self.rank]

    def map(
        self,
        what: str,
        function: Callable[[Item], Result],
        items: Mapping[str, Item],
        costs: Mapping[str, float],
    ) -> dict[str, Result]:
        """Apply a function to every item, each in the process that owns it."""

        def run(names: Sequence[str]) -> dict[str, Result]:
            return {name: function(items[name]) for name in names}

        return self.collected(what, run, costs)

    def collected(
        self,
        what: str,
        run: Callable[[Sequence[str]], Mapping[str, Result]],
        costs: Mapping[str, float],
    ) -> dict[str, Result]:
        """Results for all names, of a function that computes those for some.

        Raises:
            Exception: what it raised in the first process in which it failed.
        """
        if self.size == 1:
            return dict(run(list(costs)))
        parts = self.exchange(what, [self._tried(what, lambda: run(self.mine(costs)))] * self.size)
        joined = {name: result for part in parts for name, result in part.items()}
        return {name: joined[name] for name in costs}

    def first(self, what: str, function: Callable[[], Result]) -> Result:
        """What a function gives in the first process, where others must not differ."""
        return self.map(what, lambda _: function(), {"": None}, {"": 1.0})[""]

    def same(self, what: str, value: object, advice: str) -> None:
        """Make sure that a small value is the same in all processes.

        Raises:
            SpecError: it is not; the advice says what to do.
        """
        if self.size > 1 and len(set(map(repr, self.exchange(what, [value] * self.size)))) > 1:
            raise self._shared(SpecError(f"{what} differ between processes: {advice}"), self._depth)

    def exchange(self, what: str, parts: Sequence[Any]) -> list[Any]:
        """Give each process its part, and get from each what it gives to this one.

        Args:
            what: is being done.
            parts: for each process, by rank.

        Raises:
            Exception: what a process met instead, in all of them.
            TeamError: a process is gone, or does something else.
        """
        if self.size == 1:
            return list(parts)
        own = (what, None, parts[self.rank])
        got = self._swap([(what, None, part) for part in parts], own)
        return self._checked(got)

    @contextmanager
    def section(self, what: str) -> Iterator[None]:
        """A part of the job that all processes end alike: an error in one ends it in all.

        Who catches an error outside of a section must ask :attr:`is_ended`.

        Raises:
            Exception: what any of them raised.
        """
        self._depth += 1
        try:
            yield
            if self.size > 1:
                self.exchange(f"the end of {what}", [None] * self.size)
        except Exception as error:
            is_told = error is self._raised and self._ended <= self._depth
            if self.size > 1 and not is_told and not self._is_broken:
                self._tell(what, error)
            raise
        finally:
            self._depth -= 1

    @property
    def is_ended(self) -> bool:
        """Whether the last error ends more than the section that it came out of."""
        return self._ended <= self._depth

    def _tried(self, what: str, function: Callable[[], Result]) -> Result:
        """What a function gives; an error is told to all before it is raised."""
        try:
            return function()
        except Exception as error:
            self._tell(what, error)
            raise

    def _tell(self, what: str, error: Exception) -> None:
        own = (what, (error, self._depth), None)
        self._swap([(what, (_sendable(error), self._depth), None)] * self.size, own)
        self._shared(error, self._depth)

    def _checked(self, got: Sequence[tuple[str, tuple[Exception, int] | None, Any]]) -> list[Any]:
        for _, told, _ in got:
            if told is not None:
                raise self._shared(*told)
        if len({what for what, _, _ in got}) > 1:
            each = (f"process {n}: {printable(what)}" for n, (what, _, _) in enumerate(got))
            raise self._shared(
                TeamError(
                    f"processes do different things ({'; '.join(each)}): start all with the same "
                    "arguments, data, versions and numbers of threads, on processors of one kind"
                ),
                0,
            )
        return [part for _, _, part in got]

    def _shared(self, error: Exception, depth: int) -> Exception:
        """An error that all processes know, and the section that it ends."""
        self._raised, self._ended = error, depth
        return error

    def _swap(self, parts: Sequence[object], own: Any) -> list[Any]:  # noqa: ANN401 - as given
        """Each process's message to this one; its own stays as it is."""
        if self._is_broken:
            raise TeamError("a process of the group is gone: start all of them again")
        same = parts[1:] and all(part is parts[0] for part in parts)
        packed = [_packed(parts[0])] * self.size if same else [_packed(part) for part in parts]
        packed[self.rank] = torch.zeros(0, dtype=torch.uint8)
        try:
            sizes = torch.zeros(self.size, self.size, dtype=torch.int64)
            sizes[self.rank] = torch.tensor([len(part) for part in packed])
            distributed.all_reduce(sizes, group=self._group)
            incoming = sizes[:, self.rank].tolist()
            received = torch.empty(sum(incoming), dtype=torch.uint8)
            given = sizes[self.rank].tolist()
            distributed.all_to_all_single(
                received, torch.cat(packed), incoming, given, group=self._group
            )
        except RuntimeError as error:
            self._is_broken, self._ended = True, 0
            said = str(error).splitlines()[0]
            raise TeamError(
                f"a process of the {self.size} is gone, or was silent for {PATIENCE}: look for its "
                f"own message, and start all of them again ({said})"
            ) from error
        messages = received.split(incoming)
        return [own if n == self.rank else _unpacked(part) for n, part in enumerate(messages)]


ALONE = Team()
"""A process that works for itself."""


@contextmanager
def team_of(what: str) -> Iterator[Team]:
    """The processes of the default group, if there is one, for one job that all of them do."""
    current = _current.get()
    if current is None and distributed.is_available() and distributed.is_initialized():
        group = _met(what)
        try:
            with _led(Team(group), what) as team:
                yield team
        finally:
            distributed.destroy_process_group(group)
    else:
        with (current or ALONE).section(what):
            yield current or ALONE


def _met(what: str) -> distributed.ProcessGroup:
    """A group of all processes on the CPU, once all have come.

    Raises:
        TeamError: some did not.
    """
    try:
        met = distributed.new_group(backend="gloo", timeout=MEETING)
        distributed.barrier(met)
    except RuntimeError as error:
        raise TeamError(
            f"not all of the {distributed.get_world_size()} processes came to {what} within "
            f"{MEETING}: each of them has to call it, or the one that does without the others, "
            "within `with dither.team.alone():`"
        ) from error
    group: distributed.ProcessGroup = distributed.new_group(backend="gloo", timeout=PATIENCE)
    distributed.destroy_process_group(met)
    return group


@contextmanager
def joined(what: str) -> Iterator[Team]:
    """The processes that torchrun started, if it did; jobs within are done by all of them."""
    size = os.environ.get("WORLD_SIZE", "1")
    known = distributed.is_available() and not distributed.is_initialized()
    if size == "1" or "MASTER_ADDR" not in os.environ or not known:
        yield ALONE
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        with _led(Team(distributed.group.WORLD), what) as team:
            yield team
    finally:
        distributed.destroy_process_group()


@contextmanager
def _led(team: Team, what: str) -> Iterator[Team]:
    token = _current.set(team)
    try:
        with team.section(what):
            yield team
    finally:
        _current.reset(token)


class _Pickler(pickle.Pickler):
    """Tensors as plain bytes: torch's own way copies and checks them several times."""

    def reducer_override(self, value: object) -> Any:  # noqa: ANN401 - as pickle has it
        if type(value) is not Tensor or value.layout != torch.strided:
            return NotImplemented
        # What is computed of a tensor may depend, in the last bit, on the order of its axes in
        # memory.
        strides = value.stride()
        order = sorted(range(value.ndim), key=lambda axis: -strides[axis])
        plain = value.detach().cpu().permute(order).contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy()
        return _tensor, (data, plain.dtype, tuple(plain.shape), order)


def _tensor(
    data: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...], order: list[int]
) -> Tensor:
    plain = torch.from_numpy(data).view(dtype).reshape(shape)
    return plain.permute([order.index(axis) for axis in range(len(order))])


def _packed(value: object) -> Tensor:
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(value)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:  # noqa: ANN401 - what another process gave
    return pickle.loads(data.numpy().data)  # noqa: S301 - from a process of one's own job


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent."""
    try:
        if str(_unpacked(_packed(error))) == str(error):
            return error
    except Exception:  # noqa: BLE001, S110 - errors of users hold anything
        pass
    return DitherError(f"{type(error).__name__}: {error}")


def fingerprint(value: object, team: Team) -> int:
    """What tells tensors in tuples, lists and dicts from others; 0 where nobody asks."""
    found = 0
    for leaf in tree_leaves(value) if team.size > 1 else ():
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_meta:
            plain = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found = crc32(plain.numpy().data, found)
            found = crc32(str((leaf.dtype, tuple(leaf.shape))).encode(), found)
    return found


def nbytes_of(value: object) -> int:
    """Bytes of the tensors in tuples, lists and dicts, as a guess of what they cost; at least 1."""
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return max(1, sum(leaf.numel() * leaf.element_size() for leaf in tensors))
