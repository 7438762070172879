"""Few labels: which groups are drawn. python -m pytest tests/trainables/test_labelled.py"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.balls import balls
from tests.trainables.test_store import source_of
from trainables.config import SegmentConfig
from trainables.data import Dataset, open_dataset
from trainables.data import store as store_module
from trainables.data.store import write
from trainables.labelled import classes_missing, labelled_rows

NUM_TRAIN = 20
RARE = 13  # the one training image that shows a platelet
CLASSES = ["background", "cell", "platelet", "parasite"]


@pytest.fixture(scope="module")
def smears(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Cells everywhere, platelets in one training image, a parasite in a validation image alone."""
    count = NUM_TRAIN + 2
    images = np.random.default_rng(0).integers(0, 255, (count, 1, 8, 8)).astype(np.uint8)
    masks = np.zeros((count, 8, 8), np.uint8)
    masks[:, 2:5, 2:5] = 1
    masks[:, -1] = 255
    masks[RARE, 6, 6] = 2
    masks[-1, 6, 6] = 3
    source = source_of(
        images,
        masks,
        splits=["train"] * NUM_TRAIN + ["val"] * 2,
        classes=CLASSES,
        small_classes=[2],
    )
    return open_dataset(write(source, tmp_path_factory.mktemp("smears")))


def rows_of(dataset: Dataset, labels: int | float | None, seed: int = 0) -> set[int]:
    return set(labelled_rows(SegmentConfig(labels=labels), dataset, seed).tolist())


def test_few_labels_are_among_more(smears: Dataset) -> None:
    nested = [rows_of(smears, labels) for labels in (1, 0.25, 7, 0.5, 20, None)]
    assert [len(rows) for rows in nested] == [1, 5, 7, 10, 20, 20]
    assert all(few <= more for few, more in itertools.pairwise(nested))
    assert rows_of(smears, 1000) == rows_of(smears, None)
    assert len({frozenset(rows_of(smears, 5, seed)) for seed in range(8)}) > 5


def test_labels_count_groups_and_take_them_whole(smears: Dataset) -> None:
    groups = [str(row // 4) for row in range(NUM_TRAIN + 2)]
    rows = rows_of(dataclasses.replace(smears, groups=groups), 2)
    assert len(rows) == 8
    assert all(row - row % 4 + other in rows for row in rows for other in range(4))


def test_each_class_is_drawn_before_all_else(smears: Dataset) -> None:
    """By chance alone, four of twenty draws of four would show a platelet."""
    draws = [rows_of(smears, 4, seed) for seed in range(20)]
    assert all(RARE in rows for rows in draws)
    assert len({frozenset(rows) for rows in draws}) > 15
    assert not any(classes_missing(SegmentConfig(labels=4), smears, seed) for seed in range(20))


def test_a_class_that_too_few_labels_leave_out_is_named(smears: Dataset) -> None:
    """A parasite is in no training image, whatever is drawn: that is said elsewhere."""
    missing = [classes_missing(SegmentConfig(labels=1), smears, seed) for seed in range(20)]
    assert ["platelet"] in missing
    assert all(
        names == ([] if rows_of(smears, 1, seed) == {RARE} else ["platelet"])
        for seed, names in enumerate(missing)
    )


def test_classes_are_found_however_many_rows_there_are(
    smears: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are read in parts; neither background nor what is not labelled is a class."""
    rows = smears.rows("train")
    assert smears.classes_shown(rows) == {1, 2}
    monkeypatch.setattr(store_module, "PIXELS_AT_ONCE", 100)
    assert smears.classes_shown(rows) == {1, 2}
    assert smears.classes_shown(rows[:3]) == {1} and smears.classes_shown(rows[:0]) == set()


def test_of_volumes_whole_cases_are_drawn(tmp_path: Path) -> None:
    dataset = balls(tmp_path)
    assert dataset.volumes is not None
    rows = labelled_rows(SegmentConfig(labels=1), dataset, 0)
    case = set(dataset.volumes.owner[rows].tolist())
    assert len(case) == 1 and dataset.classes_shown(rows) == {1}
    assert rows.tolist() == np.flatnonzero(dataset.volumes.owner == case.pop()).tolist()
