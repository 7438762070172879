"""Augmentations of a whole batch on its device, with counter-based randomness.

To add one, write a function of (images, masks, seed, step, samples) with keyword-only options, and
add it to AUGMENTATIONS. It moves images and masks alike, may change intensities besides, and draws
from `counter`. Padding is NaN in images and 255 in masks, and stays so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainables import counter
from trainables.late import Late

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional
else:
    torch = Late("torch")
    functional = Late("torch.nn.functional")

Share = Annotated[float, Field(gt=0, le=1)]
FlipAxes = Annotated[
    tuple[Literal[0, 1, 2], ...] | None,
    Field(description="axes that are turned around, the first is 0; null: all"),
]


def none(
    images: Tensor, masks: Tensor | None, seed: int, step: int, samples_B: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Images as they are."""
    return images, masks


def flips(
    images: Tensor,
    masks: Tensor | None,
    seed: int,
    step: int,
    samples_B: Tensor,
    *,
    flip_axes: FlipAxes = None,
) -> tuple[Tensor, Tensor | None]:
    """Each axis turned around with probability 1/2; images (B, C, *S), masks (B, *S).

    `flip_axes`: those alone, as classes that have a side (left, right) would change it.
    """
    num_axes = images.ndim - 2
    is_flipped_BA = counter.uniform(seed, "flip", step, samples_B, num_axes) < 0.5
    axes = range(num_axes) if flip_axes is None else flip_axes
    pixel_BS = _turned(images.shape[2:], is_flipped_BA, axes).flatten(1)
    images = _picked(images, pixel_BS[:, None].expand(-1, images.shape[1], -1))
    return images, None if masks is None else _picked(masks, pixel_BS)


def crops(
    images: Tensor,
    masks: Tensor | None,
    seed: int,
    step: int,
    samples_B: Tensor,
    *,
    scale: tuple[Share, Share] = (0.2, 1.0),
    stretch: Annotated[float, Field(ge=1, description="longest to shortest edge, at most")] = 4 / 3,
    flip_axes: FlipAxes = None,
) -> tuple[Tensor, Tensor | None]:
    """A random part of each image, enlarged to the size of the whole, then `flips` (MAE's recipe).

    `scale`: least and largest share of the area or volume that is kept, all alike probable. Values
    between pixels are linear, of those that are no padding; masks take the nearest pixel's.
    """
    size = images.shape[2:]
    num_axes = len(size)
    chance = counter.uniform(seed, "resized-crop", step, samples_B, 1 + 2 * num_axes)
    share_B1 = scale[0] + chance[:, :1] * (scale[1] - scale[0])
    # exponents of mean 0 keep the area as it was drawn; their spread is that of the longest edge
    drawn_BA = chance[:, 1 : 1 + num_axes] * math.log(stretch)
    shape_BA = torch.exp(drawn_BA - drawn_BA.mean(dim=1, keepdim=True))
    edge_BA = (share_B1 ** (1 / num_axes) * shape_BA).clamp(max=1.0)
    middle_BA = (2 * chance[:, 1 + num_axes :] - 1) * (1 - edge_BA)
    # of the last axis first, as grid_sample has it
    theta = torch.diag_embed(edge_BA.flip(1))
    theta = torch.cat([theta, middle_BA.flip(1)[..., None]], dim=2)
    grid = functional.affine_grid(theta, [len(images), 1, *size], align_corners=False)
    sample = partial(functional.grid_sample, grid=grid, align_corners=False, padding_mode="border")
    is_real = (~images[:, :1].isnan()).float()
    share_real = sample(is_real, mode="bilinear")
    is_padding = sample(is_real, mode="nearest") == 0
    images = sample(images.nan_to_num(), mode="bilinear") / share_real.clamp(min=0.1)
    images = images.masked_fill(is_padding, math.nan)
    if masks is not None:
        masks = sample(masks[:, None].float(), mode="nearest")[:, 0].to(masks.dtype)
    return flips(images, masks, seed, step, samples_B, flip_axes=flip_axes)


def _turned(size: Sequence[int], is_flipped_BA: Tensor, axes: Collection[int]) -> Tensor:
    """Which pixel of an image, counted row-major, comes to each place (B, *S).

    One gather then turns all axes, in half to a quarter of the time that turning each takes.
    """
    pixel_BS, stride = is_flipped_BA.new_zeros((), dtype=torch.int64), 1
    for axis, edge in reversed(list(enumerate(size))):
        place = torch.arange(edge, device=is_flipped_BA.device)[None]
        if axis in axes:
            place = torch.where(is_flipped_BA[:, axis, None], edge - 1 - place, place)
        along = [len(place), *[1] * len(size)]
        along[1 + axis] = edge
        pixel_BS = pixel_BS + (place * stride).view(along)
        stride *= edge
    return pixel_BS.expand(len(is_flipped_BA), *size)


def _picked(values: Tensor, pixel: Tensor) -> Tensor:
    """Values (..., *S) at pixels (..., number of pixels), in the shape that they had."""
    return values.flatten(pixel.ndim - 1).gather(-1, pixel).view(values.shape)


AUGMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "none": none,
    "flips": flips,
    "crops": crops,
}
