"""Which labelled groups segmentation learns from: all, or the few that the seed draws.

Labels are counted in groups (a patient, slide or field), as those who draw them count them. Groups
come in an order that the seed draws, so that few labels are among more of them, and trials of one
seed that ask for as many have the same ones, whatever else they differ in. First of all come those
that show a class not shown yet, as in a set of labels that somebody would draw to learn from: a
class without a label costs more than any encoder is worth, and which seed meets it is chance.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainables import counter
from trainables.config import SegmentConfig, num_labelled

if TYPE_CHECKING:
    from trainables.data import Dataset


def labelled_rows(settings: SegmentConfig, dataset: Dataset, seed: int) -> NDArray[np.int64]:
    """The training rows that segmentation learns from, of `segment.labels` groups."""
    rows = dataset.rows("train")
    if settings.labels is None:
        return rows
    rows_of_group: dict[str, list[int]] = {}
    for row in rows.tolist():
        rows_of_group.setdefault(dataset.groups[row], []).append(row)
    names = sorted(rows_of_group)
    order = counter.permutation(seed, "labels", 0, len(names)).tolist()
    drawn = _covering_first([rows_of_group[names[place]] for place in order], dataset)
    chosen = drawn[: num_labelled(settings, len(names))]
    return np.array(sorted(chain.from_iterable(chosen)), np.int64)


def classes_missing(settings: SegmentConfig, dataset: Dataset, seed: int) -> list[str]:
    """The classes of the training images that the groups of this seed do not show."""
    shown = dataset.classes_shown(labelled_rows(settings, dataset, seed))
    there = dataset.classes_shown(dataset.rows("train"))
    return [dataset.classes[place] for place in sorted(there - shown)]


def _covering_first(groups: list[list[int]], dataset: Dataset) -> list[list[int]]:
    """Those that show a class which no group before them shows, then the others."""
    missing = set(range(1, len(dataset.classes)))
    first: list[list[int]] = []
    others: list[list[int]] = []
    for rows in groups:
        new = missing & dataset.classes_shown(np.array(rows, np.int64)) if missing else set()
        missing -= new
        (first if new else others).append(rows)
    return first + others
