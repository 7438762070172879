"""Batches out of a prepared data set: crops gathered from memory maps, or from the device.

Everything is a crop: a picture is the one crop of itself, a volume has many. Arrays are seen as
lines along the last axis, one gather takes those of a whole batch, and only what is in the crops is
ever read.

Training draws crops at random, so that no two epochs see the same; everywhere else a row of the
data set is one crop (`Volumes.corners`). Segmentation may ask that a share of them shows something;
pretraining never sees a label, not even through where it looks.

Padding, behind the end of what is smaller than a crop or tile, is NaN in images and 255 in labels.
Whoever forgets it gets NaN, never a number that is quietly wrong.

Letters: B batch, C channels, A axes, *S pixels along every axis, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainables import counter
from trainables.data.source import NOT_LABELLED
from trainables.data.store import Dataset

RESIDENT_SHARE = 0.5  # of the free device memory that images and masks may take


class Resident:
    """Batches of some rows: integers on the device when they fit, standardised on the fly."""

    def __init__(
        self, dataset: Dataset, rows: npt.NDArray[np.int64], device: torch.device, labels: bool
    ) -> None:
        self.device, self.size, self.channels = device, dataset.size, dataset.channels
        self.is_padded = dataset.is_padded
        row_index = np.asarray(rows, np.int64)
        images = torch.from_numpy(_signed(dataset.images)).view(-1)
        masks = torch.from_numpy(dataset.masks).view(-1)
        shape, corner, begin = _places(dataset, row_index)
        has_labels = labels and dataset.is_labelled
        if device.type != "cpu" and _fits(dataset, row_index, has_labels, device):
            images, masks, begin = _gathered(dataset, row_index, has_labels, device)
        place = images.device
        self.images, self.masks = images, masks if has_labels else None
        self.rows = torch.arange(len(row_index), device=place)
        self.size_A = torch.tensor(self.size, device=place)
        self.shape, self.corner, self.begin = shape.to(place), corner.to(place), begin.to(place)
        self.real = self.shape  # what is no padding
        if dataset.tiles is not None:
            ends = dataset.tiles.shapes[dataset.tiles.owner[row_index]]
            self.real = torch.from_numpy(ends - dataset.tiles.corners[row_index]).to(place)
        self.has_class = self.spots = None
        if has_labels and dataset.volumes is not None:
            owner = dataset.volumes.owner[row_index]
            self.has_class = torch.from_numpy(dataset.volumes.has_class[owner]).to(place)
            spots = dataset.volumes.spots[owner].astype(np.int32)  # CUDA gathers no uint16
            self.spots = torch.from_numpy(spots).to(place)
        self.centre_C, self.gain_C = _scale(dataset, device)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (x - mean) / std as float32 (B, C, *S), masks as int64 (B, *S); rows as they are.

        `index_B` counts within the rows of this object.
        """
        index_B = index_B.to(self.rows.device)
        return self._crops(index_B, self.corner[index_B])

    def draw(
        self,
        index_B: Tensor,
        seed: int,
        step: int,
        samples_B: Tensor,
        *,
        foreground: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """The same of crops at random places of these rows' volumes, as training wants them.

        All places are alike probable, but a share `foreground` of the crops is centred, as far as
        the volume's border allows, on a random voxel of a random class among those that it has.
        `samples_B`: places in the global batch, on the device of `rows`.
        """
        index_B = index_B.to(self.rows.device)
        axes = len(self.size)
        room_BA = (self.shape[index_B] - self.size_A).clamp(min=0)
        chance = counter.uniform(seed, "crop", step, samples_B, axes + 3)
        corner_BA = _scaled(chance[:, :axes], room_BA + 1)
        if foreground > 0 and self.spots is not None and self.has_class is not None:
            has_BK = self.has_class[index_B]
            spot_BA = self._spots(index_B, has_BK, chance[:, axes + 1], chance[:, axes + 2])
            around_BA = (spot_BA - self.size_A // 2).clamp(min=0).minimum(room_BA)
            is_around_B = (chance[:, axes] < foreground) & has_BK.any(dim=1)
            corner_BA = torch.where(is_around_B[:, None], around_BA, corner_BA)
        return self._crops(index_B, corner_BA)

    def _spots(
        self, index_B: Tensor, has_BK: Tensor, which_class_B: Tensor, which_spot_B: Tensor
    ) -> Tensor:
        """A voxel (B, A) of one of the classes that each volume has, by two random numbers."""
        assert self.spots is not None
        number_B = _scaled(which_class_B, has_BK.sum(dim=1)) + 1
        class_B = (has_BK.cumsum(dim=1) >= number_B[:, None]).int().argmax(dim=1)
        spot_B = _scaled(which_spot_B, self.spots.shape[2])
        return self.spots[index_B, class_B, spot_B].long()

    def _crops(self, index_B: Tensor, corner_BA: Tensor) -> tuple[Tensor, Tensor | None]:
        shape_BA, begin_B = self.shape[index_B], self.begin[index_B]
        voxels_B = shape_BA.prod(dim=1)
        channel_C = torch.arange(self.channels, device=index_B.device)
        begin_BC = begin_B[:, None] * self.channels + channel_C * voxels_B[:, None]
        images = torch.stack(
            [_crop(self.images, b_B, shape_BA, corner_BA, self.size) for b_B in begin_BC.unbind(1)],
            dim=1,
        )
        images = _intensities(_sent(images, self.device)).sub_(self.centre_C).mul_(self.gain_C)
        is_padding = None
        if self.is_padded:
            is_padding = _is_beyond(self.real[index_B], corner_BA, self.size)
            is_padding = _sent(is_padding, self.device)
            images = images.masked_fill_(is_padding[:, None], math.nan)
        if self.masks is None:
            return images, None
        masks = _crop(self.masks, begin_B, shape_BA, corner_BA, self.size)
        masks = _sent(masks, self.device).long()
        if is_padding is not None:
            masks = masks.masked_fill_(is_padding, NOT_LABELLED)
        return images, masks


def to_device(
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    device: torch.device | str,
    *,
    labels: bool = True,
) -> Resident:
    """A source of batches; indices count within `rows`."""
    return Resident(dataset, rows, torch.device(device), labels)


def whole_volume(dataset: Dataset, volume: int, device: torch.device) -> Tensor:
    """One volume, standardised (1, C, *S); NaN after its end where a crop is larger."""
    assert dataset.volumes is not None
    levels = torch.from_numpy(_signed(dataset.image_of(volume)))
    shape = levels.shape[1:]
    whole = torch.full(
        (1, dataset.channels, *map(max, shape, dataset.size)), math.nan, device=device
    )
    inside = whole[0]
    for axis, edge in enumerate(shape, start=1):
        inside = inside.narrow(axis, 0, edge)
    for channel, level in enumerate(levels):  # one at a time, as whole volumes are large
        inside[channel] = _intensities(level.to(device))
    centre_C, gain_C = _scale(dataset, device)
    inside.sub_(centre_C).mul_(gain_C)
    return whole


def _places(dataset: Dataset, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row (shape (N, A), corner (N, A), begin (N,)): its volume, crop and first voxel."""
    if dataset.volumes is None:
        size = np.array(dataset.size, np.int64)
        shape, corner = np.tile(size, (len(rows), 1)), np.zeros((len(rows), len(size)), np.int64)
        begin = rows * math.prod(dataset.size)
    else:
        owner = dataset.volumes.owner[rows]
        shape, corner = dataset.volumes.shapes[owner], dataset.volumes.corners[rows]
        begin = dataset.volumes.begins[owner]
    return torch.from_numpy(shape), torch.from_numpy(corner), torch.from_numpy(begin)


def _gathered(
    dataset: Dataset, rows: npt.NDArray[np.int64], labels: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(images, masks, begin of each row) with the images of these rows alone, on the device."""
    if dataset.volumes is None:
        images, masks = dataset.images[rows], dataset.masks[rows if labels else rows[:0]]
        begin = np.arange(len(rows)) * math.prod(dataset.size)
        arrays = [torch.from_numpy(_signed(images)), torch.from_numpy(masks)]
        return arrays[0].to(device).view(-1), arrays[1].to(device).view(-1), torch.from_numpy(begin)
    owners, place = np.unique(dataset.volumes.owner[rows], return_inverse=True)
    voxels = dataset.volumes.shapes[owners].prod(axis=1)
    begins = np.concatenate([[0], np.cumsum(voxels)])
    tail = dataset.size[-1]  # a padded crop's last line goes on behind the last voxel
    levels = torch.zeros(begins[-1] * dataset.channels + tail, dtype=torch.int16, device=device)
    classes = torch.zeros(begins[-1] + tail if labels else 0, dtype=torch.uint8, device=device)
    for owner, first, count in zip(owners, begins, voxels, strict=False):
        part = slice(first * dataset.channels, (first + count) * dataset.channels)
        levels[part] = torch.from_numpy(_signed(dataset.image_of(owner))).view(-1).to(device)
        if labels:
            part = slice(first, first + count)
            classes[part] = torch.from_numpy(dataset.mask_of(owner)).view(-1).to(device)
    return levels, classes, torch.from_numpy(begins[:-1][place])


def _crop(
    flat: Tensor, begin_B: Tensor, shape_BA: Tensor, corner_BA: Tensor, size: Sequence[int]
) -> Tensor:
    """(B, *S) of arrays (shape) that begin at `begin_B` of a flat one; beyond an array is anything.

    Lines along the last axis overlap in a view of all of them, of which one gather takes some.
    """
    lines = flat.as_strided((flat.numel() - size[-1] + 1, size[-1]), (1, 1))
    start = begin_B + corner_BA[:, -1]
    stride_B = shape_BA[:, -1]
    for axis in reversed(range(len(size) - 1)):
        position = corner_BA[:, axis, None] + torch.arange(size[axis], device=flat.device)
        offset = position.minimum(shape_BA[:, axis, None] - 1) * stride_B[:, None]
        behind = start.ndim - 1
        start = start.unsqueeze(1) + offset.reshape(*offset.shape, *[1] * behind)
        stride_B = stride_B * shape_BA[:, axis]
    return lines.index_select(0, start.flatten()).view(len(begin_B), *size)


def _is_beyond(shape_BA: Tensor, corner_BA: Tensor, size: Sequence[int]) -> Tensor:
    """Which voxels (B, *S) of a crop lie behind the end of what it is from."""
    beyond = torch.zeros(len(shape_BA), *[1] * len(size), dtype=torch.bool, device=shape_BA.device)
    for axis, edge in enumerate(size):
        position = corner_BA[:, axis, None] + torch.arange(edge, device=shape_BA.device)
        along = [1] * len(size)
        along[axis] = edge
        beyond = beyond | (position >= shape_BA[:, axis, None]).view(-1, *along)
    return beyond


def _scaled(chance: Tensor, count: Tensor | int) -> Tensor:
    """Random numbers in [0, 1) as whole numbers in [0, count), int64."""
    return (chance.double() * count).long()


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """On the device; to a GPU from pinned memory, so that nobody waits for it."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _scale(dataset: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """What to take from stored intensities, then to multiply them with: (C, 1, ...) each."""
    extent = dataset.high - dataset.low
    per_channel = (-1, *[1] * len(dataset.size))
    centre_C = [dataset.low + mean * extent for mean in dataset.mean]
    gain_C = [1 / (std * extent) for std in dataset.std]
    centre, gain = (torch.tensor(values, device=device) for values in (centre_C, gain_C))
    return centre.view(per_channel), gain.view(per_channel)


def _intensities(stored: Tensor) -> Tensor:
    """Stored integers as float32, of 16 bits without their sign."""
    if stored.dtype == torch.int16:
        stored = stored.int().bitwise_and_(0xFFFF)
    return stored.float()


def _signed(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same bytes as a type that torch can gather on every device."""
    return images.view(np.int16) if images.dtype == np.uint16 else images


def _fits(
    dataset: Dataset, rows: npt.NDArray[np.int64], labels: bool, device: torch.device
) -> bool:
    if device.type != "cuda":
        return True  # it shares the memory of the host
    voxels = len(rows) * math.prod(dataset.size)
    if dataset.volumes is not None:
        voxels = dataset.volumes.shapes[np.unique(dataset.volumes.owner[rows])].prod(axis=1).sum()
    num_bytes = voxels * (dataset.channels * dataset.images.dtype.itemsize + labels)
    return bool(num_bytes <= RESIDENT_SHARE * free_memory(device))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that are free, or that torch keeps for itself and would use again."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
