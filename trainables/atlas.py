"""What a trial hides, drawn on a few images and put into numbers, at some point of its training.

B images · C channels · *S spatial axes · P patches of the grid · K classes
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainables import distributed, padding
from trainables.config import TrialConfig
from trainables.edges import grid_of
from trainables.hiding import hide, request_at
from trainables.mae import MAE, patchify
from trainables.masking import pixels_hidden
from trainables.pictures import remember, save_masks, to_intensity
from trainables.schedules import value_at

DRAWS = 16
NUMBERS = "masks.json"  # of all pictures of a folder: name of the picture -> its numbers


def masks_name(progress: float) -> str:
    """The picture's name; in order of progress by name."""
    return f"masks-{round(100 * progress):03d}.png"


@torch.no_grad()
def draw_masks(
    path: Path,
    images: Tensor,
    rows_B: Tensor,
    config: TrialConfig,
    progress: float,
    seed: int,
    model: MAE | None,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    labels: Tensor | None = None,
    classes: Sequence[str] = (),
    draws: int = DRAWS,
    is_padded: bool = False,
) -> dict[str, Any]:
    """Draw the trial's masks of these images, and write their numbers into NUMBERS beside it.

    `images` are standardised (B, C, *S), `rows_B` their places in the data set, `labels` (B, *S)
    what each pixel is of `classes`; `model` is whom the strategy asks: its teacher if it has one.
    Of a random ratio the median is shown. Training never repeats these masks: its steps count from
    0 upwards, these draws from -1 downwards.
    """
    size = images.shape[2:]
    patch = config.patch_edges(len(size))
    grid = grid_of(size, patch)
    # a few images are not worth compiling for
    stance = torch.compiler.set_stance("force_eager") if config.pretrain.compile else None
    drawn = []
    with (
        stance or contextlib.nullcontext(),
        distributed.autocast(config.pretrain.precision, images.device),
    ):
        request = request_at(
            config, progress, images, rows_B, model, seed=seed, step=-1, is_padded=is_padded
        )
        for draw in range(draws):
            request = replace(request, step=-1 - draw)
            drawn.append(request.to_patches(hide(config, request)))
    often_BP = torch.stack(drawn).float().mean(dim=0)
    hidden, real_share_BP = often_BP.mean(), None
    is_hidden, how_often = (pixels_hidden(each, grid, patch) for each in (drawn[0], often_BP))
    if is_padded:  # it is black in pictures, and counts nowhere
        is_real = ~images[:, 0].isnan()
        is_hidden, how_often = is_hidden & is_real, how_often * is_real
        real_share_BP = padding.real_share(images, patch)
        hidden = (often_BP * real_share_BP).sum() / real_share_BP.sum()

    columns = save_masks(path, to_intensity(images, mean, std), is_hidden, how_often, labels)
    by_class = {}
    if labels is not None:
        by_class = class_numbers(often_BP, labels, classes, patch, real_share_BP)
    numbers = {
        "progress": progress,
        "columns": columns,
        "draws": draws,
        "ratio": value_at(config.masking.ratio, progress),
        "units": request.num_units,
        "hidden": hidden.item(),
        "classes": by_class,
    }
    remember(path, numbers, NUMBERS)
    return numbers


def class_numbers(
    often_BP: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    patch: Sequence[int],
    real_share_BP: Tensor | None = None,
) -> dict[str, dict[str, float | None]]:
    """How often pixels of each class were hidden, against all pixels.

    enrichment: hidden share of the class's pixels minus that of all pixels. chance: three standard
    deviations of the same difference when each image's map of `often_BP` is shifted against its
    classes by a random number of patches along every axis, around the edges; so a map with few
    large regions, or one that never changes, has to find more to stand out. Exact, by correlation.
    `real_share_BP`: how much of each patch is no padding, which is no pixel; None: all.
    """
    grid = grid_of(labels.shape[1:], patch)
    axes = list(range(2, 2 + len(grid)))
    count_KBP = torch.stack(
        [
            patchify((labels == label)[:, None].double(), patch).sum(dim=-1)
            for label in range(len(classes))
        ]
    )
    often_BP = often_BP.double()
    pixels_K = count_KBP.sum(dim=(1, 2))
    share_K = (count_KBP * often_BP).sum(dim=(1, 2)) / pixels_K
    if real_share_BP is None:
        enrichment_K = share_K - often_BP.mean()
    else:
        weight_BP = real_share_BP.double() / real_share_BP.double().sum()
        enrichment_K = share_K - (weight_BP * often_BP).sum()
        # A shifted map meets more or less of what is real; without padding always all of it
        count_KBP = count_KBP - pixels_K[:, None, None] * weight_BP

    waves_KB = torch.fft.fftn(count_KBP.reshape(*count_KBP.shape[:2], *grid), dim=axes)
    waves_B = torch.fft.fftn(often_BP.reshape(-1, *grid), dim=[axis - 1 for axis in axes])
    at_shift_KB = torch.fft.ifftn(waves_KB * waves_B.conj(), dim=axes).real
    chance_K = 3 * at_shift_KB.var(dim=axes, correction=0).sum(dim=1).sqrt() / pixels_K

    table = torch.stack([pixels_K, share_K, enrichment_K, chance_K], dim=1).tolist()
    names = ("pixels", "hidden", "enrichment", "chance")
    return {
        name: {
            key: value if math.isfinite(value) else None
            for key, value in zip(names, line, strict=True)
        }
        for name, line in zip(classes, table, strict=True)
    }
