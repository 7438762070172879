"""Folders and tables as people have them. python -m pytest tests/trainables/test_entries.py"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.trainables.test_images import (
    EDGE,
    change,
    complaint,
    manifest,
    rows_of,
    save,
    source,
    texture,
)
from tests.trainables.test_images import study as study  # a fixture

MASK = (np.eye(EDGE) > 0).astype(np.uint8)


def folder_of(study: Path, **options: Any) -> Any:
    return source(study, manifest=None, folder="data", **options)


# Folders


def test_what_is_not_read_is_counted_by_kind(study: Path) -> None:
    for name in ("images/Thumbs.db", "images/notes.txt", "masks/i0.xml", "masks/i1.xml"):
        (study / "data" / name).write_text("")
    (study / "data/images/.DS_Store").write_text("")
    notes = folder_of(study).notes
    assert any("2 files in images/ are not read (1 .db, 1 .txt); expected .png" in n for n in notes)
    assert any("2 files in masks/ are not read (2 .xml)" in note for note in notes)


def test_masks_in_other_formats_are_masks(study: Path) -> None:
    for number in range(6):
        (study / f"data/masks/i{number}.png").unlink()
        suffix = "bmp" if number % 2 else "gif"
        Image.fromarray(MASK).save(study / f"data/masks/i{number}.{suffix}")
    found = folder_of(study, classes=["ground", "cell"])
    for part in range(6):
        np.testing.assert_array_equal(found.decode(part).masks[0], MASK)


def test_sub_folders_are_groups(study: Path) -> None:
    for kind in ("images", "masks"):
        for number in range(6):
            name = study / f"data/{kind}/i{number}.png"
            (study / f"data/{kind}/slide {number // 2}").mkdir(exist_ok=True)
            name.rename(study / f"data/{kind}/slide {number // 2}/{number % 2}.png")
    found = folder_of(study)
    assert found.names[3] == "images/slide 1/1.png"
    assert found.groups == ["slide 0"] * 2 + ["slide 1"] * 2 + ["slide 2"] * 2
    assert found.is_labelled and sorted(set(found.splits)) == ["test", "train", "val"]


def test_a_name_written_by_a_mac_is_the_same_name(study: Path) -> None:
    name = "Pr\u00fcfung.png"
    (study / "data/images/i0.png").rename(
        study / "data/images" / unicodedata.normalize("NFD", name)
    )
    (study / "data/masks/i0.png").rename(study / "data/masks" / name)
    found = folder_of(study)
    assert len(found.names) == 6 and "pretrain" not in found.splits
    change(study, 0, image=f"images/{name}", mask=f"masks/{name}")
    np.testing.assert_array_equal(source(study).decode(0).images[0, 0], texture(0, EDGE, EDGE))


def test_what_is_read_as_ever_is_the_same_data(study: Path) -> None:
    """A study that was begun before can go on."""
    assert source(study).identity.keys() == {"files", "fit", "mask_encoding", "ignore"}


# What files say of themselves


def test_turned_pictures_are_told_and_fit_their_masks(study: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    upright = texture(1, 16, 24)
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    turned.save(study / "data/images/i0.png", exif=exif)
    save(study / "data/masks/i0.png", np.ones((16, 24), np.uint8))
    found = source(study)
    np.testing.assert_array_equal(found.decode(0).images[0, 0], upright[:, :16])
    assert "1 files carry an orientation (EXIF or TIFF): turned upright" in " ".join(found.notes)
    assert found.identity["read_anew"] == 1, "release 0.1 read it otherwise: these are other data"
    turned.save(study / "data/images/i0.png")
    assert "is 16x24, but its image images/i0.png is 24x16" in complaint(study)


def test_palettes_that_contradict_each_other_are_refused_and_can_be_read_by_colour(
    study: Path,
) -> None:
    for number in range(6):
        is_odd = number == 3
        picture = Image.fromarray(1 - MASK if is_odd else MASK)
        picture.putpalette([255] * 3 + [0] * 3 if is_odd else [0] * 3 + [255] * 3)
        picture.save(study / f"data/masks/i{number}.png")
    text = complaint(study)
    assert "palettes of masks differ: 1 give" in text
    assert "i3.png, where 0 is #ffffff and not #000000" in text
    classes = {"#000000": "ground", "#ffffff": "cell"}
    found = source(study, mask_encoding="colours", classes=classes)
    for part in range(6):
        np.testing.assert_array_equal(found.decode(part).masks[0], MASK)


def test_masks_in_colour_are_grey_if_their_channels_agree(study: Path) -> None:
    save(study / "data/masks/i0.png", np.repeat(MASK[..., None], 3, axis=2))
    opaque = np.full((EDGE, EDGE, 1), 255, np.uint8)
    save(study / "data/masks/i1.png", np.dstack([MASK, MASK, MASK, opaque]))
    found = source(study)
    np.testing.assert_array_equal(found.decode(0).masks[0], MASK)
    np.testing.assert_array_equal(found.decode(1).masks[0], MASK)
    save(study / "data/masks/i0.png", np.dstack([255 * MASK, 0 * MASK, 0 * MASK]))
    text = complaint(study)
    assert "has 3 channels of the colours #000000, #ff0000; expected one channel" in text


def numbers(study: Path) -> None:
    for number in range(6):
        cells = np.zeros((EDGE, EDGE), np.uint16)
        cells[:3, :3], cells[:3, 3:6], cells[8:, 8:] = 1, 2, 3 + number
        save(study / f"data/masks/i{number}.png", cells)


def test_numbers_of_objects_are_not_taken_for_classes(study: Path) -> None:
    numbers(study)
    text = complaint(study)
    assert "the values of 6 masks look like numbers of objects, not classes" in text
    assert source(study, classes=[f"c{index}" for index in range(9)]).decode(0).masks.max() == 3
    found = source(study, mask_encoding="instances")
    decoded = found.decode(2)
    assert found.has_instances and set(np.unique(decoded.masks)) == {0, 1}
    assert set(np.unique(decoded.instances).tolist()) == {0, 1, 2, 5}  # touching ones too


def test_classes_in_several_pieces_or_alike_in_all_masks_are_classes(study: Path) -> None:
    numbers(study)
    cells = np.zeros((EDGE, EDGE), np.uint8)
    cells[0, 0], cells[9, 9], cells[4, 4] = 1, 1, 2
    for number in (1, 3):
        save(study / f"data/masks/i{number}.png", cells)
    assert source(study).decode(3).masks.max() == 2
    for number in range(6):
        cells[4:6, 8:] = 3
        cells[9, 9] = 0
        save(study / f"data/masks/i{number}.png", cells)
    assert source(study).decode(3).masks.max() == 3


def test_many_objects_are_numbered_anew(study: Path) -> None:
    cells = np.zeros((EDGE, EDGE), np.int32)
    cells[0, 0], cells[0, 1] = 70_000, 2_000_000
    save(study / "data/masks/i0.tif", cells)
    change(study, 0, mask="masks/i0.tif")
    found = source(study, mask_encoding="instances").decode(0)
    assert set(np.unique(found.instances).tolist()) == {0, 1, 2} and found.masks.sum() == 2


# Tables


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_are_read_as_spreadsheets_write_them(
    study: Path, delimiter: str, encoding: str
) -> None:
    expected = source(study)
    path = study / "data/manifest.csv"
    table = path.read_text().replace(",", delimiter)
    path.write_bytes(f"{table}{delimiter * 3}\r\n{delimiter * 3}\r\n".encode(encoding))
    assert source(study).fingerprint() == expected.fingerprint()


def test_paths_of_windows_are_paths(study: Path) -> None:
    change(study, 0, image="images\\i0.png", mask="masks\\i0.png")
    np.testing.assert_array_equal(source(study).decode(0).images[0, 0], texture(0, EDGE, EDGE))


def test_two_columns_of_one_name_are_refused(study: Path) -> None:
    path = study / "data/manifest.csv"
    lines = [line + ",masks/i0.png" for line in path.read_text().splitlines()]
    path.write_text("\n".join([lines[0].replace("masks/i0.png", "mask"), *lines[1:]]))
    assert "manifest.csv has 2 columns 'mask'; expected one" in complaint(study)


@pytest.mark.parametrize(
    "alike",
    [("P1", "p1"), ("slide 3", "slide_3"), ("7", "7.0"), ("07", "7"), ("a\u0308", "\u00e4")],
)
def test_groups_that_look_alike_are_refused(study: Path, alike: tuple[str, str]) -> None:
    change(study, 0, group=alike[0])
    change(study, 2, group=alike[1])
    text = complaint(study)
    assert f"group {alike[0]!r} (manifest.csv line 2) and {alike[1]!r} (manifest.csv line" in text


def test_groups_that_differ_are_kept_apart(study: Path) -> None:
    names = ["1-1", "11", "1.5", "15", "a1", "a11"]
    for number, name in enumerate(names):
        change(study, number, group=name)
    assert source(study).groups == names


@pytest.mark.parametrize("column", ["patient_id", "Subject", "slide"])
def test_a_column_of_patients_is_not_read_past(study: Path, column: str) -> None:
    rows = [{(column if k == "group" else k): v for k, v in row.items()} for row in rows_of(study)]
    manifest(study / "data", rows)
    text = complaint(study)
    assert f"columns: {{group: {column}}}" in text and "columns: {group: image}" in text
    assert source(study, columns={"group": column}).groups[0] == "patient-0"
    assert source(study, columns={"group": "image"}).groups[0] == "images/i0.png"
