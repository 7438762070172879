"""Whole volumes, each with a bright ball in it, some smaller than a crop, and a trial for them."""

from __future__ import annotations

import numpy as np

from tests import toy
from tests.trainables.test_store import source_of
from trainables.config import ProbeConfig
from trainables.data import open_dataset
from trainables.data.source import Decoded, Whole
from trainables.data.store import write

SIZE = (8, 12, 8)
SHAPES = [(8, 12, 11), (13, 12, 8), (6, 15, 9), (10, 9, 6), (9, 14, 10), (6, 12, 9)]  # three padded
SPLITS = ["train", "train", "train", "train", "val", "val"]
PROBE = ProbeConfig(unit=(4, 4, 4), images=6, ratios=(0.25, 0.5))
PATCH = (4, 4, 2)


def ball(number, shape):
    """A bright ball of 4 to 6 voxels in noise, and its labels."""
    rng = np.random.default_rng(number)
    radius = rng.uniform(2, 3)
    centre = [rng.uniform(radius, edge - radius) for edge in shape]
    axes = np.ogrid[tuple(slice(edge) for edge in shape)]
    is_ball = sum((a + 0.5 - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2
    grey = np.where(is_ball, 50_000, 15_000) + rng.normal(0, 2000, shape)
    return grey.astype(np.uint16)[None], is_ball.astype(np.uint8)


def balls(tmp_path, shapes=SHAPES, size=SIZE, spacing=(1.0, 1.0, 1.0), overlap=0.5):
    source = source_of(
        np.zeros((len(shapes), 1, *size), np.uint16),
        splits=SPLITS[: len(shapes)] if len(shapes) > 2 else ["train", "val"],
        classes=["background", "ball"],
        window=(0, 65535),
        decode=lambda part: Decoded(*(a[None] for a in ball(part, shapes[part]))),
        whole=Whole(list(shapes), [spacing] * len(shapes), overlap, 1.0, 1),
    )
    return open_dataset(write(source, tmp_path / "cache"))


def trial(**changes):
    settings = {
        "model__patch": PATCH,
        "pretrain__epochs": 1,
        "segment__epochs": 1,
        "masking__ratio": {"name": "constant", "value": 0.5},
    }
    return toy.trial(**(settings | changes))
