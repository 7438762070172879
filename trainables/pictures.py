"""Pictures of what a model sees: PNG grids, one line per image.

Of volumes the middle slice of the first axis is drawn.

Letters of shapes: B images, C channels, H W pixels, *S any number of axes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from trainables.metrics import IGNORED

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


def save_reconstruction(path: Path, images: Tensor, is_hidden: Tensor, predicted: Tensor) -> None:
    """Image | hidden regions in grey | reconstruction with the visible pixels pasted in.

    `images`, `predicted` (B, C, *S) are intensities in [0, 1]; `is_hidden` (B, *S) is boolean.
    """
    seen, guess = _rgb(images), _rgb(predicted)
    hidden = _flat(is_hidden).cpu().numpy()[..., None]
    _save_grid(
        path, [seen, np.where(hidden, np.uint8(HIDDEN_GREY), seen), np.where(hidden, guess, seen)]
    )


def save_segmentation(path: Path, images: Tensor, truth: Tensor, predicted: Tensor) -> None:
    """Image | true classes | predicted classes; intensities (B, C, *S), labels (B, *S)."""
    seen = _rgb(images)
    _save_grid(path, [seen, _coloured(seen, truth), _coloured(seen, predicted)])


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


def middle_slice(volumes: Tensor) -> Tensor:
    """(B, C, *S) -> (B, C, H, W): of volumes the middle slice of the first axis."""
    return volumes[:, :, volumes.shape[2] // 2] if volumes.ndim == 5 else volumes


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
    """Write columns of tiles (B, H, W, 3) aside, then rename, so that no half picture is seen."""
    height, width = columns[0].shape[1:3]
    scale = max(1, -(-SMALLEST_TILE // min(height, width)))
    lines = []
    for tiles in zip(*columns, strict=True):
        enlarged = [tile.repeat(scale, axis=0).repeat(scale, axis=1) for tile in tiles]
        lines.append(_joined(enlarged, axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(_joined(lines, axis=0)).save(aside, format="PNG")
    os.replace(aside, path)


def _joined(tiles: Sequence[Pixels], axis: int) -> Pixels:
    """Tiles beside (1) or below (0) each other with white gaps."""
    shape = list(tiles[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    pieces = [piece for tile in tiles for piece in (gap, tile)][1:]
    return np.concatenate(pieces, axis=axis)
