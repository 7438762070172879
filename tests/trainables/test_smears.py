"""Generated smears: exact masks, settable sizes, the same picture from the same settings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from scipy import ndimage

from trainables.data import DataConfig
from trainables.data.smears import CLASSES, PLATELET, RED, WHITE, Look, _place, smears

PLAIN = {"stain": 0.0, "light": 0.0, "noise": 0.0}
ONLY = {
    RED: {"white_cells": 0, "platelets": 0},
    WHITE: {"red_cells": 0, "platelets": 0},
    PLATELET: {"red_cells": 0, "white_cells": 0},
}
SIZE_OF = {RED: "red_diameter", WHITE: "white_diameter", PLATELET: "platelet_diameter"}
COUNT_OF = {RED: "red_cells", WHITE: "white_cells", PLATELET: "platelets"}


def draw(count: int, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (n, 3, H, W), classes and instances (n, H, W) of the first training images."""
    source = smears(Path(), images=count, **options)
    drawn = [source.decode(row) for row in range(count)]
    return (
        np.concatenate([d.images for d in drawn]),
        np.concatenate([d.masks for d in drawn]),
        np.concatenate([d.instances for d in drawn if d.instances is not None]),
    )


def inner_diameters(instances: np.ndarray) -> list[float]:
    """Equivalent diameters of the objects that do not touch the border."""
    found = []
    for image in instances:
        border = set(np.unique(np.concatenate([image[[0, -1]].ravel(), image[:, [0, -1]].ravel()])))
        areas = np.bincount(image.ravel())
        found += [
            2 * np.sqrt(area / np.pi)
            for label, area in enumerate(areas)
            if label and area and label not in border
        ]
    return found


def test_the_same_settings_give_the_same_pictures_and_another_seed_others():
    first, again, other = (draw(3, seed=seed) for seed in (1, 1, 2))
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left, right)
    assert (first[0] != other[0]).mean() > 0.5


def test_a_picture_does_not_depend_on_how_many_there_are():
    few, many = smears(Path(), images=2, val=3), smears(Path(), images=9, val=3)
    assert few.names[2] == many.names[9] == "val-00000"
    np.testing.assert_array_equal(few.decode(2).images, many.decode(9).images)


def test_splits_do_not_repeat_each_other():
    source = smears(Path(), images=1, val=1, test=1, unlabelled=1)
    pictures = [source.decode(row).images for row in range(4)]
    assert all((pictures[0] != other).mean() > 0.5 for other in pictures[1:])


def test_classes_and_instances_agree_pixel_by_pixel():
    pictures, classes, instances = draw(8)
    assert pictures.shape == (8, 3, 64, 64)
    assert set(np.unique(classes)) == {0, RED, WHITE, PLATELET}
    np.testing.assert_array_equal(classes > 0, instances > 0)
    for image, labels in zip(instances, classes, strict=True):
        for label in np.unique(image[image > 0]):
            assert len(np.unique(labels[image == label])) == 1


@pytest.mark.parametrize("label", [RED, WHITE, PLATELET])
@pytest.mark.parametrize("diameter", [7.0, 22.0])
def test_objects_have_the_asked_diameter(label, diameter):
    options = {SIZE_OF[label]: diameter, COUNT_OF[label]: 6, **ONLY[label]}
    _, classes, instances = draw(6, size=128, spread=0.0, overlap=0.0, **options)
    assert set(np.unique(classes)) == {0, label}
    assert np.mean(inner_diameters(instances)) == pytest.approx(diameter, rel=0.04)


def test_counts_are_means_per_picture():
    _, _, instances = draw(
        30, size=(128, 192), red_cells=4, white_cells=0, platelets=3, platelet_diameter=8
    )
    counts = [len(np.unique(image)) - 1 for image in instances]
    assert np.mean(counts) == pytest.approx(7, abs=1.2)  # Poisson: 0.5 standard errors


def test_without_counts_the_density_is_the_same_at_every_size():
    small = draw(16, size=64)[1]
    large = draw(4, size=128)[1]
    for label in (RED, PLATELET):
        assert (large == label).mean() == pytest.approx((small == label).mean(), rel=0.3)


def test_overlap_zero_keeps_cells_apart_and_one_does_not():
    def gaps(overlap: float) -> np.ndarray:
        look = Look((100, 100), {RED: 14.0}, {RED: 40}, 0.1, overlap, 0, 0, 0)
        radii, centres = _place(look, RED, {}, np.random.default_rng(0))
        apart = np.hypot(*(centres[:, None] - centres[None]).transpose(2, 0, 1))
        return (apart - radii[:, None] - radii[None])[np.triu_indices(len(radii), 1)]

    assert gaps(0.0).min() >= -1e-4
    assert gaps(1.0).min() < -7


def test_nuclei_are_dark_red_cells_pink_and_platelets_violet():
    pictures, classes, _ = draw(6, size=128, **PLAIN, white_diameter=40, red_diameter=30)
    rgb = pictures.transpose(0, 2, 3, 1).astype(float)
    ground, red, platelet = (rgb[classes == k].mean(0) for k in (0, RED, PLATELET))
    nucleus = np.percentile(rgb[classes == WHITE], 10, axis=0)
    assert ground.min() > 200
    assert red[0] > red[2] > red[1]  # pink
    assert platelet[2] > platelet[0] > platelet[1]  # violet
    assert nucleus[0] < 110 and nucleus[1] < 90


def test_red_cells_are_pale_in_the_middle():
    options = {**PLAIN, **ONLY[RED], "red_cells": 3, "red_diameter": 30, "overlap": 0.0}
    pictures, classes, _ = draw(12, size=128, **options)
    depth = np.stack([ndimage.distance_transform_edt(labels) for labels in classes])
    green = pictures[:, 1].astype(float)
    assert green[depth > 12].mean() > green[(depth > 2) & (depth < 6)].mean() + 15


def test_light_stain_and_noise_can_be_turned_off():
    empty = {"red_cells": 0, "white_cells": 0, "platelets": 0}
    assert len(np.unique(draw(3, **empty, **PLAIN)[0][:, 0])) == 1
    one = {**PLAIN, "noise": 0.5}
    assert 1 < draw(3, **empty, **one)[0][:, 0].std() < 5
    uneven = draw(1, **empty, **{**PLAIN, "light": 1.0})[0][0, 0].astype(float)
    assert uneven.max() - uneven.min() > 10


def test_unlabelled_pictures_have_no_label_and_are_for_pretraining_only():
    source = smears(Path(), images=1, val=1, test=0, unlabelled=2)
    assert source.splits == ["train", "val", "pretrain", "pretrain"]
    assert (source.decode(3).masks == 255).all()
    assert (source.decode(0).masks != 255).all()


def test_a_hundred_pictures_take_less_than_a_second_of_processor_time():
    source = smears(Path())
    started = time.process_time()
    for row in range(40):
        source.decode(row)
    assert time.process_time() - started < 0.4


def test_the_study_file_names_smears_and_its_options():
    config = TypeAdapter(DataConfig).validate_python(
        {"source": "smears", "size": [64, 96], "platelet_diameter": 4}
    )
    source = smears(Path(), **config.options())
    assert (source.size, source.channels, source.classes) == ((64, 96), 3, CLASSES)
    assert source.small_classes == [PLATELET]


@pytest.mark.parametrize(
    "wrong", [{"size": 4}, {"sise": 64}, {"overlap": 1.5}, {"red_diameter": 0}, {"images": 0}]
)
def test_a_wrong_option_is_refused(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(DataConfig).validate_python({"source": "smears", **wrong})
