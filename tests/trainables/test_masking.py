"""Masking strategies and their geometry. Run: python -m pytest tests/trainables/test_masking.py"""

import functools
import itertools
import math

import pytest
import torch

from tests.drawn import drawn
from trainables import counter
from trainables.config import Strategy as StrategySetting
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.hiding import hide
from trainables.mae import MAE, build_mae, patchify
from trainables.masking import (
    MASKING,
    MaskRequest,
    Strategy,
    hidden_units,
    pixels_hidden,
    plan_hidden,
    split_indices,
    unit_to_patch,
)
from trainables.schedules import SCHEDULES, Schedule

GRIDS = [(8, 8), (3, 7), (1, 5), (2, 3, 4)]


def config_of(strategy, patches_per_unit=1):
    model = {"size": "pico", "patch": 2, "decoder": {"depth": 1, "width": 64}}
    masking = {"strategy": strategy, "unit": 2 * patches_per_unit}
    return TrialConfig.model_validate({"model": model, "masking": masking})


def build(config, grid, patches_per_unit=1):
    size = tuple(2 * patches_per_unit * units for units in grid)
    return build_mae(config, size, 1, seed=0)


@functools.lru_cache(maxsize=64)
def with_model(name, grid, patches_per_unit=1):
    config = config_of(name, patches_per_unit)
    return config, build(config, grid, patches_per_unit)


@torch.no_grad()
def ask(strategy, grid, hidden, samples=None, *, patches_per_unit=1, seed=0, step=0):
    """What it hides of noisy images; `strategy` is a name, or a trial with its model."""
    samples = torch.arange(6) if samples is None else samples
    if isinstance(strategy, str):
        strategy = with_model(strategy, grid, patches_per_unit)
    config, model = strategy
    size = [2 * patches_per_unit * units for units in grid]
    noise = counter.uniform(7, "images", 0, samples, math.prod(size)).reshape(-1, 1, *size)
    edges = (patches_per_unit,) * len(grid)
    request = MaskRequest(grid, hidden, 0.5, seed, step, samples, noise, model, edges)
    return hide(config, request)


@pytest.mark.parametrize("patches_per_unit", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MASKING)
def test_every_sample_hides_exactly_the_asked_count(name, grid, patches_per_unit):
    for ratio in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99):
        hidden = hidden_units(ratio, math.prod(grid))
        is_hidden_BU = ask(name, grid, hidden, patches_per_unit=patches_per_unit)
        assert is_hidden_BU.dtype == torch.bool
        assert is_hidden_BU.shape == (6, math.prod(grid))
        assert is_hidden_BU.sum(1).tolist() == [hidden] * 6
        is_hidden_BP = unit_to_patch(is_hidden_BU, grid, (patches_per_unit,) * len(grid))
        assert is_hidden_BP.sum(1).tolist() == [hidden * patches_per_unit ** len(grid)] * 6


@pytest.mark.parametrize("grid", [(3, 7), (2, 3, 4)])
@pytest.mark.parametrize("name", MASKING)
def test_whatever_its_options_a_strategy_hides_the_asked_count(name, grid):
    for setting in drawn(StrategySetting, name):
        config = config_of(setting.model_dump(mode="json"))
        model = build(config, grid)
        for hidden in (1, math.prod(grid) // 2, math.prod(grid) - 1):
            is_hidden_BU = ask((config, model), grid, hidden)
            assert is_hidden_BU.sum(1).tolist() == [hidden] * 6, setting


def test_a_strategy_that_does_not_say_what_asking_costs_has_nobody_to_ask(monkeypatch):
    asked = []

    def curious(request, **_):
        asked.append(request.model)
        return MASKING["random"].hide(request)

    for flops in (None, lambda sizes, hidden_patches: 7):
        monkeypatch.setitem(MASKING, "grid", Strategy(curious, guide_flops=flops))
        model = with_model("random", (4, 4))[1]
        hide(config_of("grid"), MaskRequest((4, 4), 3, 0.5, 0, 0, torch.arange(2), model=model))
    assert asked == [None, model]


@pytest.mark.parametrize("name", MASKING)
def test_masks_follow_from_seed_step_and_sample(name):
    first = ask(name, (6, 6), 19)
    torch.rand(1)
    assert torch.equal(first, ask(name, (6, 6), 19))
    is_alike = MASKING[name].is_alike_at_every_step
    assert torch.equal(first, ask(name, (6, 6), 19, step=1)) == is_alike
    assert torch.equal(first, ask(name, (6, 6), 19, seed=1)) == is_alike
    # two samples may be hidden alike by chance, where there are few ways, but not at every step
    steps = torch.cat([ask(name, (6, 6), 19, step=step) for step in range(16)], dim=1)
    assert len({tuple(row) for row in steps.tolist()}) == 6


@pytest.mark.parametrize("name", MASKING)
def test_two_ranks_hide_what_one_would(name):
    whole = ask(name, (4, 6), 9, torch.arange(8))
    ranks = [ask(name, (4, 6), 9, torch.arange(start, start + 4)) for start in (0, 4)]
    assert torch.equal(whole, torch.cat(ranks))


@pytest.mark.parametrize("name", MASKING)
def test_nothing_waits_for_the_device(name):
    """On the meta device, where no number exists, reading one is an error."""
    with torch.device("meta"):
        model = MAE(config_of(name), (12, 12), 1)
        request = MaskRequest(
            (6, 6), 18, 0.5, 0, 0, torch.arange(4), torch.empty(4, 1, 12, 12), model
        )
        assert hide(config_of(name), request).shape == (4, 36)


def blind(grid, hidden, samples):
    return MaskRequest(grid, hidden, 0.5, 0, 0, samples)


def test_random_hides_every_unit_equally_often():
    often = MASKING["random"].hide(blind((3, 4), 3, torch.arange(4000))).float().mean(0)
    # 4000 draws at 1/4: five standard deviations are 0.034
    assert (often - 0.25).abs().max() < 0.034


def test_hidden_units_by_hand():
    # 0.29 * 100 = 28.999999999999996: cutting off would lose a unit
    assert [hidden_units(0.75, 64), hidden_units(0.29, 100), hidden_units(0.6, 9)] == [48, 29, 5]
    assert [hidden_units(0.001, 10), hidden_units(0.999, 10), hidden_units(0.5, 2)] == [1, 9, 1]


def test_one_unit_cannot_be_hidden_in_part():
    with pytest.raises(UserError, match=r"image of 1 mask unit .* smaller masking.unit"):
        hidden_units(0.5, 1)


SCHEDULED = {
    "constant": {},
    "amr": {},
    "linear": {"start": 0.15, "end": 0.9},
    "cosine": {"start": 0.15, "end": 0.9},
    "power": {"start": 0.15, "end": 0.9},
    "ramp": {"start": 0.15, "end": 0.9, "until": 0.5},
    "step": {"values": [0.1, 0.9, 0.5], "at": [0.3, 0.6]},
    "piecewise": {"values": [0.1, 0.9, 0.5]},
    "uniform": {"low": 0.15, "high": 0.9},
    "truncated_normal": {"high": 0.95},
}
PLANNED = [functools.partial(SCHEDULES[name], **given) for name, given in SCHEDULED.items()] + [
    functools.partial(SCHEDULES[name], **setting.options())
    for name in SCHEDULES
    for setting in drawn(Schedule, name, 2)
]


@pytest.mark.parametrize("num_units", [4, 64, 1024])
@pytest.mark.parametrize("steps", [1, 5, 300])
@pytest.mark.parametrize(
    "schedule", PLANNED, ids=lambda schedule: f"{schedule.func.__name__} {schedule.keywords}"
)
def test_every_schedule_needs_at_most_eight_hidden_counts(schedule, steps, num_units):
    plan = plan_hidden(schedule, num_units, steps, seed=0)
    chances = counter.uniform(0, "ratio", 0, torch.arange(steps), 1)[:, 0].tolist()
    exact = [
        hidden_units(schedule(step / steps, chances[step]), num_units) for step in range(steps)
    ]
    assert len(plan) == steps
    assert len(set(plan)) <= 8
    assert min(plan) == min(exact) and max(plan) == max(exact)
    half_a_level = (max(exact) - min(exact)) / 7 / 2 + 1
    assert all(abs(a - b) <= half_a_level for a, b in zip(plan, exact, strict=True))


def test_a_random_ratio_follows_from_the_seed():
    def draw(seed):
        return plan_hidden(lambda progress, chance: chance, 1000, 50, seed, max_distinct=1000)

    assert draw(1) == draw(1) != draw(2)
    assert 300 < sum(draw(1)) / 50 < 700 and len(set(draw(1))) > 40


def test_a_constant_plan_is_exact():
    assert plan_hidden(lambda progress, chance: 0.37, 100, 4, seed=0) == [37, 37, 37, 37]


def test_a_linear_plan_by_hand():
    plan = plan_hidden(
        lambda progress, chance: 0.2 + 0.6 * progress, 100, 6, seed=0, max_distinct=3
    )
    # exact: 20 30 40 50 60 70, levels: 20 45 70
    assert plan == [20, 20, 45, 45, 70, 70]


def test_units_spread_over_their_patches_by_hand():
    is_hidden_BU = torch.tensor([[True, False, False, False, True, True]])
    spread = unit_to_patch(is_hidden_BU, (2, 3), (2, 2)).reshape(4, 6).int().tolist()
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


@pytest.mark.parametrize(
    ("unit_grid", "patches_per_unit", "patch"),
    [
        ((2, 5), (1, 1), (1, 1)),
        ((5, 2), (2, 2), (1, 1)),
        ((2, 5), (2, 2), (4, 4)),
        ((2, 3, 4), (1, 1, 1), (2, 2, 2)),
        ((2, 3, 4), (2, 2, 2), (1, 1, 1)),
        ((5, 2), (1, 3), (2, 1)),
        ((2, 3, 2), (2, 1, 2), (2, 4, 3)),
        ((3, 1, 4), (1, 3, 2), (3, 2, 1)),
        ((7,), (2,), (3,)),
    ],
)
def test_visible_patches_are_exactly_where_pixels_are_not_hidden(
    unit_grid, patches_per_unit, patch
):
    axes = range(len(unit_grid))
    grid = tuple(unit_grid[axis] * patches_per_unit[axis] for axis in axes)
    hidden = max(1, math.prod(unit_grid) // 3)
    is_hidden_BU = MASKING["random"].hide(blind(unit_grid, hidden, torch.arange(6)))
    is_hidden_BP = unit_to_patch(is_hidden_BU, unit_grid, patches_per_unit)
    num_hidden = hidden * math.prod(patches_per_unit)
    visible_BV, hidden_BX = split_indices(is_hidden_BP, num_hidden)

    is_hidden_pixel = pixels_hidden(is_hidden_BP, grid, patch)
    # every pixel asks its own unit, without the helpers
    edges = [patches_per_unit[axis] * patch[axis] for axis in axes]
    for sample in range(6):
        for pixel in itertools.product(*(range(grid[axis] * patch[axis]) for axis in axes)):
            number = 0
            for axis in axes:
                number = number * unit_grid[axis] + pixel[axis] // edges[axis]
            assert is_hidden_pixel[(sample, *pixel)] == is_hidden_BU[sample, number]
        if len(is_hidden_pixel[0].flatten()) > 100:
            break  # one sample of the large ones is enough

    patches_BPQ = patchify(is_hidden_pixel[:, None].float(), patch)
    rows = torch.arange(6)[:, None]
    assert (patches_BPQ[rows, visible_BV] == 0).all()
    assert (patches_BPQ[rows, hidden_BX] == 1).all()
    both = torch.cat([visible_BV, hidden_BX], 1).sort(1).values
    assert torch.equal(both, torch.arange(math.prod(grid)).expand(6, -1))
