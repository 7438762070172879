"""Pictures of what a model sees: PNG grids, one line per image, and sheets of slices of volumes.

Volumes run to the patient's right, to the front and upwards. Their planes are drawn as radiologists
look at them: the patient's right is on the left of axial and coronal planes, the front is on the
left of sagittal and at the top of axial ones, and up is at the top of the others. Grids show the
middle axial plane. A sheet is a PNG of frames below each other, each with the three planes at the
same relative depth; SLICES beside it says how many frames there are and what stands in them.

Letters of shapes: B images, C channels, H W pixels, X Y Z voxels, *S any number of axes.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from trainables import durable
from trainables.scores import IGNORED

Pixels = npt.NDArray[np.uint8]

# Colours of classes 1, 2, ...: Okabe and Ito (2008), told apart with any colour vision.
CLASS_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
# How often a place is hidden, from never to always: cividis, even in lightness and the same to
# colour-blind readers
HEAT = (
    (0, 32, 77),
    (49, 68, 107),
    (102, 105, 112),
    (149, 143, 120),
    (202, 185, 105),
    (255, 234, 70),
)
HIDDEN_GREY = 128
IGNORED_GREY = 160
GAP = 4  # pixels of white between tiles
SMALLEST_TILE = 128  # pixels; smaller images are enlarged by a whole number

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # each with the axis that runs across it
SLICES = "slices.json"  # of all sheets of a folder: name of the sheet -> what stands in it
MOST_FRAMES = 24
TALLEST_SHEET = 16_000  # pixels, which browsers still draw in one piece
LARGEST_PLANE = 128  # pixels along the longest edge of a volume: about what a page has room for
MOST_BYTES = 1_000_000  # of a sheet; pages hold about ten


def save_reconstruction(path: Path, images: Tensor, is_hidden: Tensor, predicted: Tensor) -> None:
    """Image | hidden regions in grey | reconstruction with the visible pixels pasted in.

    `images`, `predicted` (B, C, *S) are intensities in [0, 1]; `is_hidden` (B, *S) is boolean.
    """
    _save_grid(path, list(_reconstruction(images, is_hidden, predicted).values()))


def save_segmentation(path: Path, images: Tensor, truth: Tensor, predicted: Tensor) -> None:
    """Image | true classes | predicted classes; intensities (B, C, *S), labels (B, *S)."""
    _save_grid(path, list(_segmentation(images, truth, predicted).values()))


def save_reconstruction_slices(
    path: Path, images: Tensor, is_hidden: Tensor, predicted: Tensor, spacing: Sequence[float]
) -> None:
    """A sheet of what `save_reconstruction` shows; volumes (B, C, X, Y, Z), hidden (B, X, Y, Z).

    `spacing` is mm per voxel along each axis. The few volumes of a batch stand below each other.
    """

    def columns(axis: int, depth: int) -> dict[str, Pixels]:
        at = (plane(values, axis, depth) for values in (images, is_hidden, predicted))
        return _reconstruction(*at)

    _save_sheet(path, columns, len(images), images.shape[2:], spacing)


def save_segmentation_slices(
    path: Path,
    image: Tensor | npt.NDArray[Any],
    truth: Tensor | npt.NDArray[Any],
    predicted: Tensor | npt.NDArray[Any],
    spacing: Sequence[float],
) -> None:
    """A sheet of what `save_segmentation` shows of one volume (C, X, Y, Z), labels (X, Y, Z).

    `spacing` is mm per voxel along each axis. Only what is drawn is copied of a large volume.
    """
    volumes = [_tensor(values)[None] for values in (image, truth, predicted)]

    def columns(axis: int, depth: int) -> dict[str, Pixels]:
        return _segmentation(*(plane(values, axis, depth) for values in volumes))

    _save_sheet(path, columns, 1, volumes[0].shape[2:], spacing)


def save_masks(
    path: Path,
    images: Tensor,
    is_hidden: Tensor,
    how_often: Tensor,
    classes: Tensor | None = None,
) -> list[str]:
    """Image | true classes, if known | hidden in one draw, in grey | how often hidden, as heat.

    `images` (B, C, *S) and `how_often` (B, *S) are in [0, 1], `is_hidden` (B, *S) is boolean,
    `classes` (B, *S) are labels. Returns what the columns show.
    """
    seen = _rgb(images)
    hidden = _flat(is_hidden).cpu().numpy()[..., None]
    columns = {"image": seen}
    if classes is not None:
        columns["classes"] = _coloured(seen, classes)
    columns["hidden in one draw"] = np.where(hidden, np.uint8(HIDDEN_GREY), seen)
    columns["how often hidden"] = _heated(seen, how_often)
    _save_grid(path, list(columns.values()))
    return list(columns)


def plane(volumes: Tensor, axis: int, depth: int) -> Tensor:
    """(..., X, Y, Z) -> (..., H, W): the plane across an axis there, turned as it is looked at."""
    return volumes.select(axis - 3, depth).flip(-2, -1).transpose(-2, -1)


def middle_slice(volumes: Tensor) -> Tensor:
    """(B, C, *S) -> (B, C, H, W): of volumes the middle axial plane."""
    if volumes.ndim < 5:
        return volumes
    return plane(volumes, PLANES["axial"], volumes.shape[-1] // 2)


def remember(path: Path, numbers: dict[str, Any], file: str) -> None:
    """Note what stands in a picture in a JSON file beside it: its name -> its numbers.

    Written aside, then renamed; a picture drawn again after a resumption replaces its own, and a
    file that cannot be read is begun anew.
    """
    try:
        found = json.loads(path.with_name(file).read_text())
    except (OSError, ValueError):
        found = {}
    known = (found if isinstance(found, dict) else {}) | {path.name: numbers}
    _write(path.with_name(file), json.dumps(known, indent=1, sort_keys=True).encode())


def to_intensity(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Standardised (B, C, *S) -> intensities in [0, 1], what is outside clipped, no number 0."""
    per_channel = (1, -1, *[1] * (images.ndim - 2))
    scale = torch.tensor(std, device=images.device).reshape(per_channel)
    shift = torch.tensor(mean, device=images.device).reshape(per_channel)
    return (images.float() * scale + shift).clamp(0, 1).nan_to_num(nan=0.0)


def class_colour(label: int) -> tuple[int, int, int]:
    """The fixed colour of a class from 1 on; from the eighth on they return, each time darker."""
    lap, index = divmod(label - 1, len(CLASS_COLOURS))
    red, green, blue = CLASS_COLOURS[index]
    return red >> lap, green >> lap, blue >> lap


def _reconstruction(images: Tensor, is_hidden: Tensor, predicted: Tensor) -> dict[str, Pixels]:
    """Columns of tiles by what they show."""
    seen, guess = _rgb(images), _rgb(predicted)
    hidden = _flat(is_hidden).cpu().numpy()[..., None]
    return {
        "image": seen,
        "hidden (grey)": np.where(hidden, np.uint8(HIDDEN_GREY), seen),
        "reconstructed": np.where(hidden, guess, seen),
    }


def _segmentation(images: Tensor, truth: Tensor, predicted: Tensor) -> dict[str, Pixels]:
    """Columns of tiles by what they show."""
    seen = _rgb(images)
    return {
        "image": seen,
        "truth": _coloured(seen, truth),
        "predicted": _coloured(seen, predicted),
    }


def _tensor(values: Tensor | npt.NDArray[Any]) -> Tensor:
    """Without a copy, but for read-only arrays, which torch takes with a warning only."""
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.require(values, requirements="W"))


def _flat(values: Tensor) -> Tensor:
    """The same of values without channels: (B, *S) -> (B, H, W)."""
    return middle_slice(values[:, None])[:, 0]


def _rgb(images: Tensor) -> Pixels:
    """Grey from one channel, the first and an empty third from two, the first three from more."""
    images = middle_slice(images)
    pixels = images.detach().float().clamp(0, 1).mul(255).round().cpu().numpy().astype(np.uint8)
    channels = pixels.shape[1]
    if channels == 1:
        pixels = np.repeat(pixels, 3, axis=1)
    elif channels == 2:
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:, :1])], axis=1)
    return np.ascontiguousarray(np.moveaxis(pixels[:, :3], 1, -1))


def _coloured(pixels_BHW3: Pixels, labels: Tensor) -> Pixels:
    """Opaque class colours over the dimmed picture, so that the smallest objects stand out."""
    label = _flat(labels).cpu().numpy()
    palette = np.zeros((256, 3), np.uint8)
    for index in range(1, IGNORED):
        palette[index] = class_colour(index)
    palette[IGNORED] = IGNORED_GREY
    return np.where((label == 0)[..., None], pixels_BHW3 // 2, palette[label])


def _heated(pixels_BHW3: Pixels, shares: Tensor) -> Pixels:
    """Four parts of HEAT, the same colour for a share in every picture, and one of the image.

    The image is in eight levels of grey: enough to find one's way, and the file stays small.
    """
    steps = np.linspace(0, 1, len(HEAT))
    palette = [
        np.interp(np.arange(256) / 255, steps, channel) for channel in zip(*HEAT, strict=True)
    ]
    colours = np.stack(palette, axis=1).round().astype(np.uint16)
    heat = colours[
        _flat(shares).detach().float().clamp(0, 1).mul(255).round().cpu().numpy().astype(int)
    ]
    grey = pixels_BHW3.mean(axis=-1, keepdims=True).astype(np.uint16) // 32 * 32
    mixed: Pixels = ((4 * heat + grey) // 5).astype(np.uint8)
    return mixed


def _save_grid(path: Path, columns: Sequence[Pixels]) -> None:
    """Columns of tiles (B, H, W, 3) beside each other."""
    height, width = columns[0].shape[1:3]
    scale = max(1, -(-SMALLEST_TILE // min(height, width)))
    lines = []
    for tiles in zip(*columns, strict=True):
        enlarged = [tile.repeat(scale, axis=0).repeat(scale, axis=1) for tile in tiles]
        lines.append(_joined(enlarged, axis=1))
    _write(path, _png(_joined(lines, axis=0)))


def _save_sheet(
    path: Path,
    columns_at: Callable[[int, int], dict[str, Pixels]],
    num_volumes: int,
    shape: Sequence[int],
    spacing: Sequence[float],
) -> None:
    """Frames of planes below each other, small enough for MOST_BYTES, and what is in them.

    `columns_at(axis, depth)` gives columns of tiles (B, H, W, 3), one tile of each volume.
    """
    largest = LARGEST_PLANE
    while True:
        extents = _pixels_along(shape, spacing, largest)
        boxes = [_box(extents, axis, largest) for axis in PLANES.values()] * num_volumes
        frame_height = sum(height for height, _ in boxes)
        num_frames = min(MOST_FRAMES, max(shape), TALLEST_SHEET // frame_height)
        frames = []
        for number in range(num_frames):
            depth = (number + 0.5) / num_frames
            planes = [columns_at(axis, int(depth * shape[axis])) for axis in PLANES.values()]
            tiles = [
                [column[volume] for column in columns.values()]
                for volume in range(num_volumes)
                for columns in planes
            ]
            sizes = [_size(extents, axis) for axis in PLANES.values()] * num_volumes
            frames += [
                np.concatenate([_boxed(tile, size, box) for tile in line], axis=1)
                for line, size, box in zip(tiles, sizes, boxes, strict=True)
            ]
        sheet = np.concatenate(frames)
        is_grey = (sheet == sheet[..., :1]).all()
        encoded = _png(sheet[..., 0] if is_grey else sheet)  # a third of the pixels to pack
        if len(encoded) <= MOST_BYTES:
            break
        largest = int(largest * min(0.9, math.sqrt(MOST_BYTES / len(encoded))))
    _write(path, encoded)
    numbers = {
        "frames": num_frames,
        "planes": list(PLANES) * num_volumes,
        "heights": [height for height, _ in boxes],
        "columns": list(planes[0]),
        "shape": list(shape),
        "spacing": [float(step) for step in spacing],
    }
    remember(path, numbers, SLICES)


def _pixels_along(shape: Sequence[int], spacing: Sequence[float], largest: int) -> list[int]:
    """Pixels along each axis, as many to a mm everywhere: the longest has at most `largest`.

    Where the finest voxels take more than a pixel they take a whole number, so that all look alike.
    """
    lengths = [edge * step for edge, step in zip(shape, spacing, strict=True)]
    per_voxel = largest / max(lengths) * min(spacing)
    per_mm = (math.floor(per_voxel) if per_voxel > 1 else per_voxel) / min(spacing)
    return [max(1, round(length * per_mm)) for length in lengths]


def _size(extents: Sequence[int], axis: int) -> tuple[int, int]:
    """Height and width of the plane across an axis."""
    width, height = (extent for other, extent in enumerate(extents) if other != axis)
    return height, width


def _box(extents: Sequence[int], axis: int, largest: int) -> tuple[int, int]:
    """Height and width of the box around a plane; all are as wide, and none is a mere strip."""
    width = max(_size(extents, other)[1] for other in PLANES.values())
    height = _size(extents, axis)[0]
    return max(height, largest // 2) + GAP, max(width, largest // 2) + GAP


def _boxed(tile: Pixels, size: tuple[int, int], box: tuple[int, int]) -> Pixels:
    """A tile in the middle of a black box; shrunk pixels are means, enlarged ones repeated."""
    height, width = size
    fitted = Image.fromarray(tile).resize((width, height), Image.Resampling.BOX)
    boxed = np.zeros((*box, 3), np.uint8)
    top, left = (box[0] - height) // 2, (box[1] - width) // 2
    boxed[top : top + height, left : left + width] = np.asarray(fitted)
    return boxed


def _png(pixels: Pixels) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Not synced: training does not wait for a picture, and a torn one costs nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path, synced=False) as aside:
        aside.write_bytes(content)


def _joined(tiles: Sequence[Pixels], axis: int) -> Pixels:
    """Tiles beside (1) or below (0) each other with white gaps."""
    shape = list(tiles[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    pieces = [piece for tile in tiles for piece in (gap, tile)][1:]
    return np.concatenate(pieces, axis=axis)
