"""Which mask units the encoder does not see, and the bookkeeping between units, patches and pixels.

To add a strategy, write a function of a `MaskRequest` that returns `is_hidden_BU` with exactly
`request.hidden` True in each row, give it keyword-only options, and add it to MASKING.

B batch · U mask units of the grid (row-major) · P patches · V visible patches · X hidden patches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainables import counter
from trainables.errors import UserError


@dataclass(frozen=True)
class MaskRequest:
    """What a strategy is asked for: `hidden` units of `grid` for each of the samples."""

    grid: tuple[int, ...]  # mask units per axis
    hidden: int  # units to hide, the same for every sample, so that shapes stay static
    progress: float
    seed: int
    step: int
    samples_B: Tensor  # places in the global batch, int64
    scores_BU: Tensor | None = None  # only for strategies that ask for them

    @property
    def num_units(self) -> int:
        return math.prod(self.grid)


def random(request: MaskRequest) -> Tensor:
    """Units hidden independently of each other."""
    noise_BU = counter.uniform(
        request.seed, "mask", request.step, request.samples_B, request.num_units
    )
    return _hide_smallest(noise_BU, request.hidden)


def hidden_units(ratio: float, num_units: int) -> int:
    """The number of units nearest to `ratio` of them; at least one hidden and one visible."""
    if num_units < 2:
        raise UserError(
            f"masking: an image of {num_units} mask unit cannot be hidden in part; "
            f"set a smaller masking.unit (or model.patch) or a larger image size"
        )
    return min(max(round(ratio * num_units), 1), num_units - 1)


def plan_hidden(
    schedule: Callable[[float], float], num_units: int, steps: int, max_distinct: int = 8
) -> list[int]:
    """Units hidden at each step; at most `max_distinct` values, as each is a shape to compile.

    More are snapped to evenly spaced levels between the smallest and the largest.
    """
    exact = [hidden_units(schedule(step / steps), num_units) for step in range(steps)]
    distinct = sorted(set(exact))
    if len(distinct) <= max_distinct:
        return exact
    low, span = distinct[0], distinct[-1] - distinct[0]
    levels = [low + round(span * level / (max_distinct - 1)) for level in range(max_distinct)]
    nearest = {count: min(levels, key=lambda level: abs(level - count)) for count in distinct}
    return [nearest[count] for count in exact]


def unit_to_patch(is_hidden_BU: Tensor, unit_grid: Sequence[int], patches_per_unit: int) -> Tensor:
    """Each unit stands for `patches_per_unit` patches along every axis -> is_hidden_BP."""
    batch, axes = is_hidden_BU.shape[0], len(unit_grid)
    spread = [edge for units in unit_grid for edge in (units, patches_per_unit)]
    is_hidden = is_hidden_BU.reshape(batch, *(edge for units in unit_grid for edge in (units, 1)))
    assert is_hidden.ndim == 1 + 2 * axes
    return is_hidden.expand(batch, *spread).reshape(batch, -1)


def split_indices(is_hidden_BP: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """(visible_BV, hidden_BX): int64 patch numbers, ascending.

    `num_hidden` is known beforehand, so nothing waits for the device.
    """
    order_BP = is_hidden_BP.to(torch.uint8).argsort(dim=1, stable=True)
    num_visible = is_hidden_BP.shape[1] - num_hidden
    return order_BP[:, :num_visible], order_BP[:, num_visible:]


def pixels_hidden(is_hidden_BP: Tensor, grid: Sequence[int], patch: int) -> Tensor:
    """The same regions as pixels: bool (B, *S)."""
    pixels = unit_to_patch(is_hidden_BP, grid, patch)
    return pixels.reshape(is_hidden_BP.shape[0], *(edge * patch for edge in grid))


def _hide_smallest(values_BU: Tensor, hidden: int) -> Tensor:
    order_BU = values_BU.argsort(dim=1, stable=True)
    is_hidden_BU = torch.zeros_like(values_BU, dtype=torch.bool)
    return is_hidden_BU.scatter_(1, order_BU[:, :hidden], True)


MASKING: dict[str, Callable[..., Tensor]] = {"random": random}
