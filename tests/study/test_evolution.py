"""CMA-ES and children, by hand and on known valleys.  pytest tests/study/test_evolution.py"""

import random
from statistics import fmean

import numpy as np
import pytest

from study.evolution import (
    FIRST_STEP,
    Normal,
    advanced,
    crossed,
    drawn,
    generation_size,
    mutated,
    told,
)


def normal(mean, step=0.1, covariance=None):
    mean = np.array(mean)
    covariance = np.eye(len(mean)) if covariance is None else np.array(covariance)
    return Normal(mean, step, covariance, np.zeros((2, len(mean))), 0)


def test_the_size_of_a_generation_is_the_tutorials():
    assert [generation_size(n) for n in (1, 2, 3, 10)] == [4, 6, 7, 10]


def test_the_mean_goes_to_the_better_half_by_rank():
    points = 0.5 + 0.1 * np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [0.5, 0.5], [0, 0]])
    found = advanced(normal([0.5, 0.5]), points)
    # ln(3.5) - ln(1, 2, 3), as shares: .637, .285, .078; the worse half counts for nothing
    assert found.mean == pytest.approx([0.5 + 0.1 * (0.637 - 0.0784), 0.5 + 0.1 * 0.2846], abs=1e-4)
    assert found.generations == 1


def test_in_one_direction_steps_grow_and_at_the_best_place_they_shrink():
    on, still = normal([0.2]), normal([0.5])
    for _ in range(6):
        on = advanced(on, on.mean + on.step * np.array([[1.2], [1.0], [0.8], [-1.0]]))
        still = advanced(still, still.mean + still.step * np.array([[-0.1], [0.1], [1.0], [-1.0]]))
    assert on.step > 0.15 and still.step < 0.07


def test_where_good_points_lie_on_a_line_the_distribution_becomes_one():
    line = np.array([1.0, -1.0]) / 2**0.5
    found = normal([0.5, 0.5])
    for turn in range(30):
        side = 1 if turn % 2 else -1
        steps = [side * line, -side * 0.8 * line, side * 0.6 * line, [1, 1], [-1, -1], [2, 2]]
        found = advanced(found, found.mean + found.step * np.array(steps))
    values, axes = np.linalg.eigh(found.covariance)
    assert values[1] > 10 * values[0]
    assert abs(axes[:, 1] @ line) == pytest.approx(1, abs=0.01)


def test_a_point_from_far_away_moves_it_no_further_than_a_long_step_of_its_own():
    points = np.full((4, 1), 0.5)
    points[0] = 1.0
    found = advanced(normal([0.5], step=0.01), points)
    # √1 + 2/3 steps, by the weight of the best of two, .8
    assert found.mean[0] - 0.5 == pytest.approx(0.01 * (1 + 2 / 3) * 0.8042, rel=1e-3)


def test_it_begins_where_the_better_half_of_the_first_points_lies():
    points = np.array([[0.1], [0.9], [0.5], [0.7]])
    found = told(points, [4.0, 1.0, 3.0, 2.0], first=4)
    assert found.mean == pytest.approx([0.8042 * 0.9 + 0.1958 * 0.7], abs=1e-3)
    assert (found.step, found.generations) == (FIRST_STEP, 0)


def test_a_generation_counts_once_it_is_full():
    points = np.random.default_rng(0).random((4 + 2 * 6 - 1, 2))
    losses = points[:, 0].tolist()
    counts = [told(points[:n], losses[:n], first=4).generations for n in (3, 4, 9, 10, 15)]
    assert counts == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_bottom_of_a_narrow_valley_that_lies_aslant(seed):
    turn = np.linalg.qr(np.random.default_rng(9).standard_normal((4, 4)))[0]
    bottom = np.array([0.3, 0.6, 0.5, 0.7])

    def loss(point):
        return float(((np.array([1, 3, 10, 30]) * (turn @ (point - bottom))) ** 2).sum())

    chance = np.random.default_rng(seed)
    points = chance.random((10, 4))
    for _ in range(50):
        now = told(points, [loss(point) for point in points], first=10)
        points = np.vstack([points, *(drawn(now, chance) for _ in range(generation_size(4)))])
    assert ((points >= 0) & (points <= 1)).all()
    assert min(map(loss, points)) < 2e-3
    assert min(map(loss, chance.random((410, 4)))) > 0.1


class Draws(random.Random):
    def __init__(self, *shares):
        self.shares = list(shares)

    def random(self):
        return self.shares.pop(0)


def test_children_lie_between_or_beside_their_parents():
    assert crossed(0.2, 0.8, Draws(0.5)) == 0.2
    # spreads of (2 · .25)^(1/21) = .9675, and beyond the parents of 1 / .9675 = 1.0336
    assert crossed(0.2, 0.8, Draws(0.25)) == pytest.approx(0.5 - 0.3 * 0.9675, abs=1e-4)
    assert crossed(0.2, 0.8, Draws(0.75)) == pytest.approx(0.5 - 0.3 * 1.0336, abs=1e-4)
    assert crossed(0.0, 1.0, Draws(0.999)) == 0.0


def test_mutations_are_small_within_the_range_and_fair():
    assert mutated(0.3, Draws(0.5)) == pytest.approx(0.3)
    assert mutated(0.0, Draws(0.1)) == 0.0 and mutated(1.0, Draws(0.9)) == 1.0
    # far from both ends: half of them within 1 - .5^(1/21) = .0325
    found = [mutated(0.5, random.Random(number)) for number in range(400)]
    assert fmean(abs(each - 0.5) < 0.0325 for each in found) == pytest.approx(0.5, abs=0.07)
    assert fmean(found) == pytest.approx(0.5, abs=0.01)
    assert min(found) >= 0 and max(found) <= 1
