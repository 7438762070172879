"""Strategies that look at nothing. Run: python -m pytest tests/trainables/test_masking_plain.py"""

import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import ndimage

from trainables import counter
from trainables.masking import plain
from trainables.masking.request import MaskRequest
from trainables.named import named

STRATEGIES = {name: strategy.hide for name, strategy in plain.STRATEGIES.items()}
GRIDS = [(8, 8), (3, 7), (1, 5), (2, 3, 4)]


def request(grid, hidden, samples=8, *, seed=0, step=0):
    samples = torch.arange(samples) if isinstance(samples, int) else samples
    return MaskRequest(grid, hidden, 0.5, seed, step, samples)


def cells(is_hidden_BU, edge):
    """Visible units per cell and place, (B, G, L), for two axes that `edge` divides."""
    rows, columns = edge
    is_visible = ~is_hidden_BU.reshape(len(is_hidden_BU), *rows, *columns)
    return is_visible.transpose(2, 3).flatten(3).flatten(1, 2)


def box(is_inside):
    """Units per axis of the smallest block around what is True; it must fill the block."""
    where = np.argwhere(is_inside)
    extents = np.ptp(where, axis=0) + 1
    assert len(where) == extents.prod()
    return extents.tolist()


def reaches_everywhere(placed):
    """Blocks of some sample lie along each edge of the grid, and between."""
    return all(
        np.moveaxis(placed, axis, 0).reshape(placed.shape[axis], -1).any(1).all()
        for axis in range(1, placed.ndim)
    )


@pytest.fixture
def ranked(monkeypatch):
    """The values by which the last strategy called has decided."""
    seen = []

    def spy(request, values_BU):
        seen.append(values_BU)
        return hide_first(request, values_BU)

    hide_first = plain.hide_first
    monkeypatch.setattr(plain, "hide_first", spy)
    return lambda: seen[-1]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_sample_hides_exactly_the_asked_count(name, grid, share):
    hidden = min(max(round(share * math.prod(grid)), 1), math.prod(grid) - 1)
    is_hidden_BU = STRATEGIES[name](request(grid, hidden))
    assert is_hidden_BU.dtype == torch.bool
    assert is_hidden_BU.shape == (8, math.prod(grid))
    assert is_hidden_BU.sum(1).tolist() == [hidden] * 8


@pytest.mark.parametrize("grid", [(8, 8), (2, 3, 4)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_half_batches_hide_what_the_whole_one_does(name, grid):
    hidden = math.prod(grid) // 2
    whole = STRATEGIES[name](request(grid, hidden))
    halves = [STRATEGIES[name](request(grid, hidden, torch.arange(a, a + 4))) for a in (0, 4)]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("name", STRATEGIES)
def test_mixed_precision_changes_nothing(name):
    exact = STRATEGIES[name](request((32, 32), 700))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact, STRATEGIES[name](request((32, 32), 700)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_samples_steps_and_seeds_differ(name):
    ask = STRATEGIES[name]
    first = ask(request((8, 8), 30))
    # two samples may be hidden alike by chance, where there are few ways, but not at every step
    steps = torch.cat([ask(request((8, 8), 30, step=step)) for step in range(16)], dim=1)
    assert len({tuple(row) for row in steps.tolist()}) == 8
    assert not torch.equal(first, ask(request((8, 8), 30, step=1)))
    assert not torch.equal(first, ask(request((8, 8), 30, seed=1)))


@pytest.mark.parametrize("name", ["uniform", "grid", "color"])
def test_every_unit_is_hidden_equally_often(name):
    often = STRATEGIES[name](request((4, 4), 9, 4000)).float().mean(0)
    # 4000 draws at 9/16: five standard deviations are 0.04
    assert (often - 9 / 16).abs().max() < 0.04


def test_uniform_shows_one_unit_of_every_two_by_two_cell():
    is_hidden_BU = plain.uniform(request((8, 8), 48, 32))
    is_visible_BGL = cells(is_hidden_BU, ((4, 2), (4, 2)))
    assert (is_visible_BGL.sum(2) == 1).all()
    # 512 cells choose between four places: five standard deviations are 49
    assert (is_visible_BGL.sum((0, 1)) - 128).abs().max() < 49
    assert all(len(set(row)) > 1 for row in is_visible_BGL.int().argmax(2).tolist())


@pytest.mark.parametrize("visible, fewest, most", [(10, 0, 1), (20, 1, 2), (32, 2, 2), (50, 3, 4)])
def test_uniform_shows_no_cell_twice_before_all_once(visible, fewest, most):
    counts = cells(plain.uniform(request((8, 8), 64 - visible)), ((4, 2), (4, 2))).sum(2)
    assert (counts.min().item(), counts.max().item()) == (fewest, most)


def test_uniform_shows_one_unit_of_every_cell_that_the_edge_cuts_off():
    # rows 01|2 and columns 01|23|45|6 make eight cells
    is_visible = ~plain.uniform(request((3, 7), 13)).reshape(8, 3, 7)
    for rows, columns in itertools.product([(0, 2), (2, 3)], [(0, 2), (2, 4), (4, 6), (6, 7)]):
        assert (is_visible[:, slice(*rows), slice(*columns)].sum((1, 2)) == 1).all()


@pytest.mark.parametrize("name", ["uniform", "grid"])
def test_cells_have_as_many_axes_and_units_as_asked(name):
    is_visible = ~STRATEGIES[name](request((4, 4, 4), 56)).reshape(8, 2, 2, 2, 2, 2, 2)
    assert (is_visible.sum((2, 4, 6)) == 1).all()
    counts = cells(STRATEGIES[name](request((6, 9), 48), cell=3), ((2, 3), (3, 3))).sum(2)
    assert (counts == 1).all()


def test_grid_shows_the_same_place_of_every_cell():
    is_visible_BGL = cells(plain.grid(request((8, 8), 48, 64)), ((4, 2), (4, 2)))
    assert (is_visible_BGL == is_visible_BGL[:, :1]).all()
    assert (is_visible_BGL[:, 0].sum(1) == 1).all()
    assert set(is_visible_BGL[:, 0].int().argmax(1).tolist()) == {0, 1, 2, 3}


def test_grid_goes_on_with_one_further_place():
    counts_BL = cells(plain.grid(request((8, 8), 64 - 21)), ((4, 2), (4, 2))).sum(1)
    assert counts_BL.sort(1).values.tolist() == [[0, 0, 5, 16]] * 8


@dataclass(frozen=True)
class SameNoise(MaskRequest):
    value: float = 0.0

    def noise(self, stream="mask", count=None):
        return torch.full((len(self.samples_B), count or self.num_units), self.value)


@pytest.mark.parametrize(
    "value, units", [(0.0, [0, 1, 4, 5]), (0.5, [5, 6, 9, 10]), (0.99, [10, 11, 14, 15])]
)
def test_a_square_block_by_hand(value, units):
    # 4 units at aspect 1 are 2x2; of the starts 0, 1 and 2 the noise takes one
    ask = SameNoise((4, 4), 4, 0.5, 0, 0, torch.arange(1), value=value)
    assert plain.block(ask, aspect=1.0, rounds=1).nonzero()[:, 1].tolist() == units


@pytest.mark.parametrize("grid, volume", [((20, 20), 36), ((1, 20, 20), 36), ((9, 9, 9), 64)])
def test_a_block_is_as_large_and_as_long_as_asked(ranked, grid, volume):
    plain.block(request(grid, volume, 200), min_units=volume, aspect=0.4, rounds=1)
    placed = (ranked() < 0).reshape(200, *grid).numpy()
    assert reaches_everywhere(placed)
    shapes = [box(block) for block in placed if block.any()]
    assert len(shapes) > 100
    for shape in shapes:
        extents = sorted(extent for extent, edge in zip(shape, grid, strict=True) if edge > 1)
        assert (extents[-1] - 0.5) / (extents[0] + 0.5) <= 1 / 0.4
        assert math.prod(extent + 0.5 for extent in extents) >= volume
        assert math.prod(extents) <= volume
    ratios = [shape[-1] / shape[-2] for shape in shapes]
    assert min(ratios) < 0.6 and max(ratios) > 1.6


def test_the_volume_of_a_block_is_even_between_the_least_and_the_missing(ranked):
    plain.block(request((20, 20), 200, 400), min_units=4, aspect=1.0, rounds=1)
    volumes = (ranked() < 0).sum(1)
    # squares of 2x2 to 14x14; a quarter of 4 + (0, 196) is below 53, so up to 7x7
    assert set(volumes.tolist()) == {side**2 for side in range(2, 15)}
    # 400 draws at 0.27 (7.5 ** 2 = 56.25): four standard deviations are 0.09
    assert (volumes <= 49).float().mean().item() == pytest.approx(0.27, abs=0.09)


def test_a_block_that_is_wider_than_the_grid_is_not_cut(ranked):
    plain.block(request((4, 20), 36, 100), min_units=36, aspect=0.4, rounds=1)
    placed = (ranked() < 0).reshape(100, 4, 20).numpy()
    shapes = [box(block) for block in placed if block.any()]
    # 36 units that are 4 at most along an axis: 4 x 9, as 3.5 x 10.3 is beyond 1 / 0.4
    assert len(shapes) > 20
    assert all(shape in ([4, 8], [4, 9]) for shape in shapes)


def test_two_axes_of_a_block_have_log_uniform_aspects():
    draws = counter.uniform(0, "aspect", 0, torch.arange(20000), 3)
    shape = plain._centred_shape(draws[:, :2])
    log_aspect = draws[:, 2] * (shape[:, 0] - shape[:, 1])
    assert torch.allclose(shape.sum(1), torch.zeros(20000), atol=1e-6)
    # as BEiT's: even on (-1, 1), here in units of log(1 / aspect)
    counts = log_aspect.histc(bins=4, min=-1, max=1)
    assert (counts / 20000 - 0.25).abs().max() < 0.016


def test_blocks_hang_together():
    def pieces(is_hidden_BU):
        return [ndimage.label(row)[1] for row in is_hidden_BU.reshape(-1, 14, 14).numpy()]

    ask = request((14, 14), 78, 32)
    assert np.mean(pieces(plain.block(ask))) < 5
    assert np.mean(pieces(plain.random(ask))) > 20


def test_chance_fills_little_of_what_blocks_hide(ranked):
    for hidden, allowed in [(78, 0.0005), (118, 0.002), (147, 0.01)]:
        plain.block(request((14, 14), hidden, 128))
        assert 0 <= (hidden - (ranked() < 0).sum(1)).float().mean() / hidden < allowed


COLOURS = ["red", "green", "blue", "purple"]


@pytest.mark.parametrize("grid", [(12, 9), (1, 7), (4, 5, 6)])
@pytest.mark.parametrize("colour", COLOURS)
def test_what_stays_visible_are_the_peaks_of_filtered_noise(colour, grid):
    hidden = math.prod(grid) // 2
    ask = request(grid, hidden, 4)
    white = ask.noise().double().reshape(4, *grid).numpy()
    narrow, wide = (
        np.stack([ndimage.gaussian_filter(one, width, mode="wrap", truncate=8) for one in white])
        for width in (0.6, 1.7)
    )
    filtered = {
        "red": wide,
        "green": narrow - wide,
        "blue": white - narrow,
        "purple": white - narrow + wide,
    }[colour].reshape(4, -1)
    is_hidden = np.zeros_like(filtered, dtype=bool)
    np.put_along_axis(is_hidden, filtered.argsort(1)[:, :hidden], True, 1)
    drawn = plain.color(ask, colour=colour, widths=(0.6, 1.7))
    assert np.array_equal(drawn.numpy(), is_hidden)


def test_colours_are_where_their_power_is():
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))
    bands = [(0, 0.08), (0.1, 0.22), (0.4, 0.71)]

    def power(ask, **options):
        is_hidden = ask(request((32, 32), 512, 32), **options).reshape(-1, 32, 32).numpy()
        spectrum = (np.abs(np.fft.fft2(is_hidden - 0.5)) ** 2).mean(0) / 256  # of white noise: 1
        inside = [(frequency > low) & (frequency <= high) for low, high in bands]
        return [spectrum[band].mean() for band in inside]

    assert power(plain.random) == pytest.approx([1, 1, 1], abs=0.15)
    low, middle, high = power(plain.color, colour="red")
    assert low > 2 * middle and middle > 2 * high
    low, middle, high = power(plain.color, colour="green")
    assert middle > 2 * low and middle > 2 * high
    low, middle, high = power(plain.color, colour="blue")
    assert high > 2 * middle and high > 3 * low
    low, middle, high = power(plain.color, colour="purple")
    assert low > 1.5 * middle and high > 1.5 * middle


def test_neighbours_agree_in_red_and_green_and_not_in_blue():
    agreement = {}
    for colour in COLOURS:
        signs = 1 - 2 * plain.color(request((32, 32), 512, 16), colour=colour).float()
        signs = signs.reshape(-1, 32, 32)
        agreement[colour] = (signs[:, 1:] * signs[:, :-1]).mean().item()
    assert agreement["red"] > agreement["green"] > 0.25
    assert agreement["blue"] < -0.1


@pytest.mark.parametrize(
    "grid, aspect, shape",
    [
        # int(0.2 * 256) = 51 units: 7.14 x 7.14, or 7.14 * 1.5 x 7.14 / 1.5
        ((16, 16), 1.0, [7, 7]),
        ((16, 16), 2.25, [11, 5]),
        ((16, 16), 0.4, [5, 11]),
        # int(0.2 * 512) = 102: 4.67 along each; 4.67 * 2, 4.67, 4.67 / 2
        ((8, 8, 8), 1.0, [5, 5, 5]),
        ((8, 8, 8), 4.0, [8, 5, 2]),
        # cut to the grid
        ((4, 20), 10.0, [4, 1]),
        ((1, 10), 4.0, [1, 2]),
    ],
)
def test_a_target_by_hand(grid, aspect, shape):
    ask = request(grid, math.prod(shape), 64)
    is_hidden_BU = plain.multiblock(ask, targets=1, scale=(0.2, 0.2), aspect=(aspect, aspect))
    placed = is_hidden_BU.reshape(64, *grid).numpy()
    assert [box(block) for block in placed] == [shape] * 64
    assert reaches_everywhere(placed)


def test_targets_are_hidden_first_then_what_is_outside_the_context():
    options = {"scale": (0.04, 0.04), "aspect": (1.0, 1.0), "context_scale": (0.5, 0.5)}
    masks = [plain.multiblock(request((10, 10), hidden), **options) for hidden in range(1, 100)]
    assert all((less <= more).all() for less, more in itertools.pairwise(masks))
    hidden = [mask.reshape(8, 10, 10).numpy() for mask in masks]
    for sample in range(8):
        # the first of the 2x2 targets is complete, and nothing else hidden
        assert box(hidden[3][sample]) == [2, 2]
        # 4 targets of 4 cover 16 at most, a context of 7x7 has 49: 67 hidden is all outside of it
        where = np.argwhere(~hidden[66][sample])
        assert (np.ptp(where, axis=0) + 1 <= 7).all()


def test_all_targets_are_hidden_where_the_count_allows(ranked):
    for step in range(8):
        is_hidden_BU = plain.multiblock(request((14, 14), 147, step=step))
        in_a_target = ranked() < 4
        assert (in_a_target <= is_hidden_BU).all()
        assert is_hidden_BU[ranked() >= 5].any() and not is_hidden_BU[ranked() >= 5].all()


def test_targets_of_a_step_have_one_size_within_the_scale(ranked):
    shapes = set()
    for step in range(40):
        plain.multiblock(request((16, 16), 128, 4, step=step))
        first = {tuple(box(turn)) for turn in (ranked() < 1).reshape(4, 16, 16).numpy()}
        assert len(first) == 1
        shapes |= first
    assert len(shapes) > 3
    for rows, columns in shapes:
        # extents are rounded
        assert (rows - 0.5) * (columns - 0.5) <= 0.2 * 256
        assert (rows + 0.5) * (columns + 0.5) >= 0.15 * 256 - 1
        assert (rows - 0.5) / (columns + 0.5) <= 1.5 and (rows + 0.5) / (columns - 0.5) >= 0.75


def read(**settings):
    return TypeAdapter(named(STRATEGIES)).validate_json(json.dumps(settings), strict=True)


def test_options_are_read_from_lists():
    assert read(name="multiblock", scale=[0.1, 0.3]).options() == {
        "targets": 4,
        "scale": (0.1, 0.3),
        "aspect": (0.75, 1.5),
        "context_scale": (0.85, 1.0),
    }
    assert read(name="color", widths=[1, 3]).options() == {"colour": "green", "widths": (1.0, 3.0)}


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "multiblock", "scale": [0.3, 0.1]},
        {"name": "multiblock", "scale": [0.0, 0.1]},
        {"name": "multiblock", "aspect": [1.0]},
        {"name": "color", "widths": [2.0, 2.0]},
        {"name": "color", "colour": "white"},
        {"name": "block", "aspect": 1.5},
        {"name": "uniform", "cell": 1},
    ],
)
def test_options_out_of_bounds_are_refused(settings):
    with pytest.raises(ValidationError):
        read(**settings)
