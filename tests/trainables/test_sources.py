"""What every data source promises, tried on its own example.

pytest tests/trainables/test_sources.py
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pydantic import TypeAdapter

from study.loading import parse_spec
from tests.conftest import TINY_STUDY
from tests.drawn import varied
from trainables.data import SOURCES, DataConfig, open_dataset, prepare
from trainables.data.source import NOT_LABELLED, SPLITS, Decoded, Source, tile_corners
from trainables.errors import UserError
from trainables.named import Choice


class Example(NamedTuple):
    root: Path
    given: dict[str, Any]  # as it stands in a study file

    @property
    def setting(self) -> Choice:
        return TypeAdapter(DataConfig).validate_json(json.dumps(self.given), strict=True)

    def source(self) -> Source:
        return make(self.root, self.setting)

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())

    def copied(self, folder: Path) -> Example:
        return Example(Path(shutil.copytree(self.root, folder)), self.given)


@pytest.fixture(params=SOURCES)
def example(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Example:
    """A source's own example, in a folder that is not the working directory."""
    root = tmp_path / "root"
    root.mkdir()
    options = SOURCES[request.param].example(root)
    monkeypatch.chdir("/")
    return Example(root, {"source": request.param, **options})


def make(root: Path, setting: Choice) -> Source:
    return SOURCES[setting.name].make(root, **setting.options())


def parts_of(source: Source) -> Iterator[Decoded]:
    return map(source.decode, range(len(source.parts)))


def content(source: Source) -> str:
    """A digest of all that is promised and decoded, but not of what is said to people."""
    whole = source.whole
    facts = [source.name, source.size, source.channels, source.dtype, source.classes]
    facts += [source.small_classes, source.window, source.highest, source.is_labelled]
    facts += [source.has_instances]
    facts += [source.names, source.groups, source.splits, source.parts]
    facts += [
        whole and (whole.shapes, whole.spacings, whole.overlap, whole.tolerance, whole.scored)
    ]
    found = hashlib.sha256(repr(facts).encode())
    for part in parts_of(source):
        for array in (part.images, part.masks, part.instances, part.truth):
            if array is not None:
                found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def test_asked_twice_it_promises_and_decodes_the_same(example: Example) -> None:
    first, again = example.source(), example.source()
    assert first.fingerprint() == again.fingerprint()
    assert content(first) == content(again) == content(first)


def test_the_fingerprint_does_not_depend_on_the_place(example: Example, tmp_path: Path) -> None:
    moved = example.copied(tmp_path / "elsewhere" / "moved")
    assert moved.source().fingerprint() == example.source().fingerprint()


def test_data_that_differ_have_fingerprints_that_differ(example: Example) -> None:
    """Whichever option is changed, and whatever follows from it."""
    first = example.source()
    known = {first.fingerprint(): first}
    for option, setting in varied(DataConfig, example.given, example.setting.name):
        try:
            source = make(example.root, setting)
            same = known.setdefault(source.fingerprint(), source)
            assert same is source or content(same) == content(source), option
        except UserError:
            continue  # of this value, or together with the others
    assert len(known) > 1, "no option makes a difference"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(path: Path) -> None:
    """What another file beside it holds."""
    beside = sorted(path.parent.glob(f"*{path.suffix}"))
    path.write_bytes(beside[beside.index(path) - 1].read_bytes())


@pytest.mark.parametrize("damage", [swap, flip, cut, Path.unlink])
def test_a_file_that_is_changed_cut_short_or_gone_is_noticed(
    example: Example, damage: Any, tmp_path: Path
) -> None:
    """Its name is told, or the data have another fingerprint, unless they are the same."""
    before = example.source()
    for number, file in enumerate(example.files()):
        other = example.copied(tmp_path / str(number))
        damage(other.root / file.relative_to(example.root))
        try:
            folder = prepare(other.setting, other.root, tmp_path / "cache")
        except UserError as error:
            assert file.name in str(error)
        else:
            is_other = folder.name != before.fingerprint()
            assert is_other or content(other.source()) == content(before), file


def test_without_its_files_it_says_which_it_misses(example: Example, tmp_path: Path) -> None:
    places = [
        value
        for value in example.given.values()
        if isinstance(value, str) and (example.root / value).exists()
    ]
    assert bool(places) == bool(example.files()), "files that no option names"
    if places:
        with pytest.raises(UserError) as caught:
            prepare(example.setting, tmp_path / "nowhere", tmp_path / "cache")
        assert all(place in str(caught.value) for place in places)


def test_every_row_stands_in_one_part_and_every_group_in_one_split(example: Example) -> None:
    source = example.source()
    rows = len(source.names)
    assert len(source.groups) == len(source.splits) == rows
    assert [row for part in source.parts for row in part] == list(range(rows))
    assert all(len(part) for part in source.parts) and len(set(source.names)) == rows
    assert set(source.splits) <= set(SPLITS) and "val" in source.splits
    training = ["train" if split == "pretrain" else split for split in source.splits]
    assert "train" in training
    assert len(set(zip(source.groups, training, strict=True))) == len(set(source.groups))


def test_decoded_parts_are_what_was_promised(example: Example) -> None:
    source = example.source()
    for rows, part in zip(source.parts, parts_of(source), strict=True):
        size = source.size if source.whole is None else source.whole.shapes[rows.start]
        assert part.images.shape == (len(rows), source.channels, *size)
        assert part.images.dtype == source.dtype
        assert part.masks.shape == (len(rows), *size) and part.masks.dtype == np.uint8
        if source.has_instances:
            assert part.instances is not None and part.instances.shape == (len(rows), *size)
            assert part.instances.dtype == np.uint16
        labels = set(np.unique(part.masks)) - {NOT_LABELLED}
        assert source.classes is None or labels <= set(range(len(source.classes)))
        assert source.is_labelled or not labels


def test_tiles_cover_their_image_and_label_each_pixel_once(example: Example) -> None:
    source = example.source()
    if source.cut_from is None:
        return
    assert len(source.cut_from) == len(source.parts)
    for part, shape in zip(parts_of(source), source.cut_from, strict=True):
        times_seen, times_labelled = np.zeros((2, *shape), int)
        for corner, mask in zip(tile_corners(shape, source.size), part.masks, strict=True):
            place = tuple(slice(c, c + e) for c, e in zip(corner, source.size, strict=True))
            times_seen[place] += 1
            times_labelled[place] += mask != NOT_LABELLED
        assert times_seen.min() == 1 and times_labelled.max() <= 1


def test_what_is_prepared_is_what_was_decoded(example: Example, tmp_path: Path) -> None:
    signs: list[tuple[int, int]] = []
    before = {path: path.read_bytes() for path in example.files()}
    folder = prepare(
        example.setting, example.root, tmp_path / "cache", lambda *sign: signs.append(sign)
    )
    assert {path: path.read_bytes() for path in example.files()} == before
    source, dataset = example.source(), open_dataset(folder)
    count = len(source.parts)
    assert sorted(signs) == [(done, count) for done in range(1, count + 1)]
    assert dataset.fingerprint == folder.name == source.fingerprint()
    assert (dataset.name, dataset.size) == (source.name, source.size)
    assert (dataset.channels, dataset.images.dtype) == (source.channels, source.dtype)
    assert source.classes in (None, dataset.classes)
    assert dataset.small_classes == source.small_classes
    assert dataset.is_labelled == source.is_labelled
    assert (dataset.instances is not None) == source.has_instances
    assert set(np.unique(dataset.masks)) <= {*range(len(dataset.classes)), NOT_LABELLED}
    if dataset.volumes is None:
        assert dataset.names == source.names and dataset.groups == source.groups
        assert list(dataset.splits) == source.splits
    for rows, part in zip(source.parts, parts_of(source), strict=True):
        images = np.clip(part.images, dataset.low, source.highest or dataset.high)
        if dataset.volumes is not None:
            np.testing.assert_array_equal(dataset.image_of(rows.start), images[0])
            np.testing.assert_array_equal(dataset.mask_of(rows.start), part.masks[0])
            np.testing.assert_array_equal(dataset.truth_of(rows.start)[0], part.truth[0])
            continue
        assert (dataset.tiles is None) == (source.cut_from is None)
        np.testing.assert_array_equal(dataset.images[list(rows)], images)
        np.testing.assert_array_equal(dataset.masks[list(rows)], part.masks)
        if dataset.instances is not None:
            np.testing.assert_array_equal(dataset.instances[list(rows)], part.instances)


def test_an_unknown_option_is_refused_by_its_name(example: Example) -> None:
    given = {**example.given, "no_such_option": 1}
    line = next(line for line in TINY_STUDY.splitlines() if line.startswith("data:"))
    with pytest.raises(UserError, match=r"data\.no_such_option: unknown key"):
        parse_spec(TINY_STUDY.replace(line, f"data: {json.dumps(given)}"), Path(), where="s.yaml")
