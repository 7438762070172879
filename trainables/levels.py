"""The levels of the U-Net Transformer (unetr.py): how large they are, and how wide. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FEWEST_LEVELS = 3  # under the image's own
WIDEST = 8  # channels double with the level up to this many times the finest level's


class Levels(NamedTuple):
    """Level 0 is the image's own."""

    sizes: list[tuple[int, ...]]
    widths: list[int]  # channels

    def edges(self, patch: Sequence[int], level: int) -> tuple[int, ...]:
        """Edges of a patch at a level, in pixels of the level."""
        return tuple(max(1, round(edge / 2**level)) for edge in patch)


def levels_of(image_size: Sequence[int], patch: Sequence[int], features: int) -> Levels:
    """`features`: channels of the finest level."""
    levels = range(1 + max(FEWEST_LEVELS, round(math.log2(max(patch)))))
    return Levels(
        sizes=[tuple(-(-edge // 2**level) for edge in image_size) for level in levels],
        widths=[features * min(2**level, WIDEST) for level in levels],
    )
