"""Volumes: how they are turned, resampled, levelled and cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file

from tests import toy
from tests.trainables.test_images import manifest
from tests.trainables.test_nifti import ramp, save
from trainables.config import ProbeConfig
from trainables.data import DataConfig, open_dataset, prepare
from trainables.data.batches import to_device, whole_volume
from trainables.data.source import Source
from trainables.data.volumes import (
    HEADROOM,
    HIGHEST,
    resampled,
    resampled_labels,
    to_levels,
    to_ras,
    volumes,
)
from trainables.errors import UserError
from trainables.trial import run_trial

SIZE = (8, 8, 8)
SPLITS = ["train", "train", "val", "val", "test", "test"]


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def box(*shape: int) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[:3, :4, :5] = 1
    return mask


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Six volumes of 8x10x12 with masks of two classes, two per split, in data/."""
    rows = []
    for number, split in enumerate(SPLITS):
        save(tmp_path / f"data/images/v{number}.nii.gz", noise(number, 8, 10, 12))
        save(tmp_path / f"data/masks/v{number}.nii.gz", box(8, 10, 12))
        rows.append(
            {
                "image": f"images/v{number}.nii.gz",
                "mask": f"masks/v{number}.nii.gz",
                "split": split,
                "group": f"patient-{number // 2}",
            }
        )
    manifest(tmp_path / "data", rows)
    return tmp_path


def rows_of(study: Path) -> list[dict[str, str]]:
    header, *lines = (study / "data/manifest.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def change(study: Path, number: int, **cells: str) -> None:
    rows = rows_of(study)
    rows[number] |= cells
    manifest(study / "data", rows)


def replace_volume(study: Path, number: int, array: np.ndarray, affine: Any = None) -> None:
    """Another image and an empty mask on its grid."""
    save(study / f"data/images/v{number}.nii.gz", array, affine)
    save(study / f"data/masks/v{number}.nii.gz", np.zeros(array.shape[:3], np.uint8), affine)


def config(**options: Any) -> Any:
    settings = {"source": "volumes", "manifest": "data/manifest.csv", "size": list(SIZE)}
    return TypeAdapter(DataConfig).validate_python(settings | options)


def source(study: Path, **options: Any) -> Source:
    return volumes(study, **config(**options).options())


def complaint(study: Path, **options: Any) -> str:
    """The refusal, which may come before decoding or while it goes on."""
    with pytest.raises(UserError) as caught:
        found = source(study, **options)
        for part in range(len(found.parts)):
            found.decode(part)
    return str(caught.value)


def whole(study: Path, number: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Levels (C, *S) and labels (*S) of a volume."""
    decoded = source(study, **options).decode(number)
    return decoded.images[0], decoded.masks[0]


# --- rows ---


def test_the_whole_way_from_the_study_file_to_arrays(study):
    replace_volume(study, 5, noise(5, 9, 17, 8))
    dataset = open_dataset(prepare(config(), study, study / "cache"))
    assert dataset.images.dtype == np.uint16 and dataset.image_of(5).shape == (1, 9, 17, 8)
    assert dataset.mask_of(4).tolist() == box(8, 10, 12).tolist()
    assert dataset.size == SIZE and (dataset.low, dataset.high) == (0, HIGHEST / HEADROOM)
    described = dataset.describe()
    assert described["images"] == {"pretrain": 8, "train": 8, "val": 8, "test": 10}
    assert described["volumes"] == {"pretrain": 2, "train": 2, "val": 2, "test": 2}
    assert dataset.classes == ["background", "class 1"] and dataset.instances is None
    assert dataset.groups[:4] == ["patient-0"] * 4 and dataset.groups[-1] == "patient-2"
    assert dataset.names[-6:-3] == [f"images/v5.nii.gz@{c}" for c in ("0,0,0", "0,4,0", "0,9,0")]
    assert list(dataset.volumes_of("test")) == [4, 5]


def test_spacing_and_sizes_of_objects_are_in_millimetres(study):
    for number in range(6):
        replace_volume(study, number, noise(number, 8, 10, 12), np.diag([2.0, 1, 0.75, 1]))
        inside = np.roll(box(8, 10, 12), (1, 1, 1), axis=(0, 1, 2))  # no border cuts it off
        save(study / f"data/masks/v{number}.nii.gz", inside, np.diag([2.0, 1, 0.75, 1]))
    dataset = open_dataset(prepare(config(), study, study / "cache"))
    assert dataset.volumes.spacings.tolist() == [[2.0, 1.0, 0.75]] * 6
    cubic_millimetres = 3 * 4 * 5 * 2.0 * 1.0 * 0.75
    expected = 2 * (cubic_millimetres * 3 / (4 * np.pi)) ** (1 / 3)
    assert dataset.object_edges == pytest.approx((expected, expected))
    finer = open_dataset(prepare(config(spacing=[1, 1, 1]), study, study / "cache"))
    assert finer.volumes.spacings.tolist() == [[1.0, 1.0, 1.0]] * 6
    assert finer.volumes.shapes.tolist() == [[16, 10, 9]] * 6


def test_a_smaller_volume_is_padded_at_its_end_and_padding_counts_nowhere(study):
    before = open_dataset(prepare(config(window=[0, HIGHEST]), study, study / "cache"))
    assert not before.is_padded and not any("padded" in n for n in before.about["notes"])
    replace_volume(study, 0, noise(9, 8, 5, 12))
    dataset = open_dataset(prepare(config(window=[0, HIGHEST]), study, study / "cache"))
    assert dataset.is_padded and dataset.image_of(0).shape == (1, 8, 5, 12)
    levels = np.concatenate([noise(9, 8, 5, 12).ravel(), noise(1, 8, 10, 12).ravel()]) / HIGHEST
    assert dataset.mean == pytest.approx((levels.mean(),))
    assert dataset.std == pytest.approx((levels.std(),))
    expected = "1 of 6 volumes are smaller than a crop of 8x8x8, and padded"
    assert any(expected in note for note in dataset.about["notes"])
    images, labels = to_device(dataset, np.arange(1), "cpu").batch(torch.zeros(1, dtype=torch.long))
    assert images[0, 0, :, :5].isfinite().all() and images[0, 0, :, 5:].isnan().all()
    assert (labels[0, :, :5] == 0).all() and (labels[0, :, 5:] == 255).all()


# --- orientation and spacing ---


def test_a_stored_volume_is_turned_by_hand():
    stored = ramp(2, 3, 4)
    lps = np.diag([-1, -1, 1, 1])
    assert to_ras(stored, lps)[0, 0, 0] == stored[1, 2, 0]
    # axes to the back, downwards, to the right
    pir = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    turned = to_ras(stored, pir)
    assert turned.shape == (4, 2, 3)
    assert turned[3, 1, 2] == stored[0, 0, 3] and turned[0, 0, 0] == stored[1, 2, 0]


@pytest.mark.parametrize("code", ["LAS", "PIR", "SRA", "ILP"])
def test_however_a_volume_is_stored_it_comes_out_the_same(study, code):
    """Image and mask written along other axes, at the same places in the patient."""
    straight = nibabel.Nifti1Image(noise(0, 8, 10, 12), np.diag([1.0, 2.0, 3.0, 1.0]))
    mask = nibabel.Nifti1Image(box(8, 10, 12), straight.affine)
    expected, labels = noise(0, 8, 10, 12), box(8, 10, 12)
    there = nibabel.orientations.axcodes2ornt(code)
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), there)
    for kind, volume in (("images", straight), ("masks", mask)):
        turned = volume.as_reoriented(turn)
        assert "".join(nibabel.aff2axcodes(turned.affine)) == code
        nibabel.save(turned, study / f"data/{kind}/v0.nii.gz")
    levels, found = whole(study, 0, window=[0, HIGHEST])
    np.testing.assert_array_equal(levels[0], expected)
    np.testing.assert_array_equal(found, labels)


def test_new_voxels_lie_in_the_middle_of_the_old_ones():
    line = np.array([0.0, 10, 20, 30]).reshape(1, 1, 4)
    finer = resampled(line, (1, 1, 8), [1, 1, 0.5])
    assert finer.ravel().tolist() == [0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30]
    labels = resampled_labels(line, (1, 1, 8), [1, 1, 0.5])
    assert labels.ravel().tolist() == [0, 0, 10, 10, 20, 20, 30, 30]
    coarser = resampled(np.arange(40.0).reshape(1, 1, 40), (1, 1, 20), [1, 1, 2])
    assert coarser.ravel()[5:15] == pytest.approx(np.arange(10.5, 30, 2))
    fine = np.tile([0.0, 8], 18).reshape(1, 1, 36)  # new voxels would hit 8, 0, 8, 0, ...
    assert resampled(fine, (1, 1, 12), [1, 1, 3]).ravel()[2:10] == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("step", [0.5, 1.5, 2.0, 3.0])
def test_labels_stay_where_their_image_is(step):
    """New voxels often lie halfway between old ones, where rounding moves all labels one way."""
    shifts = []
    for old in range(24, 32):
        for first in range(4, 16):  # whole periods of every pattern
            line = np.zeros((1, 1, old))
            line[..., first : first + 9] = 1
            shape = (1, 1, round(old / step))
            found = resampled_labels(line, shape, [1, 1, step]).ravel()
            exact = resampled(line, shape, [1, 1, step]).ravel()
            place = np.arange(shape[2])
            shifts.append((place @ found / found.sum() - place @ exact / exact.sum()) * step)
    assert abs(np.mean(shifts)) < 0.06  # old voxels; half of one where all are rounded one way
    assert np.abs(shifts).max() <= 1


def test_spacing_is_made_alike_axis_by_axis(study):
    steps = np.arange(16, dtype=np.int16)[:, None, None] * 100 + np.zeros((1, 10, 6), np.int16)
    replace_volume(study, 0, steps, np.diag([0.5, 1, 2, 1]))
    save(study / "data/masks/v0.nii.gz", (steps >= 800).astype(np.uint8), np.diag([0.5, 1, 2, 1]))
    levels, labels = whole(study, 0, spacing=[1, 1, 1], window=[0, HIGHEST])
    assert levels.shape == (1, 8, 10, 12)
    # voxel i of 1 mm is the mean of 2 i and 2 i + 1; the ends go on
    assert levels[0, 1:-1, 0, 0].tolist() == [100 * (2 * i) + 50 for i in range(1, 7)]
    assert (levels == levels[:, :, :1, :1]).all()
    assert labels[:, 3, 3].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    kept = source(study)
    assert any("from [0.5, 1, 1] to [1, 1, 2] mm" in note for note in kept.notes)


def test_the_order_of_spacing_is_that_of_the_rows_not_of_the_file(study):
    # axes upwards in steps of 2, to the right in steps of 0.5, to the front
    stored = np.zeros((6, 1, 10), np.int16) + np.arange(16, dtype=np.int16)[:, None] * 100
    affine = np.array([[0, 0.5, 0, 0], [0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 1.0]])
    replace_volume(study, 0, stored, affine)
    levels = whole(study, 0, spacing=[1, 1, 1], window=[0, HIGHEST])[0]
    assert levels.shape == (1, 8, 10, 12)
    assert levels[0, 1:-1, 5, 5].tolist() == [200 * i + 50 for i in range(1, 7)]


def test_a_mask_in_another_place_or_grid_is_refused(study):
    affine = np.eye(4)
    affine[0, 3] = 0.05
    save(study / "data/masks/v0.nii.gz", box(8, 10, 12), affine)
    source(study)
    affine[0, 3] = 0.2
    save(study / "data/masks/v0.nii.gz", box(8, 10, 12), affine)
    assert "masks/v0.nii.gz (manifest.csv line 2) lies up to 0.2 mm away" in complaint(study)
    save(study / "data/masks/v0.nii.gz", box(8, 10, 12), np.diag([-1, 1, 1, 1]))
    assert "lies up to 14 mm away" in complaint(study)
    save(study / "data/masks/v0.nii.gz", box(8, 10, 11))
    assert "is 8x10x11, but its image images/v0.nii.gz is 8x10x12" in complaint(study)


# --- intensities ---


def test_percentiles_are_of_the_voxels_that_are_not_zero(study):
    volume = np.zeros((8, 10, 12), np.int16)
    volume[:, :5, :5] = np.arange(1, 201).reshape(8, 5, 5)
    replace_volume(study, 0, volume)
    levels = whole(study, 0, percentiles=[0, 50])[0][0]  # 1 to 100.5
    assert levels[0, 9, 9] == 0 and levels[7, 4, 4] == HIGHEST
    assert levels[0, 0, 1] == round((2 - 1) / 99.5 * HIGHEST)
    low, high = 1 + 199 * 0.005, 1 + 199 * 0.995
    levels = whole(study, 0, percentiles=[0.5, 99.5])[0][0]
    assert levels[4, 0, 0] == round((101 - low) / (high - low) * HIGHEST)
    levels = whole(study, 0)[0][0]
    assert levels[4, 0, 0] == round((101 - low) / (high - low) * HIGHEST / HEADROOM)


def test_volumes_with_any_unit_are_alike(study):
    small = (noise(3, 8, 10, 12) % 111 + 1).astype(np.uint8)
    replace_volume(study, 0, small)
    replace_volume(study, 1, small.astype(np.float32) * 15_000)
    one, other = (whole(study, number)[0].astype(int) for number in (0, 1))
    assert np.abs(one - other).max() <= 1 and one.max() > HIGHEST / HEADROOM


def test_a_window_has_the_unit_of_the_file(study):
    replace_volume(study, 0, noise(3, 8, 10, 12) - np.int16(500))
    levels = whole(study, 0, window=[-100, 100])[0][0]
    expected = to_levels(noise(3, 8, 10, 12) - 500, -100, 100)
    np.testing.assert_array_equal(levels, expected)
    assert to_levels(np.array([[-101, -100, 0, 100, 300]]), -100, 100)[0].tolist() == [
        0,
        0,
        32768,
        HIGHEST,
        HIGHEST,
    ]


def test_files_separated_by_semicolons_are_channels(study):
    for number in range(6):
        save(study / f"data/more/v{number}.nii.gz", noise(50 + number, 8, 10, 12) * 3)
        change(study, number, image=f"images/v{number}.nii.gz; more/v{number}.nii.gz")
    levels = whole(study, 1, window=[0, HIGHEST])[0]
    np.testing.assert_array_equal(levels[0], noise(1, 8, 10, 12))
    np.testing.assert_array_equal(levels[1], noise(51, 8, 10, 12) * 3)
    assert source(study).names[0] == "images/v0.nii.gz"
    save(study / "data/more/v0.nii.gz", noise(50, 8, 10, 12), np.diag([2, 1, 1, 1]))
    assert "more/v0.nii.gz (manifest.csv line 2) lies up to 7 mm away" in complaint(study)
    change(study, 0, image="images/v0.nii.gz")
    assert "v0.nii.gz (manifest.csv line 2) has 1 channels; most volumes have 2" in complaint(study)
    change(study, 0, image="images/v0.nii.gz;")
    assert "line 2: image: a name is blank in" in complaint(study)


# --- labels, groups, files ---


def test_labels_that_were_scaled_and_rounded_are_read_and_told(study):
    """nibabel scales whole numbers to the range of 8 bits, and reads 0.996 where 1 was meant."""
    labels = box(8, 10, 12) * 1.0
    labels[7, 7, 7] = 2
    scaled = nibabel.Nifti1Image(labels, np.eye(4))
    scaled.set_data_dtype(np.uint8)
    nibabel.save(scaled, study / "data/masks/v0.nii.gz")
    found = source(study)
    np.testing.assert_array_equal(found.decode(0).masks[0], labels)
    assert any("1 masks store their values with a scale (scl_slope)" in n for n in found.notes)


def test_labels_with_gaps_and_minus_one(study):
    labels = box(8, 10, 12).astype(np.int16) * 4
    labels[:, :, -1] = -1
    save(study / "data/masks/v0.nii.gz", labels)
    mapped = {"classes": {"0": "ground", "4": "core", "1": "rim"}, "ignore": -1}
    found = whole(study, 0, **mapped)[1]
    expected = np.where(labels == -1, 255, labels // 4)
    np.testing.assert_array_equal(found, expected)
    assert (whole(study, 1, **mapped)[1] == 2 * box(8, 10, 12)).all()
    assert "volumes have no colours" in complaint(study, mask_encoding="colours")


def test_a_qform_that_contradicts_the_sform_is_told(study):
    for number, other in enumerate((np.diag([-1.0, 1, 1, 1]), np.eye(4), np.eye(4))):
        other[0, 3] = (7, 0, 3)[number]
        volume = nibabel.Nifti1Image(noise(number, 8, 10, 12), None)
        volume.header.set_sform(np.eye(4), 1)
        volume.header.set_qform(other, 1)
        nibabel.save(volume, study / f"data/images/v{number}.nii.gz")
    notes = " ".join(source(study).notes)
    assert "1 files have a qform and an sform that disagree (axes LAS and RAS); the sform" in notes
    assert "1 files have a qform and an sform that disagree about their place; the sform" in notes


def test_a_class_that_the_window_cuts_off_is_told(study):
    """Bright lesions of few voxels lie beyond the percentiles of a whole volume."""
    for number in range(2):
        scan, mask = noise(number, 8, 10, 12), np.zeros((8, 10, 12), np.uint8)
        mask[2:4, 2:4, 2:4] = 1
        scan[mask == 1] = np.arange(5000, 9000, 500)
        save(study / f"data/images/v{number}.nii.gz", scan)
        save(study / f"data/masks/v{number}.nii.gz", mask)

    def told(place, **options):
        dataset = open_dataset(prepare(config(**options), study, study / place))
        return [note for note in dataset.about["notes"] if "highest level" in note]

    (note,) = told("cut off", percentiles=[0.5, 99.5])
    assert "% of 'class 1' has the highest level" in note and "percentiles up to 100" in note
    assert told("whole", percentiles=[0, 100]) == [] == told("window", window=[0, 10_000])
    assert told("by default") == []
    levels = whole(study, 0)[0]
    assert len(np.unique(levels[0, 2:4, 2:4, 2:4])) == 8  # what each of its voxels was is kept
    dataset = open_dataset(prepare(config(), study, study / "by default"))
    np.testing.assert_array_equal(dataset.image_of(0), levels)
    standardised = whole_volume(dataset, 0, torch.device("cpu")).numpy()[0, 0]
    intensities = standardised * dataset.std[0] + dataset.mean[0]
    np.testing.assert_allclose(intensities, levels[0] / HIGHEST * HEADROOM, atol=1e-4)
    assert intensities.max() > 1
    values = np.concatenate([whole(study, number)[0].ravel() for number in (0, 1)])
    assert dataset.mean[0] == pytest.approx(values.mean() * HEADROOM / HIGHEST)


def test_what_looks_like_hounsfield_units_has_one_window(study):
    """Voxels of 0 are water, and the same number is the same tissue in every volume."""
    for number in range(6):
        scan = noise(number, 8, 10, 12) - (0 if number == 1 else 1024)  # one shows no air
        scan[0, 0, 0] = 0
        save(study / f"data/images/v{number}.nii.gz", scan.astype(np.int16))
    found = source(study)
    assert "0 and 1 are [-1000, 1000] of the files, as they look like Hounsfield units" in str(
        found.notes
    )
    levels = [found.decode(number).images[0, 0] for number in (0, 1)]
    assert levels[0][0, 0, 0] == levels[1][0, 0, 0] == round(HIGHEST / HEADROOM / 2)
    assert found.identity["intensities"] == {"window": (-1000, 1000)}
    asked = source(study, percentiles=[0.5, 99.5])
    assert asked.identity["intensities"] == {"percentiles": (0.5, 99.5)}
    assert "Hounsfield" not in str(asked.notes) + str(source(study, window=[0, 80]).notes)


def test_the_fourth_axis_may_have_the_channels(study):
    for number in range(6):
        pair = [noise(number, 8, 10, 12), noise(50 + number, 8, 10, 12) * 3]
        save(study / f"data/images/v{number}.nii.gz", np.stack(pair, axis=-1))
    assert "or set fourth_axis: channels if it is one scan" in complaint(study)
    found = source(study, fourth_axis="channels", window=[0, HIGHEST])
    assert found.channels == 2
    levels = found.decode(1).images[0]
    np.testing.assert_array_equal(levels[0], noise(1, 8, 10, 12))
    np.testing.assert_array_equal(levels[1], noise(51, 8, 10, 12) * 3)
    mask = np.stack([box(8, 10, 12)] * 2, axis=-1)
    save(study / "data/masks/v0.nii.gz", mask)
    assert "masks/v0.nii.gz (manifest.csv line 2) has 4 axes, 8x10x12x2; expected one 3-D" in (
        complaint(study, fourth_axis="channels")
    )


def test_volumes_are_judged_on_the_grid_of_their_files(study):
    """Resampling may cost objects of a voxel: they are told, and the scores count them."""
    labels = np.zeros((8, 10, 12), np.uint8)
    labels[:7:6, ::4, ::4] = 1  # 2 x 3 x 3 objects of one voxel, half of them between new ones
    for number in range(6):
        save(study / f"data/masks/v{number}.nii.gz", labels)
    dataset = open_dataset(prepare(config(spacing=[2, 2, 2], size=[4, 4, 4]), study, study / "c"))
    assert dataset.mask_of(2).shape == (4, 5, 6) and dataset.mask_of(2).sum() == 9
    truth, spacing = dataset.truth_of(2)
    np.testing.assert_array_equal(truth, labels)
    assert spacing == (1.0, 1.0, 1.0)
    assert dataset.about["objects"]["class 1"]["train"] == 36
    (note,) = [one for one in dataset.about["notes"] if "resampling leaves" in one]
    assert "leaves 18 of 36 objects of 'class 1' to learn from; scores count all of them" in note
    as_filed = open_dataset(prepare(config(size=[4, 4, 4]), study, study / "c"))
    assert as_filed.volumes.filed is None and as_filed.fingerprint != dataset.fingerprint
    assert not any("resampling" in one for one in as_filed.about["notes"])


def test_masks_of_floats_are_class_indices_if_they_are_whole(study):
    save(study / "data/masks/v0.nii.gz", box(8, 10, 12).astype(np.float32))
    assert whole(study, 0)[1].sum() == 60
    half = box(8, 10, 12) * np.float32(0.5)
    save(study / "data/masks/v0.nii.gz", half)
    assert "has 60 values that are no class index, such as 0.5" in complaint(study)
    save(study / "data/masks/v0.nii.gz", box(8, 10, 12).astype(np.int16) * -1)
    assert "has the values -1; expected class indices 0 to 63; set ignore: -1" in complaint(study)
    save(study / "data/masks/v0.nii.gz", box(8, 10, 12) * np.uint8(90))
    assert "has the values 90; expected class indices 0 to 63" in complaint(study)
    assert whole(study, 0, ignore=90)[1][0, 0, 0] == 255


def test_groups_do_not_leak_and_who_has_none_is_told(study):
    assert not any("group" in note for note in source(study).notes)
    change(study, 4, group="patient-0")
    assert "group 'patient-0' is in two splits" in complaint(study)
    rows = [row | {"split": "", "group": ""} for row in rows_of(study)]
    manifest(study / "data", rows)
    found = source(study, group=r"v(\d)", split={"val": 0.2, "test": 0.2})
    assert set(found.groups) == set("012345") and not any("cannot" in n for n in found.notes)
    by_group = dict(zip(found.groups, found.splits, strict=True))
    assert [by_group[group] for group in found.groups] == found.splits
    assert any("cannot be known" in n for n in source(study, split={"val": 0.2}).notes)


def test_the_same_voxels_in_two_splits_are_a_leak_however_they_are_packed(study):
    save(study / "data/other.nii", noise(0, 8, 10, 12), np.diag([1.001, 1, 1, 1]))
    change(study, 5, image="other.nii", mask="")
    text = complaint(study)
    assert "images/v0.nii.gz (manifest.csv line 2) and other.nii (manifest.csv line 7)" in text
    assert "same content" in text


def test_a_folder_is_matched_by_stem_without_what_a_mac_leaves(study):
    (study / "data/images/._v0.nii.gz").write_bytes(b"\0\5\26\7")
    (study / "data/masks/v5.nii.gz").unlink()
    (study / "data/classes.json").write_text('{"classes": ["background", "box"]}')
    options = {"manifest": None, "folder": "data", "split": {"val": 0.2, "test": 0.2}}
    found = source(study, **options)
    assert found.classes == ["background", "box"] and found.name == "data"
    assert found.splits[5] == "pretrain"
    save(study / "data/images/v0.nii", noise(0, 8, 10, 12))
    assert "have the same stem" in complaint(study, **options)


def test_the_fingerprint_follows_content_and_settings_not_place_or_packing(study):
    before = source(study).fingerprint()
    content = nibabel.load(study / "data/images/v0.nii.gz")
    nibabel.save(content, study / "data/images/v0.nii.gz")
    (study / "data").rename(study / "moved")
    assert source(study, manifest="moved/manifest.csv").fingerprint() == before
    (study / "moved").rename(study / "data")
    for options in (
        {"window": [0, 9]},
        {"percentiles": [1, 99]},
        {"spacing": [1, 1, 1]},
        {"overlap": 0.25},
        {"tolerance": 2},
    ):
        assert source(study, **options).fingerprint() != before
    save(study / "data/images/v4.nii.gz", noise(4, 8, 10, 12) + np.int16(1))
    changed = source(study).fingerprint()
    save(study / "data/masks/v4.nii.gz", 1 - box(8, 10, 12))
    assert len({before, changed, source(study).fingerprint()}) == 3


def test_all_bad_files_are_told_at_once(study):
    change(study, 0, image="images/gone.nii.gz")
    (study / "data/images/v1.nii.gz").write_bytes(b"no volume")
    holes = noise(2, 8, 10, 12).astype(np.float32)
    holes[0, 0, 0] = np.nan  # found while decoding
    replace_volume(study, 2, holes)
    replace_volume(study, 3, np.zeros((8, 10, 12), np.int16))
    replace_volume(study, 4, np.full((8, 10, 12), 7, np.int16))
    text = complaint(study)
    assert text.startswith("data: 5 problems\n")
    reasons = ["does not exist", "is not a NIfTI", "holds 1 voxels", "is empty", "has no contrast"]
    for line, reason in enumerate(reasons, 2):
        assert f"(manifest.csv line {line}) {reason}" in text


def test_resampling_may_not_take_more_memory_than_allowed(study):
    replace_volume(study, 0, noise(0, 8, 10, 12), np.diag([400.0, 400, 400, 1]))
    text = complaint(study, spacing=[1, 1, 1], max_mib=64)
    assert "becomes 3200x4000x4800 voxels at spacing [1, 1, 1], 234,375 MiB" in text


def test_a_volume_that_changes_while_it_is_read_is_noticed(study):
    found = source(study)
    replace_volume(study, 0, noise(77, 8, 10, 12))
    with pytest.raises(UserError, match="changed while it was read"):
        found.decode(0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": [5, 5]}, "data.window: .* is empty"),
        ({"percentiles": [99, 1]}, "data.percentiles: .* is empty"),
        ({"window": [0, 1], "percentiles": [1, 99]}, "exclude each other"),
        ({"classes": ["background"], "small_classes": ["box"]}, "not among"),
        ({"folder": "data"}, "either manifest"),
    ],
)
def test_settings_that_cannot_be_are_refused(study, options, reason):
    with pytest.raises(UserError, match=reason):
        source(study, **options)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 8}, {"size": [8, 8]}, {"size": [8, 8, 2]}, {"spacing": [1, 1]}, {"spacing": "keep"}],
)
def test_settings_of_the_wrong_kind_are_refused(wrong):
    with pytest.raises(ValidationError):
        config(**wrong)


# --- training ---


def test_a_trial_runs_on_volumes_from_files_to_an_encoder(study, tmp_path, monkeypatch):
    manifest(study / "data", [rows_of(study)[0], rows_of(study)[2]])
    for number in (0, 2):
        save(study / f"data/images/v{number}.nii.gz", noise(number, 12, 13, 16))
        save(study / f"data/masks/v{number}.nii.gz", box(12, 13, 16))
    dataset = open_dataset(prepare(config(size=[12, 12, 16]), study, study / "cache"))
    assert dataset.describe()["images"] == {"pretrain": 2, "train": 2, "val": 2, "test": 0}
    trial = toy.trial(pretrain__epochs=1, segment__epochs=1)
    diary = toy.Diary()
    outcome = run_trial(
        trial, 0, dataset, ProbeConfig(unit=4, images=2), toy.context(tmp_path / "trial", diary)
    )
    assert outcome == "complete"
    names = {metric for _, _, metric in diary.values}
    assert {"probe_psnr", "probe_ssim", "miou", "flops"} <= names
    pictures = {path.name for path in (tmp_path / "trial/pictures").glob("*.png")}
    assert {"reconstruction.png", "segmentation.png", "masks-100.png"} <= pictures
    assert {"reconstruction-slices.png", "segmentation-slices.png"} <= pictures

    monkeypatch.chdir(tmp_path / "trial/encoder")
    about = json.loads(Path("encoder.json").read_text())
    assert about["input"]["size"] == [12, 12, 16] and len(load_file("encoder.safetensors")) > 10
    found: dict[str, Any] = {}
    exec("\n".join(about["usage"]), found)
    assert found["tokens"].shape == (1, 1 + 3 * 3 * 4, 64)
