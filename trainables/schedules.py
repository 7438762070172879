"""Schedules: progress in [0, 1] (share of the planned budget done) -> value.

To add one, write the function with keyword-only options and add it to SCHEDULES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

Share = Annotated[float, Field(gt=0, lt=1)]


def constant(progress: float, *, value: Share = 0.75) -> float:
    """The same value throughout."""
    return value


def linear(progress: float, *, start: Share, end: Share) -> float:
    """Straight from `start` to `end`."""
    return start + (end - start) * progress


def cosine(progress: float, *, start: Share, end: Share) -> float:
    """From `start` to `end` along half a cosine: slow, fast, slow."""
    return start + (end - start) * (1 - math.cos(math.pi * progress)) / 2


def step(
    progress: float,
    *,
    values: Annotated[list[Share], Field(min_length=2)],
    at: Annotated[list[Share], Field(min_length=1)],
) -> float:
    """`values[0]`, then `values[i + 1]` from progress `at[i]` on; `at` rises."""
    if len(values) != len(at) + 1 or list(at) != sorted(set(at)):
        raise ValueError(
            f"step needs one more value than rising turning points, got {values} at {at}"
        )
    return values[sum(progress >= turn for turn in at)]


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": step,
}
