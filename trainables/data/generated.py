"""What sources of generated images share: splits, seeds, and images without masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from trainables.data.source import NOT_LABELLED, Decoded, Source, Split

Count = Annotated[int, Field(ge=0)]
Edge = Annotated[int, Field(ge=8, le=4096)]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "pretrain")  # their places seed the images


class Picture(NamedTuple):
    """One generated image, and what is on it."""

    image_CHW: npt.NDArray[np.uint8]
    classes_HW: npt.NDArray[np.uint8]
    instances_HW: npt.NDArray[np.uint16]  # 1 and up, 0: none


def generated(
    name: str,
    draw: Callable[[np.random.Generator], Picture],
    *,
    counts: Mapping[Split, int],
    seed: int,
    about: Mapping[str, Any],
    size: tuple[int, int],
    channels: int,
    classes: list[str],
    small_classes: list[int],
) -> Source:
    """Images that `draw` makes, each from its own generator: of its split, its place and the seed.

    So an image does not depend on how many there are. `about` is what `draw` depends on otherwise.
    Those of pretrain, which join nothing else, are not labelled.
    """
    rows = [(split, index) for split in SPLITS for index in range(counts[split])]

    def decode(row: int) -> Decoded:
        split, index = rows[row]
        made = draw(np.random.default_rng([seed, SPLITS.index(split), index]))
        masks, instances = made.classes_HW, made.instances_HW
        if split == "pretrain":
            masks, instances = np.full_like(masks, NOT_LABELLED), np.zeros_like(instances)
        return Decoded(made.image_CHW[None], masks[None], instances[None])

    names = [f"{split}-{index:05d}" for split, index in rows]
    return Source(
        name=name,
        identity={"seed": seed, **about},
        size=size,
        channels=channels,
        dtype="uint8",
        classes=classes,
        small_classes=small_classes,
        window=None,
        is_labelled=True,
        has_instances=True,
        names=names,
        groups=names,
        splits=[split for split, _ in rows],
        parts=[range(row, row + 1) for row in range(len(rows))],
        decode=decode,
        notes=[],
    )
