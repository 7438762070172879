"""python -m pytest tests/trainables/test_surfaces.py"""

import math
import warnings

import monai.metrics
import numpy as np
import pytest
import torch
from scipy import ndimage

from trainables import surfaces
from trainables.metrics import METRICS, split_scores
from trainables.scores import Counted, ObjectCounts
from trainables.surfaces import NAMES, case_sums

CLASSES = ["background", "organ", "lesion"]


def case_scores(sums, counts, classes):
    """All that is scored of whole volumes."""
    nothing = np.zeros((len(classes), len(classes)), int)
    objects = ObjectCounts(np.zeros((4, 4), int), np.zeros((len(classes), 2), int))
    found = split_scores(Counted(classes, nothing, objects, sums, counts))
    return {name: value for name, value in found.items() if name.split("/")[0] in NAMES}


def cube(start, edge=5, shape=(20, 20, 20), label=1):
    """A volume with a cube of a class; `start` is its first voxel."""
    volume = np.zeros(shape, np.uint8)
    volume[tuple(slice(at, at + edge) for at in start)] = label
    return volume


def scored(truth, predicted, spacing=(1.0, 1.0, 1.0), tolerance=1.0, num_classes=2):
    """Dice, HD95 and NSD of class 1 in one volume."""
    sums, counts = case_sums(truth, predicted, num_classes, spacing, tolerance)
    assert counts[1].tolist() == [1, 1, 1]
    return sums[1].tolist()


def by_monai(truth, predicted, num_classes, spacing, tolerance):
    """The three of every class (K, 3) on the whole volume, by MONAI's own functions."""
    both = [
        torch.nn.functional.one_hot(torch.from_numpy(labels).long(), num_classes).movedim(-1, 0)
        for labels in (predicted, truth)
    ]
    y_pred, y = (labels[None].float() for labels in both)
    with warnings.catch_warnings():
        # MONAI 1.6 warns of its own use of an old argument
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        found = [
            monai.metrics.compute_dice(y_pred, y),
            monai.metrics.compute_hausdorff_distance(
                y_pred, y, include_background=True, percentile=95, spacing=spacing
            ),
            monai.metrics.compute_surface_dice(
                y_pred, y, [tolerance] * num_classes, include_background=True, spacing=spacing
            ),
        ]
    return torch.cat(found).double().numpy().T


def blobs(rng, shape, num_classes, smooth=2.0):
    """Smooth regions of all classes; the likeliest of as many random fields."""
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), smooth) for _ in range(num_classes)]
    return np.argmax(fields, axis=0).astype(np.uint8)


def test_two_cubes_side_by_side_by_hand():
    """Edge 5, 3 voxels apart at 2 mm: the overlap is 2 x 5 x 5 voxels of 125."""
    truth, predicted = cube((4, 4, 4)), cube((7, 4, 4))
    dice, hd95, nsd = scored(truth, predicted, (2.0, 1.0, 1.0), tolerance=2.0)
    assert dice == pytest.approx(2 * 50 / 250)
    places = [(x, y, z) for x in range(5) for y in range(5) for z in range(5)]
    shell = [place for place in places if 0 in place or 4 in place]
    assert len(shell) == 98  # all of 125 but the inner 27
    distances = sorted(
        min(math.dist((2 * x, y, z), (2 * (other[0] + 3), other[1], other[2])) for other in shell)
        for x, y, z in shell
    )
    assert distances[-1] == 6.0
    place = 0.95 * 97  # the percentile lies between the 93rd and the 94th, counted from 1
    low, high = distances[int(place)], distances[int(place) + 1]
    assert hd95 == pytest.approx(low + (place - int(place)) * (high - low))
    assert nsd == pytest.approx(sum(distance <= 2.0 for distance in distances) / 98)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_are_as_far_apart_as_the_spacing_of_their_axis_says(axis):
    """Two whole planes 3 voxels apart: every voxel of one is 3 voxels from the other."""
    spacing = (0.7, 2.0, 5.0)
    truth, predicted = np.zeros((2, 8, 9, 10), np.uint8)
    np.moveaxis(truth, axis, 0)[2] = 1
    np.moveaxis(predicted, axis, 0)[5] = 1
    far = 3 * spacing[axis]
    assert scored(truth, predicted, spacing, far) == [0, pytest.approx(far), 1]
    assert scored(truth, predicted, spacing, 0.99 * far) == [0, pytest.approx(far), 0]
    assert scored(truth, truth, spacing, 0.0) == [1, 0, 1]


def test_the_tolerance_is_met_where_only_rounding_exceeds_it():
    truth, predicted = np.zeros((2, 8, 4, 4), np.uint8)
    truth[1], predicted[4] = 1, 1
    assert 3 * 0.1 > 0.3
    assert scored(truth, predicted, (0.1, 1.0, 1.0), tolerance=0.3)[2] == 1


def test_hd95_is_of_the_worse_direction_and_nsd_of_both():
    """Truth: one voxel. Prediction: it, and 3 more in a row, 10, 11 and 12 mm away."""
    truth, predicted = np.zeros((2, 20, 3, 3), np.uint8)
    truth[0, 1, 1] = 1
    predicted[[0, 10, 11, 12], 1, 1] = 1
    between = 11 + 0.85  # the percentile of 0, 10, 11, 12 at 0.95 * 3 = 2.85
    assert scored(truth, predicted) == [pytest.approx(2 / 5), pytest.approx(between), 2 / 5]
    assert scored(predicted, truth) == [pytest.approx(2 / 5), pytest.approx(between), 2 / 5]


def test_a_class_that_one_side_lacks_scores_the_diagonal():
    shape, spacing = (3, 8, 6), (4.0, 1.0, 1.5)  # 12, 8 and 9 mm: a diagonal of 17 mm
    empty, full = np.zeros(shape, np.uint8), cube((0, 0, 0), 2, shape)
    for truth, predicted in [(empty, full), (full, empty)]:
        assert scored(truth, predicted, spacing) == [0, 17, 0]


def test_a_class_that_both_sides_lack_is_left_out():
    sums, counts = case_sums(cube((4, 4, 4)), cube((4, 4, 4)), 3, (1, 1, 1), 1.0)
    assert sums.tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert counts.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert sums.dtype == np.float64 and counts.dtype == np.int64
    assert sorted(case_scores(sums, counts, CLASSES)) == sorted(
        [*NAMES, *(f"{name}/organ" for name in NAMES)]
    )
    nothing = case_sums(*np.zeros((2, 4, 4, 4), np.uint8), 3, (1, 1, 1), 1.0)
    assert case_scores(*nothing, CLASSES) == {}


def test_scores_are_means_over_volumes_then_over_classes():
    sums = np.array([[0, 0, 0], [1.5, 30.0, 1.0], [0.25, 8.0, 0.5]])
    counts = np.array([[0, 0, 0], [2, 2, 2], [1, 1, 1]])
    assert case_scores(sums, counts, CLASSES) == {
        "case_dice/organ": 0.75,
        "case_dice/lesion": 0.25,
        "case_dice": 0.5,
        "hd95/organ": 15.0,
        "hd95/lesion": 8.0,
        "hd95": 11.5,
        "nsd/organ": 0.5,
        "nsd/lesion": 0.5,
        "nsd": 0.5,
    }


def test_sums_of_volumes_add_up():
    """Volumes of different shapes: once perfect, once missed, once without the class."""
    found = [
        case_sums(cube((4, 4, 4)), cube((4, 4, 4)), 2, (1, 1, 1), 1.0),
        case_sums(cube((0, 0), 2, (3, 4)), np.zeros((3, 4), np.uint8), 2, (1, 1), 1.0),
        case_sums(*np.zeros((2, 5, 5, 5), np.uint8), 2, (1, 1, 1), 1.0),
    ]
    sums, counts = (sum(parts) for parts in zip(*found, strict=True))
    got = case_scores(sums, counts, CLASSES[:2])
    assert (got["case_dice"], got["hd95"], got["nsd"]) == (0.5, 2.5, 0.5)


def test_unlabelled_voxels_count_nowhere():
    truth = cube((4, 4, 4))
    truth[10:] = 255
    rng = np.random.default_rng(0)
    clean = cube((5, 4, 4))
    expected = scored(np.where(truth == 255, 0, truth), clean)
    for _ in range(3):
        predicted = clean.copy()
        predicted[10:] = rng.integers(0, 2, predicted[10:].shape)
        before = truth.copy(), predicted.copy()
        assert scored(truth, predicted) == expected
        assert all(map(np.array_equal, (truth, predicted), before))
    only = np.full((4, 4, 4), 255, np.uint8)
    assert not case_sums(only, np.ones_like(only), 2, (1, 1, 1), 1.0)[1].any()


@pytest.mark.parametrize("per_point", [0, 40, 10**9])  # always a search, as it is, always a map
def test_agrees_with_monai_on_whole_volumes(monkeypatch, per_point):
    monkeypatch.setattr(surfaces, "VOXELS_PER_POINT", per_point)
    rng = np.random.default_rng(1)
    for _ in range(8):
        shape = tuple(rng.integers(9, 26, 3))
        spacing = tuple(rng.uniform(0.4, 5.0, 3).tolist())
        tolerance = rng.uniform(0.5, 4.0)
        truth, predicted = blobs(rng, shape, 4), blobs(rng, shape, 4)
        mixed = rng.random(shape) < rng.random()
        predicted = np.where(mixed, truth, predicted)
        sums, _ = case_sums(truth, predicted, 4, spacing, tolerance)
        expected = by_monai(truth, predicted, 4, spacing, tolerance)
        is_both = [bool((truth == k).any() and (predicted == k).any()) for k in range(4)]
        is_both[0] = False
        assert sum(is_both) >= 1
        np.testing.assert_allclose(sums[is_both], expected[is_both], rtol=1e-5, atol=1e-5)


def test_agrees_with_monai_on_small_far_and_outermost_things():
    """Where a bounding box could go wrong: at the faces of the volume, and far apart."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        truth, predicted = np.zeros((2, 14, 17, 12), np.uint8)
        for volume in (truth, predicted):
            for _ in range(rng.integers(1, 4)):
                corner = [rng.choice([0, edge - 2, rng.integers(edge - 2)]) for edge in truth.shape]
                box = tuple(slice(at, at + rng.integers(1, 5)) for at in corner)
                volume[box] = 1
        spacing = tuple(rng.uniform(0.4, 5.0, 3).tolist())
        expected = by_monai(truth, predicted, 2, spacing, 2.0)[1]
        assert scored(truth, predicted, spacing, 2.0) == pytest.approx(expected, abs=1e-5)


def test_images_of_two_axes_are_scored_as_well():
    rng = np.random.default_rng(3)
    truth, predicted = blobs(rng, (40, 30), 3), blobs(rng, (40, 30), 3)
    sums, _ = case_sums(truth, predicted, 3, (0.5, 1.5), 1.0)
    expected = by_monai(truth, predicted, 3, (0.5, 1.5), 1.0)
    np.testing.assert_allclose(sums[1:], expected[1:], rtol=1e-5, atol=1e-5)


def test_every_score_is_a_metric_with_a_direction_and_a_twin_on_the_test_split():
    goals = [METRICS[name].goal for name in NAMES]
    assert goals == ["maximize", "minimize", "maximize"]
    for name in NAMES:
        tested, metric = METRICS[f"test_{name}"], METRICS[name]
        assert (tested.goal, tested.unit) == (metric.goal, metric.unit)
