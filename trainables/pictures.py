"""Pictures of what a model sees: PNG grids, one line per image.

Letters of shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
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
HIDDEN_GREY = 128
IGNORED_GREY = 160
GAP = 4  # pixels of white between tiles
SMALLEST_TILE = 128  # pixels; smaller images are enlarged by a whole number


def save_reconstruction(path: Path, images: Tensor, is_hidden: Tensor, predicted: Tensor) -> None:
    """Image | hidden regions in grey | reconstruction with the visible pixels pasted in.

    `images`, `predicted` (B, C, H, W) are intensities in [0, 1]; `is_hidden` (B, H, W) is boolean.
    """
    seen, guess = _rgb(images), _rgb(predicted)
    hidden = is_hidden.cpu().numpy()[..., None]
    _save_grid(
        path, [seen, np.where(hidden, np.uint8(HIDDEN_GREY), seen), np.where(hidden, guess, seen)]
    )


def save_segmentation(path: Path, images: Tensor, truth: Tensor, predicted: Tensor) -> None:
    """Image | true classes | predicted classes; intensities (B, C, H, W), labels (B, H, W)."""
    seen = _rgb(images)
    _save_grid(path, [seen, _coloured(seen, truth), _coloured(seen, predicted)])


def class_colour(label: int) -> tuple[int, int, int]:
    """The fixed colour of a class from 1 on; from the eighth on they return, each time darker."""
    lap, index = divmod(label - 1, len(CLASS_COLOURS))
    red, green, blue = CLASS_COLOURS[index]
    return red >> lap, green >> lap, blue >> lap


def _rgb(images: Tensor) -> Pixels:
    """Grey from one channel, the first and an empty third from two, the first three from more."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().cpu().numpy().astype(np.uint8)
    channels = pixels.shape[1]
    if channels == 1:
        pixels = np.repeat(pixels, 3, axis=1)
    elif channels == 2:
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:, :1])], axis=1)
    return np.ascontiguousarray(np.moveaxis(pixels[:, :3], 1, -1))


def _coloured(pixels_BHW3: Pixels, labels: Tensor) -> Pixels:
    """Opaque class colours over the dimmed picture, so that the smallest objects stand out."""
    label = labels.cpu().numpy()
    palette = np.zeros((256, 3), np.uint8)
    for index in range(1, IGNORED):
        palette[index] = class_colour(index)
    palette[IGNORED] = IGNORED_GREY
    return np.where((label == 0)[..., None], pixels_BHW3 // 2, palette[label])


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
    Image.fromarray(_joined(lines, axis=0)).save(aside, format="PNG", optimize=True)
    os.replace(aside, path)


def _joined(tiles: Sequence[Pixels], axis: int) -> Pixels:
    """Tiles beside (1) or below (0) each other with white gaps."""
    shape = list(tiles[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    pieces = [piece for tile in tiles for piece in (gap, tile)][1:]
    return np.concatenate(pieces, axis=axis)
