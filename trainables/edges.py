"""Edges in pixels of patches, mask units and probe regions: one for all axes, or one for each.

A study file may say either; inside there is a tuple with one edge for each axis of the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from trainables.errors import UserError

Edges: TypeAlias = int | tuple[int, ...]


def per_axis(value: Edges, axes: int, setting: str) -> tuple[int, ...]:
    """One edge for each axis of the images; `setting` is where the user gave them."""
    if isinstance(value, int):
        return (value,) * axes
    if not fits(value, axes):
        raise UserError(
            f"{setting}: given {list(value)}, {len(value)} edges, but the images have {axes} axes; "
            f"expected one edge for each axis, or one number for all of them"
        )
    return value


def fits(value: Edges, axes: int) -> bool:
    """Whether there is an edge for each of so many axes."""
    return isinstance(value, int) or len(value) == axes


def grid_of(size: Sequence[int], edges: Sequence[int]) -> tuple[int, ...]:
    """How many such cells an image has along every axis."""
    return tuple(pixels // edge for pixels, edge in zip(size, edges, strict=True))


def simplest(value: Edges | Sequence[int]) -> Edges:
    """8 for (8, 8, 8), which means the same on images of three axes."""
    if isinstance(value, int):
        return value
    return value[0] if len(set(value)) == 1 else tuple(value)


def in_words(value: Edges | Sequence[int]) -> str:
    """8 or 4x8x8."""
    return str(value) if isinstance(value, int) else "x".join(map(str, value))


def even(edge: int, spacing: Sequence[float]) -> list[int]:
    """A patch of this edge along the finest axis, as long in mm along all as powers of 2 allow."""
    return [max(2, edge // 2 ** round(math.log2(step / min(spacing)))) for step in spacing]
