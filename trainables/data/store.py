"""Images decoded once: a content-addressed folder of memory maps.

A source says what the data are (`Source`); `write` decodes them into `cache/<fingerprint>/`, once
for all processes of a node; `open_dataset` maps that folder.

    images.npy (N, C, *S) uint8 or uint16    masks.npy (N, *S) uint8    instances.npy uint16
    rows.json   name, group and split of each row; the size of each image that tiles were cut from
    meta.json   the rest, and the size of each file; written last

Volumes are whole, each with a shape of its own: images.npy and masks.npy then are flat, one volume
behind the other; rows.json has their shapes and spacings, and spots.npy (N, K, M, A) some voxels
of each class, around which segmentation may look. Their rows are crops that cover them. Of those
that were resampled truth.npy has the labels on the grids of the files, by which they are judged.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables import durable
from trainables.data.measure import PIXELS_AT_ONCE, measure, spots_of
from trainables.data.rows import joined
from trainables.data.source import (
    NOT_LABELLED,
    SPLITS,
    Array,
    Grids,
    Hears,
    Source,
    Split,
    begins,
    refuse,
    rows_of,
    tile_corners,
    tile_names,
    unheard,
)
from trainables.errors import StorageError, UserError
from trainables.settings import canonical_json

# Raise it when a prepared folder holds other things than before. (FORMAT, in source.py, is part of
# the data's identity: another one would make them other data, which no study begun before has.)
LAYOUT = 3
DECODING_BYTES = 2**31  # that volumes decoded side by side may take
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FiledLabels:
    """The labels of volumes on the grids of their files, one behind the other."""

    labels: Array
    grids: Grids
    shows: npt.NDArray[np.bool_]  # (N, K) whether a volume shows a class; never the background

    def of(self, volume: int) -> Array:
        begin, end = self.grids.begins[volume : volume + 2].tolist()
        return self.labels[begin:end].reshape(self.grids.shapes[volume])


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
    filed: FiledLabels | None = None  # by which they are judged; None: those learnt from


@dataclass(frozen=True, eq=False)
class Tiles:
    """Which images the data set's rows were cut from, and where."""

    shapes: npt.NDArray[np.int64]  # (N, A) of the images
    owner: npt.NDArray[np.int64]  # (rows,) the image of each row
    corners: npt.NDArray[np.int64]  # (rows, A) where its tile begins


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
    # diameters in px or mm: thirds of the training objects that no border cuts off
    object_edges: tuple[float, float]
    is_labelled: bool
    images: Array  # (N, C, *S) uint8 or uint16; of volumes flat
    masks: Array  # (N, *S) uint8, 255 = not labelled; of volumes flat
    instances: Array | None  # (N, *S) uint16, of tiles each unique in the image they are cut from
    names: list[str]
    groups: list[str]
    splits: Array  # (N,) of words
    about: dict[str, Any]
    volumes: Volumes | None = None
    tiles: Tiles | None = None  # None: each row is an image of its own, or the crop of a volume

    @property
    def is_padded(self) -> bool:
        """Whether a crop or tile may reach beyond its volume or image."""
        parts = self.volumes or self.tiles
        return parts is not None and bool((parts.shapes < self.size).any())

    def image_of(self, volume: int) -> Array:
        """A whole volume (C, *shape) as it is stored."""
        assert self.volumes is not None
        return _part_of(self.images, self.volumes, volume, (self.channels,))

    def mask_of(self, volume: int) -> Array:
        """The labels (*shape) of a whole volume."""
        assert self.volumes is not None
        return _part_of(self.masks, self.volumes, volume, ())

    def truth_of(self, volume: int) -> tuple[Array, tuple[float, ...]]:
        """The labels by which a volume is judged, and the mm between their voxels."""
        assert self.volumes is not None
        filed = self.volumes.filed
        if filed is None:
            return self.mask_of(volume), tuple(self.volumes.spacings[volume].tolist())
        return filed.of(volume), filed.grids.spacings[volume]

    def labels_of(self, image: int) -> tuple[Array, Array | None]:
        """The labels and the instances, if there are any, (*shape) of an image cut into tiles."""
        assert self.tiles is not None
        rows = np.flatnonzero(self.tiles.owner == image)
        corners, shape = self.tiles.corners[rows], self.tiles.shapes[image].tolist()
        return (
            joined(self.masks[rows], corners, shape, NOT_LABELLED),
            None if self.instances is None else joined(self.instances[rows], corners, shape, 0),
        )

    def cut_images_of(self, split: Split) -> npt.NDArray[np.int64]:
        """The images whose tiles are the rows of a split."""
        assert self.tiles is not None
        return np.unique(self.tiles.owner[self.rows(split)])

    def volumes_of(self, split: Split) -> npt.NDArray[np.int64]:
        """The volumes whose crops are the rows of a split."""
        assert self.volumes is not None
        return np.unique(self.volumes.owner[self.rows(split)])

    def rows(self, split: Split) -> npt.NDArray[np.int64]:
        """Indices of a split; `pretrain` is `train` and the unlabelled, never `val` or `test`."""
        return rows_of(self.splits, split)

    def classes_shown(self, rows: npt.NDArray[np.int64]) -> set[int]:
        """The classes, but for the background, that the labels of these rows show somewhere."""
        return set(np.flatnonzero(self._has_class_RK[rows].any(axis=0)).tolist()) - {0}

    def rows_showing(self, label: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those of these rows whose labels show the class; of volumes if the whole one does."""
        shown: npt.NDArray[np.int64] = rows[self._has_class_RK[rows, label]]
        return shown

    @cached_property
    def _has_class_RK(self) -> npt.NDArray[np.bool_]:
        """Whether each row shows each class; of volumes whether the whole one does."""
        if self.volumes is not None:
            filed = self.volumes.filed
            shows = self.volumes.has_class if filed is None else filed.shows
            return shows[self.volumes.owner]
        num_rows, step = len(self.splits), max(1, PIXELS_AT_ONCE // math.prod(self.size))
        found = np.zeros((num_rows, len(self.classes)), bool)
        for start in range(0, num_rows, step):
            masks = np.asarray(self.masks[start : start + step]).reshape(-1, math.prod(self.size))
            for label in range(1, len(self.classes)):
                found[start : start + step, label] = (masks == label).any(axis=1)
        return found

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


def write(source: Source, cache: Path, decoded: Hears = unheard) -> Path:
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
                _LOG.warning("prepared data are of no use (%s); decoding again: %s", reason, folder)
            aside = cache / f".{fingerprint}.tmp"
            shutil.rmtree(aside, ignore_errors=True)  # of a process that died
            aside.mkdir()
            try:
                _decode_into(source, aside, fingerprint, decoded)
                if folder.exists():
                    shutil.rmtree(folder)
                durable.publish_folder(aside, folder)
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
        raise StorageError(f"prepared data in {folder} are of no use: {reason}; prepare them again")
    meta = json.loads((folder / "meta.json").read_text())
    rows = json.loads((folder / "rows.json").read_text())
    names, groups, splits = rows["names"], rows["groups"], rows["splits"]
    tiles = _open_tiles(tuple(meta["size"]), rows["cut_from"]) if "cut_from" in rows else None
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
        tiles=tiles,
    )


def damage(folder: Path) -> str | None:
    """Why a prepared folder cannot be used, or None."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta.get("layout") != LAYOUT:
            return "another version prepared them"
        for name, expected in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != expected:
                return f"{name} has {size} bytes instead of {expected}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "meta.json cannot be read"
    return None


def _open_tiles(size: tuple[int, ...], shapes: Sequence[Sequence[int]]) -> Tiles:
    corners = [tile_corners(shape, size) for shape in shapes]
    return Tiles(
        shapes=np.array(shapes, np.int64),
        owner=np.repeat(np.arange(len(shapes)), [len(found) for found in corners]),
        corners=np.array(list(itertools.chain(*corners)), np.int64),
    )


def _open_volumes(folder: Path, size: tuple[int, ...], rows: dict[str, Any]) -> Volumes:
    shapes = np.array(rows["shapes"], np.int64)
    corners = [tile_corners(shape, size) for shape in shapes.tolist()]
    spots = _map(folder / "spots.npy")
    return Volumes(
        shapes=shapes,
        spacings=np.array(rows["spacings"], np.float64),
        begins=begins(shapes)[:-1],
        owner=np.repeat(np.arange(len(shapes)), [len(found) for found in corners]),
        corners=np.array(list(itertools.chain(*corners)), np.int64),
        spots=spots,
        has_class=np.array(rows["has_class"], bool),
        overlap=rows["overlap"],
        tolerance=rows["tolerance"],
        filed=_open_filed(folder, rows["scored"]) if "scored" in rows else None,
    )


def _open_filed(folder: Path, scored: dict[str, Any]) -> FiledLabels:
    shapes, spacings = ([tuple(each) for each in scored[key]] for key in ("shapes", "spacings"))
    shows = np.array(scored["shows"], bool)
    return FiledLabels(_map(folder / "truth.npy"), Grids(shapes, spacings), shows)


def _row_names(names: Sequence[str], volumes: Volumes) -> list[str]:
    counts = np.bincount(volumes.owner, minlength=len(names))
    corners = np.split(volumes.corners, np.cumsum(counts)[:-1])
    return [
        word
        for name, found in zip(names, corners, strict=True)
        for word in tile_names(name, found.tolist())
    ]


def _part_of(flat: Array, volumes: Volumes, volume: int, channels: tuple[int, ...]) -> Array:
    shape, begin = volumes.shapes[volume].tolist(), int(volumes.begins[volume])
    each = math.prod(channels)
    return flat[begin * each : (begin + math.prod(shape)) * each].reshape(*channels, *shape)


def _decode_into(source: Source, folder: Path, fingerprint: str, decoded: Hears) -> None:
    started = time.monotonic()
    num_images, pixels, channels = len(source.names), source.size, source.channels
    of_images: tuple[int, ...] = (num_images, channels, *pixels)
    of_masks: tuple[int, ...] = (num_images, *pixels)
    first = np.zeros(0, np.int64)
    if source.whole is not None:
        first = source.whole.begins
        tail = pixels[-1]  # the last line of a padded crop goes on behind the last voxel
        of_images, of_masks = (int(first[-1]) * channels + tail,), (int(first[-1]) + tail,)
    images = _create(folder / "images.npy", of_images, np.dtype(source.dtype))
    masks = _create(folder / "masks.npy", of_masks, np.dtype(np.uint8))
    instances = (
        _create(folder / "instances.npy", (num_images, *pixels), np.dtype(np.uint16))
        if source.has_instances
        else None
    )

    scored = source.whole.scored if source.whole is not None else None
    truth = None
    if scored is not None:
        truth = _create(folder / "truth.npy", (int(scored.begins[-1]),), np.dtype(np.uint8))

    done = itertools.count(1)

    def fill(part: int) -> UserError | None:
        rows = slice(source.parts[part].start, source.parts[part].stop)
        try:
            found = source.decode(part)
            decoded(next(done), len(source.parts))
        except UserError as error:
            return error
        if source.whole is not None:
            start, end = int(first[rows.start]), int(first[rows.stop])
            images[start * channels : end * channels] = found.images.reshape(-1)
            masks[start:end] = found.masks.reshape(-1)
            if truth is not None and scored is not None and found.truth is not None:
                start, end = scored.begins[[rows.start, rows.stop]].tolist()
                truth[start:end] = found.truth.reshape(-1)
            return None
        images[rows], masks[rows] = found.images, found.masks
        if instances is not None:
            instances[rows] = found.instances
        return None

    at_once = min(8, os.cpu_count() or 1)
    if source.whole is not None:
        at_once = max(1, min(at_once, DECODING_BYTES // source.whole.decode_bytes))
    with ThreadPoolExecutor(at_once) as pool:
        refuse([problem for problem in pool.map(fill, range(len(source.parts))) if problem])

    meta = measure(source, images, masks, instances, truth)
    rows: dict[str, Any] = {
        "names": source.names,
        "groups": source.groups,
        "splits": source.splits,
    }
    if source.whole is not None:
        spots, has_class = spots_of(source.whole, masks, len(meta["classes"]))
        np.save(folder / "spots.npy", spots)
        rows |= {
            "shapes": source.whole.shapes,
            "spacings": source.whole.spacings,
            "has_class": has_class.tolist(),
            "overlap": source.whole.overlap,
            "tolerance": source.whole.tolerance,
        }
        if scored is not None and truth is not None:
            present = [
                set(np.unique(part).tolist()) for part in np.split(truth, scored.begins[1:-1])
            ]
            labels = range(len(meta["classes"]))
            rows["scored"] = {
                "shapes": scored.shapes,
                "spacings": scored.spacings,
                "shows": [[label > 0 and label in found for label in labels] for found in present],
            }
    if source.cut_from is not None:
        rows["cut_from"] = source.cut_from
    for array in (images, masks, instances, truth):
        if isinstance(array, np.memmap):
            array.flush()
    (folder / "rows.json").write_text(canonical_json(rows))
    files = sorted(folder.iterdir())
    meta |= {"layout": LAYOUT, "fingerprint": fingerprint}
    meta |= {"files": {p.name: p.stat().st_size for p in files}}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    seconds = time.monotonic() - started
    _LOG.info("prepared %d images of %s in %.1f s", num_images, source.name, seconds)


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
