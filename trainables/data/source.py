"""What a data source promises of its images before anything is decoded, and what decoding gives.

Letters: n rows of a part, C channels, *S pixels (any number of axes).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from trainables.errors import FileError, UserError
from trainables.settings import digest

Array = npt.NDArray[Any]
Hears = Callable[[int, int], None]  # (parts that are done, of how many), from any thread
Split = Literal["pretrain", "train", "val", "test"]

SPLITS: tuple[Split, ...] = ("pretrain", "train", "val", "test")
NOT_LABELLED = 255  # in masks: counts neither in a loss nor in a score
FORMAT = 1  # raise it when the same source would be decoded to other bytes
SHOWN_KINDS = 20  # of problems
SHOWN_FILES = 2  # that have the same problem as the first one
NUMBERS = re.compile(r"\d+(\.\d+)?(, …|, \d+(\.\d+)?)*")


@dataclass(frozen=True)
class Decoded:
    """What one part of a source (a file, a generated image) holds: n rows of the data set."""

    images: Array  # (n, C, *S)
    masks: Array  # (n, *S) uint8
    instances: Array | None = None  # (n, *S) uint16, 0 = no object
    truth: Array | None = None  # of a volume: its labels on the grid of the file, if that differs


@dataclass(frozen=True)
class Grids:
    """The grid of each volume."""

    shapes: list[tuple[int, ...]]
    spacings: list[tuple[float, ...]]  # mm from voxel to voxel

    @cached_property
    def begins(self) -> npt.NDArray[np.int64]:
        """The first voxel of each, one behind the other, and the end of the last."""
        return begins(self.shapes)


@dataclass(frozen=True)
class Whole(Grids):
    """What a source of volumes promises of them beside their voxels."""

    overlap: float  # of neighbouring windows, as a share of their edges, where they are judged
    tolerance: float  # mm within which surfaces agree
    decode_bytes: int  # memory that decoding the largest takes
    scored: Grids | None = None  # on which they are judged, where it is not that of the voxels


@dataclass(frozen=True)
class Source:
    """What a data source promises, before anything is decoded."""

    name: str
    identity: Any  # JSON; with the fields below it decides every decoded byte
    size: tuple[int, ...]
    channels: int
    dtype: Literal["uint8", "uint16"]
    classes: list[str] | None  # index 0 is background; None: class 0 to the largest in the masks
    small_classes: list[int]
    window: tuple[int, int] | None  # intensities that map to 0 and 1; None: of training images
    is_labelled: bool
    has_instances: bool
    names: list[str]  # one per row, as the splits and groups
    groups: list[str]
    splits: list[str]
    parts: list[range]  # the rows that each call of `decode` fills
    decode: Callable[[int], Decoded]
    notes: list[str]  # for people: what was left out, and why
    highest: int | None = None  # the highest intensity that is kept; None: what maps to 1
    ends: str | None = None  # for people: what of the files maps to 0 and 1, if not the window
    whole: Whole | None = None  # of volumes, where `size` is that of a crop
    # of images whose tiles are the rows, some of them padded perhaps: the size of each part's image
    cut_from: list[tuple[int, ...]] | None = None

    def fingerprint(self) -> str:
        """SHA-256 over the options, the content of the files, and the splits."""
        facts = {
            "format": FORMAT,
            "source": self.name,
            "identity": self.identity,
            "size": self.size,
            "channels": self.channels,
            "dtype": self.dtype,
            "classes": self.classes,
            "small_classes": self.small_classes,
            "window": self.window,
            "rows": [self.names, self.groups, self.splits],
        }
        if self.whole is not None:
            facts["whole"] = [self.whole.shapes, self.whole.overlap, self.whole.tolerance]
            if self.whole.scored is not None:
                facts["scored"] = self.whole.scored.shapes
        if self.highest is not None:
            facts["highest"] = self.highest
        return digest(facts)


class SourceKind(NamedTuple):
    """An entry of SOURCES. Options are the keyword-only ones of `make`."""

    make: Callable[..., Source]  # (root, heard, *, options); paths among them count from root
    # (folder) -> options: writes a few small files there, if any, and says how they are read
    example: Callable[[Path], dict[str, Any]]
    # (root, options) -> every file that reading them depends on; None: on none
    files: Callable[[Path, Mapping[str, Any]], list[Path]] | None = None


def unheard(done: int, parts: int) -> None:
    """Nobody wants to know how far it is."""


def rows_of(splits: Array, split: Split) -> npt.NDArray[np.int64]:
    """Indices of the rows of a split."""
    words = ("train", "pretrain") if split == "pretrain" else (split,)
    return np.flatnonzero(np.isin(splits, words)).astype(np.int64)


def refuse(problems: Sequence[str | UserError]) -> None:
    """Raise one error with all problems, a line for each kind of them; nothing if there are none.

    A kind is what is said of several files, whatever the numbers in it: the first of them stands
    for all, the next ones are named.
    """
    if not problems:
        return
    kinds: dict[str, list[str | UserError]] = {}
    for problem in problems:
        kind = str(problem)
        if isinstance(problem, FileError):
            kind = NUMBERS.sub("#", problem.what)
        kinds.setdefault(kind, []).append(problem)
    lines = []
    for alike in list(kinds.values())[:SHOWN_KINDS]:
        others = [one.where for one in alike[1:] if isinstance(one, FileError)]
        lines.append(f"  - {alike[0]}")
        if others:
            named = ", ".join(others[:SHOWN_FILES])
            more = f" and {len(others) - SHOWN_FILES} more" * (len(others) > SHOWN_FILES)
            lines.append(f"    (likewise {named}{more})")
    if len(kinds) > SHOWN_KINDS:
        lines.append(f"  … and {len(kinds) - SHOWN_KINDS} more kinds of problems")
    count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
    raise UserError(f"data: {count}\n" + "\n".join(lines))


def tile_corners(size: Sequence[int], tile: Sequence[int]) -> list[tuple[int, ...]]:
    """First corners of as few tiles as cover the image, evenly spaced, the last axis fastest.

    An image that is smaller than a tile has one, at its own corner.
    """
    starts = [
        np.rint(np.linspace(0, max(0, edge - part), -(-edge // part))).astype(int).tolist()
        for edge, part in zip(size, tile, strict=True)
    ]
    return list(itertools.product(*starts))


def tile_within(
    size: Sequence[int], corner: Sequence[int], tile: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """(where a tile lies in its image, what of the tile is image and no padding)."""
    ends = [min(edge, c + part) for edge, c, part in zip(size, corner, tile, strict=True)]
    pairs = list(zip(corner, ends, strict=True))
    return tuple(slice(c, end) for c, end in pairs), tuple(slice(end - c) for c, end in pairs)


def padding_share(sizes: Sequence[Sequence[int]], tile: Sequence[int]) -> float:
    """The share of the pixels of all tiles, or crops, that lie behind the end of an image."""
    counts = [len(tile_corners(size, tile)) for size in sizes]
    real = [math.prod(map(min, size, tile)) for size in sizes]
    shown = sum(count * pixels for count, pixels in zip(counts, real, strict=True))
    return 1 - shown / (sum(counts) * math.prod(tile))


def tile_names(name: str, corners: Sequence[Sequence[int]]) -> list[str]:
    """What the tiles of an image are called: like it, with their corners if they are several."""
    return [f"{name}@{','.join(map(str, corner))}" for corner in corners if len(corners) > 1] or [
        name
    ]


def begins(shapes: Sequence[Sequence[int]] | Array) -> npt.NDArray[np.int64]:
    """The first voxel of each volume when one stands behind the other, and the end of the last."""
    return np.concatenate([[0], np.cumsum([math.prod(map(int, shape)) for shape in shapes])])
