"""Trials on pictures smaller than a tile: padding is not seen, learnt or judged."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import toy
from tests.trainables.test_store import source_of
from trainables.data import Dataset, open_dataset
from trainables.data.batches import to_device
from trainables.data.rows import cut
from trainables.data.store import write
from trainables.masking import MASKING
from trainables.segment import evaluate, predictions
from trainables.trial import run_trial
from trainables.unetr import build_unetr

torch.set_num_threads(1)

TILE = (16, 16)
SIZES = [(16, 16), (12, 26), (9, 16), (20, 11), (16, 16), (13, 13)] * 2  # most smaller than a tile
SPLITS = ["train"] * 8 + ["val"] * 4


def picture(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc in noise, and its labels."""
    rng, size = np.random.default_rng(number), SIZES[number]
    row, column = np.mgrid[: size[0], : size[1]]
    y, x = (rng.uniform(3, edge - 3) for edge in size)
    is_disc = (row + 0.5 - y) ** 2 + (column + 0.5 - x) ** 2 < 9
    grey = np.where(is_disc, 200, 60) + rng.normal(0, 8, size)
    return grey.clip(0, 255).astype(np.uint8)[None], is_disc.astype(np.uint8)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    tiles = [cut(*picture(number), None, TILE) for number in range(len(SIZES))]
    counts = [len(each.masks) for each in tiles]
    ends = np.cumsum([0, *counts]).tolist()
    splits = np.repeat(SPLITS, counts).tolist()
    source = source_of(
        np.zeros((ends[-1], 1, *TILE), np.uint8),
        splits=splits,
        classes=["background", "disc"],
        parts=[range(first, end) for first, end in pairwise(ends)],
        decode=lambda part: tiles[part],
        cut_from=SIZES,
        small_classes=[],
    )
    return open_dataset(write(source, tmp_path / "cache"))


@pytest.mark.parametrize("strategy", MASKING)
def test_every_masking_learns_from_padded_pictures(
    dataset: Dataset, tmp_path: Path, strategy: str
) -> None:
    """No padding reaches a number: it would not be finite."""
    config = toy.trial(
        masking__strategy=strategy,
        masking__ratio={"name": "constant", "value": 0.5},
        pretrain__epochs=1,
        segment__epochs=1,
    )
    diary = toy.Diary()
    context = toy.context(tmp_path / "trial", diary)
    assert run_trial(config, 0, dataset, toy.PROBE, context) == "complete"
    assert diary.values
    assert all(math.isfinite(row["value"]) for row in diary.values.values())


def test_pictures_are_judged_without_their_padding(dataset: Dataset, tmp_path: Path) -> None:
    config = toy.trial()
    model = build_unetr(config, TILE, 1, 2, 0, is_padded=True)
    context = toy.context(tmp_path, toy.Diary())
    judged = list(predictions(model, config.segment, dataset, "val", context))
    assert [tuple(one.truth_BS.shape[1:]) for one in judged] == SIZES[8:]
    for number, one in enumerate(judged, start=8):
        np.testing.assert_array_equal(one.truth_BS[0].numpy(), picture(number)[1])
        assert one.predicted_BS.shape == one.truth_BS.shape
    scores = evaluate(model, config.segment, dataset, "val", context)
    total = sum(math.prod(size) for size in SIZES[8:])
    shown = sum(int(picture(number)[1].sum()) for number in range(8, 12))
    guess = sum(int(one.predicted_BS.sum()) for one in judged)
    both = sum(int((one.predicted_BS * one.truth_BS).sum()) for one in judged)
    assert scores["iou/disc"] == pytest.approx(both / (shown + guess - both))
    background = total - (shown + guess - both)
    assert scores["iou/background"] == pytest.approx(background / (total - both))


def test_what_is_padded_is_padded_in_every_order(dataset: Dataset) -> None:
    rows = dataset.rows("train")
    images, labels = to_device(dataset, rows, "cpu").batch(torch.arange(len(rows)))
    again, _ = to_device(dataset, rows[::-1].copy(), "cpu").batch(torch.arange(len(rows)))
    assert torch.equal(images.isnan(), again.flip(0).isnan())
    assert labels is not None and bool((labels[images[:, 0].isnan()] == 255).all())
    real = sum(
        math.prod(map(min, SIZES[number], TILE)) * sum(1 for row in rows if owner[row] == number)
        for owner in [dataset.tiles.owner]  # type: ignore[union-attr]
        for number in range(8)
    )
    assert int((~images.isnan()).sum()) == real
