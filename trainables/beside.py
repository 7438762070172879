"""Work of the host that goes on in threads while a device, or the caller, does something else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(items: Iterator[Item], begin: Callable[[], None] = lambda: None) -> Iterator[Item]:
    """The same, each made in a thread, which `begin` begins, while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, "ahead", initializer=begin) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield cast(Item, item)


def in_threads(work: Callable[[Item], Made], items: Iterator[Item], threads: int) -> Iterator[Made]:
    """`work` of each item, in their order, up to `threads` at a time while the next are drawn.

    0 threads: none but the caller's.
    """
    if threads == 0:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, "beside") as pool:
        begun: deque[Future[Made]] = deque()
        for item in items:
            if len(begun) > threads:  # what waits takes memory
                yield begun.popleft().result()
            begun.append(pool.submit(work, item))
        while begun:
            yield begun.popleft().result()
