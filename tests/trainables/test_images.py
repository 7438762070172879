"""Image files: what is read, how it is cut, who goes into which split, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from trainables.data import DataConfig, Dataset, open_dataset, prepare
from trainables.data.batches import to_device
from trainables.data.images import images
from trainables.data.rows import tile_corners
from trainables.data.source import Source
from trainables.errors import UserError

EDGE = 16


def texture(seed: int, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, **options)
    else:
        Image.fromarray(array).save(path, **options)
    return path


def manifest(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "manifest.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with six grey images and masks of two classes, two per split, in data/."""
    rows = []
    for number, split in enumerate(["train", "train", "val", "val", "test", "test"]):
        mask = np.zeros((EDGE, EDGE), np.uint8)
        mask[:4, :4] = 1
        save(tmp_path / f"data/images/i{number}.png", texture(number, EDGE, EDGE))
        save(tmp_path / f"data/masks/i{number}.png", mask)
        rows.append(
            {
                "image": f"images/i{number}.png",
                "mask": f"masks/i{number}.png",
                "split": split,
                "group": f"patient-{number // 2}",
            }
        )
    manifest(tmp_path / "data", rows)
    return tmp_path


def rows_of(study: Path) -> list[dict[str, str]]:
    with (study / "data/manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def change(study: Path, number: int, **cells: str) -> None:
    rows = rows_of(study)
    rows[number] |= cells
    manifest(study / "data", rows)


def source(study: Path, **options: Any) -> Source:
    settings = {"source": "images", "manifest": "data/manifest.csv", "size": EDGE} | options
    return images(study, **TypeAdapter(DataConfig).validate_python(settings).options())


def prepared(study: Path, size: Any) -> Dataset:
    config = TypeAdapter(DataConfig).validate_python(
        {"source": "images", "manifest": "data/manifest.csv", "size": size}
    )
    return open_dataset(prepare(config, study, study / "cache"))


def one(study: Path, file: str, **options: Any) -> Source:
    """A source in which `file` (below data/) is the first image, without a mask."""
    change(study, 0, image=file, mask="")
    return source(study, **options)


def complaint(study: Path, **options: Any) -> str:
    """The refusal, which may come before decoding or while it goes on."""
    with pytest.raises(UserError) as caught:
        found = source(study, **options)
        for part in range(len(found.parts)):
            found.decode(part)
    return str(caught.value)


# --- what is read ---


def test_a_manifest_names_images_masks_splits_and_groups(study):
    found = source(study)
    assert found.splits == ["train", "train", "val", "val", "test", "test"]
    assert found.groups == [f"patient-{number // 2}" for number in range(6)]
    assert found.names[5] == "images/i5.png"
    decoded = found.decode(5)
    np.testing.assert_array_equal(decoded.images[0, 0], texture(5, EDGE, EDGE))
    assert decoded.masks.sum() == 16


def test_the_whole_way_from_the_study_file_to_arrays(study):
    dataset = prepared(study, [8, 16])
    assert dataset.images.shape == (12, 1, 8, 16)
    assert dataset.classes == ["background", "class 1"]
    assert dataset.rows("train").tolist() == [0, 1, 2, 3]
    assert dataset.name == "manifest"
    assert dataset.describe()["images"] == {"pretrain": 4, "train": 4, "val": 4, "test": 4}


def test_relative_paths_count_from_the_folder_of_the_csv(study, monkeypatch):
    monkeypatch.chdir("/")
    assert source(study, manifest=str(study / "data/manifest.csv")).names == source(study).names


def test_where_chooses_rows_and_columns_renames_them(study):
    rows = [
        {"file": row["image"], "label": row["mask"], "part": row["split"], "kind": str(number % 2)}
        for number, row in enumerate(rows_of(study))
    ]
    manifest(study / "data", rows)
    columns = {"image": "file", "mask": "label", "split": "part"}
    found = source(study, where={"kind": 1}, columns=columns)
    assert found.names == ["images/i1.png", "images/i3.png", "images/i5.png"]
    assert found.groups == found.names
    assert found.name == "manifest kind=1"


def test_a_folder_is_matched_by_stem_with_names_from_classes_json(study):
    (study / "data/classes.json").write_text(
        json.dumps({"classes": {"0": "background", "1": "cell"}, "small_classes": [1]})
    )
    (study / "data/masks/i5.png").unlink()
    found = source(study, manifest=None, folder="data", split={"val": 0.2, "test": 0.2})
    assert found.classes == ["background", "cell"] and found.small_classes == [1]
    assert sorted(found.splits) == ["pretrain", "test", "train", "train", "train", "val"]
    assert found.splits[5] == "pretrain"
    assert found.name == "data"


def test_given_names_go_before_classes_json(study):
    (study / "data/classes.json").write_text('{"classes": ["background", "cell"]}')
    found = source(study, classes=["nothing", "thing", "other"], small_classes=["other"])
    assert found.classes == ["nothing", "thing", "other"] and found.small_classes == [2]


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((EDGE, EDGE), np.uint8, {}),
        ((EDGE, EDGE), np.uint16, {}),
        ((EDGE, EDGE, 3), np.uint8, {"photometric": "rgb"}),
        ((EDGE, EDGE, 3), np.uint16, {"photometric": "rgb"}),
        ((5, EDGE, EDGE), np.uint16, {"photometric": "minisblack", "planarconfig": "separate"}),
        ((EDGE, EDGE, 5), np.uint8, {"photometric": "minisblack", "planarconfig": "contig"}),
    ],
)
def test_tiff_keeps_every_bit_and_channel(study, shape, dtype, options, compression):
    array = texture(9, *shape, dtype=dtype)
    for number in range(6):
        twin = array ^ np.asarray(number, dtype)
        save(study / f"data/i{number}.tif", twin, compression=compression, **options)
        change(study, number, image=f"i{number}.tif")
    expected = array[None] if array.ndim == 2 else array
    if shape[0] == EDGE and array.ndim == 3:
        expected = array.transpose(2, 0, 1)
    found = source(study)
    assert found.channels == len(expected) and found.dtype == np.dtype(dtype).name
    np.testing.assert_array_equal(found.decode(0).images[0], expected)


def test_png_of_sixteen_bits_jpeg_and_palette(study):
    deep = texture(3, EDGE, EDGE, dtype=np.uint16)
    for number in range(6):
        save(study / f"data/images/i{number}.png", deep + np.uint16(number))
    assert source(study).dtype == "uint16"
    np.testing.assert_array_equal(source(study).decode(0).images[0, 0], deep)

    smooth = np.broadcast_to(
        np.linspace(0, 255, EDGE).astype(np.uint8)[:, None, None], (EDGE, EDGE, 3)
    )
    for number in range(6):
        picture = Image.fromarray(np.ascontiguousarray(smooth // (number + 1)))
        if number == 0:
            picture.save(study / "data/a.jpg", quality=100, subsampling=0)
        elif number == 1:
            picture.quantize(64).save(study / "data/images/i1.png")
        else:
            picture.save(study / f"data/images/i{number}.png")
    found = one(study, "a.jpg")
    assert (found.channels, found.dtype) == (3, "uint8")
    assert np.abs(found.decode(0).images[0].transpose(1, 2, 0) - smooth.astype(int)).max() < 4
    assert (
        np.abs(found.decode(1).images[0].transpose(1, 2, 0) - (smooth // 2).astype(int)).max() < 4
    )


def test_lzw_tiff_is_read_where_pillow_can(study):
    array = texture(3, EDGE, EDGE)
    Image.fromarray(array).save(study / "data/lzw.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(one(study, "lzw.tif").decode(0).images[0, 0], array)


def test_white_is_zero_tiff_is_turned_round(study):
    array = texture(3, EDGE, EDGE)
    save(study / "data/w.tif", array, photometric="miniswhite")
    np.testing.assert_array_equal(one(study, "w.tif").decode(0).images[0, 0], 255 - array)


def test_channels_are_converted_only_when_asked(study):
    rgba = texture(3, EDGE, EDGE, 4)
    save(study / "data/rgba.png", rgba)
    change(study, 0, image="rgba.png")
    assert "alpha channel" in complaint(study)
    colour = source(study, channels=3)
    np.testing.assert_array_equal(colour.decode(0).images[0], rgba[..., :3].transpose(2, 0, 1))
    np.testing.assert_array_equal(colour.decode(1).images[0, 2], texture(1, EDGE, EDGE))
    grey = source(study, channels=1).decode(0).images[0, 0, 0, 0]
    assert grey == round(float(rgba[0, 0, :3] @ np.array([0.299, 0.587, 0.114])))


# --- how it is cut ---


def test_tiles_cover_the_image_evenly():
    assert tile_corners((16, 16), (16, 16)) == [(0, 0)]
    assert tile_corners((32, 16), (16, 16)) == [(0, 0), (16, 0)]
    assert tile_corners((16, 40), (16, 16)) == [(0, 0), (0, 12), (0, 24)]


def test_no_pixel_is_labelled_in_two_tiles(study):
    picture, mask = texture(3, 24, 40), texture(4, 24, 40) % 2
    save(study / "data/images/i0.png", picture)
    save(study / "data/masks/i0.png", mask)
    found = source(study)
    assert found.names[:2] == ["images/i0.png@0,0", "images/i0.png@0,12"]
    assert found.parts[0] == range(0, 6) and found.groups[:6] == ["patient-0"] * 6
    decoded = found.decode(0)
    times_labelled = np.zeros((24, 40), int)
    for (y, x), tile, labels in zip(
        tile_corners((24, 40), (16, 16)), decoded.images, decoded.masks, strict=True
    ):
        part = (slice(y, y + 16), slice(x, x + 16))
        np.testing.assert_array_equal(tile[0], picture[part])
        times_labelled[part] += labels != 255
        np.testing.assert_array_equal(labels[labels != 255], mask[part][labels != 255])
    assert (times_labelled == 1).all()


def test_shrinking_takes_the_mean_of_areas_and_the_nearest_label(study):
    picture = np.zeros((32, 32), np.uint8)
    picture[::2] = 100  # every 2x2 block holds two pixels of 100: mean 50
    mask = np.zeros((32, 32), np.uint8)
    mask[1::2, 1::2] = 1
    save(study / "data/images/i0.png", picture)
    save(study / "data/masks/i0.png", mask)
    decoded = source(study, fit="resize").decode(0)
    assert decoded.images.shape == (1, 1, 16, 16) and (decoded.images == 50).all()
    assert (decoded.masks == 1).all()  # the centre of a block is its lower right pixel


def test_enlarging_keeps_sixteen_bits(study):
    deep = np.full((4, 4), 40_000, np.uint16)
    for number in range(6):
        save(study / f"data/images/i{number}.png", deep + np.uint16(number))
        save(study / f"data/masks/i{number}.png", np.eye(4, dtype=np.uint8))
    decoded = source(study, fit="resize").decode(2)
    assert decoded.images.dtype == np.uint16 and (decoded.images == 40_002).all()
    assert decoded.masks.sum() == 64


def test_binary_masks_only_when_said_so(study):
    for number in range(6):
        save(study / f"data/masks/i{number}.png", np.eye(EDGE, dtype=np.uint8) * 255)
    text = complaint(study)
    assert "mask_encoding: binary" in text and "6 problems" not in text
    decoded = source(study, mask_encoding="binary", classes=["ground", "cell"]).decode(0)
    np.testing.assert_array_equal(decoded.masks[0], np.eye(EDGE))


def test_a_value_can_mean_not_labelled(study):
    mask = np.eye(EDGE, dtype=np.uint8) * 7
    save(study / "data/masks/i0.png", mask)
    decoded = source(study, ignore=7).decode(0)
    assert set(np.unique(decoded.masks)) == {0, 255} and (decoded.masks == 255).sum() == EDGE


def test_instances_are_read_and_filled_in(study):
    objects = np.zeros((EDGE, EDGE), np.uint16)
    objects[:2, :4], objects[2:4, :4] = 700, 900
    save(study / "data/objects.png", objects)
    rows = [row | {"instances": ""} for row in rows_of(study)]
    rows[0]["instances"] = "objects.png"
    manifest(study / "data", rows)
    found = source(study)
    assert found.has_instances
    np.testing.assert_array_equal(found.decode(0).instances[0], objects)
    assert set(np.unique(found.decode(1).instances)) == {0, 1}


def test_tiles_know_their_image_and_their_objects_are_those_of_the_image(study):
    """Tiles overlap, and an object lies in all of them."""
    folder = study / "data"
    cells, mask = np.zeros((24, 40), np.uint16), np.zeros((24, 40), np.uint8)
    cells[4:20, 3:37], mask[4:20, 3:37] = 500, 1
    cells[21, 38], mask[21, 38] = 1, 1
    rows = [row | {"instances": ""} for row in rows_of(study)]
    for number, row in enumerate(rows):
        save(folder / row["image"], texture(number, 24, 40))
        save(folder / f"masks/i{number}.png", mask)
        save(folder / f"cells/i{number}.png", cells)
        row["instances"] = f"cells/i{number}.png"
    manifest(folder, rows)
    found = source(study)
    assert found.cut_from == [(24, 40)] * 6
    decoded = found.decode(2)
    assert len(decoded.masks) == 6 and set(np.unique(decoded.instances)) == {0, 1, 500}
    dataset = prepared(study, EDGE)
    for image in range(6):
        labels, instances = dataset.labels_of(image)
        np.testing.assert_array_equal(labels, mask)
        np.testing.assert_array_equal(instances, cells)
    for split, numbers in {"train": [0, 1], "val": [2, 3], "test": [4, 5]}.items():
        assert dataset.cut_images_of(split).tolist() == numbers
    assert dataset.about["objects"]["class 1"]["train"] == 4


def test_images_that_are_not_cut_are_each_their_own(study):
    assert source(study).cut_from is None
    assert source(study, fit="resize", size=8).cut_from is None


# --- who goes into which split ---


def unsplit(study: Path, count: int = 20, group: int = 2) -> None:
    rows = []
    for number in range(count):
        save(study / f"data/images/n{number}.png", texture(100 + number, EDGE, EDGE))
        mask = "masks/i0.png"
        rows.append(
            {"image": f"images/n{number}.png", "mask": mask, "group": f"g{number // group}"}
        )
    manifest(study / "data", rows)


def test_blank_splits_are_drawn_by_group_the_same_every_time(study):
    unsplit(study)
    found = source(study, split={"val": 0.2, "test": 0.3})
    by_group = {}
    for group, split in zip(found.groups, found.splits, strict=True):
        assert by_group.setdefault(group, split) == split
    assert sorted(by_group.values()) == ["test"] * 3 + ["train"] * 5 + ["val"] * 2
    assert source(study, split={"val": 0.2, "test": 0.3}).splits == found.splits
    assert source(study, split={"val": 0.2, "test": 0.3, "seed": 1}).splits != found.splits
    assert (
        "1 masks belong to several images, such as i0.png to 20, from images/n0.png"
        in found.notes[0]
    )
    assert "10 groups" in found.notes[1]


def test_groups_can_be_read_from_file_names(study):
    unsplit(study)
    (study / "data/masks").rename(study / "data/labels")
    found = source(study, manifest=None, folder="data", group=r"([in]\d)", split={"val": 0.5})
    assert set(found.groups) == {f"i{n}" for n in range(6)} | {f"n{n}" for n in range(10)}
    assert "does not match" in complaint(study, manifest=None, folder="data", group="^n")


def test_images_without_a_mask_are_for_pretraining_only(study):
    change(study, 0, mask="")
    change(study, 2, mask="")
    found = source(study)
    assert found.splits == ["pretrain", "train", "val", "test", "test"]
    assert found.names[2] == "images/i3.png"  # i2 is neither trained on nor scored
    assert found.notes == [
        "1 of the images of val or test have no mask: left out",
        "1 of 5 images have no mask, such as images/i0.png: they join pretraining alone",
    ]
    assert (found.decode(0).masks == 255).all()


def test_a_data_set_without_any_mask_keeps_its_validation_images(study):
    for number in range(6):
        change(study, number, mask="")
    found = source(study)
    assert found.splits == ["pretrain", "pretrain", "val", "val", "test", "test"]
    assert not found.is_labelled and found.classes == ["background"]


def test_the_fingerprint_follows_every_byte_but_not_the_place(study, tmp_path):
    before = source(study).fingerprint()
    (study / "data").rename(study / "moved")
    assert source(study, manifest="moved/manifest.csv").fingerprint() == before
    (study / "moved").rename(study / "data")
    save(study / "data/masks/i4.png", np.ones((EDGE, EDGE), np.uint8))
    assert source(study).fingerprint() != before


# --- what is refused ---


def test_a_group_in_two_splits_names_both_files(study):
    change(study, 5, group="patient-0")
    text = complaint(study)
    assert "group 'patient-0' is in two splits" in text
    assert "images/i0.png (manifest.csv line 2) in train" in text
    assert "images/i5.png (manifest.csv line 7) in test" in text


def test_pretraining_on_a_validation_patient_is_a_leak_too(study):
    change(study, 0, split="pretrain", group="patient-1", mask="")
    assert "group 'patient-1' is in two splits" in complaint(study)


def test_the_same_content_in_two_splits_names_both_files(study):
    (study / "data/images/i4.png").write_bytes((study / "data/images/i1.png").read_bytes())
    text = complaint(study)
    assert "images/i1.png (manifest.csv line 3) and images/i4.png (manifest.csv line 6)" in text
    assert "same content" in text


def test_a_row_given_twice_is_refused(study):
    rows = rows_of(study)
    manifest(study / "data", [*rows, rows[1]])
    assert "lines" not in complaint(study) and "listed twice" in complaint(study)


def bomb(edge: int = 31623, text: bytes = b"") -> bytes:
    """A PNG of one gigapixel or more in a hundred bytes."""
    ihdr = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", ihdr), (b"IDAT", zlib.compress(b"")), (b"tEXt", b"Comment\0" + text)]
    parts.append((b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def deep_colour() -> bytes:
    """A colour PNG of 16 bits, as Pillow cannot write it."""
    ihdr = struct.pack(">IIBBBBB", EDGE, EDGE, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(6 * EDGE)) * EDGE)
    parts = [(b"IHDR", ihdr), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def cut(suffix: str, **options: Any) -> Any:
    def spoil(study: Path) -> None:
        path = save(study / f"data/cut{suffix}", texture(8, 64, 64), **options)
        path.write_bytes(path.read_bytes()[:-400])
        change(study, 0, image=path.name, mask="")

    return spoil


def image_bytes(content: bytes) -> Any:
    def spoil(study: Path) -> None:
        (study / "data/images/i0.png").write_bytes(content)

    return spoil


def image_array(array: np.ndarray, suffix: str = ".png", **options: Any) -> Any:
    def spoil(study: Path) -> None:
        save(study / f"data/other{suffix}", array, **options)
        change(study, 0, image=f"other{suffix}", mask="")

    return spoil


def mask_array(array: np.ndarray, suffix: str = ".png") -> Any:
    def spoil(study: Path) -> None:
        save(study / f"data/mask{suffix}", array)
        change(study, 0, mask=f"mask{suffix}")

    return spoil


BAD = {
    "does not exist": lambda study: change(study, 0, image="images/gone.png"),
    "gone.png (manifest.csv line 2) does not exist": lambda study: change(
        study, 0, mask="masks/gone.png"
    ),
    "is not a regular file": lambda study: change(study, 0, image="images"),
    "leads out of the data folder": lambda study: change(study, 0, image="../secret.png"),
    "is not a PNG, JPEG, BMP, GIF, TIFF or NIfTI image": image_bytes(b"8BPS nothing of use"),
    "i0.png (manifest.csv line 2) is not a PNG, JPEG, BMP, GIF": image_bytes(b"GIF89a nothing"),
    "is larger than 89 megapixels": image_bytes(bomb()),
    "is 6000x6000 with 1 channels; expected at most 25 megapixels": image_bytes(
        bomb(6000, b"eXIf")
    ),
    "colour PNG of 16 bits": image_bytes(deep_colour()),
    "may be truncated": cut(".png"),
    "may be truncated: image file is truncated": cut(".jpg"),
    "is truncated": cut(".tif"),
    "cut.tif (manifest.csv line 2) is truncated": cut(".tif", compression="zlib"),
    "float32": image_array(np.zeros((EDGE, EDGE), np.float32), ".tif"),
    "pages, which may be channels or not": image_array(texture(1, 7, EDGE, EDGE), ".tif"),
    "has 3 channels of 8 bits": image_array(texture(1, EDGE, EDGE, 3)),
    "has 1 channels of 16 bits": image_array(texture(1, EDGE, EDGE, dtype=np.uint16)),
    "but its image images/i0.png is 16x16": mask_array(np.zeros((16, 17), np.uint8)),
    "expected one channel of class indices": mask_array(
        (np.eye(EDGE)[..., None] * [255, 0, 0]).astype(np.uint8)
    ),
    "is lossy": mask_array(np.zeros((EDGE, EDGE), np.uint8), ".jpg"),
    "has the values 99; expected class indices 0 to 63": mask_array(
        np.full((EDGE, EDGE), 99, np.uint8)
    ),
    "unknown split 'validation'": lambda study: change(study, 0, split="validation"),
    "'image' is blank": lambda study: change(study, 0, image=""),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_files_are_refused_with_file_line_and_reason(study, reason):
    save(study / "secret.png", texture(77, EDGE, EDGE))
    BAD[reason](study)
    text = complaint(study)
    assert reason in text and "line 2" in text


def test_a_class_without_a_name_is_refused_with_the_names_there_are(study):
    save(study / "data/masks/i3.png", np.full((EDGE, EDGE), 2, np.uint8))
    text = complaint(study, classes=["background", "cell"])
    assert "has the values 2; expected class indices 0 to 1 (background, cell)" in text


def test_links_may_not_leave_the_folder_unless_allowed(study):
    save(study / "secret.png", texture(77, EDGE, EDGE))
    (study / "data/images/i0.png").unlink()
    (study / "data/images/i0.png").symlink_to(study / "secret.png")
    assert "leads out of the data folder" in complaint(study)
    found = source(study, allow_outside=True)
    np.testing.assert_array_equal(found.decode(0).images[0, 0], texture(77, EDGE, EDGE))


def test_a_pipe_is_never_opened(study):
    (study / "data/images/i0.png").unlink()
    os.mkfifo(study / "data/images/i0.png")
    assert "is not a regular file" in complaint(study)


def test_all_bad_files_are_told_at_once_whenever_they_are_found(study):
    change(study, 0, image="images/gone.png")
    save(study / "data/masks/i1.png", np.full((EDGE, EDGE), 200, np.uint8))  # found in decoding
    save(study / "data/images/i2.png", texture(1, 8, 8))  # unlike its mask
    change(study, 5, group="patient-1")
    with pytest.raises(UserError) as caught:
        source(study)
    text = str(caught.value)
    assert text.startswith("data: 4 problems\n")
    for reason in ("does not exist", "has the values 200", "i2.png is 8x8", "two splits"):
        assert reason in text


def test_files_with_the_same_fault_are_told_in_one_line(study):
    unsplit(study, count=30)
    for number in range(25):
        (study / f"data/images/n{number}.png").write_bytes(b"")
    text = complaint(study)
    assert text.startswith("data: 25 problems\n") and text.count("\n") == 2
    assert "n0.png (manifest.csv line 2) is not a PNG" in text
    first, second = ("n1.png (manifest.csv line 3)", "n2.png (manifest.csv line 4)")
    assert f"{first}, " in text and text.endswith(f"{second} and 22 more)")


def test_no_more_than_twenty_kinds_are_shown(study):
    unsplit(study, count=60, group=1)
    rows = rows_of(study) + [row | {"image": row["image"]} for row in rows_of(study)[:25]]
    manifest(study / "data", rows)
    text = complaint(study)
    assert text.count("listed twice") == 20 and text.endswith("… and 5 more kinds of problems")


def test_images_smaller_than_a_tile_are_padded_and_padding_counts_nowhere(study):
    """One of 12 x 30 in two tiles of 16 x 16: their last four rows are no image."""
    picture = texture(1, 12, 30) // 2 + 100
    mask = np.zeros((12, 30), np.uint8)
    mask[3:9, 12:20] = 1  # across both tiles
    save(study / "data/images/i0.png", picture)
    save(study / "data/masks/i0.png", mask)
    note = "1 of 6 images are smaller than a tile of 16x16, and padded at their ends: 7% of all"
    assert note in " ".join(source(study).notes)
    dataset = prepared(study, EDGE)
    assert dataset.is_padded and dataset.names[:2] == ["images/i0.png@0,0", "images/i0.png@0,14"]
    np.testing.assert_array_equal(dataset.labels_of(0)[0], mask)
    tiles = [picture[:, :16].ravel(), picture[:, 14:].ravel(), dataset.images[2].ravel()]
    assert dataset.mean[0] == pytest.approx(np.concatenate(tiles).mean() / 255)
    batch, labels = to_device(dataset, dataset.rows("train"), "cpu").batch(torch.arange(3))
    assert torch.isnan(batch[:2, :, 12:]).all() and not torch.isnan(batch[:2, :, :12]).any()
    assert not torch.isnan(batch[2]).any() and (labels[:2, 12:] == 255).all()
    shown = batch[1, 0, :12].numpy() * dataset.std[0] + dataset.mean[0]
    np.testing.assert_allclose(shown, picture[:, 14:] / 255, atol=1e-5)


def test_images_of_one_content_in_a_split_are_told(study):
    (study / "data/images/i1.png").write_bytes((study / "data/images/i0.png").read_bytes())
    (told,) = [note for note in source(study).notes if "content" in note]
    assert told == (
        "images of one content count several times, such as images/i0.png and images/i1.png: 2 "
        "files show 1 pictures"
    )


def test_settings_of_masks_that_lead_nowhere_are_refused(study):
    options = {"manifest": None, "folder": "data"}
    assert "there is no folder data/annotation; there are images/, masks/" in complaint(
        study, mask_folder="annotation", **options
    ).replace(f"{study}/", "")
    told = complaint(study, mask_suffix="_seg", **options)
    assert "is called NAME_seg; there is i0.png" in told


def test_an_image_without_its_mask_is_told(study):
    (study / "data/masks/i3.png").unlink()
    found = source(study, manifest=None, folder="data")
    note = "1 of 6 images have no mask, such as images/i3.png: they join pretraining alone"
    assert note in found.notes


def test_pictures_of_any_unit_need_a_window(study):
    values = [texture(seed, EDGE, EDGE).astype(np.float32) / 100 - 1 for seed in range(6)]
    for number, array in enumerate(values):
        save(study / f"data/images/f{number}.tif", array)
        change(study, number, image=f"images/f{number}.tif")
    text = complaint(study)
    low, high = values[0].min(), values[0].max()
    assert f"holds float32 values from {low:g} to {high:g}; expected integers of 8 or 16" in text
    assert "likewise" in text and "`window: [low, high]`, what becomes 0 and 1" in text
    found = source(study, window=[-1, 1])
    assert (found.dtype, found.window, found.identity["levels"]) == ("uint16", (0, 65535), (-1, 1))
    levels = found.decode(0).images[0, 0]
    np.testing.assert_allclose(levels / 65535 * 2 - 1, np.clip(values[0], -1, 1), atol=2e-5)
    values[0][3, 3] = np.nan
    save(study / "data/images/f0.tif", values[0])
    assert "holds 1 pixels that are no number (NaN or infinite) of 256" in complaint(
        study, window=[-1, 1]
    )


def test_a_window_of_integers_is_of_whole_numbers(study):
    assert "[0.5, 9.0]; expected whole numbers from 0" in complaint(study, window=[0.5, 9])
    assert "[-1.0, 9.0]; expected whole" in complaint(study, window=[-1, 9])


def test_the_limit_of_pixels_is_read_from_the_header(study):
    save(study / "data/images/i0.png", np.zeros((5001, 5000), np.uint8))
    text = complaint(study)
    assert "is 5001x5000 with 1 channels; expected at most 25 megapixels" in text
    assert "cut it up, or raise max_megapixels" in text
    assert "its image images/i0.png is 5001x5000" in complaint(study, max_megapixels=26)


def test_a_file_that_changes_meanwhile_is_noticed(study):
    found = source(study)
    save(study / "data/images/i0.png", texture(50, EDGE, EDGE))
    with pytest.raises(UserError, match="changed while it was read"):
        found.decode(0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"manifest": None}, "either manifest"),
        ({"folder": "data"}, "either manifest"),
        ({"manifest": "no.csv"}, "cannot read"),
        ({"manifest": "data/images/i0.png"}, "not a CSV file in UTF-8"),
        ({"manifest": None, "folder": "nowhere"}, "holds no file that ends in .png, .jpg"),
        ({"where": {"organ": "skin"}}, "no column 'organ'; it has 'image', 'mask'"),
        ({"where": {"split": "never"}}, "no row with split=never (split has test, train, val)"),
        ({"columns": {"group": "patient"}}, "no column 'patient'"),
        ({"window": (9, 9)}, "low < high"),
        ({"classes": ["a", "a"]}, "different names"),
        ({"classes": ["a", "b"], "small_classes": ["c"]}, "['c'] are not among ['b']"),
        ({"small_classes": ["c"]}, "name the classes as well"),
        ({"mask_encoding": "binary", "classes": ["a"]}, "2 classes"),
        ({"group": "("}, "not a regular expression"),
    ],
)
def test_settings_that_cannot_be_are_refused(study, options, reason):
    assert reason in complaint(study, **options)


def test_a_near_miss_of_a_column_is_not_read_past(study):
    rows = [
        {("groups" if k == "group" else k): v for k, v in row.items()} for row in rows_of(study)
    ]
    manifest(study / "data", rows)
    assert "has a column 'groups'; did you mean 'group'?" in complaint(study)
    manifest(study / "data", [{"image": row["image"]} for row in rows])
    assert "no column 'mask'" in complaint(study)


def test_a_manifest_of_nothing_is_refused(study):
    (study / "data/manifest.csv").write_text("image,mask,split,group\n")
    assert "has no rows" in complaint(study)
    (study / "data/manifest.csv").write_text("image,mask\nimages/i0.png\n")
    assert "manifest.csv line 2: expected 2 values" in complaint(study)


def test_without_validation_images_nothing_starts(study):
    for number in (2, 3):
        change(study, number, split="train")
    assert "no image is in val (there are {'train': 4, 'test': 2})" in complaint(study)
    unsplit(study, count=2, group=1)
    assert "2 groups cannot be shared out" in complaint(study)


def test_a_mask_whose_image_is_missing_is_refused(study):
    save(study / "data/masks/i9.png", np.zeros((EDGE, EDGE), np.uint8))
    assert "masks/i9.png has no image" in complaint(study, manifest=None, folder="data")


def test_broken_class_names_are_refused(study):
    (study / "data/classes.json").write_text('{"classes": {"1": "cell"}}')
    assert "classes.json cannot be used" in complaint(study)


@pytest.mark.parametrize(
    "wrong", [{"fit": "crop"}, {"channels": 0}, {"split": {"dev": 0.1}}, {"manifst": "x"}]
)
def test_a_wrong_option_is_refused_by_the_study_file(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(DataConfig).validate_python({"source": "images", "manifest": "m.csv", **wrong})
