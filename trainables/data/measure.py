"""What is counted once of decoded images: intensities, classes, objects, where classes lie.

Letters: N images, C channels, *S pixels (any number of axes A), K classes, M spots of a class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainables.data.rows import joined
from trainables.data.source import (
    NOT_LABELLED,
    Array,
    Grids,
    Source,
    Split,
    Whole,
    rows_of,
    tile_corners,
)
from trainables.errors import UserError
from trainables.scores import diameter, objects_in

PIXELS_AT_ONCE = 2**24  # that are counted or clipped in one go
MOST_PIXELS = 0.9999  # those that decide whether a window suits the images
NARROW = 0.25  # share of a window that they should fill at least
MOST_CLIPPED = 0.3  # share of a class that may have the highest level without a word
JUDGED: tuple[Split, ...] = ("train", "val", "test")  # splits that have labels
SPOTS = 256  # voxels of each class and volume that are remembered


class Sizes(NamedTuple):
    """The objects of a class in whole images."""

    counts: dict[Split, int]  # of the splits with labels
    diameters: npt.NDArray[np.float64]  # of those to learn from that no border of an image cuts off


def measure(
    source: Source,
    images: Array,
    masks: Array,
    instances: Array | None,
    truth: Array | None = None,
) -> dict[str, Any]:
    """Everything in meta.json that has to be counted; windows the images in place.

    `truth`: of resampled volumes, the labels on the grids of their files, by which objects count.
    """
    splits = np.array(source.splits)
    training, labelled = rows_of(splits, "pretrain"), rows_of(splits, "train")
    counts = _histogram(source, images, training, source.channels)
    seen = np.flatnonzero(counts.sum(axis=0))
    observed = (int(seen[0]), int(seen[-1]))
    is_default = source.window is None and source.dtype == "uint8"
    robust, notes = observed, list[str]()
    if not is_default and source.window is None:
        robust, notes = _robust_window(source, images, masks, counts, observed)
    low, high = (0, 255) if is_default else source.window or robust
    if observed[0] == observed[1] or low >= high:
        raise UserError(
            f"data: every pixel of the training images is {observed[0]}; expected pictures"
        )
    highest = source.highest or high
    if not is_default and (low, highest) != (0, np.iinfo(images.dtype).max):
        every = images.reshape(-1)  # of val and test as well, so that they stay in the window
        for start in range(0, every.size, PIXELS_AT_ONCE):
            part = every[start : start + PIXELS_AT_ONCE]
            np.clip(part, low, highest, out=part)
    levels = (np.clip(np.arange(counts.shape[1]), low, highest) - low) / (high - low)
    total = counts.sum(axis=1)
    mean = counts @ levels / total
    std = np.sqrt(np.maximum(counts @ levels**2 / total - mean**2, 0))
    std[std < 1e-6] = 1  # an empty channel stays 0

    shares = _histogram(source, masks, np.arange(len(splits)), 1)[0]
    largest = int(np.flatnonzero(shares[:NOT_LABELLED]).max(initial=0))
    classes = source.classes or ["background", *(f"class {i}" for i in range(1, largest + 1))]
    share = _histogram(source, masks, labelled, 1)[0, : len(classes)]
    sizes = learnt = _sizes(source, masks, instances, len(classes))
    if truth is not None and source.whole is not None and source.whole.scored is not None:
        sizes = _sizes(source, truth, None, len(classes), source.whole.scored)
    every_diameter = np.concatenate([np.zeros(0), *(found.diameters for found in sizes)])
    edges = np.quantile(every_diameter, [1 / 3, 2 / 3]) if len(every_diameter) else np.zeros(2)
    return {
        "name": source.name,
        "size": list(source.size),
        "channels": source.channels,
        "classes": classes,
        "small_classes": source.small_classes,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "low": float(low),
        "high": float(high),
        "object_edges": edges.tolist(),
        "is_labelled": source.is_labelled,
        "has_instances": source.has_instances,
        "about": {
            "groups": len(set(source.groups)),
            "intensities": {
                "type": source.dtype,
                "window": [low, high],
                "window_from": "the type"
                if is_default
                else "the data setting"
                if source.window
                else "the training images",
                "observed": list(observed),
                "ends": source.ends or f"{low:,} and {high:,}",
                "mean": [round(value, 4) for value in mean.tolist()],
                "std": [round(value, 4) for value in std.tolist()],
            },
            "pixel_share": {
                name: round(float(count / max(1, share.sum())), 5)
                for name, count in zip(classes, share, strict=True)
                if source.is_labelled
            },
            "objects": {
                name: {**found.counts, "median_diameter": _median(found.diameters)}
                for name, found in zip(classes[1:], sizes, strict=True)
                if any(found.counts.values())
            },
            "object_edges": [round(edge, 1) for edge in edges.tolist()],
            **(
                {
                    "window_overlap": source.whole.overlap,
                    "surface_tolerance": source.whole.tolerance,
                }
                if source.whole is not None
                else {}
            ),
            "notes": [
                *source.notes,
                *notes,
                *(
                    _notes_of_clipping(source, images, masks, highest, classes)
                    if source.window is not None or robust != observed
                    else []
                ),
                *_notes_of_resampling(sizes, learnt, classes),
            ],
        },
    }


def _robust_window(
    source: Source,
    images: Array,
    masks: Array,
    counts_CV: npt.NDArray[np.int64],
    observed: tuple[int, int],
) -> tuple[tuple[int, int], list[str]]:
    """(the window of all training images, without a few hot pixels that stretch it; notes).

    They stay where they are what a class is made of.
    """
    reached = np.cumsum(counts_CV.sum(axis=0)) / counts_CV.sum()
    low, high = (int(np.searchsorted(reached, share)) for share in (1 - MOST_PIXELS, MOST_PIXELS))
    share = (high - low) / max(1, observed[1] - observed[0])
    if share >= NARROW or low == high:
        return observed, []
    what = (
        f"{MOST_PIXELS:.2%} of the pixels lie between {low} and {high}, in {share:.1%} of what "
        f"there is, {list(observed)}"
    )
    if _clipped_shares(source, images, masks, high).max() > MOST_CLIPPED:
        return observed, [f"{what}; all of it is the window, as a class lies above"]
    return (low, high), [
        f"{what}, which a few others stretch: they are the window, beyond which nothing is told "
        f"apart; set window: {list(observed)} to have all of it"
    ]


def _notes_of_clipping(
    source: Source, images: Array, masks: Array, highest: int, classes: list[str]
) -> list[str]:
    """That most of a class has the highest level, where nothing tells its pixels apart."""
    shares = _clipped_shares(source, images, masks, highest)
    return [
        f"{share:.0%} of {name!r} has the highest level, as the window ends below it; set a wider "
        f"window, or percentiles up to 100"
        for name, share in zip(classes[1:], shares, strict=False)
        if share > MOST_CLIPPED
    ]


def _clipped_shares(
    source: Source, images: Array, masks: Array, highest: int
) -> npt.NDArray[np.float64]:
    """Of each class but the background, the share of its training pixels at a level or above."""
    totals, clipped = np.zeros((2, NOT_LABELLED + 1), np.int64)
    for row in rows_of(np.array(source.splits), "train"):
        labels = _row(source, masks, row).ravel()
        is_highest = (_row(source, images, row, source.channels) >= highest).reshape(
            source.channels, -1
        )
        totals += np.bincount(labels, minlength=len(totals))
        clipped += np.bincount(labels[is_highest.all(axis=0)], minlength=len(totals))
    shares: npt.NDArray[np.float64] = clipped / np.maximum(totals, 1)
    return shares[1:NOT_LABELLED]


def _notes_of_resampling(sizes: list[Sizes], learnt: list[Sizes], classes: list[str]) -> list[str]:
    """That resampling costs objects: their scores count them all the same."""
    return [
        f"resampling leaves {after:,} of {before:,} objects of {name!r} to learn from; "
        f"scores count all of them, on the grid of the files; take a finer spacing"
        for name, before, after in zip(
            classes[1:],
            (found.counts["train"] for found in sizes),
            (found.counts["train"] for found in learnt),
            strict=True,
        )
        if after < before
    ]


def _histogram(
    source: Source, array: Array, rows: npt.NDArray[np.int64], channels: int
) -> npt.NDArray[np.int64]:
    """How often each value occurs in each channel (C, 256 or 65536) of the rows."""
    levels = 2 ** (8 * array.dtype.itemsize)
    counts = np.zeros((channels, levels), np.int64)
    for chunk in _chunks(source, array, rows, channels):
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[channel].ravel(), minlength=levels)
    if source.cut_from is not None and array.ndim > len(source.size) + 1:
        counts[:, 0] -= _padding(source, rows)  # of images; no label tells that of masks
    return counts


def _padding(source: Source, rows: npt.NDArray[np.int64]) -> int:
    """How many pixels of these rows are padding."""
    assert source.cut_from is not None
    real = [
        math.prod(map(min, size, source.size))
        for size, part in zip(source.cut_from, source.parts, strict=True)
        for _ in part
    ]
    return len(rows) * math.prod(source.size) - int(np.array(real, np.int64)[rows].sum())


def _chunks(
    source: Source, array: Array, rows: npt.NDArray[np.int64], channels: int
) -> Iterator[Array]:
    """What stands in some rows, channels first, in parts that take little memory."""
    if source.whole is None:
        step = max(1, PIXELS_AT_ONCE // max(1, array[0].size))
        for start in range(0, len(rows), step):
            chunk = array[rows[start : start + step]]
            yield chunk.reshape(len(chunk), channels, -1).swapaxes(0, 1)
        return
    for row in rows:
        voxels = _row(source, array, row, channels).reshape(channels, -1)
        for start in range(0, voxels.shape[1], PIXELS_AT_ONCE):
            yield voxels[:, start : start + PIXELS_AT_ONCE]


def _row(source: Source, array: Array, row: int | np.int64, channels: int = 1) -> Array:
    """One row of the arrays, (C, *S), or (*S) where there is one channel."""
    if source.whole is None:
        pixels: Array = array[row]
        return pixels
    first, shape = source.whole.begins, source.whole.shapes[row]
    part = array[int(first[row]) * channels : int(first[row + 1]) * channels]
    return part.reshape((channels, *shape) if channels > 1 else shape)


def _sizes(
    source: Source,
    masks: Array,
    instances: Array | None,
    num_classes: int,
    scored: Grids | None = None,
) -> list[Sizes]:
    """The objects of each class but the background, as scores.py counts them.

    Diameters are those of discs (or balls) as large, in pixels, of volumes in mm.
    """
    counts = {split: np.zeros(num_classes, np.int64) for split in JUDGED}
    diameters: list[list[Array]] = [[np.zeros(0)] for _ in range(num_classes)]
    for part, rows in enumerate(source.parts):
        split = source.splits[rows.start]
        if split not in JUDGED:
            continue
        grids = scored or source.whole
        if grids is None:
            labels, objects = _whole_labels(source, masks, instances, part)
        else:
            begin, end = grids.begins[rows.start : rows.start + 2].tolist()
            labels, objects = masks[begin:end].reshape(1, *grids.shapes[part]), None
        voxel = math.prod(grids.spacings[part]) if grids else 1.0
        found = objects_in(labels, num_classes, objects)
        counts[split] += np.bincount(found.label_N, minlength=num_classes)
        if split != "train":
            continue
        diameter_N = diameter(found.area_N, len(source.size), voxel)
        for label in np.unique(found.label_N):
            diameters[label].append(diameter_N[(found.label_N == label) & ~found.is_cut_N])
    return [
        Sizes({split: int(counts[split][label]) for split in JUDGED}, np.concatenate(found))
        for label, found in enumerate(diameters)
    ][1:]


def _whole_labels(
    source: Source, masks: Array, instances: Array | None, part: int
) -> tuple[Array, Array | None]:
    """Labels and instances, if there are any, of a part's whole images (n, *S)."""
    rows = source.parts[part]
    labels = masks[rows.start : rows.stop]
    objects = None if instances is None else instances[rows.start : rows.stop]
    if source.cut_from is None:
        return labels, objects
    shape = source.cut_from[part]
    corners = np.array(tile_corners(shape, source.size))
    return (
        joined(labels, corners, shape, NOT_LABELLED)[None],
        None if objects is None else joined(objects, corners, shape, 0)[None],
    )


def _median(diameters: npt.NDArray[np.float64]) -> float | None:
    """For people; None if every object is cut off."""
    return round(float(np.median(diameters)), 1) if len(diameters) else None


def spots_of(
    whole: Whole, masks: Array, num_classes: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """(spots (N, K, M, A), has_class (N, K)): some voxels of each class but the background.

    All voxels of a class are alike probable; of few each is there several times.
    """
    axes = len(whole.shapes[0])
    spots = np.zeros((len(whole.shapes), num_classes, SPOTS, axes), np.uint16)
    has_class = np.zeros((len(whole.shapes), num_classes), bool)
    for volume, shape in enumerate(whole.shapes):
        labels = masks[int(whole.begins[volume]) : int(whole.begins[volume + 1])]
        for label in range(1, num_classes):
            places = np.flatnonzero(labels == label)
            if len(places):
                chosen = np.random.default_rng([volume, label]).random(SPOTS) * len(places)
                found = np.unravel_index(places[chosen.astype(np.int64)], shape)
                spots[volume, label] = np.stack(found, axis=1)
                has_class[volume, label] = True
    return spots, has_class
