"""The store: decoded once, found again, damage noticed, batches standardised."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from trainables.data import DataConfig, default_cache, open_dataset, prepare
from trainables.data.batches import to_device
from trainables.data.rows import cut
from trainables.data.source import Decoded, Source
from trainables.data.store import Dataset, damage, write
from trainables.errors import StorageError, UserError

SPLITS = ["train", "val", "train", "pretrain", "test"]


def source_of(
    images: np.ndarray,
    masks: np.ndarray | None = None,
    splits: list[str] | None = None,
    **other: Any,
) -> Source:
    """A source whose rows are the arrays given, (N, C, H, W) and (N, H, W)."""
    labels = np.zeros((len(images), *images.shape[2:]), np.uint8) if masks is None else masks
    names = [f"image-{row}" for row in range(len(images))]
    settings: dict[str, Any] = {
        "name": "hand-made",
        "identity": "one",
        "size": images.shape[2:],
        "channels": images.shape[1],
        "dtype": str(images.dtype),
        "classes": ["background", "cell"],
        "small_classes": [1],
        "window": None,
        "is_labelled": True,
        "has_instances": False,
        "names": names,
        "groups": names,
        "splits": splits or SPLITS[: len(images)],
        "parts": [range(row, row + 1) for row in range(len(images))],
        "decode": lambda row: Decoded(images[row : row + 1], labels[row : row + 1]),
        "notes": [],
    }
    return Source(**(settings | other))


def levels(*values: int, dtype: Any = np.uint8) -> np.ndarray:
    """Images (N, 1, 4, 4) whose left half is 0 and whose right half is the value."""
    images = np.zeros((len(values), 1, 4, 4), dtype)
    images[:, 0, :, 2:] = np.array(values, dtype)[:, None, None]
    return images


def counting(source: Source) -> tuple[Source, list[int]]:
    """The source, and a list of the parts that were decoded."""
    decoded: list[int] = []

    def decode(part: int) -> Decoded:
        decoded.append(part)
        return source.decode(part)

    return replace(source, decode=decode), decoded


def test_rows_go_by_split_and_pretraining_never_sees_val_or_test(tmp_path):
    dataset = open_dataset(write(source_of(levels(9, 8, 7, 6, 5)), tmp_path))
    rows = {split: dataset.rows(split).tolist() for split in ("pretrain", "train", "val", "test")}
    assert rows == {"pretrain": [0, 2, 3], "train": [0, 2], "val": [1], "test": [4]}
    assert dataset.rows("train").dtype == np.int64
    assert dataset.images[:, 0, 0, 3].tolist() == [9, 8, 7, 6, 5]


def test_mean_and_spread_count_training_images_only(tmp_path):
    dataset = open_dataset(write(source_of(levels(255, 100, 255, 255, 3)), tmp_path))
    assert dataset.mean == pytest.approx((0.5,))  # half the pixels 0, half 255
    assert dataset.std == pytest.approx((0.5,))
    assert (dataset.low, dataset.high) == (0, 255)


def test_batches_are_standardised_and_labelled(tmp_path):
    masks = np.zeros((5, 4, 4), np.uint8)
    masks[2], masks[4] = 1, 255
    dataset = open_dataset(write(source_of(levels(255, 51, 255, 255, 0), masks), tmp_path))
    resident = to_device(dataset, np.array([2, 1, 4]), "cpu")
    images, labels = resident.batch(torch.tensor([1, 0, 2]))
    assert images.dtype == torch.float32 and images.shape == (3, 1, 4, 4)
    # 51 / 255 = 0.2, and (0.2 - 0.5) / 0.5 = -0.6
    assert images[:, 0, 0, 3].tolist() == pytest.approx([-0.6, 1.0, -1.0])
    assert labels is not None and labels.dtype == torch.int64
    assert labels[:, 0, 0].tolist() == [0, 1, 255]
    assert len(resident) == 3
    assert (
        to_device(dataset, np.array([2]), "cpu", labels=False).batch(torch.tensor([0]))[1] is None
    )


def test_an_unlabelled_data_set_has_no_masks_in_its_batches(tmp_path):
    source = source_of(levels(9, 8, 7), is_labelled=False, classes=["background"], small_classes=[])
    dataset = open_dataset(write(source, tmp_path))
    assert to_device(dataset, dataset.rows("pretrain"), "cpu").batch(torch.tensor([0]))[1] is None


def test_sixteen_bits_use_the_range_of_the_training_images(tmp_path):
    images = levels(60_000, 65_000, 40_000, dtype=np.uint16)
    images[:, 0, :, :2] = 40_000
    images[1, 0, 0, 0] = 5
    dataset = open_dataset(write(source_of(images), tmp_path))
    assert (dataset.low, dataset.high) == (40_000, 60_000)
    assert dataset.describe()["intensities"]["window_from"] == "the training images"
    assert dataset.mean == pytest.approx((0.25,))
    batch, _ = to_device(dataset, np.arange(3), "cpu").batch(torch.arange(3))
    in_range = batch * dataset.std[0] + dataset.mean[0]
    # validation values beyond the window are its ends
    assert in_range[:, 0, 0, [0, 3]].flatten().tolist() == pytest.approx(
        [0, 1, 0, 1, 0, 0], abs=1e-6
    )


def test_a_window_of_the_user_is_kept(tmp_path):
    dataset = open_dataset(
        write(source_of(levels(900, 1, 500, dtype=np.uint16), window=(100, 500)), tmp_path)
    )
    assert (dataset.low, dataset.high) == (100, 500)
    assert dataset.images[:, 0, 0, 3].tolist() == [500, 100, 500]


def test_an_empty_channel_stays_zero(tmp_path):
    images = np.concatenate([levels(9, 8, 7), np.zeros((3, 1, 4, 4), np.uint8)], axis=1)
    dataset = open_dataset(write(source_of(images), tmp_path))
    assert dataset.std[1] == 1
    batch, _ = to_device(dataset, np.arange(3), "cpu").batch(torch.arange(3))
    assert (batch[:, 1] == 0).all()


def test_pictures_of_one_value_are_refused(tmp_path):
    with pytest.raises(UserError, match="every pixel of the training images is 0"):
        write(source_of(levels(0, 5, 0)), tmp_path)
    assert not list(tmp_path.glob("*/meta.json"))


def test_object_sizes_come_from_training_masks_as_diameters_of_discs(tmp_path):
    masks = np.zeros((2, 16, 16), np.uint8)
    masks[0, 1, 1] = 1  # areas 1, 4 (two of them touch at a corner), 16
    masks[0, 4:6, 4], masks[0, 6:8, 5] = 1, 1
    masks[0, 10:14, 10:14] = 1
    masks[0, 7:, 0] = 1  # and one that the border cuts off: of unknown size, but an object
    masks[1] = 1  # validation
    images = np.arange(512, dtype=np.uint16).astype(np.uint8).reshape(2, 1, 16, 16)
    dataset = open_dataset(write(source_of(images, masks), tmp_path))
    diameters = 2 * np.sqrt(np.array([1, 4, 16]) / np.pi)
    assert dataset.object_edges == pytest.approx(tuple(np.quantile(diameters, [1 / 3, 2 / 3])))
    described = dataset.describe()
    assert described["objects"] == {
        "cell": {"train": 4, "val": 1, "test": 0, "median_diameter": 2.3}
    }
    assert described["pixel_share"] == {"background": 0.88281, "cell": 0.11719}  # 30 of 256


def test_volumes_are_kept_standardised_and_measured_as_balls(tmp_path):
    images = np.zeros((3, 2, 6, 8, 10), np.uint16)
    images[:, 0, 3:], images[:, 1, :, :4] = 100, 40
    masks = np.zeros((3, 6, 8, 10), np.uint8)
    masks[0, 1, 1, 1] = masks[0, 2, 2, 2] = 1  # corners touch: one object of 2
    masks[0, 1:4, 4:7, 6:9] = 1  # and one of 27
    dataset = open_dataset(write(source_of(images, masks, window=(0, 200)), tmp_path))
    assert dataset.size == (6, 8, 10) and dataset.describe()["size"] == [6, 8, 10]
    assert dataset.mean == pytest.approx((0.25, 0.1)) and dataset.std == pytest.approx((0.25, 0.1))
    batch, labels = to_device(dataset, np.array([0, 1]), "cpu").batch(torch.tensor([1, 0]))
    assert batch.shape == (2, 2, 6, 8, 10) and labels is not None and labels.shape == (2, 6, 8, 10)
    assert batch[:, 0].unique().tolist() == batch[:, 1].unique().tolist() == [-1, 1]
    assert batch[0, 0, 3, 0, 0] == batch[0, 1, 0, 0, 0] == 1 and labels[1, 3, 6, 8] == 1
    small, large = (2 * (voxels * 3 / 4 / np.pi) ** (1 / 3) for voxels in (2, 27))
    expected = np.quantile([small, large], [1 / 3, 2 / 3])
    assert dataset.object_edges == pytest.approx(tuple(expected))


def test_large_rows_are_counted_in_small_portions(tmp_path, monkeypatch):
    monkeypatch.setattr("trainables.data.measure.PIXELS_AT_ONCE", 20)  # one image of 16 at a time
    dataset = open_dataset(
        write(source_of(levels(900, 1, 500, dtype=np.uint16), window=(100, 500)), tmp_path)
    )
    assert dataset.images[:, 0, 0, 3].tolist() == [500, 100, 500]
    assert dataset.mean == pytest.approx((0.5,))


def test_objects_are_counted_in_whole_images_and_by_their_instances(tmp_path):
    """Two touching cells lie across four tiles, one of them at the border."""
    labels, cells = np.zeros((20, 24), np.uint8), np.zeros((20, 24), np.uint16)
    labels[8:12, 6:24] = 1
    cells[8:12, 6:16], cells[8:12, 16:24] = 300, 2
    picture = np.arange(480, dtype=np.uint8).reshape(1, 20, 24)
    source = source_of(
        np.zeros((8, 1, 10, 16), np.uint8),
        splits=["train"] * 4 + ["val"] * 4,
        has_instances=True,
        parts=[range(4), range(4, 8)],
        cut_from=[(20, 24)] * 2,
        decode=lambda part: cut(picture, labels, cells, (10, 16)),
    )
    dataset = open_dataset(write(source, tmp_path))
    expected = 2 * (40 / np.pi) ** 0.5  # 4 x 10 pixels
    assert dataset.object_edges == pytest.approx((expected, expected))
    median = round(expected, 1)
    assert dataset.about["objects"] == {
        "cell": {"train": 2, "val": 2, "test": 0, "median_diameter": median}
    }
    assert dataset.cut_images_of("val").tolist() == [1]
    for image in (0, 1):
        found = dataset.labels_of(image)
        np.testing.assert_array_equal(found[0], labels)
        np.testing.assert_array_equal(found[1], cells)


def test_without_an_object_that_is_whole_there_is_no_median(tmp_path):
    masks = np.ones((3, 4, 4), np.uint8)
    dataset = open_dataset(write(source_of(levels(9, 8, 7), masks), tmp_path))
    assert dataset.about["objects"] == {
        "cell": {"train": 2, "val": 1, "test": 0, "median_diameter": None}
    }
    assert dataset.object_edges == (0, 0)


def test_classes_without_names_are_counted_from_the_masks(tmp_path):
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[0, 0, 0], masks[1, 0, 0], masks[2, 0, 0] = 2, 3, 255
    source = source_of(levels(9, 8, 7), masks, classes=None, small_classes=[])
    assert open_dataset(write(source, tmp_path)).classes == [
        "background",
        "class 1",
        "class 2",
        "class 3",
    ]


def test_it_is_decoded_once_and_found_again(tmp_path):
    source, decoded = counting(source_of(levels(9, 8, 7)))
    folder = write(source, tmp_path)
    assert write(source, tmp_path) == folder and folder.name == source.fingerprint()
    assert sorted(decoded) == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]


def test_who_comes_at_the_same_time_waits_and_does_not_decode_again(tmp_path):
    source, decoded = counting(source_of(levels(9, 8, 7)))
    start = threading.Barrier(4)

    def run() -> None:
        start.wait()
        write(source, tmp_path)

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(decoded) == [0, 1, 2]


def _shorten(folder: Path) -> None:
    with (folder / "images.npy").open("r+b") as file:
        file.truncate(100)


def _as_of_before(folder: Path) -> None:
    """Before folders said what is in them, no row knew which image its tile was cut from."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["layout"]
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGES = {
    "images.npy has 100 bytes": _shorten,
    "masks.npy is missing": lambda folder: (folder / "masks.npy").unlink(),
    "meta.json is missing": lambda folder: (folder / "meta.json").unlink(),
    "another version prepared them": _as_of_before,
    "meta.json cannot be read": lambda folder: (folder / "meta.json").write_text('{"files": '),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damage_is_noticed_told_and_repaired(tmp_path, caplog, reason):
    source, decoded = counting(source_of(levels(9, 8, 7)))
    folder = write(source, tmp_path)
    DAMAGES[reason](folder)
    with pytest.raises(StorageError, match=reason):
        open_dataset(folder)
    with caplog.at_level(logging.WARNING):
        assert write(source, tmp_path) == folder
    assert reason in caplog.text and len(decoded) == 6
    assert open_dataset(folder).images[2, 0, 0, 3] == 7


def test_what_a_dead_process_left_is_cleared_away(tmp_path):
    source = source_of(levels(9, 8, 7))
    aside = tmp_path / f".{source.fingerprint()}.tmp"
    aside.mkdir()
    (aside / "images.npy").write_text("half")
    folder = write(source, tmp_path)
    assert damage(folder) is None and not aside.exists()


def test_all_bad_parts_are_told_at_once_and_nothing_is_left(tmp_path):
    good = source_of(np.zeros((30, 1, 4, 4), np.uint8), splits=["train"] * 30)

    def decode(part: int) -> Decoded:
        if part < 25:
            raise UserError(f"file {part} is bad")
        return good.decode(part)

    with pytest.raises(UserError) as caught:
        write(replace(good, decode=decode), tmp_path)
    text = str(caught.value)
    assert text.startswith("data: 25 problems")
    assert "file 19 is bad" in text and "file 20 is bad" not in text and "and 5 more" in text
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="MASKSTUDY_CACHE"):
        write(source_of(levels(9, 8, 7)), tmp_path / "file" / "cache")


def test_a_full_disk_is_a_storage_error_before_anything_is_mapped(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(StorageError, match="No space left on device"):
        write(source_of(levels(9, 8, 7)), tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "two"},
        {"splits": ["train", "train", "val"]},
        {"groups": ["a", "b", "b"]},
        {"window": (0, 9)},
        {"classes": ["background", "nucleus"]},
        {"small_classes": []},
    ],
)
def test_the_fingerprint_follows_content_and_splits(change):
    source = source_of(levels(9, 8, 7))
    assert replace(source, **change).fingerprint() != source.fingerprint()
    assert replace(source, notes=["told"]).fingerprint() == source.fingerprint()


def test_the_folder_can_be_moved(tmp_path):
    folder = write(source_of(levels(9, 8, 7)), tmp_path / "one")
    moved = shutil.move(folder, tmp_path / "other")
    assert open_dataset(Path(moved)).names == ["image-0", "image-1", "image-2"]
    for path in ("meta.json", "rows.json"):
        assert str(tmp_path) not in (Path(moved) / path).read_text()


def test_smears_from_the_study_file_to_a_batch(tmp_path):
    config = TypeAdapter(DataConfig).validate_python(
        {"source": "smears", "size": 32, "images": 6, "val": 2, "test": 2, "unlabelled": 2}
    )
    signs: list[tuple[int, int]] = []
    heard = lambda done, parts: signs.append((done, parts))  # noqa: E731
    folder = prepare(config, tmp_path, tmp_path / "cache", heard)
    assert sorted(signs) == [(done, 12) for done in range(1, 13)]
    dataset = open_dataset(folder)
    assert dataset.describe()["images"] == {"pretrain": 8, "train": 6, "val": 2, "test": 2}
    assert dataset.instances is not None and dataset.instances.dtype == np.uint16
    rows = dataset.rows("pretrain")
    images, _ = to_device(dataset, rows, "cpu").batch(torch.arange(len(rows)))
    assert images.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert images.std(dim=(0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)


def test_the_cache_folder_can_be_set(monkeypatch):
    monkeypatch.setenv("MASKSTUDY_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere")
    monkeypatch.delenv("MASKSTUDY_CACHE")
    assert default_cache() == Path.home() / ".cache" / "maskstudy"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.5, 0.0])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_gpu_makes_the_same_batches_resident_or_not(tmp_path, monkeypatch, share, dtype):
    monkeypatch.setattr("trainables.data.batches.RESIDENT_SHARE", share)
    dataset = open_dataset(write(source_of(levels(200, 51, 255, 7, 3, dtype=dtype)), tmp_path))
    rows, index_B = dataset.rows("pretrain"), torch.tensor([2, 0])
    expected, labels = to_device(dataset, rows, "cpu").batch(index_B)
    resident = to_device(dataset, rows, "cuda")
    images, masks = resident.batch(index_B.cuda())
    assert images.is_cuda and resident.images.is_cuda == (share > 0)
    torch.testing.assert_close(images.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert masks is not None and labels is not None and torch.equal(masks.cpu(), labels)


def test_a_few_hot_pixels_do_not_stretch_the_window(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(500, 1500, (4, 1, 160, 160)).astype(np.uint16)
    masks = np.zeros((4, 160, 160), np.uint8)

    def prepared(place: str, **options: Any) -> Dataset:
        splits = ["train", "train", "val", "test"]
        return open_dataset(
            write(source_of(images, masks, splits=splits, **options), tmp_path / place)
        )

    even = prepared("even", window=None)
    assert (even.low, even.high) == (500, 1499) and even.about["notes"] == []
    images[0, 0, 3, 3] = 65535
    hot = prepared("hot", window=None)
    assert (hot.low, hot.high) == (500, 1499)
    assert hot.images.max() == 1499 and hot.mean == pytest.approx(even.mean, abs=1e-4)
    (told,) = hot.about["notes"]
    assert told.startswith("99.99% of the pixels lie between 500 and 1499, in 1.5% of what there")
    assert told.endswith("set window: [500, 65535] to have all of it")
    assert prepared("set", window=(500, 1499)).about["notes"] == []
    masks[0, 3, 3] = 1  # what is bright there is what is looked for
    meant = prepared("meant", window=None)
    assert (meant.low, meant.high) == (500, 65535)
    (told,) = meant.about["notes"]
    assert told.endswith("all of it is the window, as a class lies above")
