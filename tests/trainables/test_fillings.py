"""Trivial fillings against brute force: `pytest tests/trainables/test_fillings.py`."""

import itertools
import math

import numpy as np
import pytest

from trainables.fillings import FILLINGS, Gain, gain_of, laplace, mean, nearest

SIZES = [(7, 9), (12, 1), (4, 5, 6), (1, 6, 3)]


def scene(size, seed=0):
    """Two channels of noise, and of the pixels about half hidden, a third visible, others padding.

    The first pixel is visible.
    """
    rng = np.random.default_rng(seed)
    image = rng.random((2, *size), dtype=np.float32)
    kind = rng.choice(3, size, p=[0.5, 0.35, 0.15])
    kind.flat[0] = 1
    image[:, kind == 2] = np.nan
    return image, kind == 1, kind == 0


def neighbours(place, size):
    for axis, step in itertools.product(range(len(size)), (-1, 1)):
        other = tuple(at + step * (axis == own) for own, at in enumerate(place))
        if all(0 <= at < edge for at, edge in zip(other, size, strict=True)):
            yield other


def reached(is_visible, is_hidden):
    """Hidden pixels from which a path over hidden ones leads to a visible one."""
    found = {tuple(place) for place in np.argwhere(is_visible)}
    left = list(found)
    while left:
        for other in neighbours(left.pop(), is_hidden.shape):
            if is_hidden[other] and other not in found:
                found.add(other)
                left.append(other)
    return [place for place in map(tuple, np.argwhere(is_hidden)) if place in found]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_harmonic_inpainting_solves_the_dense_equations(size, seed):
    image, is_visible, is_hidden = scene(size, seed)
    places = reached(is_visible, is_hidden)
    equations, bound = np.zeros((len(places), len(places))), np.zeros((len(places), 2))
    for row, place in enumerate(places):
        for other in neighbours(place, size):
            if is_visible[other] or is_hidden[other]:
                equations[row, row] += 1
            if is_visible[other]:
                bound[row] += image[(slice(None), *other)]
            elif is_hidden[other]:
                equations[row, places.index(other)] -= 1
    filled = laplace(image, is_visible, is_hidden)
    level = image[:, is_visible].mean(axis=1)
    for place, expected in zip(places, np.linalg.solve(equations, bound), strict=True):
        assert filled[(slice(None), *place)] == pytest.approx(expected, abs=1e-4)
    cut_off = {tuple(place) for place in np.argwhere(is_hidden)} - set(places)
    for place in cut_off:
        assert filled[(slice(None), *place)] == pytest.approx(level, abs=1e-6)


def test_what_rises_in_a_line_is_filled_in_without_an_error():
    for size in [(16, 24), (8, 10, 24)]:
        ramp = np.broadcast_to(np.linspace(0, 1, 24), (1, *size))
        is_hidden = np.zeros(size, bool)
        is_hidden[..., 8:16] = True
        found = laplace(ramp, ~is_hidden, is_hidden)
        assert np.abs(found - ramp)[:, is_hidden].max() < 1e-4


def test_the_nearest_of_all_visible_pixels_is_copied():
    for size, seed in itertools.product(SIZES, range(4)):
        image, is_visible, is_hidden = scene(size, seed)
        filled, seen = nearest(image, is_visible, is_hidden), np.argwhere(is_visible)
        for place in np.argwhere(is_hidden):
            distances = ((seen - place) ** 2).sum(axis=1)
            ties = seen[distances == distances.min()]
            candidates = [image[(slice(None), *other)].tolist() for other in ties]
            assert filled[(slice(None), *place)].tolist() in candidates


def test_the_mean_is_that_of_each_channel_over_visible_pixels_alone():
    image = np.array([[[0.0, 0.2], [0.4, 1.0]], [[1.0, 1.0], [0.4, math.nan]]])
    is_visible = np.array([[True, True], [True, False]])
    filled = mean(image, is_visible, ~is_visible)
    assert filled.shape == image.shape
    assert filled[:, 1, 1].tolist() == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize("key", FILLINGS)
def test_no_filling_looks_at_what_is_hidden_or_padding(key):
    image, is_visible, is_hidden = scene((6, 8))
    before = FILLINGS[key].fill(image, is_visible, is_hidden)
    other = np.where(is_visible, image, 9.0).astype(np.float32)
    after = FILLINGS[key].fill(other, is_visible, is_hidden)
    assert np.array_equal(before[:, is_hidden], after[:, is_hidden])
    assert np.isfinite(before[:, is_hidden]).all()


def test_a_gain_is_told_over_the_filling_that_is_hardest_to_beat():
    parts = {"probe_gain/mean": 3.0, "probe_gain/nearest": 1.0, "probe_gain/laplace": -0.25}
    found = gain_of({"probe_gain": -0.5, "probe_psnr": 30.0, **parts})
    assert found == Gain(-0.5, "laplace") and not found.is_learnt
    assert gain_of({"probe_gain": 0.5}) == Gain(0.5, None)
    assert Gain(0.01, None).is_learnt and not Gain(0.0, None).is_learnt
    for nothing in ({}, parts, {"probe_gain": math.nan}):
        assert gain_of(nothing) is None
