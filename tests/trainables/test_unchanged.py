"""Files that are as they were are not read again; whatever else happens to them, they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from tests.trainables.test_images import manifest, save, texture
from trainables.data import DataConfig, images, open_dataset, prepare, unchanged


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six images with masks in a folder, trusted from the moment on that they are written."""
    monkeypatch.setattr(unchanged, "YOUNG_SECONDS", -60.0)
    for number in range(6):
        save(tmp_path / f"data/images/i{number}.png", texture(number, 16, 16))
        save(tmp_path / f"data/masks/i{number}.png", (texture(number, 16, 16) > 200).astype("u1"))
    return tmp_path / "data"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that were read since it was emptied."""
    seen: list[str] = []
    inspect = images.inspect_entry

    def spy(entry: Any, reading: Any) -> Any:
        seen.append(entry.image.name)
        return inspect(entry, reading)

    monkeypatch.setattr(images, "inspect_entry", spy)
    return seen


def prepared(data: Path, **options: Any) -> Path:
    given = {"source": "images", "folder": "data", "size": 16} | options
    config = TypeAdapter(DataConfig).validate_python(given)
    return prepare(config, data.parent, data.parent / "cache")


def test_files_that_are_as_they_were_are_not_read_again(data, reads):
    first = prepared(data)
    assert len(reads) == 6
    assert prepared(data) == first and len(reads) == 6
    assert prepared(data, size=8) != first and len(reads) == 12  # other options
    assert prepared(data) == first and len(reads) == 12


@pytest.mark.parametrize(
    "happens",
    [
        "another picture of the same size and time",
        "a new file",
        "a file less",
        "names of classes",
        "a mask renamed",
        "the cache damaged",
    ],
)
def test_whatever_happens_to_a_file_is_noticed(data, reads, happens):
    first = prepared(data)
    reads.clear()
    if happens.startswith("another"):
        path = data / "images/i0.png"
        before = path.stat()
        picture = np.asarray(Image.open(path)).copy()
        Image.fromarray(picture[::-1]).save(path)
        content = path.read_bytes()[: before.st_size].ljust(before.st_size, b"\0")
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert path.stat().st_size == before.st_size
    elif happens == "a new file":
        save(data / "images/i6.png", texture(6, 16, 16))
    elif happens == "a file less":
        (data / "images/i0.png").unlink()
        (data / "masks/i0.png").unlink()
    elif happens == "names of classes":
        (data / "classes.json").write_text('{"classes": ["ground", "cell"]}')
    elif happens == "a mask renamed":
        (data / "masks/i0.png").rename(data / "masks/i6.png")
        (data / "images/i0.png").rename(data / "images/i6.png")
    else:
        (first / "images.npy").unlink()
    again = prepared(data)
    assert len(reads) >= 5
    assert (again == first) == (happens == "the cache damaged")
    reads.clear()
    assert prepared(data) == again and reads == []


def test_a_manifest_and_what_it_names_are_looked_at(data, reads):
    rows = [
        {"image": f"images/i{number}.png", "mask": f"masks/i{number}.png", "split": split}
        for number, split in enumerate(["train", "train", "train", "val", "val", "test"])
    ]
    manifest(data, rows)
    options = {"folder": None, "manifest": "data/manifest.csv"}
    first = prepared(data, **options)
    assert prepared(data, **options) == first and len(reads) == 6
    rows[0]["split"] = "test"
    manifest(data, rows)
    other = prepared(data, **options)
    assert other != first and len(reads) == 12
    save(data / "masks/i1.png", np.ones((16, 16), np.uint8))
    assert prepared(data, **options) not in (first, other) and len(reads) == 18
    (data / "images/classes.json").write_text('{"classes": ["ground", "cell"]}')
    assert open_dataset(prepared(data, **options)).classes == ["ground", "cell"]


def test_young_files_are_read(data, reads, monkeypatch):
    """They may change once more within the resolution of a clock."""
    monkeypatch.setattr(unchanged, "YOUNG_SECONDS", 60.0)
    assert prepared(data) == prepared(data) and len(reads) == 12


def test_a_cache_that_forgets_costs_time_and_nothing_else(data, reads):
    first = prepared(data)
    (note,) = (data.parent / "cache" / unchanged.FOLDER).iterdir()
    note.write_text("{")
    assert prepared(data) == first and len(reads) == 12
    shutil.rmtree(data.parent / "cache")
    assert prepared(data) == first and len(reads) == 18
