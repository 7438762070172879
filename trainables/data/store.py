"""Images decoded once: a content-addressed folder of memory maps, and batches out of it.

A source says what the data are (`Source`); `write` decodes them into `cache/<fingerprint>/`, once
for all processes of a node; `open_dataset` maps that folder; `to_device` makes batches of it.

    images.npy (N, C, *S) uint8 or uint16    masks.npy (N, *S) uint8    instances.npy uint16
    rows.json   name, group and split of each row
    meta.json   the rest, and the size of each file; written last

Letters: N images, B batch, C channels, *S pixels (any number of axes).
"""

from __future__ import annotations

import fcntl
import json
import logging
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
import torch
from scipy import ndimage
from torch import Tensor

from trainables.config import canonical_json, digest
from trainables.errors import StorageError, UserError
from trainables.metrics import diameter

Array = npt.NDArray[Any]
Split = Literal["pretrain", "train", "val", "test"]

NOT_LABELLED = 255  # in masks: counts neither in a loss nor in a score
FORMAT = 1  # raise it when the same source would be decoded to other bytes
SHOWN_PROBLEMS = 20
PIXELS_AT_ONCE = 2**24  # that are counted or clipped in one go
RESIDENT_SHARE = 0.5  # of the free device memory that images and masks may take
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """What one part of a source (a file, a generated image) holds: n rows of the data set."""

    images: Array  # (n, C, *S)
    masks: Array  # (n, *S) uint8
    instances: Array | None = None  # (n, *S) uint16, 0 = no object


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

    def fingerprint(self) -> str:
        """SHA-256 over the options, the content of the files, and the splits."""
        return digest(
            {
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
        )


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
    object_edges: tuple[float, float]  # diameters in px that part training objects into thirds
    is_labelled: bool
    images: Array  # (N, C, *S) uint8 or uint16
    masks: Array  # (N, *S) uint8, 255 = not labelled
    instances: Array | None  # (N, *S) uint16
    names: list[str]
    groups: list[str]
    splits: Array  # (N,) of words
    about: dict[str, Any]

    def rows(self, split: Split) -> npt.NDArray[np.int64]:
        """Indices of a split; `pretrain` is `train` and the unlabelled, never `val` or `test`."""
        return rows_of(self.splits, split)

    def describe(self) -> dict[str, Any]:
        """What a person wants to know before training on it."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "images": {s: len(self.rows(s)) for s in ("pretrain", "train", "val", "test")},
            "size": list(self.size),
            "channels": self.channels,
            "classes": self.classes,
            "small_classes": [self.classes[index] for index in self.small_classes],
            **self.about,
        }


class Resident:
    """Batches of some rows: integers on the device when they fit, standardised on the fly."""

    def __init__(
        self, dataset: Dataset, rows: npt.NDArray[np.int64], device: torch.device, labels: bool
    ) -> None:
        self.device = device
        images = torch.from_numpy(_signed(dataset.images))
        masks = torch.from_numpy(dataset.masks) if labels and dataset.is_labelled else None
        self.rows = torch.as_tensor(np.asarray(rows, np.int64))
        if device.type != "cpu" and _fits(images, masks, len(rows), device):
            images = images.index_select(0, self.rows).to(device)
            masks = masks.index_select(0, self.rows).to(device) if masks is not None else None
            self.rows = torch.arange(len(rows), device=device)
        self.images, self.masks = images, masks
        extent = dataset.high - dataset.low
        centre_C = [dataset.low + mean * extent for mean in dataset.mean]
        gain_C = [1 / (std * extent) for std in dataset.std]
        per_channel = (-1, *[1] * len(dataset.size))
        self.centre_C = torch.tensor(centre_C, device=device).view(per_channel)
        self.gain_C = torch.tensor(gain_C, device=device).view(per_channel)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (x - mean) / std as float32 (B, C, *S), masks as int64 (B, *S)."""
        places_B = self.rows[index_B.to(self.rows.device)]
        images = self.images.index_select(0, places_B).to(self.device)
        if images.dtype == torch.int16:
            images = images.int().bitwise_and_(0xFFFF)
        images = images.float().sub_(self.centre_C).mul_(self.gain_C)
        if self.masks is None:
            return images, None
        return images, self.masks.index_select(0, places_B).to(self.device).long()


def to_device(
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    device: torch.device | str,
    *,
    labels: bool = True,
) -> Resident:
    """A source of batches; indices count within `rows`."""
    return Resident(dataset, rows, torch.device(device), labels)


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
        names=rows["names"],
        groups=rows["groups"],
        splits=np.array(rows["splits"]),
        about=meta["about"],
    )


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


def _decode_into(source: Source, folder: Path, fingerprint: str) -> None:
    started = time.monotonic()
    num_images, pixels = len(source.names), source.size
    images = _create(
        folder / "images.npy", (num_images, source.channels, *pixels), np.dtype(source.dtype)
    )
    masks = _create(folder / "masks.npy", (num_images, *pixels), np.dtype(np.uint8))
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
        images[rows], masks[rows] = decoded.images, decoded.masks
        if instances is not None:
            instances[rows] = decoded.instances
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        refuse([problem for problem in pool.map(fill, range(len(source.parts))) if problem])

    meta = _measure(source, images, masks)
    for array in (images, masks, instances):
        if isinstance(array, np.memmap):
            array.flush()
    rows = {"names": source.names, "groups": source.groups, "splits": source.splits}
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
    counts = _histogram(images, training)
    seen = np.flatnonzero(counts.sum(axis=0))
    observed = [int(seen[0]), int(seen[-1])]
    is_default = source.window is None and source.dtype == "uint8"
    low, high = (0, 255) if is_default else source.window or observed
    if observed[0] == observed[1] or low >= high:
        raise UserError(
            f"data: every pixel of the training images is {observed[0]}; expected pictures"
        )
    if not is_default:
        for part in _portions(images, len(images)):  # so that val and test stay in [0, 1] as well
            np.clip(images[part], low, high, out=images[part])
    levels = (np.clip(np.arange(counts.shape[1]), low, high) - low) / (high - low)
    total = counts.sum(axis=1)
    mean = counts @ levels / total
    std = np.sqrt(np.maximum(counts @ levels**2 / total - mean**2, 0))
    std[std < 1e-6] = 1  # an empty channel stays 0

    largest = int(np.max(masks, where=masks != NOT_LABELLED, initial=0))
    classes = source.classes or ["background", *(f"class {i}" for i in range(1, largest + 1))]
    share = _histogram(masks[:, None], labelled)[0, : len(classes)]
    diameters = [_diameters(masks, labelled, label) for label in range(1, len(classes))]
    every = np.concatenate([*diameters, np.zeros(0)])
    edges = np.quantile(every, [1 / 3, 2 / 3]) if len(every) else np.zeros(2)
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
            "notes": source.notes,
        },
    }


def _histogram(images: Array, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each value occurs in each channel (C, 256 or 65536) of the rows."""
    levels = 2 ** (8 * images.dtype.itemsize)
    counts = np.zeros((images.shape[1], levels), np.int64)
    for part in _portions(images, len(rows)):
        chunk = images[rows[part]]
        for channel in range(len(counts)):
            counts[channel] += np.bincount(chunk[:, channel].ravel(), minlength=levels)
    return counts


def _portions(images: Array, num_rows: int) -> Iterator[slice]:
    """Slices of rows that together take little memory, however large a row is."""
    step = max(1, PIXELS_AT_ONCE // max(1, images[0].size))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _diameters(masks: Array, rows: npt.NDArray[np.int64], label: int) -> npt.NDArray[np.float64]:
    """Diameters of discs (or balls) as large as the objects: pixels of a class that touch.

    Corners count as touching, as where objects are scored.
    """
    axes = masks.ndim - 1
    areas: list[Array] = [np.zeros(0, np.int64)]
    for row in rows:
        objects, _ = ndimage.label(masks[row] == label, structure=np.ones((3,) * axes))
        areas.append(np.bincount(objects.ravel())[1:])
    return diameter(np.concatenate(areas), axes)


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


def _signed(images: Array) -> Array:
    """The same bytes as a type that torch can gather on every device."""
    return images.view(np.int16) if images.dtype == np.uint16 else images


def _fits(images: Tensor, masks: Tensor | None, num_rows: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return True  # it shares the memory of the host
    per_row = sum(t[0].numel() * t.element_size() for t in (images, masks) if t is not None)
    return per_row * num_rows <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


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
