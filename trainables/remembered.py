"""What is computed once in a process: a dict of the newest few.

Not functools.lru_cache, as what an answer depends on is less than what computing it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

MOST = 8

Value = TypeVar("Value")


def remembered(kept: dict[Hashable, Value], key: Hashable, compute: Callable[[], Value]) -> Value:
    """The value under the key, computed if it is not there; of more than MOST the oldest goes."""
    if key not in kept:
        if len(kept) == MOST:
            del kept[next(iter(kept))]
        kept[key] = compute()
    return kept[key]
