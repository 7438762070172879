"""What a masking strategy is asked, and the bookkeeping between mask units, patches and pixels.

Where images are padded, `hidden` units of the grid are hidden as elsewhere, as shapes are static,
but of the real units of each image (not padding alone) as large a share as of the whole grid.

B batch · U mask units of the grid (row-major) · P patches · V visible patches · X hidden patches
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainables import counter, padding
from trainables.edges import grid_of
from trainables.errors import UserError
from trainables.late import Late

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainables.masking.strategy import Guide
else:
    torch = Late("torch")


@dataclass(frozen=True)
class MaskRequest:
    """What a strategy is asked for: `hidden` units of `grid` for each of the samples."""

    grid: tuple[int, ...]  # mask units per axis
    hidden: int  # units to hide, the same for every sample, so that shapes stay static
    progress: float
    seed: int
    step: int
    samples_B: Tensor  # places in the global batch, int64
    images: Tensor | None = None  # standardised (B, C, *S), for strategies that look at them
    model: Guide | None = None  # the teacher, for strategies that have one; else the model itself
    patches_per_unit: tuple[int, ...] = ()  # per axis; by default a unit is a patch
    is_padding_BU: Tensor | None = None  # units that hold nothing else; None: nothing is padded

    def __post_init__(self) -> None:
        if not self.patches_per_unit:
            object.__setattr__(self, "patches_per_unit", (1,) * len(self.grid))
        assert len(self.patches_per_unit) == len(self.grid)

    @property
    def num_units(self) -> int:
        return math.prod(self.grid)

    @property
    def hidden_patches(self) -> int:
        return self.hidden * math.prod(self.patches_per_unit)

    @property
    def num_real_B1(self) -> Tensor:
        """Units of each sample that are not padding alone, int64."""
        assert self.is_padding_BU is not None
        return self.num_units - self.is_padding_BU.sum(dim=1, keepdim=True)

    @property
    def hidden_real_B1(self) -> Tensor:
        """How many of them are to be hidden, int64: one at least, and one visible, of two or more.

        The others of `hidden` are padding, of which there always are as many.
        """
        num_real_B1 = self.num_real_B1
        nearest_B1 = (self.hidden * num_real_B1.double() / self.num_units).round().long()
        has_both_B1 = (num_real_B1 >= 2).long()
        return nearest_B1.maximum(has_both_B1).minimum(num_real_B1 - has_both_B1)

    def of_real(self, count: int) -> int | Tensor:
        """A part of `hidden`; of the real units that a sample hides as large a part (B, 1)."""
        if self.is_padding_BU is None:
            return count
        return count * self.hidden_real_B1 // self.hidden

    def to_patches(self, values_BU: Tensor) -> Tensor:
        """Each unit's value for all of its patches: (B, U) -> (B, P)."""
        return unit_to_patch(values_BU, self.grid, self.patches_per_unit)

    def real_share(self) -> Tensor:
        """Share of each patch's voxels that are no padding, float32 (B, P)."""
        assert self.images is not None
        patches = map(operator.mul, self.grid, self.patches_per_unit)
        return padding.real_share(self.images, grid_of(self.images.shape[2:], list(patches)))

    def noise(self, stream: str = "mask", count: int | None = None) -> Tensor:
        """float32 (B, count) in [0, 1), by default a number for each unit; of this step alone."""
        places = self.num_units if count is None else count
        return counter.uniform(self.seed, stream, self.step, self.samples_B, places)


def hidden_units(ratio: float, num_units: int) -> int:
    """The number of units nearest to `ratio` of them; at least one hidden and one visible."""
    if num_units < 2:
        raise UserError(
            f"masking: an image of {num_units} mask unit cannot be hidden in part; "
            f"set a smaller masking.unit (or model.patch) or a larger image size"
        )
    return min(max(round(ratio * num_units), 1), num_units - 1)


def plan_hidden(
    schedule: Callable[[float, float], float],
    num_units: int,
    steps: int,
    seed: int,
    max_distinct: int = 8,
) -> list[int]:
    """Units hidden at each step; at most `max_distinct` values, as each is a shape to compile.

    More are snapped to evenly spaced levels between the smallest and the largest. A random schedule
    draws a number for each step from `seed`.
    """
    exact = [
        hidden_units(schedule(step / steps, chance), num_units)
        for step, chance in enumerate(counter.chances(seed, "ratio", 0, steps))
    ]
    distinct = sorted(set(exact))
    if len(distinct) <= max_distinct:
        return exact
    low, span = distinct[0], distinct[-1] - distinct[0]
    levels = [low + round(span * level / (max_distinct - 1)) for level in range(max_distinct)]
    nearest = {count: min(levels, key=lambda level: abs(level - count)) for count in distinct}
    return [nearest[count] for count in exact]


def unit_to_patch(
    is_hidden_BU: Tensor, unit_grid: Sequence[int], patches_per_unit: Sequence[int]
) -> Tensor:
    """Each unit stands for so many patches along each axis -> is_hidden_BP."""
    batch = is_hidden_BU.shape[0]
    spread = _interleaved(unit_grid, patches_per_unit)
    is_hidden = is_hidden_BU.reshape(batch, *_interleaved(unit_grid, [1] * len(unit_grid)))
    return is_hidden.expand(batch, *spread).reshape(batch, -1)


def split_indices(is_hidden_BP: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """(visible_BV, hidden_BX): int64 patch numbers, ascending.

    `num_hidden` is known beforehand, so nothing waits for the device.
    """
    order_BP = is_hidden_BP.to(torch.uint8).argsort(dim=1, stable=True)
    num_visible = is_hidden_BP.shape[1] - num_hidden
    return order_BP[:, :num_visible], order_BP[:, num_visible:]


def pixels_hidden(is_hidden_BP: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The same regions as pixels: bool (B, *S)."""
    pixels = unit_to_patch(is_hidden_BP, grid, patch)
    size = [cells * edge for cells, edge in zip(grid, patch, strict=True)]
    return pixels.reshape(is_hidden_BP.shape[0], *size)


def hide_first(request: MaskRequest, values_BU: Tensor) -> Tensor:
    """is_hidden_BU with the smallest values hidden, as many as are asked for; of equals the first.

    Of a padded image the smallest ones among the real units, and among the others.
    """
    if request.is_padding_BU is None:
        return hide_smallest(values_BU, request.hidden)
    order_BU = values_BU.argsort(dim=1, stable=True)
    is_last_BU = request.is_padding_BU.gather(1, order_BU).to(torch.uint8)
    order_BU = order_BU.gather(1, is_last_BU.argsort(dim=1, stable=True))  # real ones first
    place_U = torch.arange(request.num_units, device=values_BU.device)
    num_real_B1, hidden_real_B1 = request.num_real_B1, request.hidden_real_B1
    is_hidden = (place_U < hidden_real_B1) | (place_U >= num_real_B1) & (
        place_U < num_real_B1 + request.hidden - hidden_real_B1
    )
    return torch.zeros_like(request.is_padding_BU).scatter_(1, order_BU, is_hidden)


def hide_smallest(values_BU: Tensor, hidden: int | Tensor) -> Tensor:
    """is_hidden_BU with the `hidden` smallest values of each sample hidden; of equals the first.

    `hidden`: one number for all samples, or (B, 1).
    """
    order_BU = values_BU.argsort(dim=1, stable=True)
    is_hidden_BU = torch.zeros_like(values_BU, dtype=torch.bool)
    if isinstance(hidden, int):
        return is_hidden_BU.scatter_(1, order_BU[:, :hidden], True)
    place_U = torch.arange(values_BU.shape[1], device=values_BU.device)
    return is_hidden_BU.scatter_(1, order_BU, place_U < hidden)


def hide_highest(request: MaskRequest, scores_BU: Tensor, count: int) -> Tensor:
    """is_hidden_BU with the `count` highest scores; padding, which never guides, comes last."""
    if request.is_padding_BU is not None:
        scores_BU = scores_BU.masked_fill(request.is_padding_BU, -math.inf)
    return hide_smallest(-scores_BU, request.of_real(count))


def to_units(
    values_BP: Tensor, unit_grid: Sequence[int], patches_per_unit: Sequence[int]
) -> Tensor:
    """The mean over the patches of each unit: (B, P) -> (B, U); of all, padding or not."""
    cut = _interleaved(unit_grid, patches_per_unit)
    within = [2 + 2 * axis for axis in range(len(unit_grid))]
    return values_BP.reshape(-1, *cut).mean(dim=within).flatten(1)


def mean_of_real(request: MaskRequest, values_BP: Tensor) -> Tensor:
    """The mean over the real voxels of each unit, of values of its patches: (B, P) -> (B, U).

    0 for units that are padding alone. Also (B, F, P) -> (B, F, U).
    """
    if request.is_padding_BU is None:
        averaged = to_units(values_BP, request.grid, request.patches_per_unit)
        return averaged.reshape(*values_BP.shape[:-1], -1)
    share_BP = request.real_share()
    real_BU = to_units(share_BP, request.grid, request.patches_per_unit)
    real_BU = real_BU.masked_fill(request.is_padding_BU, 1.0)
    if values_BP.ndim == 3:
        share_BP, real_BU = share_BP[:, None], real_BU[:, None]
    total_BU = to_units(values_BP * share_BP, request.grid, request.patches_per_unit)
    return total_BU.reshape(*values_BP.shape[:-1], -1) / real_BU


def errors_under(
    request: MaskRequest, is_hidden_BU: Tensor, hidden: int, *, normalised: bool
) -> Tensor:
    """The model's mean squared error in each of the `hidden` units, 0 in visible ones: (B, U).

    `normalised`: in units of each patch's deviation, as `MAE.patch_errors` says.
    """
    assert request.model is not None and request.images is not None
    is_hidden_BP = request.to_patches(is_hidden_BU)
    num_hidden = hidden * math.prod(request.patches_per_unit)
    visible_BV, hidden_BX = split_indices(is_hidden_BP, num_hidden)
    errors_BX = request.model.patch_errors(
        request.images, visible_BV, hidden_BX, normalised=normalised
    )
    errors_BP = torch.zeros_like(is_hidden_BP, dtype=torch.float32)
    errors_BP.scatter_(1, hidden_BX, errors_BX)
    return mean_of_real(request, errors_BP)


def _interleaved(grid: Sequence[int], within: Sequence[int]) -> list[int]:
    """Cells of the first axis, what lies within one of them, cells of the second axis, ..."""
    return [count for pair in zip(grid, within, strict=True) for count in pair]
