"""Which mask units the encoder does not see.

To add a strategy, write a function of a `MaskRequest` that returns `is_hidden_BU` with exactly
`request.hidden` True in each row, give it keyword-only options, and add it to MASKING; how many of
them are padding, `hide` sees to, if the strategy does not (`hide_first` does). One with an
option `momentum` (a schedule) is given a teacher in `request.model`: the exponential moving average
of the model, with that momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainables import padding
from trainables.edges import grid_of
from trainables.masking.guided import anatomask, attmask, hpm
from trainables.masking.lesions import amlp
from trainables.masking.plain import block, color, grid, multiblock, random, uniform
from trainables.masking.request import (
    MaskRequest,
    hidden_units,
    hide_first,
    hide_smallest,
    pixels_hidden,
    plan_hidden,
    split_indices,
    to_units,
    unit_to_patch,
)
from trainables.schedules import value_at

if TYPE_CHECKING:
    from torch import Tensor

    from trainables.config import TrialConfig
    from trainables.mae import MAE

__all__ = [
    "MASKING",
    "MaskRequest",
    "has_teacher",
    "hidden_units",
    "hide",
    "hide_first",
    "hide_smallest",
    "pixels_hidden",
    "plan_hidden",
    "request_at",
    "split_indices",
    "to_units",
    "unit_to_patch",
]

MASKING: dict[str, Callable[..., Tensor]] = {
    "random": random,
    "uniform": uniform,
    "grid": grid,
    "block": block,
    "color": color,
    "multiblock": multiblock,
    "attmask": attmask,
    "hpm": hpm,
    "anatomask": anatomask,
    "amlp": amlp,
}


def request_at(
    config: TrialConfig,
    progress: float,
    images: Tensor,
    rows_B: Tensor,
    model: MAE | None,
    *,
    seed: int,
    step: int,
    is_padded: bool = False,
) -> MaskRequest:
    """What the trial would be asked at this point of its schedule; of a random ratio the median.

    `images` are standardised (B, C, *S), `rows_B` their places in the data set; `model` is whom the
    strategy asks: its teacher if it has one.
    """
    size = images.shape[2:]
    unit = config.unit_edges(len(size))
    unit_grid = grid_of(size, unit)
    ratio = value_at(config.masking.ratio, progress)
    return MaskRequest(
        grid=unit_grid,
        hidden=hidden_units(ratio, math.prod(unit_grid)),
        progress=progress,
        seed=seed,
        step=step,
        samples_B=rows_B,
        images=images,
        model=model,
        patches_per_unit=config.patches_per_unit(len(size)),
        is_padding_BU=padding.is_padding(images, unit) if is_padded else None,
    )


def hide(config: TrialConfig, request: MaskRequest) -> Tensor:
    """What the trial's strategy hides: is_hidden_BU, of real units and of padding what is due.

    Where the strategy hid too few or too many of either, chance decides which.
    """
    strategy = config.masking.strategy
    is_hidden_BU = MASKING[strategy.name](request, **strategy.options())
    if request.is_padding_BU is None:
        return is_hidden_BU
    return hide_first(request, request.noise("padding") - is_hidden_BU.float())


def has_teacher(config: TrialConfig) -> bool:
    """Whether the trial's strategy asks a moving average of the model."""
    return hasattr(config.masking.strategy, "momentum")
