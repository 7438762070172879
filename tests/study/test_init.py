"""Folders as people have them, and the study files that `init` writes for them.

python -m pytest tests/study/test_init.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from study.draft import (
    FEWEST_STEPS,
    STEPS,
    Machine,
    affordable,
    draft,
    first_size,
    needs_resizing,
    patches_of,
)
from study.fit import data_problems, data_size
from study.loading import load_spec, parse_spec
from study.plan import Phases
from study.survey import GROUPS, survey
from tests.study.test_commands import Capture, call
from tests.trainables.test_images import save
from trainables.data import DataConfig, Dataset, open_dataset, prepare
from trainables.errors import UserError

NUM_IMAGES = 12
CYX = {"axes": "CYX"}
LAPTOP = Machine(has_gpu=False)


def discs(number: int, edge: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture with a bright large disc and a brighter small one, and their numbers."""
    rng = np.random.default_rng(number)
    row, column = np.mgrid[:edge, :edge]
    numbers = np.zeros((edge, edge), np.uint8)
    for index, radius in ((1, 7.0), (2, 3.0)):
        y, x = rng.uniform(8, edge - 8, 2)
        numbers[(row - y) ** 2 + (column - x) ** 2 < radius**2] = index
    picture = np.clip(60 + 60 * numbers + rng.normal(0, 12, numbers.shape), 0, 255)
    return picture.astype(np.uint8), numbers


def cellpose(folder: Path) -> None:
    """Label images beside the pictures, in a folder for each plate."""
    for number in range(NUM_IMAGES):
        picture, numbers = discs(number)
        numbers[:4, :4] = 3 + number % 3
        plate = folder / f"plate {number // 2}"
        save(plate / f"well{number}.png", picture)
        save(plate / f"well{number}_cp_masks.png", numbers.astype(np.uint16))


def coloured(folder: Path) -> None:
    """Masks in colour, and a table as a German spreadsheet writes it."""
    colours = np.array([[255, 255, 255], [200, 0, 0], [0, 0, 120]], np.uint8)
    lines = ["File;Mask;Patient"]
    for number in range(NUM_IMAGES):
        picture, numbers = discs(number)
        save(folder / f"smears/s{number}.png", np.repeat(picture[..., None], 3, axis=2))
        save(folder / f"drawn/s{number}.png", colours[numbers])
        lines.append(f"smears\\s{number}.png;drawn\\s{number}.png;P{number // 2}")
    (folder / "table.csv").write_text("\r\n".join(lines) + "\r\n;;\r\n", encoding="utf-8-sig")


def nnunet(folder: Path) -> None:
    """Two channels of each case in files of their own."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        mask = np.zeros((16, 20, 16), np.uint8)
        mask[4:12, 5:13, 4:10] = 1
        mask[6:9, 6:9, 5:8] = 2
        for channel in range(2):
            scan = (100 + 200 * mask + rng.normal(0, 20, mask.shape)).astype(np.int16)
            image = nibabel.Nifti1Image(scan, np.eye(4))
            nibabel.save(image, folder / f"imagesTr/case_{number:03}_{channel:04}.nii.gz")
        labels = nibabel.Nifti1Image(mask, np.eye(4))
        nibabel.save(labels, folder / f"labelsTr/case_{number:03}.nii.gz")
    content = {"labels": {"background": 0, "core": 1, "rim": 2}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))


def deep(folder: Path) -> None:
    """16-bit pictures with masks of 0 and 255 in labels/."""
    for number in range(NUM_IMAGES):
        picture, numbers = discs(number)
        save(folder / f"images/f{number}.tif", picture.astype(np.uint16) * 40, compression="lzw")
        save(folder / f"labels/f{number}.png", np.where(numbers, 255, 0).astype(np.uint8))


def phone(folder: Path) -> None:
    """Photos that were held in all ways; masks drawn on what is seen, with _mask in the name."""
    for number in range(NUM_IMAGES):
        picture, numbers = discs(number)
        exif = Image.Exif()
        exif[274], turns = ((1, 0), (3, 2), (6, 1), (8, 3))[number % 4]
        turned = np.ascontiguousarray(np.rot90(picture, turns))
        colour = np.repeat(turned[..., None], 3, axis=2)
        save(folder / f"IMG_{number:04}.jpg", colour, exif=exif, quality=95)
        save(folder / f"IMG_{number:04}_mask.png", (numbers > 0).astype(np.uint8))


def pictures_alone(folder: Path) -> None:
    for number in range(NUM_IMAGES):
        save(folder / f"{number}.png", discs(number)[0])


FOLDERS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "cellpose": (
        cellpose,
        {
            "image_folder": ".",
            "mask_folder": ".",
            "mask_suffix": "_cp_masks",
            "mask_encoding": "instances",
        },
    ),
    "coloured": (
        coloured,
        {
            "columns": {"image": "File", "mask": "Mask", "group": "Patient"},
            "mask_encoding": "colours",
            "classes": {
                "#ffffff": "background",
                "#c80000": "colour c80000",
                "#000078": "colour 000078",
            },
        },
    ),
    "nnunet": (nnunet, {"layout": "nnunet"}),
    "deep": (deep, {"mask_folder": "labels", "mask_encoding": "binary"}),
    "phone": (phone, {"image_folder": ".", "mask_folder": ".", "mask_suffix": "_mask"}),
    "pictures alone": (pictures_alone, {"image_folder": "."}),
}


GAIN = "pretrain/probe_gain"
JUDGED_BY = {  # the smallest class, where there are several
    "cellpose": ["segment/miou"],
    "coloured": ["segment/iou/colour 000078"],
    "nnunet": ["segment/iou/rim"],
    "deep": ["segment/miou"],
    "phone": ["segment/miou"],
    "pictures alone": [],
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_two_commands_and_no_edit_lead_to_a_sound_study(
    kind: str, tmp_path: Path, capsys: Capture
) -> None:
    make, expected = FOLDERS[kind]
    make(tmp_path / "given")
    path = tmp_path / "mine.yaml"
    assert call("init", tmp_path / "given", "-o", path) == 0
    spec = load_spec(path)
    options = spec.data.options()
    assert {key: options[key] for key in expected} == expected
    assert [objective.metric for objective in spec.objectives] == [*JUDGED_BY[kind], GAIN]
    patches = [4, 8, 16] if kind == "pictures alone" else [4, 8]  # 16 shows no small object
    assert spec.search["model.patch"].choices == patches
    assert call("check", path) == 0
    dataset = open_dataset(prepare(spec.data, tmp_path, tmp_path / "cache"))
    assert sum(len(dataset.rows(split)) for split in ("train", "val", "test")) > 0
    if kind == "pictures alone":
        assert not dataset.is_labelled
        return
    if kind != "nnunet":
        bright = [
            np.mean(image[0][mask > 0]) - np.mean(image[0][mask == 0])
            for image, mask in zip(dataset.images, dataset.masks, strict=True)
            if (mask == 1).any() and (mask == 0).any()
        ]
        assert bright and min(bright) > 20  # masks lie where the objects are
    assert call("try", path, "--images", "2") == 0
    assert "segment/miou" in capsys.readouterr().out


def test_nothing_is_overwritten_and_no_folder_is_no_study(tmp_path: Path, capsys: Capture) -> None:
    pictures_alone(tmp_path / "given")
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert call("init", tmp_path / "given", "-o", path) == 2
    assert "is there already" in capsys.readouterr().err and path.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "slide.svs").write_text("")
    assert call("init", tmp_path / "empty", "-o", tmp_path / "other.yaml") == 2
    assert "holds no image (1 .svs); expected files that end in .png" in capsys.readouterr().err
    assert call("init", tmp_path / "nowhere", "-o", tmp_path / "other.yaml") == 2
    assert "no such folder" in capsys.readouterr().err


def test_names_that_tell_what_belongs_together_become_groups(tmp_path: Path) -> None:
    for number in range(NUM_IMAGES):
        save(tmp_path / f"images/patient{number // 2}_{number}.png", discs(number)[0])
    found = survey(tmp_path)
    assert found.data["group"] == GROUPS[0]
    assert "6 groups such as patient0" in found.why["group"]
    for number in range(NUM_IMAGES):
        path = tmp_path / f"images/patient{number // 2}_{number}.png"
        path.rename(tmp_path / f"images/slide{number // 3}_roi{number % 3}.png")
    assert "4 groups such as slide0" in survey(tmp_path).why["group"]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[0.0, 0.3, 0.8]], {"mask_encoding": "threshold", "threshold": 0.5}),
        ([[0, 1, 4]], {"classes": {0: "background", 1: "class 1", 4: "class 4"}}),
        ([[0, 1, 2]], {"classes": ["background", "class 1", "class 2"]}),
        ([[0, 1, 255]], {"classes": ["background", "class 1"], "ignore": 255}),
        ([[0, -1, 1]], {"classes": ["background", "class 1"], "ignore": -1}),
    ],
)
def test_values_of_masks_are_guessed(tmp_path: Path, mask: Any, expected: Any) -> None:
    array = np.tile(np.array(mask), (24, 8))  # each value in several pieces
    dtype = np.float32 if array.dtype == float else np.int16
    for number in range(4):
        save(tmp_path / f"images/{number}.png", discs(number, 24)[0])
        save(tmp_path / f"masks/{number}.tif", array.astype(dtype))
    found = survey(tmp_path).data
    assert {key: found[key] for key in expected} == expected


def test_patches_are_as_long_in_millimetres_along_every_axis(tmp_path: Path) -> None:
    config = {"source": "volumes", "folder": str(tmp_path), "layout": "nnunet"}
    nnunet(tmp_path)
    setting = TypeAdapter(DataConfig).validate_python({**config, "size": [16, 16, 16]})
    dataset = open_dataset(prepare(setting, tmp_path, tmp_path / "cache"))
    assert dataset.size == (16, 16, 16) and dataset.channels == 2
    assert patches_of(dataset, LAPTOP, (1.0, 1.0, 1.0)) == [4, 8]
    assert patches_of(dataset, LAPTOP, (1.0, 1.0, 2.0)) == [[4, 4, 2], [8, 8, 4]]


def test_objects_larger_than_a_tile_are_shown_whole(tmp_path: Path) -> None:
    for number in range(4):
        rng, cell = np.random.default_rng(number), np.zeros((96, 96), np.uint8)
        cell[10:80, 12:84] = 1
        save(tmp_path / f"images/{number}.png", rng.integers(0, 255, cell.shape).astype(np.uint8))
        save(tmp_path / f"masks/{number}.png", cell)
    found = survey(tmp_path)
    tile, _ = first_size(found, LAPTOP)
    assert tile == 64
    config = {"source": "images", "folder": str(tmp_path), "size": tile}
    setting = TypeAdapter(DataConfig).validate_python(config)
    dataset = open_dataset(prepare(setting, tmp_path, tmp_path / "cache"))
    assert needs_resizing(found, dataset)
    assert not needs_resizing(found, replace(dataset, size=(128, 128)))


def drafted(folder: Path, machine: Machine = LAPTOP) -> tuple[str, Dataset]:
    """The study file for a folder, and its data."""
    found = survey(folder)
    size, why = first_size(found, machine)
    found.guess("size", size, why)
    config = TypeAdapter(DataConfig).validate_python({"source": found.source, **found.data})
    dataset = open_dataset(prepare(config, folder, folder / "cache"))
    return draft("mine", found, dataset, machine, steps=600, hours=1.5), dataset


@pytest.mark.parametrize("machine", [LAPTOP, Machine(has_gpu=True)])
def test_every_machine_gets_a_study_file_that_can_be_read(machine: Machine, tmp_path: Path) -> None:
    deep(tmp_path)
    text, dataset = drafted(tmp_path, machine)
    spec = parse_spec(text, tmp_path, where="mine")
    assert spec.trial.model.size == ("tiny" if machine.has_gpu else "nano")
    steps = spec.trial.pretrain.epochs * len(dataset.rows("pretrain")) / spec.trial.pretrain.batch
    assert steps == pytest.approx(600, rel=0.05)
    assert not data_problems(spec, data_size(dataset))


def test_pictures_with_an_alpha_channel_are_read_as_colour(tmp_path: Path) -> None:
    for number in range(4):
        grey = discs(number, 24)[0]
        save(tmp_path / f"images/{number}.png", np.dstack([grey, grey, grey, grey]))
    assert survey(tmp_path).data["channels"] == 3


def test_as_many_steps_as_the_machine_can_take_in_two_hours() -> None:
    assert affordable(None) == affordable(Phases(0.25, 0.25)) == affordable(Phases(1, 1)) == STEPS
    # segmentation takes what it takes
    assert affordable(Phases(4.0, 0.0)) == affordable(Phases(3.0, 0.5)) == STEPS // 2
    assert affordable(Phases(1000.0, 0.0)) == affordable(Phases(0.5, 3.0)) == FEWEST_STEPS


def test_channels_without_a_number_are_refused(tmp_path: Path) -> None:
    nnunet(tmp_path)
    (tmp_path / "imagesTr/case_001_0000.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case_001_0001.nii.gz is not called like a channel"):
        survey(tmp_path)


def test_a_fourth_axis_of_channels_is_found(tmp_path: Path) -> None:
    """As the Medical Segmentation Decathlon has several contrasts of one scan."""
    for number in range(NUM_IMAGES):
        scan = np.random.default_rng(number).integers(1, 900, (16, 20, 16, 4)).astype(np.int16)
        path = tmp_path / f"images/case{number}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(scan, np.eye(4)), path)
    found = survey(tmp_path)
    assert found.data["fourth_axis"] == "channels" and found.seen[0].channels == 4
    assert found.why["fourth_axis"] == "4 along it in every file"


def test_objects_that_are_cut_are_objects_all_the_same(tmp_path: Path) -> None:
    """Tiles cut from a label image: any numbers, some in two pieces at the rim."""
    for number in range(NUM_IMAGES):
        picture, _ = discs(number)
        cells = np.arange(144, dtype=np.uint16).reshape(12, 12) + 1 + 37 * number
        numbers = np.kron(cells, np.pad(np.ones((3, 3), np.uint16), (0, 1)))
        numbers[:, 1:3] = numbers[:, 9:11]  # two cells of each row in two pieces
        save(tmp_path / f"images/{number}.png", picture)
        save(tmp_path / f"masks/{number}.tif", numbers.astype(np.float32))
    assert survey(tmp_path).data["mask_encoding"] == "instances"


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_masks_with_soft_edges_get_a_threshold(tmp_path: Path, suffix: str) -> None:
    for number in range(NUM_IMAGES):
        picture, mask = discs(number)
        large = Image.fromarray((mask > 0).astype(np.uint8) * 255).resize((96, 96))
        enlarged = Image.fromarray(picture).resize((96, 96))
        save(tmp_path / f"images/{number}.png", np.asarray(enlarged))
        save(tmp_path / f"masks/{number}{suffix}", np.asarray(large))
    found = survey(tmp_path).data
    assert found["mask_encoding"] == "threshold" and 120 < found["threshold"] < 130
    assert set(np.unique(drafted(tmp_path)[1].masks)) == {0, 1, 255}  # where tiles overlap


def test_nifti_of_planes_are_pictures(tmp_path: Path) -> None:
    for number in range(NUM_IMAGES):
        picture, numbers = discs(number)
        for kind, values in (("images", picture.astype(np.int16) * 4 - 300), ("masks", numbers)):
            path = tmp_path / f"{kind}/{number}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values[..., None], np.eye(4)), path)
    text, dataset = drafted(tmp_path)
    every = np.stack([discs(number)[0] for number in range(NUM_IMAGES)]) * 4.0 - 300
    assert "source: images" in text and f"window: [{every.min()}, {every.max()}]" in text
    assert dataset.classes == ["background", "class 1", "class 2"] and dataset.is_labelled
    np.testing.assert_array_equal(dataset.masks[0], discs(0)[1].T[::-1])


def test_pictures_of_floats_get_a_window(tmp_path: Path) -> None:
    for number in range(NUM_IMAGES):
        save(tmp_path / f"{number}.tif", discs(number)[0].astype(np.float32) / 255)
    assert survey(tmp_path).data["window"] == [0.0, 1.0]
    save(tmp_path / "0.tif", discs(0)[0].astype(np.float32) - 90)
    low, high = survey(tmp_path).data["window"]
    assert low == discs(0)[0].min() - 90.0 and high == discs(0)[0].max() - 90.0


def test_the_background_of_colours_is_black_or_white_if_there_is_such_a_colour(
    tmp_path: Path,
) -> None:
    """Cells may cover more than what is between them."""
    paint = np.array([[200, 0, 0], [255, 255, 255], [0, 0, 120]], np.uint8)
    for number in range(NUM_IMAGES):
        picture, numbers = discs(number)
        save(tmp_path / f"images/{number}.png", picture)
        save(tmp_path / f"masks/{number}.png", paint[numbers])
    classes = survey(tmp_path).data["classes"]
    assert classes["#ffffff"] == "background" and list(classes) == ["#ffffff", "#c80000", "#000078"]
    (tmp_path / "masks/0.png").unlink()
    save(tmp_path / "masks/0.png", (paint * np.array([[1], [0], [1]], np.uint8))[discs(0)[1]])
    assert survey(tmp_path).data["classes"]["#ffffff"] == "background"  # of both the commoner


def test_a_few_small_images_do_not_decide_the_tile(tmp_path: Path) -> None:
    for number in range(NUM_IMAGES):
        save(tmp_path / f"{number}.png", discs(number, 64 if number else 20)[0])
    size, why = first_size(survey(tmp_path), LAPTOP)
    assert size == 64 and why == "nearly all images that were looked at are 64 x 64 or more"


def test_classes_with_a_side_are_not_turned_around(tmp_path: Path) -> None:
    for number in range(NUM_IMAGES):
        picture, numbers = discs(number)
        save(tmp_path / f"images/{number}.png", picture)
        save(tmp_path / f"masks/{number}.png", numbers)
    (tmp_path / "classes.json").write_text('{"classes": ["ground", "left lung", "right lung"]}')
    text, dataset = drafted(tmp_path)
    assert "flip_axes: [0]" in text
    assert data_problems(parse_spec(text, tmp_path, where="s.yaml"), data_size(dataset)) == []


@pytest.mark.parametrize(
    ("images", "masks", "image_end", "mask_end"),
    [
        ("Bilder", "Masken", "", ""),
        ("images", "label images", "", ""),
        ("ct", "seg", "_ct", "_seg"),
        ("Aufnahmen", "masks", "", "-gezeichnet"),
    ],
)
def test_folders_of_any_name_are_told_apart_by_what_they_hold(
    tmp_path: Path, images: str, masks: str, image_end: str, mask_end: str
) -> None:
    for number in range(NUM_IMAGES):
        picture, numbers = discs(number)
        save(tmp_path / images / f"n{number}{image_end}.png", picture)
        save(tmp_path / masks / f"n{number}{mask_end}.png", numbers)
        save(tmp_path / "Vorschau" / f"n{number}{image_end}.png", picture[::4, ::4])
    found = survey(tmp_path)
    assert found.masks == found.images == NUM_IMAGES
    given = {"image_folder": images, "mask_folder": masks}
    given |= {"image_suffix": image_end, "mask_suffix": mask_end}
    defaults = {"image_folder": "images", "mask_folder": "masks"}
    assert {key: found.data.get(key, defaults.get(key, "")) for key in given} == given
    notes = " ".join(drafted(tmp_path)[1].about["notes"])
    assert "12 files in Vorschau/ are not read" in notes


def test_masks_beside_their_images_may_be_called_as_one_likes(tmp_path: Path) -> None:
    for number in range(NUM_IMAGES):
        picture, numbers = discs(number)
        save(tmp_path / f"Feld{number}.tif", np.stack([picture, picture[::-1]]), metadata=CYX)
        save(tmp_path / f"Feld{number}_Maske.tif", numbers)
    found = survey(tmp_path)
    assert found.data["mask_suffix"] == "_Maske" and found.masks == NUM_IMAGES
    assert found.seen[0].channels == 2 and "channels" not in found.data


def test_slices_of_a_volume_are_no_channels(tmp_path: Path) -> None:
    for number in range(4):
        save(
            tmp_path / f"{number}.tif", np.stack([discs(number)[0]] * 12), metadata={"axes": "ZYX"}
        )
    with pytest.raises(UserError, match=r"have 12 pages or channels each; .*as NIfTI"):
        survey(tmp_path)


def test_patches_with_an_edge_for_each_axis_have_labels_in_the_search(tmp_path: Path) -> None:
    """Thick slices: the study file that is written has to be one that can be read."""
    labels = np.zeros((32, 32, 16), np.uint8)
    labels[4:20, 4:20, 4:12] = 1
    for number in range(NUM_IMAGES):
        for kind, values in (("images", labels * np.int16(300) + number + 1), ("masks", labels)):
            path = tmp_path / f"{kind}/{number}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            image = nibabel.Nifti1Image(values.astype(np.int16), np.diag([0.7, 0.7, 5, 1]))
            nibabel.save(image, path)
    text, dataset = drafted(tmp_path)
    assert "16x16x2: [16, 16, 2]" in text
    assert data_problems(parse_spec(text, tmp_path, where="s.yaml"), data_size(dataset)) == []


def test_a_study_file_needs_a_folder_that_is_there(tmp_path: Path, capsys: Capture) -> None:
    pictures_alone(tmp_path)
    assert call("init", tmp_path, "-o", tmp_path / "none" / "s.yaml") == 2
    assert "there is no folder" in capsys.readouterr().err
