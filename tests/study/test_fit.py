"""Whether a study fits its data, and what these data cannot show in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from study.fit import data_problems, data_size, weaknesses
from study.loading import parse_spec
from study.spec import StudySpec
from tests.conftest import TINY_STUDY
from tests.trainables.test_store import source_of
from trainables.data import Dataset, open_dataset
from trainables.data.source import Decoded, Whole
from trainables.data.store import write
from trainables.edges import even


def spec_of(**replaced: str) -> StudySpec:
    text = TINY_STUDY
    for old, new in replaced.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return parse_spec(text, Path(), where="s.yaml")


def images(folder: Path, masks: np.ndarray, classes: list[str] | None = None) -> Dataset:
    """Noise with these masks, the last two for validation."""
    noise = np.random.default_rng(0).integers(0, 255, (len(masks), 1, 32, 32)).astype(np.uint8)
    splits = ["train"] * (len(masks) - 2) + ["val"] * 2
    names = classes or ["background", "cell"]
    return open_dataset(
        write(source_of(noise, masks, splits, classes=names, small_classes=[]), folder)
    )


def volumes(folder: Path, spacing: tuple[float, ...], classes: list[str]) -> Dataset:
    labels = np.zeros((32, 32, 32), np.uint8)
    labels[4:20, 4:20, 4:20], labels[22:30, 22:30, 22:30] = 1, 2
    grey = np.random.default_rng(0).integers(0, 65535, (1, 32, 32, 32)).astype(np.uint16)
    source = source_of(
        np.zeros((6, 1, 32, 32, 32), np.uint16),
        splits=["train"] * 4 + ["val"] * 2,
        classes=classes,
        window=(0, 65535),
        decode=lambda part: Decoded(grey[None], labels[None]),
        whole=Whole([(32, 32, 32)] * 6, [spacing] * 6, 0.5, 1.0, 1),
    )
    return open_dataset(write(source, folder))


def cells(count: int, edge: int, images_with: int | None = None) -> np.ndarray:
    """Squares in a grid, `count` of them in each image, or in the first few and the last two."""
    masks = np.zeros((count and 8, 32, 32), np.uint8)
    for number, mask in enumerate(masks):
        if images_with is not None and images_with <= number < 6:
            continue
        for place in range(count):
            row, column = divmod(place, 3)
            mask[2 + 10 * row :, 2 + 10 * column :][:edge, :edge] = 1
    return masks


def test_data_that_suit_the_study_have_no_weakness(tmp_path):
    assert (
        weaknesses(
            spec_of(**{"segment: {epochs: 2": "segment: {epochs: 60"}),
            images(tmp_path, cells(4, 8)),
        )
        == []
    )


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        (cells(4, 3), "cell: objects of 3.4 px (median) are smaller than the smallest patch, 4"),
        (cells(1, 8), "cell: validation shows 2 of it, which decide its scores"),
        (cells(4, 8, 1), "16.7% of the training tiles show it, so that segmentation sees it 3 "),
        (cells(4, 1, 1), "cell: 0.065% of the pixels; whoever finds none of it is right on all"),
    ],
    ids=["small", "few", "seldom", "rare"],
)
def test_what_data_cannot_show_is_told_with_what_to_do(tmp_path, masks, told):
    assert told in "\n".join(weaknesses(spec_of(), images(tmp_path, masks)))


def test_patches_that_are_longer_along_one_axis_are_told(tmp_path):
    three = {"size: 32, images: 24, val: 8, seed: 1": "size: 32, images: 24, val: 8, seed: 2"}
    names = ["ground", "core", "rim"]
    told = "\n".join(weaknesses(spec_of(**three), volumes(tmp_path / "thick", (1, 1, 4), names)))
    assert "model.patch: 8 is 8 x 8 x 32 mm, as voxels are 1 x 1 x 4 mm; [8, 8, 2]" in told
    assert "model.patch: 4 is 4 x 4 x 16 mm" in told and "[4, 4, 2] would be" in told
    assert "mm;" not in "\n".join(
        weaknesses(spec_of(**three), volumes(tmp_path / "even", (1, 1, 1.2), names))
    )


@pytest.mark.parametrize(
    ("edge", "spacing", "patch"),
    [
        (8, (1, 1, 1), [8, 8, 8]),
        (16, (0.7, 0.7, 5), [16, 16, 2]),
        (8, (3, 1, 1), [2, 8, 8]),
        (2, (1, 1, 8), [2, 2, 2]),
    ],
)
def test_an_even_patch_is_about_as_long_along_every_axis(edge, spacing, patch):
    assert even(edge, spacing) == patch


# --- classes that have a side ---


def sides(spec: StudySpec, dataset: Dataset) -> str:
    return "\n".join(line for line in data_problems(spec, data_size(dataset)) if "left" in line)


@pytest.mark.parametrize("pair", [("left lung", "Right Lung"), ("Kidney_L", "kidney_R")])
def test_turning_around_what_has_a_side_is_refused(tmp_path, pair):
    dataset = volumes(tmp_path, (1, 1, 1), ["ground", *pair])
    told = sides(spec_of(), dataset)
    assert "trial.segment.augment: turns images around from left to right" in told
    assert f"{pair[0]!r} and {pair[1]!r} are classes" in told
    assert "flip_axes: [1, 2]}`" in told
    line = "segment: {epochs: 2, batch: 8"
    for augment in ("{name: crops, flip_axes: [1, 2]}", "{name: flips, flip_axes: []}", "none"):
        changed: dict[str, Any] = {line: f"{line}, augment: {augment}"}
        assert sides(spec_of(**changed), dataset) == ""


def test_of_pictures_left_and_right_are_along_the_second_axis(tmp_path):
    masks = cells(4, 8)
    masks[:, 16:] *= 2
    dataset = images(tmp_path, masks, ["ground", "left eye", "right eye"])
    assert "flip_axes: [0]}`" in sides(spec_of(), dataset)
    alone = images(tmp_path / "other", masks, ["ground", "left ventricle", "bright spot"])
    assert sides(spec_of(), alone) == ""


def test_axes_that_the_images_do_not_have_are_refused(tmp_path):
    line = "segment: {epochs: 2, batch: 8"
    spec = spec_of(**{line: f"{line}, augment: {{name: flips, flip_axes: [0, 2]}}"})
    (told,) = data_problems(spec, data_size(images(tmp_path, cells(4, 8))))
    assert told == (
        "trial.segment.augment.flip_axes: given [0, 2]; expected axes of the images, 0 to 1"
    )
