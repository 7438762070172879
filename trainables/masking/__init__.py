"""Which mask units the encoder does not see.

To add a strategy, write a function of a `MaskRequest` that returns `is_hidden_BU` with exactly
`request.hidden` True in each row, give it keyword-only options, and add it to MASKING. One with an
option `momentum` (a schedule) is given a teacher in `request.model`: the exponential moving average
of the model, with that momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from trainables.edges import grid_of
from trainables.masking.guided import anatomask, attmask, hpm
from trainables.masking.lesions import amlp
from trainables.masking.plain import block, color, grid, multiblock, random, uniform
from trainables.masking.request import (
    MaskRequest,
    hidden_units,
    hide_smallest,
    pixels_hidden,
    plan_hidden,
    split_indices,
    to_units,
    unit_to_patch,
)
from trainables.schedules import value_at

if TYPE_CHECKING:
    from trainables.config import TrialConfig
    from trainables.mae import MAE

__all__ = [
    "MASKING",
    "MaskRequest",
    "has_teacher",
    "hidden_units",
    "hide",
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
) -> MaskRequest:
    """What the trial would be asked at this point of its schedule; of a random ratio the median.

    `images` are standardised (B, C, *S), `rows_B` their places in the data set; `model` is whom the
    strategy asks: its teacher if it has one.
    """
    size = images.shape[2:]
    unit_grid = grid_of(size, config.unit_edges(len(size)))
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
    )


def hide(config: TrialConfig, request: MaskRequest) -> Tensor:
    """What the trial's strategy hides: is_hidden_BU."""
    strategy = config.masking.strategy
    return MASKING[strategy.name](request, **strategy.options())


def has_teacher(config: TrialConfig) -> bool:
    """Whether the trial's strategy asks a moving average of the model."""
    return hasattr(config.masking.strategy, "momentum")
