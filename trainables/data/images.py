"""Two-dimensional image files with class masks, from a manifest (CSV) or from a folder.

Each image is inspected and hashed first; every problem of every file is told at once; then the
store decodes. Splits go by group, and a leak between splits is an error.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field
from scipy import ndimage

from trainables.data import files
from trainables.data.entries import (
    Entry,
    Shares,
    Word,
    named_classes,
    read_folder,
    read_manifest,
    split_by_group,
    with_groups,
)
from trainables.data.files import Header
from trainables.data.store import NOT_LABELLED, Decoded, Source, refuse
from trainables.errors import UserError

Array = npt.NDArray[Any]
Edge = Annotated[int, Field(ge=8, le=4096)]
Level = Annotated[int, Field(ge=0, le=65535)]

DEFAULT_SHARES = Shares()
MAX_CLASSES = 64
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Inspected:
    """What is known of an entry before it is decoded; hashes are SHA-256 of the bytes."""

    header: Header
    hashes: dict[str, str]


@dataclass(frozen=True)
class Reading:
    """How files become rows: the part of the settings that decoding needs."""

    size: tuple[int, int]
    fit: Literal["tile", "resize"]
    channels: int | None
    mask_encoding: Literal["index", "binary"]
    ignore: int | None
    classes: list[str] | None
    inside: Path | None


def images(
    root: Path,
    *,
    manifest: Annotated[
        str | None,
        Field(description="CSV with the columns image, mask and, if wanted, split, group"),
    ] = None,
    folder: Annotated[
        str | None, Field(description="folder with images/ and masks/ of the same stems")
    ] = None,
    size: Edge | tuple[Edge, Edge] = 128,
    fit: Annotated[
        Literal["tile", "resize"],
        Field(description="cut at full resolution, or resize the whole image"),
    ] = "tile",
    channels: Annotated[int, Field(ge=1, le=files.MAX_CHANNELS)] | None = None,
    classes: list[str] | None = None,
    small_classes: list[str] | None = None,
    where: Annotated[
        dict[str, str | int] | None,
        Field(description="column of the manifest: value that its rows must have"),
    ] = None,
    columns: Annotated[
        dict[Word, str] | None,
        Field(description="our word: the name of that column in the manifest"),
    ] = None,
    group: Annotated[
        str | None, Field(description="regular expression on file stems, where the group is blank")
    ] = None,
    mask_encoding: Literal["index", "binary"] = "index",
    ignore: Annotated[Level | None, Field(description="mask value that means not labelled")] = None,
    window: Annotated[
        tuple[Level, Level] | None, Field(description="16 bit: intensities that become 0 and 1")
    ] = None,
    split: Shares = DEFAULT_SHARES,
    allow_outside: Annotated[
        bool, Field(description="read files that are not below the data folder")
    ] = False,
) -> Source:
    """PNG, JPEG or TIFF files named in a manifest (image, mask, split, group), or in a folder."""
    if (manifest is None) == (folder is None):
        raise UserError(
            "data: give either manifest (a CSV file) or folder (with images/ and masks/)"
        )
    if folder is not None and (where or columns):
        raise UserError("data: where and columns choose from a manifest; leave them out")
    if window is not None and window[0] >= window[1]:
        raise UserError(f"data.window: {list(window)} is empty; expected [low, high], low < high")
    if manifest is not None:
        base = (root / manifest).parent
        entries = read_manifest(root / manifest, where or {}, columns or {})
        name = Path(manifest).stem + "".join(
            f" {key}={value}" for key, value in (where or {}).items()
        )
    else:
        base = root / str(folder)
        entries = read_folder(base)
        name = base.resolve().name
    entries = with_groups(entries, group)
    if classes is None:
        classes, found_small = named_classes(entries, base)
        small_classes = found_small if small_classes is None else small_classes
    reading = Reading(
        size=(size, size) if isinstance(size, int) else size,
        fit=fit,
        channels=channels,
        mask_encoding=mask_encoding,
        ignore=ignore,
        classes=classes,
        inside=None if allow_outside else base,
    )
    _check_classes(reading, small_classes or [])

    inspected = _in_parallel(lambda entry: inspect_entry(entry, reading), entries)
    found = {i: item for i, item in enumerate(inspected) if isinstance(item, Inspected)}
    problems = [str(item) for item in inspected if isinstance(item, UserError)]
    problems += _disagreements(entries, found, reading)
    entries, notes, leaks = split_by_group(entries, split)
    problems += leaks + _duplicates(entries, found)
    if problems:  # decode what is left, so that one run tells everything
        rest = _in_parallel(lambda i: decode_entry(entries[i], found[i], reading, False), found)
        refuse([*problems, *(str(item) for item in rest if isinstance(item, UserError))])

    is_labelled = any(entry.mask for entry in entries)
    kept = [i for i, e in enumerate(entries) if e.mask or not is_labelled or e.split == "pretrain"]
    if len(kept) < len(entries):
        notes.append(f"{len(entries) - len(kept)} images of val or test have no mask: left out")
    entries, reads = [entries[i] for i in kept], [found[i] for i in kept]
    _check_not_empty(entries)
    has_instances = any(entry.instances for entry in entries)
    parts: list[range] = []
    names: list[str] = []
    groups: list[str] = []
    splits: list[str] = []
    for entry, read in zip(entries, reads, strict=True):
        corners = tile_corners(read.header.size, reading.size) if fit == "tile" else [(0, 0)]
        parts.append(range(len(names), len(names) + len(corners)))
        for y, x in corners:
            names.append(entry.name if len(corners) == 1 else f"{entry.name}@{y},{x}")
            groups.append(str(entry.group))
            splits.append(str(entry.split))
    header = reads[0].header
    return Source(
        name=name,
        identity={
            "files": [read.hashes for read in reads],
            "fit": fit,
            "mask_encoding": mask_encoding,
            "ignore": ignore,
        },
        size=reading.size,
        channels=channels or header.channels,
        dtype="uint16" if header.bits == 16 else "uint8",
        classes=classes or (None if is_labelled else ["background"]),
        small_classes=[(classes or []).index(word) for word in small_classes or []],
        window=window,
        is_labelled=is_labelled,
        has_instances=has_instances,
        names=names,
        groups=groups,
        splits=splits,
        parts=parts,
        decode=lambda part: decode_entry(entries[part], reads[part], reading, has_instances),
        notes=notes,
    )


def inspect_entry(entry: Entry, reading: Reading) -> Inspected:
    """Headers and hashes of an entry's files; an error says what does not fit."""
    with _naming(entry, "image"):
        image = files.read(entry.image, reading.inside)
        header = files.inspect(image)
        _convert(np.empty((header.channels, 0, 0), np.uint8), header, reading.channels)
        smallest = min(
            zip(header.size, reading.size, strict=True), key=lambda pair: pair[0] - pair[1]
        )
        if reading.fit == "tile" and smallest[0] < smallest[1]:
            raise UserError(
                f"is {_times(header.size)}, smaller than a tile of {_times(reading.size)}; choose "
                f"a smaller size, or fit: resize"
            )
    hashes = {"image": hashlib.sha256(image).hexdigest()}
    for kind in ("mask", "instances"):
        path: Path | None = getattr(entry, kind)
        if path is None:
            continue
        with _naming(entry, kind):
            data = files.read(path, reading.inside)
            labels = files.inspect(data, as_labels=True)
            if labels.channels != 1 or labels.is_lossy:
                raise UserError(
                    f"has {labels.channels} channels{' and is lossy' * labels.is_lossy}; expected "
                    f"one channel of class indices, as PNG or TIFF"
                )
            if labels.size != header.size:
                raise UserError(
                    f"is {_times(labels.size)}, but its image {entry.name} is {_times(header.size)}"
                )
        hashes[kind] = hashlib.sha256(data).hexdigest()
    return Inspected(header, hashes)


def decode_entry(
    entry: Entry, inspected: Inspected, reading: Reading, with_instances: bool
) -> Decoded:
    """The rows of an entry: its tiles, or itself resized."""
    with _naming(entry, "image"):
        data = _unchanged(entry, "image", inspected, reading)
        picture = _convert(files.pixels(data), inspected.header, reading.channels)
    labels = np.full(inspected.header.size, NOT_LABELLED, np.uint8)
    if entry.mask:
        with _naming(entry, "mask"):
            data = _unchanged(entry, "mask", inspected, reading)
            labels = _class_labels(files.pixels(data, as_labels=True)[0], reading)
    objects = np.zeros(labels.shape, np.uint16)
    if with_instances and entry.instances:
        with _naming(entry, "instances"):
            data = _unchanged(entry, "instances", inspected, reading)
            objects = files.pixels(data, as_labels=True)[0].astype(np.uint16)
    elif with_instances:
        objects = _components(labels)
    if reading.fit == "tile":
        return _tiles(picture, labels, objects, reading.size)
    nearest = [
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(reading.size, labels.shape, strict=True)
    ]
    near = np.ix_(*nearest)
    return Decoded(_resize(picture, reading.size)[None], labels[near][None], objects[near][None])


def tile_corners(size: tuple[int, int], tile: tuple[int, int]) -> list[tuple[int, int]]:
    """Upper left corners of as few tiles as cover the image, evenly spaced, row by row."""
    starts = [
        np.rint(np.linspace(0, edge - part, -(-edge // part))).astype(int).tolist()
        for edge, part in zip(size, tile, strict=True)
    ]
    return [(y, x) for y in starts[0] for x in starts[1]]


def _tiles(picture: Array, labels: Array, objects: Array, tile: tuple[int, int]) -> Decoded:
    """Tiles at the original resolution; a pixel is labelled in the first tile that has it only."""
    labels, objects = labels.copy(), objects.copy()
    cut: list[tuple[Array, Array, Array]] = []
    for y, x in tile_corners(labels.shape, tile):
        part = (slice(y, y + tile[0]), slice(x, x + tile[1]))
        cut.append((picture[:, part[0], part[1]], labels[part].copy(), objects[part].copy()))
        labels[part], objects[part] = NOT_LABELLED, 0
    images_N, masks_N, instances_N = (np.stack(column) for column in zip(*cut, strict=True))
    return Decoded(images_N, masks_N, instances_N)


def _resize(picture: Array, size: tuple[int, int]) -> Array:
    """Mean over areas when shrinking, bilinear otherwise."""
    is_smaller = size[0] <= picture.shape[1] and size[1] <= picture.shape[2]
    how = Image.Resampling.BOX if is_smaller else Image.Resampling.BILINEAR
    resized = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize(size[::-1], how))
        for channel in picture
    ]
    largest = np.iinfo(picture.dtype).max
    return np.asarray(np.clip(np.rint(np.stack(resized)), 0, largest), picture.dtype)


def _convert(picture: Array, header: Header, asked: int | None) -> Array:
    """The picture (C, H, W) with the asked channels, if there is one way to get there."""
    have = header.channels
    if asked is None:
        if header.has_alpha or header.is_stack:
            what = "an alpha channel" if header.has_alpha else "pages, which may be channels or not"
            ways = f"channels: {have} keeps them, channels: 1 or 3 converts to grey or RGB"
            raise UserError(f"has {have} channels with {what}; say which: {ways}")
        return picture
    if asked == have:
        return picture
    if header.has_alpha:
        opaque = replace(header, channels=have - 1, has_alpha=False)
        return _convert(picture[:-1], opaque, asked)
    if (have, asked) == (1, 3):
        return np.repeat(picture, 3, axis=0)
    if (have, asked) == (3, 1):
        grey = np.tensordot(np.array(LUMINANCE), picture, axes=1)
        return np.asarray(np.rint(grey)[None], picture.dtype)
    raise UserError(
        f"has {have} channels, channels: {asked} was asked for; expected {asked} channels"
        + (", or one or three" if asked in (1, 3) else "")
    )


def _class_labels(values: Array, reading: Reading) -> npt.NDArray[np.uint8]:
    """Class indices with 255 where nothing is labelled; an error for any other value."""
    counts = np.bincount(values.ravel())
    present = set(np.flatnonzero(counts).tolist()) - {reading.ignore}
    if reading.mask_encoding == "binary":
        if not present <= {0, 1} and not present <= {0, 255}:
            raise UserError(f"has the values {_some(present)}; expected 0 and 255 (or 0 and 1)")
        labels = (values > 0).astype(np.uint8)
    else:
        limit = len(reading.classes) if reading.classes else MAX_CLASSES
        wrong = {value for value in present if value >= limit}
        if wrong:
            expected = f"class indices 0 to {limit - 1}"
            if reading.classes:
                expected += f" ({', '.join(reading.classes)})"
            ways = "set ignore: 255 if that means not labelled"
            if present <= {0, 255}:
                ways = f"set mask_encoding: binary if 255 is the object, or {ways}"
            raise UserError(
                f"has the values {_some(wrong)}; expected {expected}"
                + (f"; {ways}" if 255 in wrong else "")
            )
        labels = values.astype(np.uint8)
    if reading.ignore is not None:
        labels[values == reading.ignore] = NOT_LABELLED
    return labels


def _components(labels: Array) -> npt.NDArray[np.uint16]:
    """Touching pixels of a class as objects, for images without instances of their own."""
    objects = np.zeros(labels.shape, np.uint16)
    for label in np.unique(labels):
        if 0 < label < NOT_LABELLED:
            found, _ = ndimage.label(labels == label, structure=np.ones((3, 3)))
            objects[found > 0] = found[found > 0] + objects.max()
    return objects


def _unchanged(entry: Entry, kind: str, inspected: Inspected, reading: Reading) -> bytes:
    data = files.read(getattr(entry, kind), reading.inside)
    if hashlib.sha256(data).hexdigest() != inspected.hashes[kind]:
        raise UserError("changed while it was read; start again")
    return data


def _check_classes(reading: Reading, small_classes: Sequence[str]) -> None:
    classes = reading.classes
    if classes is None:
        if small_classes:
            raise UserError(
                "data.small_classes: name the classes as well: classes: [background, …]"
            )
        return
    if len(classes) > MAX_CLASSES or len(set(classes)) < len(classes) or not classes:
        raise UserError(f"data.classes: {classes}; expected 1 to {MAX_CLASSES} different names")
    if reading.mask_encoding == "binary" and len(classes) != 2:
        raise UserError(f"data.classes: binary masks have 2 classes, {len(classes)} are named")
    unknown = [name for name in small_classes if name not in classes[1:]]
    if unknown:
        raise UserError(f"data.small_classes: {unknown} are not among {classes[1:]}")


def _disagreements(
    entries: Sequence[Entry], found: dict[int, Inspected], reading: Reading
) -> list[str]:
    """Images that differ from most of the others in bits or channels."""

    def kind(inspected: Inspected) -> tuple[int, int]:
        return inspected.header.bits, reading.channels or inspected.header.channels

    usual = Counter(map(kind, found.values())).most_common(1)
    return [
        f"{_label(entries[i], 'image')} has {kind(item)[1]} channels of {kind(item)[0]} bits; most "
        f"images have {usual[0][0][1]} of {usual[0][0][0]}; set channels, or leave it out"
        for i, item in found.items()
        if kind(item) != usual[0][0]
    ]


def _duplicates(entries: Sequence[Entry], found: dict[int, Inspected]) -> list[str]:
    """Images of the same content in two splits, and images that are listed twice."""
    first: dict[str, Entry] = {}
    problems = []
    for i, item in found.items():
        entry = entries[i]
        twin = first.setdefault(item.hashes["image"], entry)
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


def _check_not_empty(entries: Sequence[Entry]) -> None:
    counts = Counter(str(entry.split) for entry in entries)
    for words in (("train", "pretrain"), ("val",)):
        if not any(counts[word] for word in words):
            raise UserError(
                f"data: no image is in {' or '.join(words)} (there are {dict(counts)}); name some "
                f"in the split column, or leave it blank to have a share of the groups drawn"
            )


def _in_parallel(task: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """What the task returns for each item, or its UserError."""

    def attempt(item: Any) -> Any:
        try:
            return task(item)
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(attempt, items))


@contextmanager
def _naming(entry: Entry, kind: str) -> Iterator[None]:
    """Puts the name of the file in front of an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{_label(entry, kind)} {error}") from error


def _label(entry: Entry, kind: str) -> str:
    return f"{getattr(entry, kind)}{entry.line}"


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _some(values: set[int]) -> str:
    first = sorted(values)
    return ", ".join(map(str, first[:8])) + (", …" if len(first) > 8 else "")
