"""Segmenters without an encoder: `pytest tests/trainables/test_trivial.py`."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import toy
from tests.balls import balls
from trainables import trivial
from trainables.data.store import Tiles
from trainables.metrics import METRICS
from trainables.scores import confusion, miou_of
from trainables.trivial import best_classes, images_of, luminance, otsu, scores

torch.set_num_threads(1)

CPU = torch.device("cpu")
REAL = Path(__file__).parents[2] / "data" / "manifest.csv"  # where the examples look for them


def scored(data, patch=(4, 4), rows=None, **options):
    """Of these data as they are now: another object, of which nothing is remembered."""
    rows = data.rows("train") if rows is None else rows
    return scores(replace(data), rows, patch, CPU, **options)


def textured(seed=0):
    """Discs as bright as what is around them: only their texture tells them."""
    data = toy.discs(num_images=60, diameters=(7.0, 9.0), seed=seed)
    rng = np.random.default_rng(seed)
    fine = np.where(rng.random(data.images.shape) < 0.5, 70, 130)
    coarse = np.where(rng.random((60, 1, 8, 8)) < 0.5, 70, 130).repeat(2, 2).repeat(2, 3)
    data.images[:] = np.where(data.masks[:, None] == 1, fine, coarse)
    return data


def test_the_segmenters_are_the_metrics_of_trivial_ones():
    trivial_ones = {
        key for key, metric in METRICS.items() if metric.is_trivial and not metric.is_held_out
    }
    assert set(trivial.SEGMENTERS) == trivial_ones


def test_bright_discs_are_solved_by_a_threshold_and_textured_ones_are_not():
    found = scored(toy.discs(num_images=60))
    assert found["threshold_miou"] > 0.98 and found["ridge_pixels_miou"] > 0.95
    found = scored(textured())
    assert found["threshold_miou"] < 0.6 and found["ridge_pixels_miou"] < 0.6


def test_dark_objects_are_found_as_well_as_bright_ones():
    data = toy.discs(num_images=60)
    data.images[:] = 255 - data.images
    assert scored(data)["threshold_miou"] > 0.98


def test_the_test_split_has_scores_of_its_own_if_there_is_one():
    data = toy.discs(num_images=60)
    splits = data.splits.copy()
    splits[-6:] = "test"
    both = scored(replace(data, splits=splits))
    assert both.keys() == {
        *trivial.SEGMENTERS,
        *(f"test_{key}" for key in trivial.SEGMENTERS),
    }
    data.masks[-6:] = 1 - data.masks[-6:]
    worse = scored(replace(data, splits=splits))
    assert worse["test_threshold_miou"] < 0.1 < 0.9 < both["test_threshold_miou"]
    assert worse["threshold_miou"] == both["threshold_miou"]
    assert scored(replace(data, splits=splits), splits=["val"]).keys() == set(trivial.SEGMENTERS)
    data.masks[-6:] = 0
    nothing = scored(replace(data, splits=splits))
    assert nothing["threshold_miou"] == both["threshold_miou"]
    assert "test_threshold_miou" not in nothing, "there is nothing to be found"


def test_labels_are_taken_of_the_given_rows_alone():
    data = toy.discs(num_images=60)
    rows = data.rows("train")[:10]
    before = scored(data, rows=rows)
    data.masks[data.rows("train")[10:]] = 0
    assert scored(data, rows=rows) == before != scored(data)
    one = replace(data, groups=["one"] * 60)
    assert scored(one, rows=rows).keys() == {"threshold_miou"}
    assert scored(data, rows=rows[:0]) == {}


def variance_within(histogram, cuts):
    levels = np.repeat(np.arange(len(histogram)), histogram)
    ranks = np.searchsorted(cuts, levels, side="right")
    parts = [levels[ranks == rank] for rank in range(len(cuts) + 1)]
    return sum(((part - part.mean()) ** 2).sum() for part in parts if len(part))


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_thresholds_have_the_least_variance_of_all(num_classes):
    rng = np.random.default_rng(num_classes)
    for _ in range(5):
        histogram = rng.integers(0, 9, 12) * (rng.random(12) < 0.8)
        every = itertools.combinations_with_replacement(range(13), num_classes - 1)
        least = min(variance_within(histogram, cuts) for cuts in every)
        found = otsu(histogram, num_classes)
        assert len(found) == num_classes - 1 and found == sorted(found)
        assert variance_within(histogram, found) == pytest.approx(least)


def test_an_image_of_one_level_has_thresholds_too():
    assert len(otsu(np.bincount([7], minlength=256) * 100, 3)) == 2


def test_ranks_are_named_as_no_other_names_would_do_better():
    rng = np.random.default_rng(0)

    def value(counts, names):
        pixels = np.zeros_like(counts)
        for rank, label in enumerate(names):
            pixels[:, label] += counts[rank]
        return miou_of(pixels)

    for _ in range(20):
        counts = rng.integers(0, 1000, (3, 3)) ** 2
        counts[:, 0] *= 5
        best = max(value(counts, names) for names in itertools.product(range(3), repeat=3))
        assert value(counts, best_classes(counts)) == pytest.approx(best)
    nothing = np.zeros((2, 2), np.int64)
    nothing[:, 0] = 5
    assert best_classes(nothing).tolist() == [0, 0]


def test_thresholds_are_those_of_a_whole_image_not_of_its_tiles():
    """One of two tiles is of one class: by itself it would be cut through its noise."""
    data = toy.discs(num_images=24)
    tiles = Tiles(
        shapes=np.array([[16, 32]] * 12),
        owner=np.arange(24) // 2,
        corners=np.array([[0, 0], [0, 16]] * 12),
    )
    data.masks[::2] = 0
    data.images[::2] = np.random.default_rng(0).normal(50, 4, data.images[::2].shape).clip(0, 255)
    assert scored(replace(data, tiles=tiles))["threshold_miou"] > 0.98
    assert scored(data)["threshold_miou"] < 0.5
    found = list(images_of(replace(data, tiles=tiles), data.rows("val")))
    assert [len(level_M) for level_M, _ in found] == [512, 512, 512]
    assert len(list(images_of(data, data.rows("train"), 5))) == 5


def test_luminance_by_hand():
    levels = np.array([[255, 0], [0, 0], [0, 255]], np.uint8)
    assert luminance(levels, toy.discs()).tolist() == [round(0.299 * 255), round(0.114 * 255)]
    sixteen = replace(toy.discs(), low=1000.0, high=3000.0)
    assert luminance(np.array([[500, 2000, 9999]], np.uint16), sixteen).tolist() == [0, 128, 255]


def test_unlabelled_pixels_count_nowhere():
    data = toy.discs(num_images=60)
    data.masks[:, :8] = 255
    expected = scored(data)
    data.images[data.rows("val"), 0, :8] = data.images[data.rows("val"), 0, :8][:, ::-1]
    assert scored(data)["threshold_miou"] == expected["threshold_miou"] > 0.95


def test_whole_volumes_are_cut_and_padding_is_no_part_of_them(tmp_path):
    data = balls(tmp_path)
    found = scored(data, (4, 4, 2))
    assert found["threshold_miou"] > 0.98 and found["ridge_pixels_miou"] > 0.8
    volume = int(data.volumes_of("val")[0])
    level_M, label_M = next(images_of(data, data.rows("val")))
    assert label_M.size == level_M.size == data.mask_of(volume).size
    predicted = (level_M > 128).astype(np.uint8)
    pixels = confusion(torch.from_numpy(label_M), torch.from_numpy(predicted), 2)
    assert miou_of(pixels.numpy()) > 0.98


@pytest.mark.skipif(not REAL.is_file(), reason="no real images in data/")
def test_real_nuclei_are_solved_by_a_threshold(tmp_path):
    from study.loading import parse_spec
    from trainables.data import open_dataset, prepare

    text = f"""study: s
data: {{source: images, manifest: {REAL}, where: {{dataset: nuclei_dsb}}, size: 64, channels: 1}}
trial: {{model: {{size: pico, patch: 8}}}}
objectives: [{{metric: segment/miou, goal: maximize}}]
budget: {{trials: 4}}
"""
    data = open_dataset(
        prepare(parse_spec(text, tmp_path, where="s.yaml").data, tmp_path, tmp_path / "cache")
    )
    found = scored(data, (8, 8))
    assert found["threshold_miou"] == pytest.approx(0.888, abs=0.002)
    assert found["test_threshold_miou"] == pytest.approx(0.854, abs=0.002)


def test_a_process_computes_them_once_for_the_same_data_rows_and_patch(monkeypatch):
    data = toy.discs()
    rows = data.rows("train")
    first = scores(data, rows, (4, 4), CPU)
    fitted = []

    def fit(dataset, rows, patch, *_):
        fitted.append((dataset, len(rows), patch))

    monkeypatch.setattr("trainables.trivial.SEGMENTERS", {"threshold_miou": fit})
    assert scores(data, rows.copy(), [4, 4], CPU) == first and not fitted
    other = toy.discs()
    for given in ((data, rows[:-1], (4, 4)), (data, rows, (8, 8)), (other, rows, (4, 4))):
        scores(*given, CPU)
    assert fitted == [
        (data, len(rows) - 1, (4, 4)),
        (data, len(rows), (8, 8)),
        (other, len(rows), (4, 4)),
    ]
