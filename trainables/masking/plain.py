"""Strategies that look at nothing: where they hide follows from chance and the grid alone.

B batch · S units along an axis · U units of the grid (row-major) · G cells · L places in a cell
K blocks proposed at once · N axes

Sums are float64: exact, and mixed precision leaves float64 alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from trainables import counter
from trainables.late import Late
from trainables.masking.request import MaskRequest, hide_first
from trainables.masking.strategy import Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Late("torch")


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"the first of two bounds is the smaller, got {bounds}")
    return bounds


def _apart(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError(f"the first width is below the second, got {bounds}")
    return bounds


Edge = Annotated[int, Field(ge=2, le=16)]
Share = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(ge=0.1, le=10)]
Width = Annotated[float, Field(gt=0, le=64)]
Shares = Annotated[tuple[Share, Share], AfterValidator(_rising)]
Factors = Annotated[tuple[Factor, Factor], AfterValidator(_rising)]
Widths = Annotated[tuple[Width, Width], AfterValidator(_apart)]

PROPOSALS = 4  # blocks tried in a round; changes how much a round costs, not what blocks are like


def random(request: MaskRequest) -> Tensor:
    """Units hidden independently of each other (MAE, He et al. 2022)."""
    return hide_first(request, request.noise())


def uniform(request: MaskRequest, *, cell: Edge = 2) -> Tensor:
    """What is visible is spread evenly (UM-MAE, Li et al. 2022).

    Every cell of `cell` units along each axis shows one unit, drawn for itself, before any shows
    two. UM-MAE is the ratio 0.75 with cells of 2x2: one visible in each. Other ratios and cells cut
    off by the edge of the image are our extension, so is what decides there: chance among cells.
    """
    # Beyond the edge there is no unit to show: 1 comes last in its cell
    order_BGL = _rank(_to_cells(request.noise(), request.grid, cell, beyond=1.0))
    return _show_first(request, order_BGL, cell)


def grid(request: MaskRequest, *, cell: Edge = 2) -> Tensor:
    """What is visible is a regular grid, moved by chance (MAE's grid-wise sampling).

    As `uniform`, but all cells of a sample show the same places in the same order. At other ratios
    than whole places of a cell, and where the edge cuts cells off, chance decides among the cells.
    """
    order_B1L = _rank(request.noise("mask-places", cell ** len(request.grid)))[:, None]
    return _show_first(request, order_B1L, cell)


def block(
    request: MaskRequest,
    *,
    min_units: Annotated[int, Field(ge=1)] = 4,
    aspect: Annotated[float, Field(ge=0.05, le=1)] = 0.3,
    rounds: Annotated[int, Field(ge=1, le=64)] = 16,
) -> Tensor:
    """Rectangles, one after the other, until enough is hidden (BEiT, Bao et al. 2022).

    A block has between `min_units` and the missing number of units, and its longest axis is to its
    shortest as r : 1, log-uniform between 1 and 1 / `aspect`. In each round the first of four
    proposals is taken that lies in the grid and hides at least one more unit, but not too many.
    BEiT may stop short; here units drawn by chance fill what is missing after `rounds`, an
    interpretation, like the axes of a volume between its longest and its shortest.
    """
    edges = _wide_axes(request.grid)
    batch, axes, device = len(request.samples_B), len(edges), request.samples_B.device
    draws = request.noise("mask-blocks", rounds * PROPOSALS * (2 + 2 * axes)).double()
    draws = draws.reshape(batch, rounds, PROPOSALS, 2 + 2 * axes)
    volume, spread = draws[..., :1], draws[..., 1:2]
    shape, start = draws[..., 2 : 2 + axes], draws[..., 2 + axes :]
    factors = (-math.log(aspect) * spread * _centred_shape(shape)).exp()

    limits_N = _vector(edges, device)
    is_free_BU = torch.ones(batch, request.num_units, dtype=torch.float64, device=device)
    missing_B1 = torch.full((batch, 1), request.hidden, dtype=torch.float64, device=device)
    for turn in range(rounds):
        volume_BK1 = min_units + volume[:, turn] * (missing_B1[:, :, None] - min_units)
        extents_BKN = (volume_BK1 ** (1 / axes) * factors[:, turn]).round().clamp(min=1)
        starts_BKN = (start[:, turn] * (limits_N - extents_BKN + 1)).floor()
        # A block that is too wide is put outside, where it hides nothing
        starts_BKN = starts_BKN.masked_fill(extents_BKN > limits_N, max(edges))
        inside_BKNS = _inside(starts_BKN, extents_BKN, max(edges)).double()

        new_BK = _sum_inside(is_free_BU, inside_BKNS, edges)
        fits_BK = (new_BK > 0) & (new_BK <= missing_B1)
        is_first_BK = fits_BK & (fits_BK.cumsum(1) == 1)
        taken_BNS = (is_first_BK[:, :, None, None] * inside_BKNS).sum(1)
        is_free_BU = torch.addcmul(is_free_BU, is_free_BU, _box(taken_BNS, edges), value=-1)
        missing_B1 = missing_B1 - (new_BK * is_first_BK).sum(1, keepdim=True)
    # Blocks come first; of a padded image only a part of them, by chance
    return hide_first(request, request.noise() - 2.0 * (is_free_BU == 0))


def color(
    request: MaskRequest,
    *,
    colour: Literal["green", "blue", "red", "purple"] = "green",
    widths: Widths = (0.75, 2.0),
) -> Tensor:
    """Where filtered noise is low; its peaks stay visible (ColorMAE, Hinojosa et al. 2024).

    White noise is blurred with Gaussians of two `widths` in units. Red is what the wide one leaves,
    green what only the narrow one leaves, blue what the narrow one takes away; purple is white
    without green. ColorMAE cuts windows out of noise filtered beforehand and does not say how wide
    its filters were; noise made for each sample, wrapped around the edges, and the widths are ours.
    """
    white_BU = request.noise().double() - 0.5
    narrow, wide = widths
    red_BU = _blur(white_BU, request.grid, wide)
    if colour == "red":
        return hide_first(request, red_BU)
    fine_BU = _blur(white_BU, request.grid, narrow)
    if colour == "blue":
        return hide_first(request, white_BU - fine_BU)
    green_BU = fine_BU - red_BU
    values_BU = green_BU if colour == "green" else white_BU - green_BU
    return hide_first(request, values_BU)


def multiblock(
    request: MaskRequest,
    *,
    targets: Annotated[int, Field(ge=1, le=16)] = 4,
    scale: Shares = (0.15, 0.2),
    aspect: Factors = (0.75, 1.5),
    context_scale: Shares = (0.85, 1.0),
) -> Tensor:
    """Some large blocks, then what lies outside a larger one (I-JEPA, Assran et al. 2023).

    Hidden until it is enough: the target blocks one by one, what is outside the context block,
    units by chance. Blocks have the same size for all samples of a step; one number draws `scale`
    (share of the image) and `aspect` (first axis to last), as in the authors' code; the context is
    square. I-JEPA predicts representations of the targets and drops what is neither target nor
    context; here all that is not visible is reconstructed: an interpretation.
    """
    edges = _wide_axes(request.grid)
    device, axes = request.samples_B.device, len(edges)
    # All samples share it, so it can be drawn on the host
    step_alone = torch.zeros(1, dtype=torch.int64, device="cpu")
    sizes = counter.uniform(request.seed, "mask-sizes", request.step, step_alone, 2)
    draw, context_draw = sizes[0].tolist()
    target = _extents(edges, _between(scale, draw), _between(aspect, draw))
    context = _extents(edges, _between(context_scale, context_draw), 1.0)

    extents_KN = _vector(target * targets + context, device).reshape(targets + 1, axes)
    start = request.noise("mask-blocks", (targets + 1) * axes).reshape(-1, targets + 1, axes)
    starts_BKN = (start * (_vector(edges, device) - extents_KN + 1)).floor()
    inside_BKNS = _inside(starts_BKN, extents_KN, max(edges))

    turn_BU = targets + _box(inside_BKNS[:, targets], edges).double()
    for number in reversed(range(targets)):
        turn_BU = turn_BU.masked_fill(_box(inside_BKNS[:, number], edges), number)
    return hide_first(request, turn_BU + request.noise())


def _show_first(request: MaskRequest, order_BGL: Tensor, cell: int) -> Tensor:
    """Visible: the units that come first in their cells; chance decides between cells."""
    num_cells = math.prod(math.ceil(edge / cell) for edge in request.grid)
    turn_BGL = order_BGL + request.noise("mask-cells", num_cells).double()[:, :, None]
    return hide_first(request, -_from_cells(turn_BGL, request.grid, cell))


def _to_cells(values_BU: Tensor, grid: Sequence[int], cell: int, beyond: float) -> Tensor:
    """(B, U) -> (B, G, L); cells that the edge cuts off are filled up with `beyond`."""
    batch, axes = len(values_BU), len(grid)
    room = [amount for edge in reversed(grid) for amount in (0, -edge % cell)]
    values = torch.nn.functional.pad(values_BU.reshape(batch, *grid), room, value=beyond)
    values = values.reshape(batch, *(edge for units in grid for edge in (-(-units // cell), cell)))
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2)]
    return values.permute(order).reshape(batch, -1, cell**axes)


def _from_cells(values_BGL: Tensor, grid: Sequence[int], cell: int) -> Tensor:
    """(B, G, L) -> (B, U): `_to_cells` undone."""
    batch, axes = len(values_BGL), len(grid)
    cells = [-(-units // cell) for units in grid]
    values = values_BGL.reshape(batch, *cells, *[cell] * axes)
    order = [0, *(place for axis in range(axes) for place in (1 + axis, 1 + axes + axis))]
    values = values.permute(order).reshape(batch, *(count * cell for count in cells))
    for axis, edge in enumerate(grid):
        values = values.narrow(1 + axis, 0, edge)
    return values.flatten(1)


def _rank(values: Tensor) -> Tensor:
    """The place of each value in the ascending order along the last axis."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1)


def _wide_axes(grid: Sequence[int]) -> list[int]:
    """The edges along which a block has a choice."""
    return [edge for edge in grid if edge > 1]


def _centred_shape(draws: Tensor) -> Tensor:
    """Along the last axis: the highest 1 above the lowest, the others between, their mean 0."""
    low, high = draws.aminmax(dim=-1, keepdim=True)
    between = (draws - low) / (high - low).clamp(min=1e-9)
    return between - between.mean(-1, keepdim=True)


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + draw * (bounds[1] - bounds[0])


def _extents(edges: Sequence[int], share: float, aspect: float) -> list[int]:
    """Units per axis of a block with `share` of the grid; the first axis is `aspect` x the last."""
    side = int(share * math.prod(edges)) ** (1 / len(edges))
    powers = [0.5 - axis / (len(edges) - 1) for axis in range(len(edges))] if edges[1:] else [0.0]
    wished = [round(side * aspect**power) for power in powers]
    return [min(max(units, 1), edge) for units, edge in zip(wished, edges, strict=True)]


def _vector(numbers: Sequence[int], device: torch.device) -> Tensor:
    """float64 on the device, filled there: a copy from the host would wait for the device."""
    filled = [torch.full((), number, dtype=torch.float64, device=device) for number in numbers]
    return torch.stack(filled)


def _inside(starts_BKN: Tensor, extents_BKN: Tensor, longest: int) -> Tensor:
    """Which units each block takes up along each axis: bool (B, K, N, S of the longest axis)."""
    past_start = torch.arange(longest, device=starts_BKN.device) - starts_BKN[..., None]
    return (past_start >= 0) & (past_start < extents_BKN[..., None])


def _box(inside_BNS: Tensor, edges: Sequence[int]) -> Tensor:
    """The units that are inside along all axes: (B, U)."""
    box = inside_BNS[:, 0, : edges[0]]
    for axis, edge in enumerate(edges[1:], start=1):
        box = (box[:, :, None] * inside_BNS[:, axis, None, :edge]).flatten(1)
    return box


def _sum_inside(values_BU: Tensor, inside_BKNS: Tensor, edges: Sequence[int]) -> Tensor:
    """The sum over each block: (B, K)."""
    batch, blocks = inside_BKNS.shape[:2]
    sums = inside_BKNS[:, :, 0, : edges[0]] @ values_BU.reshape(batch, edges[0], -1)
    for axis, edge in enumerate(edges[1:], start=1):
        sums = sums.reshape(batch, blocks, edge, -1)
        sums = (sums * inside_BKNS[:, :, axis, :edge, None]).sum(2)
    return sums[:, :, 0]


def _blur(values_BU: Tensor, grid: Sequence[int], width: float) -> Tensor:
    """Gaussian blur along every axis, wrapped around the edges; float64 (B, U)."""
    values = values_BU.reshape(-1, *grid)
    for axis, edge in enumerate(grid):
        kernel_SS = _ring_gaussian(edge, width, values.device)
        values = (values.movedim(1 + axis, -1) @ kernel_SS).movedim(-1, 1 + axis)
    return values.flatten(1)


@lru_cache(maxsize=64)
def _ring_gaussian(edge: int, width: float, device: torch.device) -> Tensor:
    """A Gaussian on a ring of `edge` units, as a circulant matrix whose rows sum to 1."""
    places_S = torch.arange(edge, dtype=torch.float64)
    turns = math.ceil(6 * width / edge) + 1
    around = torch.arange(-turns, turns + 1, dtype=torch.float64) * edge
    distance = places_S[:, None, None] - places_S[None, :, None] + around
    kernel_SS = (-0.5 * (distance / width) ** 2).exp().sum(2)
    return (kernel_SS / kernel_SS.sum(1, keepdim=True)).to(device)


STRATEGIES = {
    "random": Strategy(random),
    "uniform": Strategy(uniform),
    "grid": Strategy(grid),
    "block": Strategy(block),
    "color": Strategy(color),
    "multiblock": Strategy(multiblock),
}
