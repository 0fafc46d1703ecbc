"""What long work says of itself, and to whom.

Work reports its steps with :func:`report`; whoever wants to show them listens with
:func:`listening`, around the work. Nothing is passed down, and where nobody listens nothing is
spent. Threads that work starts are not heard: it reports what they finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

Hook = Callable[[str, float], None]
"""Called with what is being done, in words, and the share of it that is done, 0 to 1."""

SURE = 2.0, 0.03
"""Seconds, and the share of a stage, after which its speed so far says how long it takes."""


@dataclass(frozen=True)
class Step:
    """Where work is.

    >>> print(Step("calibrated", "encoding", "head.weight", 0.25, 90.0))
    calibrated: encoding head.weight, 25 %, about 2 min left

    Attributes:
        way: what the stage is a part of; may be empty.
        stage: what is being done.
        item: to what: most often the name of a tensor; may be empty.
        share: of the stage that is done, 0 to 1.
        left: seconds until the stage is done, if it goes on as so far; None as long as that says
            little. Of stages still to come, nothing is known.
    """

    way: str
    stage: str
    item: str
    share: float
    left: float | None = None

    @property
    def what(self) -> str:
        """The way, the stage and the item."""
        way = f"{self.way}: " if self.way else ""
        return f"{way}{self.stage}{' ' if self.item else ''}{self.item}"

    def __str__(self) -> str:
        """All of it in words."""
        left = "" if self.left is None else f", about {spoken(self.left)} left"
        return f"{self.what}, {self.share:.0%}{left}".replace("%", " %")


def spoken(seconds: float) -> str:
    """A time that is not known well, as one says it.

    >>> [spoken(t) for t in (3.2, 31, 89, 1000, 8000)]
    ['5 s', '35 s', '2 min', '17 min', '2.2 h']
    """
    if seconds < 60:
        return f"{5 * max(-(-seconds // 5), 1):.0f} s"
    return f"{-(-seconds // 60):.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Listener:
    """Who listens, and since when the stage goes on."""

    def __init__(self, hear: Callable[[Step], None], around: _Listener | None) -> None:
        self._hear, self._around = hear, around
        self.way = ""
        self._stage: tuple[str, str] = "", ""
        self._start, self._first = 0.0, 0.0

    def take(self, stage: str, share: float, item: str) -> None:
        now = time.monotonic()
        if self._stage != (self.way, stage) or share < self._first:
            self._stage, self._start, self._first = (self.way, stage), now, share
        spent, done, left = now - self._start, share - self._first, None
        if spent >= SURE[0] and done >= SURE[1]:
            left = spent * (1 - share) / done
        token = _listener.set(self._around)  # which hears what the hook itself reports
        try:
            self._hear(Step(self.way, stage, item, share, left))
        finally:
            _listener.reset(token)


_listener: ContextVar[_Listener | None] = ContextVar("dither progress", default=None)


@contextmanager
def listening(hear: Callable[[Step], None] | None) -> Iterator[None]:
    """Have each step told to ``hear`` within the block; None changes nothing.

    >>> with listening(print):
    ...     for name in steps("reading", ["a", "b"]):
    ...         pass
    reading a, 0 %
    reading b, 50 %
    reading, 100 %
    """
    if hear is None:
        yield
        return
    token = _listener.set(_Listener(hear, _listener.get()))
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def hooked(hook: Hook | None) -> Iterator[None]:
    """The same for a hook that wants words and a share; None changes nothing."""
    with listening(None if hook is None else lambda step: hook(step.what, step.share)):
        yield


@contextmanager
def part_of(way: str) -> Iterator[None]:
    """What is reported within the block is a part of ``way``."""
    listener = _listener.get()
    if listener is None:
        yield
        return
    before, listener.way = listener.way, way
    try:
        yield
    finally:
        listener.way = before


def report(stage: str, share: float, item: str = "") -> None:
    """Say what is being done.

    Args:
        stage: the same for all that goes on at one speed.
        share: of the stage that is done, 0 to 1, as its time goes.
        item: to what; most often the name of a tensor.
    """
    listener = _listener.get()
    if listener is not None:
        listener.take(stage, share, item)


def steps(
    stage: str, items: Iterable[Item], costs: Callable[[Item], float] | None = None
) -> Iterator[Item]:
    """The items, with a report before each, and one at the end.

    Args:
        stage: see :func:`report`.
        items: of which texts are named.
        costs: of each item, in any unit; all the same by default.
    """
    if _listener.get() is None:
        yield from items
        return
    all_items = list(items)
    weights = [1.0 if costs is None else costs(item) for item in all_items]
    done, total = 0.0, sum(weights) or 1.0
    for item, weight in zip(all_items, weights, strict=True):
        report(stage, done / total, item if isinstance(item, str) else "")
        yield item
        done += weight
    report(stage, 1.0)
