"""Masking strategies and their geometry. Run: python -m pytest tests/test_masking.py"""

import math
import typing
from functools import partial

import pytest
import torch

from trainables.errors import UserError
from trainables.mae import patchify
from trainables.masking import (
    MASKING,
    MaskRequest,
    hidden_units,
    pixels_hidden,
    plan_hidden,
    split_indices,
    unit_to_patch,
)
from trainables.schedules import SCHEDULES, Share

GRIDS = [(8, 8), (3, 7), (1, 5), (2, 3, 4)]

# Options that a rule cannot guess; a schedule of plain shares needs no entry here
OPTIONS = {"step": {"values": [0.1, 0.9, 0.5], "at": [0.3, 0.6]}}


def request(grid, hidden, samples=None, *, seed=0, step=0):
    samples = torch.arange(6) if samples is None else samples
    scores = (samples[:, None] * 5 + torch.arange(math.prod(grid)) * 7) % 13 / 13
    return MaskRequest(grid, hidden, 0.5, seed, step, samples, scores)


def schedule_options(name):
    if name in OPTIONS:
        return OPTIONS[name]
    hints = typing.get_type_hints(SCHEDULES[name], include_extras=True)
    shares = [option for option, hint in hints.items() if hint == Share]
    return {option: 0.9 if place % 2 else 0.15 for place, option in enumerate(shares)}


@pytest.mark.parametrize("patches_per_unit", [1, 2])
@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MASKING)
def test_every_sample_hides_exactly_the_asked_count(name, grid, ratio, patches_per_unit):
    hidden = hidden_units(ratio, math.prod(grid))
    is_hidden_BU = MASKING[name](request(grid, hidden))
    assert is_hidden_BU.dtype == torch.bool
    assert is_hidden_BU.shape == (6, math.prod(grid))
    assert is_hidden_BU.sum(1).tolist() == [hidden] * 6
    is_hidden_BP = unit_to_patch(is_hidden_BU, grid, patches_per_unit)
    assert is_hidden_BP.sum(1).tolist() == [hidden * patches_per_unit ** len(grid)] * 6


@pytest.mark.parametrize("name", MASKING)
def test_masks_follow_from_seed_step_and_sample(name):
    first = MASKING[name](request((6, 6), 18))
    torch.rand(1)
    assert torch.equal(first, MASKING[name](request((6, 6), 18)))
    assert not torch.equal(first, MASKING[name](request((6, 6), 18, step=1)))
    assert not torch.equal(first, MASKING[name](request((6, 6), 18, seed=1)))
    assert len({tuple(row) for row in first.tolist()}) == 6


@pytest.mark.parametrize("name", MASKING)
def test_two_ranks_hide_what_one_would(name):
    whole = MASKING[name](request((4, 6), 9, torch.arange(8)))
    ranks = [MASKING[name](request((4, 6), 9, torch.arange(a, a + 4))) for a in (0, 4)]
    assert torch.equal(whole, torch.cat(ranks))


def test_random_hides_every_unit_equally_often():
    often = MASKING["random"](request((3, 4), 3, torch.arange(4000))).float().mean(0)
    # 4000 draws at 1/4: five standard deviations are 0.034
    assert (often - 0.25).abs().max() < 0.034


def test_hidden_units_by_hand():
    # 0.29 * 100 = 28.999999999999996: cutting off would lose a unit
    assert [hidden_units(0.75, 64), hidden_units(0.29, 100), hidden_units(0.6, 9)] == [48, 29, 5]
    assert [hidden_units(0.001, 10), hidden_units(0.999, 10), hidden_units(0.5, 2)] == [1, 9, 1]


def test_one_unit_cannot_be_hidden_in_part():
    with pytest.raises(UserError, match=r"image of 1 mask unit .* smaller masking.unit"):
        hidden_units(0.5, 1)


@pytest.mark.parametrize("num_units", [4, 64, 1024])
@pytest.mark.parametrize("steps", [1, 5, 300])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_needs_at_most_eight_hidden_counts(name, steps, num_units):
    schedule = partial(SCHEDULES[name], **schedule_options(name))
    plan = plan_hidden(schedule, num_units, steps)
    exact = [hidden_units(schedule(step / steps), num_units) for step in range(steps)]
    assert len(plan) == steps
    assert len(set(plan)) <= 8
    assert min(plan) == min(exact) and max(plan) == max(exact)
    half_a_level = (max(exact) - min(exact)) / 7 / 2 + 1
    assert all(abs(a - b) <= half_a_level for a, b in zip(plan, exact, strict=True))


def test_a_constant_plan_is_exact():
    assert plan_hidden(lambda progress: 0.37, 100, 4) == [37, 37, 37, 37]


def test_a_linear_plan_by_hand():
    plan = plan_hidden(lambda progress: 0.2 + 0.6 * progress, 100, 6, max_distinct=3)
    # exact: 20 30 40 50 60 70, levels: 20 45 70
    assert plan == [20, 20, 45, 45, 70, 70]


def test_units_spread_over_their_patches_by_hand():
    is_hidden_BU = torch.tensor([[True, False, False, False, True, True]])
    spread = unit_to_patch(is_hidden_BU, (2, 3), 2).reshape(4, 6).int().tolist()
    assert spread == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
    ]


def test_indices_are_split_in_ascending_order():
    is_hidden_BP = torch.tensor(
        [[False, True, True, False, True], [True, True, False, False, True]]
    )
    visible_BV, hidden_BX = split_indices(is_hidden_BP, 3)
    assert visible_BV.tolist() == [[0, 3], [2, 3]]
    assert hidden_BX.tolist() == [[1, 2, 4], [0, 1, 4]]
    assert visible_BV.dtype == hidden_BX.dtype == torch.int64


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("patches_per_unit", [1, 2])
@pytest.mark.parametrize("unit_grid", [(2, 5), (5, 2), (2, 3, 4)])
def test_visible_patches_are_exactly_where_pixels_are_not_hidden(
    unit_grid, patches_per_unit, patch
):
    grid = tuple(units * patches_per_unit for units in unit_grid)
    hidden = math.prod(unit_grid) // 3
    is_hidden_BU = MASKING["random"](request(unit_grid, hidden))
    is_hidden_BP = unit_to_patch(is_hidden_BU, unit_grid, patches_per_unit)
    num_hidden = hidden * patches_per_unit ** len(unit_grid)
    visible_BV, hidden_BX = split_indices(is_hidden_BP, num_hidden)

    is_hidden_pixel = pixels_hidden(is_hidden_BP, grid, patch)
    # every pixel asks its own unit, without the helpers
    unit = patches_per_unit * patch
    for sample in range(6):
        for pixel in torch.cartesian_prod(*[torch.arange(0, units * unit) for units in unit_grid]):
            number = 0
            for axis, units in enumerate(unit_grid):
                number = number * units + int(pixel[axis]) // unit
            assert is_hidden_pixel[(sample, *pixel)] == is_hidden_BU[sample, number]
        if patch * patches_per_unit > 2:
            break  # one sample of the large ones is enough

    patches_BPQ = patchify(is_hidden_pixel[:, None].float(), patch)
    rows = torch.arange(6)[:, None]
    assert (patches_BPQ[rows, visible_BV] == 0).all()
    assert (patches_BPQ[rows, hidden_BX] == 1).all()
    both = torch.cat([visible_BV, hidden_BX], 1).sort(1).values
    assert torch.equal(both, torch.arange(math.prod(grid)).expand(6, -1))
