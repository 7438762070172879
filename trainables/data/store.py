"""Images decoded once: a content-addressed folder of memory maps.

A source says what the data are (`Source`); `write` decodes them into `cache/<fingerprint>/`, once
for all processes of a node; `open_dataset` maps that folder.

    images.npy (N, C, *S) uint8 or uint16    masks.npy (N, *S) uint8    instances.npy uint16
    rows.json   name, group and split of each row
    meta.json   the rest, and the size of each file; written last

Volumes are whole, each with a shape of its own: images.npy and masks.npy then are flat, one volume
behind the other; rows.json has their shapes and spacings, and spots.npy (N, K, M, A) some voxels
of each class, around which segmentation may look. Their rows are crops that cover them.

Letters: N images, C channels, *S pixels (any number of axes A), K classes, M spots of a class.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from trainables.config import canonical_json, digest
from trainables.errors import StorageError, UserError
from trainables.metrics import diameter

Array = npt.NDArray[Any]
Split = Literal["pretrain", "train", "val", "test"]

SPLITS: tuple[Split, ...] = ("pretrain", "train", "val", "test")
NOT_LABELLED = 255  # in masks: counts neither in a loss nor in a score
FORMAT = 1  # raise it when the same source would be decoded to other bytes
SHOWN_PROBLEMS = 20
PIXELS_AT_ONCE = 2**24  # that are counted or clipped in one go
DECODING_BYTES = 2**31  # that volumes decoded side by side may take
SPOTS = 256  # voxels of each class and volume that are remembered
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """What one part of a source (a file, a generated image) holds: n rows of the data set."""

    images: Array  # (n, C, *S)
    masks: Array  # (n, *S) uint8
    instances: Array | None = None  # (n, *S) uint16, 0 = no object


@dataclass(frozen=True)
class Whole:
    """What a source of volumes promises of them beside their voxels."""

    shapes: list[tuple[int, ...]]
    spacings: list[tuple[float, ...]]  # mm from voxel to voxel
    overlap: (
        float  # of neighbouring windows, as a share of their edges, where whole ones are judged
    )
    tolerance: float  # mm within which surfaces agree
    decode_bytes: int  # memory that decoding the largest takes


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
    whole: Whole | None = None  # of volumes, where `size` is that of a crop

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
        return digest(facts)


@dataclass(frozen=True, eq=False)
class Volumes:
    """Where whole volumes stand in flat arrays, and which crops of them are the data set's rows."""

    shapes: npt.NDArray[np.int64]  # (N, A)
    spacings: npt.NDArray[np.float64]  # (N, A) mm
    begins: npt.NDArray[np.int64]  # (N,) the first voxel of each
    owner: npt.NDArray[np.int64]  # (rows,) the volume of each row
    corners: npt.NDArray[np.int64]  # (rows, A) where its crop begins
    spots: npt.NDArray[np.uint16]  # (N, K, M, A) voxels of each class, 0 where it has none
    has_class: npt.NDArray[np.bool_]  # (N, K); never the background
    overlap: float
    tolerance: float


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set; the arrays are memory maps that all processes of a node share."""

    folder: Path
    fingerprint: str
    name: str
    size: tuple[int, ...]
    channels: int
    classes: list[str]
    small_classes: list[int]
    mean: tuple[float, ...]  # per channel over training images, in units of [0, 1]
    std: tuple[float, ...]
    low: float  # the intensity that maps to 0
    high: float  # the intensity that maps to 1
    object_edges: tuple[float, float]  # diameters in px or mm: thirds of the training objects
    is_labelled: bool
    images: Array  # (N, C, *S) uint8 or uint16; of volumes flat
    masks: Array  # (N, *S) uint8, 255 = not labelled; of volumes flat
    instances: Array | None  # (N, *S) uint16
    names: list[str]
    groups: list[str]
    splits: Array  # (N,) of words
    about: dict[str, Any]
    volumes: Volumes | None = None

    @property
    def is_padded(self) -> bool:
        """Whether a crop may reach beyond its volume."""
        return self.volumes is not None and bool((self.volumes.shapes < self.size).any())

    def image_of(self, volume: int) -> Array:
        """A whole volume (C, *shape) as it is stored."""
        assert self.volumes is not None
        return _part_of(self.images, self.volumes, volume, (self.channels,))

    def mask_of(self, volume: int) -> Array:
        """The labels (*shape) of a whole volume."""
        assert self.volumes is not None
        return _part_of(self.masks, self.volumes, volume, ())

    def volumes_of(self, split: Split) -> npt.NDArray[np.int64]:
        """The volumes whose crops are the rows of a split."""
        assert self.volumes is not None
        return np.unique(self.volumes.owner[self.rows(split)])

    def rows(self, split: Split) -> npt.NDArray[np.int64]:
        """Indices of a split; `pretrain` is `train` and the unlabelled, never `val` or `test`."""
        return rows_of(self.splits, split)

    def describe(self) -> dict[str, Any]:
        """What a person wants to know before training on it."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": {s: len(self.rows(s)) for s in SPLITS},
            **(
                {"volumes": {s: len(self.volumes_of(s)) for s in SPLITS}}
                if self.volumes is not None
                else {}
            ),
            "size": list(self.size),
            "channels": self.channels,
            "classes": self.classes,
            "small_classes": [self.classes[index] for index in self.small_classes],
            **self.about,
        }


def default_cache() -> Path:
    """Where prepared data sets stand: $MASKSTUDY_CACHE, or ~/.cache/maskstudy."""
    return Path(os.environ.get("MASKSTUDY_CACHE") or "~/.cache/maskstudy").expanduser()


def rows_of(splits: Array, split: Split) -> npt.NDArray[np.int64]:
    """Indices of the rows of a split."""
    words = ("train", "pretrain") if split == "pretrain" else (split,)
    return np.flatnonzero(np.isin(splits, words)).astype(np.int64)


def refuse(problems: Sequence[str]) -> None:
    """Raise one error with all problems, the first of them in full; nothing if there are none."""
    if problems:
        lines = [f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        if len(problems) > SHOWN_PROBLEMS:
            lines.append(f"  … and {len(problems) - SHOWN_PROBLEMS} more")
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise UserError(f"data: {count}\n" + "\n".join(lines))


def write(source: Source, cache: Path) -> Path:
    """The folder of the decoded source; decoded by the first process that asks for it."""
    fingerprint = source.fingerprint()
    folder = cache / fingerprint
    try:
        if folder.is_dir() and damage(folder) is None:
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{fingerprint}.lock"):
            reason = damage(folder) if folder.exists() else None
            if folder.exists() and reason is None:
                return folder  # another process was faster
            if reason:
                _LOG.warning("prepared data are damaged (%s); decoding again: %s", reason, folder)
            aside = cache / f".{fingerprint}.tmp"
            shutil.rmtree(aside, ignore_errors=True)  # of a process that died
            aside.mkdir()
            try:
                _decode_into(source, aside, fingerprint)
                if folder.exists():
                    shutil.rmtree(folder)
                os.rename(aside, folder)
                _sync(cache)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write prepared data to {cache}: {error.strerror or error}; "
            "set MASKSTUDY_CACHE to a folder that is writable and has room"
        ) from error
    return folder


def open_dataset(folder: Path) -> Dataset:
    """Map a prepared folder; nothing is decoded or copied."""
    reason = damage(folder)
    if reason:
        raise StorageError(f"prepared data in {folder} are damaged: {reason}; prepare them again")
    meta = json.loads((folder / "meta.json").read_text())
    rows = json.loads((folder / "rows.json").read_text())
    names, groups, splits = rows["names"], rows["groups"], rows["splits"]
    volumes = None
    if "shapes" in rows:
        volumes = _open_volumes(folder, tuple(meta["size"]), rows)
        names = _row_names(names, volumes)
        groups, splits = ([words[i] for i in volumes.owner] for words in (groups, splits))
    return Dataset(
        folder=folder,
        fingerprint=meta["fingerprint"],
        name=meta["name"],
        size=tuple(meta["size"]),
        channels=meta["channels"],
        classes=meta["classes"],
        small_classes=meta["small_classes"],
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        low=meta["low"],
        high=meta["high"],
        object_edges=tuple(meta["object_edges"]),
        is_labelled=meta["is_labelled"],
        images=_map(folder / "images.npy"),
        masks=_map(folder / "masks.npy"),
        instances=_map(folder / "instances.npy") if meta["has_instances"] else None,
        names=names,
        groups=groups,
        splits=np.array(splits),
        about=meta["about"],
        volumes=volumes,
    )


def tile_corners(size: Sequence[int], tile: Sequence[int]) -> list[tuple[int, ...]]:
    """First corners of as few tiles as cover the image, evenly spaced, the last axis fastest.

    An image that is smaller than a tile has one, at its own corner.
    """
    starts = [
        np.rint(np.linspace(0, max(0, edge - part), -(-edge // part))).astype(int).tolist()
        for edge, part in zip(size, tile, strict=True)
    ]
    return list(itertools.product(*starts))


def tile_names(name: str, corners: Sequence[Sequence[int]]) -> list[str]:
    """What the tiles of an image are called: like it, with their corners if they are several."""
    return [f"{name}@{','.join(map(str, corner))}" for corner in corners if len(corners) > 1] or [
        name
    ]


def damage(folder: Path) -> str | None:
    """Why a prepared folder cannot be used, or None."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for name, expected in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != expected:
                return f"{name} has {size} bytes instead of {expected}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "meta.json cannot be read"
    return None


def _open_volumes(folder: Path, size: tuple[int, ...], rows: dict[str, Any]) -> Volumes:
    shapes = np.array(rows["shapes"], np.int64)
    corners = [tile_corners(shape, size) for shape in shapes.tolist()]
    spots = _map(folder / "spots.npy")
    return Volumes(
        shapes=shapes,
        spacings=np.array(rows["spacings"], np.float64),
        begins=_begins(shapes)[:-1],
        owner=np.repeat(np.arange(len(shapes)), [len(found) for found in corners]),
        corners=np.array(list(itertools.chain(*corners)), np.int64),
        spots=spots,
        has_class=np.array(rows["has_class"], bool),
        overlap=rows["overlap"],
        tolerance=rows["tolerance"],
    )


def _row_names(names: Sequence[str], volumes: Volumes) -> list[str]:
    corners = [volumes.corners[volumes.owner == i].tolist() for i in range(len(names))]
    return [
        word for name, found in zip(names, corners, strict=True) for word in tile_names(name, found)
    ]


def _begins(shapes: Sequence[Sequence[int]] | Array) -> npt.NDArray[np.int64]:
    """The first voxel of each volume when one stands behind the other, and the end of the last."""
    return np.concatenate([[0], np.cumsum([math.prod(map(int, shape)) for shape in shapes])])


def _part_of(flat: Array, volumes: Volumes, volume: int, channels: tuple[int, ...]) -> Array:
    shape, begin = volumes.shapes[volume].tolist(), int(volumes.begins[volume])
    each = math.prod(channels)
    return flat[begin * each : (begin + math.prod(shape)) * each].reshape(*channels, *shape)


def _decode_into(source: Source, folder: Path, fingerprint: str) -> None:
    started = time.monotonic()
    num_images, pixels, channels = len(source.names), source.size, source.channels
    of_images: tuple[int, ...] = (num_images, channels, *pixels)
    of_masks: tuple[int, ...] = (num_images, *pixels)
    begins = np.zeros(0, np.int64)
    if source.whole is not None:
        begins = _begins(source.whole.shapes)
        tail = pixels[-1]  # the last line of a padded crop goes on behind the last voxel
        of_images, of_masks = (int(begins[-1]) * channels + tail,), (int(begins[-1]) + tail,)
    images = _create(folder / "images.npy", of_images, np.dtype(source.dtype))
    masks = _create(folder / "masks.npy", of_masks, np.dtype(np.uint8))
    instances = (
        _create(folder / "instances.npy", (num_images, *pixels), np.dtype(np.uint16))
        if source.has_instances
        else None
    )

    def fill(part: int) -> str | None:
        rows = slice(source.parts[part].start, source.parts[part].stop)
        try:
            decoded = source.decode(part)
        except UserError as error:
            return str(error)
        if source.whole is not None:
            first, end = int(begins[rows.start]), int(begins[rows.stop])
            images[first * channels : end * channels] = decoded.images.reshape(-1)
            masks[first:end] = decoded.masks.reshape(-1)
            return None
        images[rows], masks[rows] = decoded.images, decoded.masks
        if instances is not None:
            instances[rows] = decoded.instances
        return None

    at_once = min(8, os.cpu_count() or 1)
    if source.whole is not None:
        at_once = max(1, min(at_once, DECODING_BYTES // source.whole.decode_bytes))
    with ThreadPoolExecutor(at_once) as pool:
        refuse([problem for problem in pool.map(fill, range(len(source.parts))) if problem])

    meta = _measure(source, images, masks)
    rows: dict[str, Any] = {
        "names": source.names,
        "groups": source.groups,
        "splits": source.splits,
    }
    if source.whole is not None:
        spots, has_class = _spots(source.whole, masks, len(meta["classes"]))
        np.save(folder / "spots.npy", spots)
        rows |= {
            "shapes": source.whole.shapes,
            "spacings": source.whole.spacings,
            "has_class": has_class.tolist(),
            "overlap": source.whole.overlap,
            "tolerance": source.whole.tolerance,
        }
    for array in (images, masks, instances):
        if isinstance(array, np.memmap):
            array.flush()
    (folder / "rows.json").write_text(canonical_json(rows))
    files = sorted(path for path in folder.iterdir())
    for path in files:
        _sync(path)
    meta |= {"fingerprint": fingerprint, "files": {p.name: p.stat().st_size for p in files}}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    _sync(folder / "meta.json")
    _sync(folder)
    seconds = time.monotonic() - started
    _LOG.info("prepared %d images of %s in %.1f s", num_images, source.name, seconds)


def _measure(source: Source, images: Array, masks: Array) -> dict[str, Any]:
    """Everything in meta.json that has to be counted; windows the images in place."""
    splits = np.array(source.splits)
    training, labelled = rows_of(splits, "pretrain"), rows_of(splits, "train")
    counts = _histogram(source, images, training, source.channels)
    seen = np.flatnonzero(counts.sum(axis=0))
    observed = [int(seen[0]), int(seen[-1])]
    is_default = source.window is None and source.dtype == "uint8"
    low, high = (0, 255) if is_default else source.window or observed
    if observed[0] == observed[1] or low >= high:
        raise UserError(
            f"data: every pixel of the training images is {observed[0]}; expected pictures"
        )
    if not is_default and (low, high) != (0, np.iinfo(images.dtype).max):
        every = images.reshape(-1)  # of val and test as well, so that they stay in [0, 1]
        for start in range(0, every.size, PIXELS_AT_ONCE):
            part = every[start : start + PIXELS_AT_ONCE]
            np.clip(part, low, high, out=part)
    levels = (np.clip(np.arange(counts.shape[1]), low, high) - low) / (high - low)
    total = counts.sum(axis=1)
    mean = counts @ levels / total
    std = np.sqrt(np.maximum(counts @ levels**2 / total - mean**2, 0))
    std[std < 1e-6] = 1  # an empty channel stays 0

    shares = _histogram(source, masks, np.arange(len(splits)), 1)[0]
    largest = int(np.flatnonzero(shares[:NOT_LABELLED]).max(initial=0))
    classes = source.classes or ["background", *(f"class {i}" for i in range(1, largest + 1))]
    share = _histogram(source, masks, labelled, 1)[0, : len(classes)]
    diameters = _diameters(source, masks, labelled, len(classes))
    every_diameter = np.concatenate([*diameters, np.zeros(0)])
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
                "observed": observed,
                "mean": [round(value, 4) for value in mean.tolist()],
                "std": [round(value, 4) for value in std.tolist()],
            },
            "pixel_share": {
                name: round(float(count / max(1, share.sum())), 5)
                for name, count in zip(classes, share, strict=True)
                if source.is_labelled
            },
            "objects": {
                name: {"count": len(found), "median_diameter": round(float(np.median(found)), 1)}
                for name, found in zip(classes[1:], diameters, strict=True)
                if len(found)
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
            "notes": source.notes,
        },
    }


def _histogram(
    source: Source, array: Array, rows: npt.NDArray[np.int64], channels: int
) -> npt.NDArray[np.int64]:
    """How often each value occurs in each channel (C, 256 or 65536) of the rows."""
    levels = 2 ** (8 * array.dtype.itemsize)
    counts = np.zeros((channels, levels), np.int64)
    for chunk in _chunks(source, array, rows, channels):
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[channel].ravel(), minlength=levels)
    return counts


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


def _row(source: Source, array: Array, row: int, channels: int = 1) -> Array:
    """One row of the arrays, (C, *S), or (*S) where there is one channel."""
    if source.whole is None:
        pixels: Array = array[row]
        return pixels
    begins, shape = _begins(source.whole.shapes), source.whole.shapes[row]
    part = array[int(begins[row]) * channels : int(begins[row + 1]) * channels]
    return part.reshape((channels, *shape) if channels > 1 else shape)


def _diameters(
    source: Source, masks: Array, rows: npt.NDArray[np.int64], num_classes: int
) -> list[npt.NDArray[np.float64]]:
    """Diameters of discs (or balls) as large as each class's objects: pixels that touch.

    In pixels, of volumes in mm. Corners count as touching, as where objects are scored.
    """
    sizes: list[list[Array]] = [[np.zeros(0)] for _ in range(1, num_classes)]
    for row in rows:
        labels = _row(source, masks, row)
        voxel = math.prod(source.whole.spacings[row]) if source.whole else 1.0
        present = np.unique(labels)
        for label in range(1, num_classes):
            if label in present:
                touching = np.ones((3,) * labels.ndim)
                objects, _ = ndimage.label(labels == label, structure=touching)
                sizes[label - 1].append(np.bincount(objects.ravel())[1:] * voxel)
    return [diameter(np.concatenate(found), len(source.size)) for found in sizes]


def _spots(
    whole: Whole, masks: Array, num_classes: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """(spots (N, K, M, A), has_class (N, K)): some voxels of each class but the background.

    All voxels of a class are alike probable; of few each is there several times.
    """
    axes = len(whole.shapes[0])
    spots = np.zeros((len(whole.shapes), num_classes, SPOTS, axes), np.uint16)
    has_class = np.zeros((len(whole.shapes), num_classes), bool)
    begins = _begins(whole.shapes)
    for volume, shape in enumerate(whole.shapes):
        labels = masks[int(begins[volume]) : int(begins[volume + 1])]
        for label in range(1, num_classes):
            places = np.flatnonzero(labels == label)
            if len(places):
                chosen = np.random.default_rng([volume, label]).random(SPOTS) * len(places)
                found = np.unravel_index(places[chosen.astype(np.int64)], shape)
                spots[volume, label] = np.stack(found, axis=1)
                has_class[volume, label] = True
    return spots, has_class


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """A new memory map whose blocks exist: a full disk is an error now, not a SIGBUS later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _map(path: Path) -> Array:
    # Copy on write, since torch warns of arrays that it may not write to; nobody writes.
    return np.asarray(np.load(path, mmap_mode="c"))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, a dying process as well


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
