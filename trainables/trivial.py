"""Segmenters without an encoder: what a data set gives away to a threshold or to a few pixels.

    threshold_miou      thresholds on the luminance of each image (Otsu 1979; for several classes
                        Liao, Chen & Chung 2001), found without labels; which class lies between
                        which thresholds is what has the highest mIoU on labelled training images
    ridge_pixels_miou   ridge regression on the raw pixels of a patch, see ridge.py

Data on which these come close to trained networks cannot tell one encoder from another.
To add one, write a function, and a line in SEGMENTERS and (`is_trivial`) in metrics.METRICS.

They are judged as trained segmenters are: one confusion matrix over the split, mean IoU without
background. An image is whole for its thresholds, not a tile of it, and a volume as well. The
regression tells the crops that cover a volume: voxels in two of them count twice.

K classes · L levels of luminance · R ranks, from dark to bright · M pixels of an image
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from trainables.data import Dataset
from trainables.data.images import LUMINANCE
from trainables.data.rows import joined
from trainables.data.source import Array, Split
from trainables.dense import PIXELS, batches, labelled_patches, probed, raw_values
from trainables.metrics import TEST
from trainables.probe import probe_rows
from trainables.remembered import remembered
from trainables.ridge import segmenter
from trainables.scores import IGNORED, Counts, confusion, miou_of, mious_of

LEVELS = 256
MOST_IMAGES = 256  # training images by which classes are given to ranks

_kept: dict[Hashable, dict[str, float]] = {}

Judge = Callable[[Split], Counts]  # the confusion matrix (K, K) over a split
# (dataset, rows with labels to learn from, patch, device, alive) -> how it judges a split; None:
# it cannot be had of these rows
Segmenter = Callable[
    [Dataset, NDArray[np.int64], Sequence[int], torch.device, Callable[[], None]], Judge | None
]


def scores(
    dataset: Dataset,
    rows: NDArray[np.int64],
    patch: Sequence[int],
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
    splits: Sequence[Split] = ("val", "test"),
) -> dict[str, float]:
    """Key of METRICS -> mIoU of each segmenter on each split; what does not exist is left out.

    A process computes them once for all trials that have these rows and patches.
    """

    def compute() -> dict[str, float]:
        found: dict[str, float] = {}
        for key, fit in SEGMENTERS.items() if len(rows) else ():
            judge = fit(dataset, rows, patch, device, alive)
            for split in splits:
                if judge is not None and len(dataset.rows(split)) > 0:
                    found[f"{TEST if split == 'test' else ''}{key}"] = miou_of(judge(split))
        return {key: value for key, value in found.items() if not math.isnan(value)}

    about = (dataset, tuple(patch), rows.tobytes(), tuple(splits), device.type)
    return remembered(_kept, about, compute)


def threshold(
    dataset: Dataset,
    rows: NDArray[np.int64],
    patch: Sequence[int],
    device: torch.device,
    alive: Callable[[], None],
) -> Judge:
    """Thresholds on each image's luminance; the labels only name what lies between them."""
    num_classes = len(dataset.classes)

    def ranked(rows: NDArray[np.int64], most: int | None = None) -> Counts:
        total = np.zeros((num_classes, num_classes), np.int64)
        for level_M, label_M in images_of(dataset, rows, most):
            alive()
            total += rank_counts(level_M, label_M, num_classes)
        return total

    class_of_R = best_classes(ranked(rows, MOST_IMAGES))
    return lambda split: _named(ranked(dataset.rows(split)), class_of_R)


def ridge_pixels(
    dataset: Dataset,
    rows: NDArray[np.int64],
    patch: Sequence[int],
    device: torch.device,
    alive: Callable[[], None],
) -> Judge | None:
    """Ridge regression on the raw pixels of a patch; of two groups or more."""
    chunk = max(1, PIXELS // math.prod(dataset.size))
    values_of = partial(raw_values, patch=patch)
    some = probed(dataset, rows)
    patches = labelled_patches(dataset, some, patch, values_of, device, chunk, alive)
    if len(set(patches.fold_N.tolist())) < 2:
        return None
    fitted = segmenter(patches, len(dataset.classes))

    def judge(split: Split) -> Counts:
        total = np.zeros((len(dataset.classes),) * 2, np.int64)
        rows = dataset.rows(split)
        for _, images, labels_BPQ in batches(dataset, rows, patch, device, chunk, alive):
            predicted = fitted.classes(values_of(images).flatten(0, 1))
            found = confusion(labels_BPQ.flatten(0, 1), predicted, len(dataset.classes))
            total += found.cpu().numpy()
        return total

    return judge


SEGMENTERS: dict[str, Segmenter] = {
    "threshold_miou": threshold,
    "ridge_pixels_miou": ridge_pixels,
}


def images_of(
    dataset: Dataset, rows: NDArray[np.int64], most: int | None = None
) -> Iterator[tuple[Array, Array]]:
    """(luminance (M,), labels (M,)) of each whole image of these rows, or `most` of them."""
    if dataset.volumes is not None:
        for volume in _some(np.unique(dataset.volumes.owner[rows]), most):
            levels = dataset.image_of(int(volume)).reshape(dataset.channels, -1)
            yield luminance(levels, dataset), dataset.mask_of(int(volume)).ravel()
        return
    if dataset.tiles is None:
        for row in _some(rows, most):
            levels = dataset.images[row].reshape(dataset.channels, -1)
            yield luminance(levels, dataset), dataset.masks[row].ravel()
        return
    tiles = dataset.tiles
    for image in _some(np.unique(tiles.owner[rows]), most):
        own, shape = np.flatnonzero(tiles.owner == image), tiles.shapes[image].tolist()
        levels = np.stack(
            [
                joined(dataset.images[own, channel], tiles.corners[own], shape, 0).ravel()
                for channel in range(dataset.channels)
            ]
        )
        yield luminance(levels, dataset), dataset.labels_of(int(image))[0].ravel()


def luminance(levels_CM: Array, dataset: Dataset) -> NDArray[np.uint8]:
    """Of stored intensities, in LEVELS steps (M,); of other channels than RGB their mean."""
    channels = len(levels_CM)
    weights = LUMINANCE if channels == len(LUMINANCE) else (1 / channels,) * channels
    grey_M = np.zeros(levels_CM.shape[1], np.float32)
    for weight, level_M in zip(weights, levels_CM, strict=True):
        grey_M += np.float32(weight) * level_M
    share_M = (grey_M - dataset.low) / (dataset.high - dataset.low)
    return np.asarray(np.rint(share_M.clip(0, 1) * (LEVELS - 1)), np.uint8)


def rank_counts(level_M: NDArray[np.uint8], label_M: NDArray[np.uint8], num_classes: int) -> Counts:
    """How many labelled pixels of each rank are of each class (R, K)."""
    cuts = otsu(np.bincount(level_M, minlength=LEVELS), num_classes)
    rank_M = np.searchsorted(cuts, np.arange(LEVELS), side="right")[level_M]
    is_labelled_M = label_M != IGNORED
    cell_M = rank_M[is_labelled_M] * num_classes + label_M[is_labelled_M]
    counts = np.bincount(cell_M, minlength=num_classes**2)
    return np.asarray(counts.reshape(num_classes, num_classes), np.int64)


def otsu(histogram_L: NDArray[np.int64], num_classes: int) -> list[int]:
    """The K - 1 levels at which the next brighter class begins, of the least variance within.

    By dynamic programming over the levels, so exact for any number of classes.
    """
    number, total = (
        np.concatenate([[0.0], np.cumsum(values)])
        for values in (histogram_L, histogram_L * np.arange(len(histogram_L)))
    )
    # as the sum of squares is what it is, squared sums over their numbers are to be the largest
    number_LL, total_LL = number - number[:, None], total - total[:, None]
    gain_LL = np.where(number_LL > 0, total_LL**2 / np.maximum(number_LL, 1), 0.0)
    gain_LL[np.tril_indices(len(gain_LL), -1)] = -np.inf
    best_L, begins = gain_LL[0], []
    for _ in range(num_classes - 1):
        both_LL = best_L[:, None] + gain_LL
        begins.append(both_LL.argmax(axis=0))
        best_L = both_LL.max(axis=0)
    cuts, end = [], len(histogram_L)
    for begin_L in reversed(begins):
        end = int(begin_L[end])
        cuts.append(end)
    return cuts[::-1]


def best_classes(counts_RK: Counts) -> NDArray[np.int64]:
    """The class of each rank (R,) with the highest mIoU; several ranks may have the same.

    From each rank's most frequent class on, two ranks change at a time while that helps.
    """
    num_classes = len(counts_RK)
    class_of_R = np.asarray(counts_RK.argmax(axis=1), np.int64)
    best = miou_of(_named(counts_RK, class_of_R))
    while True:
        others = []
        for pair in itertools.combinations(range(num_classes), 2):
            for labels in itertools.product(range(num_classes), repeat=2):
                other_R = class_of_R.copy()
                other_R[list(pair)] = labels
                others.append(other_R)
        found = mious_of(np.stack([_named(counts_RK, other_R) for other_R in others]))
        if not found.max() > best:  # nor where there is nothing but background
            return class_of_R
        best, class_of_R = found.max(), others[int(found.argmax())]


def _named(counts_RK: Counts, class_of_R: NDArray[np.int64]) -> Counts:
    """The confusion matrix (K, K) when each rank is told as its class."""
    pixels_KK = np.zeros_like(counts_RK)
    for rank, label in enumerate(class_of_R):
        pixels_KK[:, label] += counts_RK[rank]
    return pixels_KK


def _some(values: Array, most: int | None) -> Array:
    return values if most is None else probe_rows(values, most)
