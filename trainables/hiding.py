"""Where a trial hides: its strategy, asked at a point of its schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from trainables import padding
from trainables.edges import grid_of
from trainables.masking import MASKING
from trainables.masking.request import MaskRequest, hidden_units, hide_first
from trainables.schedules import value_at

if TYPE_CHECKING:
    from torch import Tensor

    from trainables.config import TrialConfig
    from trainables.masking.strategy import Guide


def request_at(
    config: TrialConfig,
    progress: float,
    images: Tensor,
    rows_B: Tensor,
    model: Guide | None,
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
    setting = config.masking.strategy
    strategy = MASKING[setting.name]
    if strategy.guide_flops is None:
        request = replace(request, model=None)  # nothing that is asked may cost nothing
    is_hidden_BU = strategy.hide(request, **setting.options())
    if request.is_padding_BU is None:
        return is_hidden_BU
    return hide_first(request, request.noise("padding") - is_hidden_BU.float())


def has_teacher(config: TrialConfig) -> bool:
    """Whether the trial's strategy asks a moving average of the model."""
    return hasattr(config.masking.strategy, "momentum")
