"""Work side by side in threads, which ends when its caller does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Condition
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Room:
    """Bounds what several threads have in work at once.

    >>> with Room(10).for_some(12):  # more than there is room for has it to itself
    ...     pass
    """

    def __init__(self, most: int) -> None:
        """Have room for so much, of any unit."""
        self._most, self._held, self._changed = most, 0, Condition()

    @contextmanager
    def for_some(self, size: int) -> Iterator[None]:
        """Wait until there is room, and take it as long as the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._most)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


@contextmanager
def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[Iterator[Result]]:
    """Results in the order of items, ``count`` of which are worked at once.

    Where the block ends by an exception, Ctrl-C or one of ``function`` among them, what has begun
    is waited for, and nothing else begins: a pool by itself would do all that is queued first.
    Operations of torch take one thread each in there; with several for each of several, cores
    would wait for one another.

    >>> with side_by_side(abs, [-1, 2, -3], 2) as found:
    ...     print(list(found))
    [1, 2, 3]
    """
    if count == 1:
        yield map(function, items)
        return
    before, ready = torch.get_num_threads(), Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread is given the number of all when it first asks
        torch.set_num_threads(1)  # of this thread, and of all that ask first from now on
        ready.wait()

    pool = ThreadPoolExecutor(count)
    try:
        for _ in range(count):
            pool.submit(begin)
        try:
            ready.wait()
        finally:
            torch.set_num_threads(before)  # of this thread, and of all that ask first
        yield pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
