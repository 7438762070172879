"""Augmentations of a whole batch on its device, with counter-based randomness.

To add one, write a function of (images, masks, seed, step, samples) with keyword-only options, and
add it to AUGMENTATIONS. It moves images and masks alike, may change intensities besides, and draws
from `counter`. Padding is NaN in images and 255 in masks, and stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trainables import counter
from trainables.late import Late

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Late("torch")


def none(
    images: Tensor, masks: Tensor | None, seed: int, step: int, samples_B: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Images as they are."""
    return images, masks


def flips(
    images: Tensor, masks: Tensor | None, seed: int, step: int, samples_B: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Each axis turned around with probability 1/2; images (B, C, *S), masks (B, *S)."""
    num_axes = images.ndim - 2
    is_flipped_BA = counter.uniform(seed, "flip", step, samples_B, num_axes) < 0.5
    for axis in range(num_axes):
        images = _flip(images, axis - num_axes, is_flipped_BA[:, axis])
        if masks is not None:
            masks = _flip(masks, axis - num_axes, is_flipped_BA[:, axis])
    return images, masks


def _flip(tensor: Tensor, axis: int, is_flipped_B: Tensor) -> Tensor:
    is_flipped = is_flipped_B.reshape(-1, *[1] * (tensor.ndim - 1))
    return torch.where(is_flipped, tensor.flip(axis), tensor)


AUGMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "none": none,
    "flips": flips,
}
