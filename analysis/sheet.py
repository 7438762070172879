"""One self-contained page of a data set: images with their masks laid over them, split by split.

Every word that comes from the data is escaped.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from analysis import theme
from analysis.page import base64_of, still_page, write_page
from analysis.theme import plain
from trainables.data.rows import joined
from trainables.data.source import NOT_LABELLED, Split

if TYPE_CHECKING:
    from trainables.data import Dataset

Pixels = npt.NDArray[np.uint8]

SPLITS: tuple[Split, ...] = ("train", "val", "test", "pretrain")
EXAMPLES = 3  # of each class and split
TINT = 0.35  # of a class's colour within its outline
WIDEST = 256  # pixels of a picture; larger ones are shrunk, small ones are enlarged
GAP = 4  # pixels between a picture and the same with its mask
BARS = 64  # of a histogram
SAMPLED = 200  # images whose intensities are counted
NOT_LABELLED_COLOUR = "#a0a0a0"


class Example(NamedTuple):
    name: str
    uri: str  # the picture, and beside it the same with its mask


class Part(NamedTuple):
    """A split: how much of each class it shows, and a few of its images."""

    name: str
    images: int
    groups: int
    shares: list[str]  # of the pixels, of each class
    shown: list[int]  # images that show each class
    examples: list[tuple[str, list[Example]]]  # of each class


def build_sheet(dataset: Dataset, study: str, output: Path) -> Path:
    """Write the page about prepared data; returns where it lies."""
    parts = [_part(dataset, split) for split in SPLITS]
    page = still_page(
        "sheet",
        {},
        study=plain(study),
        data=plain(dataset.name),
        extent=" x ".join(map(str, dataset.size)),
        is_volume=dataset.volumes is not None,
        classes=[plain(name) for name in dataset.classes] if dataset.is_labelled else [],
        colours=len(theme.CLASSES),
        parts=[part for part in parts if part.images],
        notes=[plain(note, 400) for note in [*dataset.about["notes"], *_channels(dataset)]],
        histograms=_histograms(dataset),
        ends=plain(dataset.about["intensities"]["ends"], 200),
    )
    return write_page(output, page)


def _channels(dataset: Dataset) -> list[str]:
    """Which of several channels the pictures show."""
    if dataset.channels in (1, 3):
        return []
    shown = "the first" if dataset.channels == 2 else "the first three, as red, green and blue,"
    return [f"the pictures below show {shown} of {dataset.channels} channels"]


def _part(dataset: Dataset, split: Split) -> Part:
    """Of a split; of pretraining the images that no other split has."""
    rows = dataset.rows(split)
    if split == "pretrain":
        rows = np.setdiff1d(rows, dataset.rows("train"))
    owners = _owners(dataset)[rows]
    numbers = np.unique(owners).tolist()
    groups = {dataset.groups[row] for row in rows}
    if not dataset.is_labelled or split == "pretrain":
        few = [_example(dataset, number) for number in _spread(numbers)]
        return Part(split, len(numbers), len(groups), [], [], [("", few)] if few else [])
    counts = np.array([_counts(dataset, number) for number in numbers]).reshape(
        len(numbers), len(dataset.classes)
    )
    share_K = counts.sum(axis=0) / max(1, counts.sum())
    examples = []
    for place, name in enumerate(dataset.classes):
        showing = [number for number, count in zip(numbers, counts, strict=True) if count[place]]
        if place and showing:
            few = [_example(dataset, number, place) for number in _spread(showing)]
            examples.append((plain(name), few))
    return Part(
        split,
        len(numbers),
        len(groups),
        [f"{100 * share:.3g} %" for share in share_K],
        (counts > 0).sum(axis=0).tolist(),
        examples,
    )


def _spread(numbers: list[int]) -> list[int]:
    return numbers[:: max(1, len(numbers) // EXAMPLES)][:EXAMPLES]


def _owners(dataset: Dataset) -> npt.NDArray[np.int64]:
    """The image or volume of each row."""
    parts = dataset.tiles or dataset.volumes
    return np.arange(len(dataset.splits)) if parts is None else np.asarray(parts.owner)


def _counts(dataset: Dataset, number: int) -> npt.NDArray[np.int64]:
    """Pixels of each class in an image."""
    found = np.bincount(_labels(dataset, number).ravel(), minlength=NOT_LABELLED + 1)
    return found[: len(dataset.classes)]


def _labels(dataset: Dataset, number: int) -> npt.NDArray[np.uint8]:
    if dataset.volumes is not None:
        return np.asarray(dataset.mask_of(number))
    if dataset.tiles is not None:
        return np.asarray(dataset.labels_of(number)[0])
    return np.asarray(dataset.masks[number])


def _objects(dataset: Dataset, number: int) -> npt.NDArray[np.uint16] | None:
    """The numbers of its objects, where the data have them."""
    if dataset.instances is None:
        return None
    if dataset.tiles is not None:
        return dataset.labels_of(number)[1]
    return np.asarray(dataset.instances[number])


def _picture(dataset: Dataset, number: int) -> npt.NDArray[Any]:
    """An image or a volume (C, *S), whole."""
    if dataset.volumes is not None:
        return np.asarray(dataset.image_of(number))
    if dataset.tiles is None:
        return np.asarray(dataset.images[number])
    rows = np.flatnonzero(dataset.tiles.owner == number)
    corners, shape = dataset.tiles.corners[rows], dataset.tiles.shapes[number].tolist()
    channels = [
        joined(dataset.images[rows, channel].astype(np.int32), corners, shape, -1)
        for channel in range(dataset.channels)
    ]
    return np.stack(channels)


def _example(dataset: Dataset, number: int, place: int = 0) -> Example:
    """A picture and its mask; of a volume the plane across its last axis that shows most."""
    picture = _picture(dataset, number).astype(np.float64)
    labels = _labels(dataset, number) if dataset.is_labelled else None
    tall = 1.0  # a pixel, by its width
    if dataset.volumes is not None:
        is_class = np.ones(picture.shape[1:]) if labels is None else labels == place
        depth = int(is_class.sum(axis=(0, 1)).argmax())
        # as radiologists look at it: the patient's right on the left, the front at the top
        picture = picture[..., depth][:, ::-1, ::-1].swapaxes(1, 2)
        labels = None if labels is None else labels[..., depth][::-1, ::-1].T
        across, forwards, _ = dataset.volumes.spacings[number].tolist()
        tall = forwards / across
    shown = np.clip((picture - dataset.low) / (dataset.high - dataset.low), 0, 1)
    grey = np.repeat(shown[:1], 3, axis=0) if len(shown) < 3 else shown[:3]
    pixels = (255 * grey).round().astype(np.uint8).transpose(1, 2, 0)
    both = [pixels]
    if labels is not None:
        both.append(overlaid(pixels, labels, _objects(dataset, number)))
    row = int(np.flatnonzero(_owners(dataset) == number)[0])
    return Example(plain(dataset.names[row].partition("@")[0]), _uri(both, tall))


def overlaid(
    pixels_HW3: Pixels,
    labels_HW: npt.NDArray[np.uint8],
    objects_HW: npt.NDArray[np.uint16] | None = None,
) -> Pixels:
    """The picture with each class, and each object, outlined in its colour, and a little within."""
    mixed = pixels_HW3.astype(np.float64)
    is_inside = np.ones(labels_HW.shape, bool)
    for numbers in (labels_HW,) if objects_HW is None else (labels_HW, objects_HW):
        padded = np.pad(numbers, 1, mode="edge")
        for shift in ((0, 1), (2, 1), (1, 0), (1, 2)):
            part = padded[shift[0] :, shift[1] :][: numbers.shape[0], : numbers.shape[1]]
            is_inside &= part == numbers
    for label in np.unique(labels_HW).tolist():
        if label == 0:
            continue
        colour = NOT_LABELLED_COLOUR
        if label != NOT_LABELLED:
            colour = theme.CLASSES[(label - 1) % len(theme.CLASSES)]
        level = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        weight = np.where(is_inside, TINT, 1.0)[labels_HW == label, None]
        mixed[labels_HW == label] = weight * level + (1 - weight) * pixels_HW3[labels_HW == label]
    return mixed.round().astype(np.uint8)


def _uri(pictures: list[Pixels], tall: float) -> str:
    """Pictures beside each other, as a PNG within the page; their pixels are `tall` by wide."""
    height, width = pictures[0].shape[0] * tall, float(pictures[0].shape[1])
    factor = WIDEST / max(height, width)
    factor = max(1, math.floor(factor)) if factor >= 1 else factor
    how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    size = max(1, round(width * factor)), max(1, round(height * factor))
    resized = [np.asarray(Image.fromarray(one).resize(size, how)) for one in pictures]
    gap = np.full((size[1], GAP, 3), 128, np.uint8)
    row = resized[0] if len(resized) == 1 else np.concatenate([resized[0], gap, resized[1]], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(row).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64_of(buffer.getvalue())}"


def _histograms(dataset: Dataset) -> list[list[float]]:
    """Of each channel, how high the bars of its intensities are, the highest 1."""
    rows = dataset.rows("pretrain")
    sampled = np.unique(_owners(dataset)[rows])
    heights = []
    pictures = [_picture(dataset, n) for n in sampled[:: len(sampled) // SAMPLED + 1].tolist()]
    for channel in range(dataset.channels):
        values = np.concatenate([picture[channel].ravel() for picture in pictures])
        counts, _ = np.histogram(values, BARS, (dataset.low, dataset.high))
        heights.append((counts / max(1, counts.max())).round(4).tolist())
    return heights
