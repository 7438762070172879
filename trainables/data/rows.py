"""From files to rows, alike for every kind of file: errors that name the file, tiles, duplicates.

Letters: C channels, *S pixels along every axis, n tiles.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.data.entries import Entry
from trainables.data.source import (
    NOT_LABELLED,
    Decoded,
    Hears,
    tile_corners,
    tile_names,
    tile_within,
    unheard,
)
from trainables.errors import FileError, UserError

Array = npt.NDArray[Any]


def cut(picture: Array, labels: Array, objects: Array | None, tile: Sequence[int]) -> Decoded:
    """Tiles of an image (C, *S), its labels (*S) and its objects (*S), if there are any.

    Where tiles overlap, a pixel is labelled, and belongs to an object, in the first of them only.
    Behind the end of an image that is smaller than a tile are 0 and no label.
    """
    labels = labels.copy()
    objects = None if objects is None else objects.copy()
    corners = tile_corners(labels.shape, tile)
    images = np.zeros((len(corners), len(picture), *tile), picture.dtype)
    masks = np.full((len(corners), *tile), NOT_LABELLED, labels.dtype)
    instances = None if objects is None else np.zeros((len(corners), *tile), objects.dtype)
    for number, corner in enumerate(corners):
        part, there = tile_within(labels.shape, corner, tile)
        images[number][(slice(None), *there)] = picture[(slice(None), *part)]
        masks[number][there] = labels[part]
        labels[part] = NOT_LABELLED
        if objects is not None and instances is not None:
            instances[number][there] = objects[part]
            objects[part] = 0
    return Decoded(images, masks, instances)


def joined(tiles: Array, corners: Array, shape: Sequence[int], nothing: int) -> Array:
    """What `cut` cut: (*S) of the tiles' (n, *tile) labels or objects, that lie at corners (n, A).

    `nothing` is what a tile has where a pixel counts in another one.
    """
    whole = np.full(tuple(shape), nothing, tiles.dtype)
    for tile, corner in zip(tiles, corners, strict=True):
        part, there = tile_within(shape, corner, tile.shape)
        np.copyto(whole[part], tile[there], where=tile[there] != nothing)
    return whole


def usable(entries: Sequence[Entry]) -> list[int]:
    """Which entries can be used: of val and test only those with a mask, if any has one."""
    is_labelled = any(entry.mask for entry in entries)
    return [i for i, e in enumerate(entries) if e.mask or not is_labelled or e.split == "pretrain"]


def lay_out(
    entries: Sequence[Entry], corners: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[str], list[str], list[str], list[range]]:
    """(names, groups, splits) of all rows, and the rows of each entry, whose tiles begin there.

    A row is called like its file, with the tile's corner where there are several.
    """
    names: list[str] = []
    groups: list[str] = []
    splits: list[str] = []
    parts = []
    for entry, begins in zip(entries, corners, strict=True):
        parts.append(range(len(names), len(names) + len(begins)))
        names += tile_names(entry.name, begins)
        groups += [str(entry.group)] * len(begins)
        splits += [str(entry.split)] * len(begins)
    return names, groups, splits, parts


def duplicates(entries: Sequence[Entry], content: dict[int, str]) -> list[str]:
    """Images of the same content in two splits, and images that are listed twice."""
    first: dict[str, Entry] = {}
    problems = []
    for i, digest in content.items():
        entry = entries[i]
        twin = first.setdefault(digest, entry)
        if twin is entry:
            continue
        splits = {"train" if e.split == "pretrain" else e.split for e in (twin, entry)}
        names = f"{twin.name}{twin.line} and {entry.name}{entry.line}"
        if len(splits) > 1:
            problems.append(
                f"{names} have the same content but are in {twin.split} and {entry.split}; leave "
                f"one out, or give both the same group"
            )
        elif twin.image == entry.image:
            problems.append(f"{names} are the same file, listed twice; leave one out")
    return problems


def notes_of_twins(entries: Sequence[Entry], content: Sequence[str]) -> list[str]:
    """Images of one content within a split, under different names: they count several times."""
    names: dict[str, list[str]] = {}
    for entry, digest in zip(entries, content, strict=True):
        names.setdefault(digest, []).append(entry.name)
    alike = [found for found in names.values() if len(found) > 1]
    if not alike:
        return []
    return [
        f"images of one content count several times, such as "
        f"{' and '.join(max(alike, key=len)[:2])}: {sum(map(len, alike))} files show "
        f"{len(alike)} pictures"
    ]


def notes_of_masks_missing(entries: Sequence[Entry]) -> list[str]:
    """Images without a mask, where others have one."""
    without = [entry.name for entry in entries if entry.mask is None]
    if not without or len(without) == len(entries):
        return []
    return [
        f"{len(without):,} of {len(entries):,} images have no mask, such as {without[0]}: they "
        f"join pretraining alone"
    ]


def check_not_empty(entries: Sequence[Entry]) -> None:
    """There must be something to train on, and something to be judged on."""
    counts = Counter(str(entry.split) for entry in entries)
    for words in (("train", "pretrain"), ("val",)):
        if not any(counts[word] for word in words):
            raise UserError(
                f"data: no image is in {' or '.join(words)} (there are {dict(counts)}); name some "
                f"in the split column, or leave it blank to have a share of the groups drawn"
            )


def in_parallel(
    task: Callable[[Any], Any], items: Sequence[Any], heard: Hears = unheard
) -> list[Any]:
    """What the task returns for each item, or its UserError."""
    done = itertools.count(1)

    def attempt(item: Any) -> Any:
        try:
            return task(item)
        except UserError as error:
            return error
        finally:
            heard(next(done), len(items))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(attempt, items))


@contextmanager
def naming(path: Path, entry: Entry) -> Iterator[None]:
    """Puts the name of the file, and its line of the manifest, in front of an error."""
    try:
        yield
    except UserError as error:
        raise FileError(f"{path}{entry.line}", str(error)) from error


def times(size: Sequence[int]) -> str:
    """A size for people: 3x4."""
    return "x".join(map(str, size))
