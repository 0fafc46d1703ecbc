"""Work side by side in threads, which ends when its caller does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[Iterator[Result]]:
    """Results in the order of items, ``count`` of which are worked at once.

    Where the block ends by an exception, Ctrl-C or one of ``function`` among them, what has begun
    is waited for, and nothing else begins: a pool by itself would do all that is queued first.

    >>> with side_by_side(abs, [-1, 2, -3], 2) as found:
    ...     print(list(found))
    [1, 2, 3]
    """
    if count == 1:
        yield map(function, items)
        return
    pool = ThreadPoolExecutor(count)
    try:
        yield pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
