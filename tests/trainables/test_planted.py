"""What is planted in generated images is found: pytest tests/trainables/test_planted.py

Two textures have the same histogram, and no pixel, nor any linear map of a patch, tells one from
the other: each is one of two patterns of 4 x 4 pixels, of either sign, repeated under noise of
twice its size. A thousand images without labels show what repeats; two labelled ones do not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests import toy
from trainables.config import ProbeConfig, TrialConfig
from trainables.data import Dataset
from trainables.trial import run_trial

torch.set_num_threads(1)

SIZE, PATTERN, STRENGTH = 32, 4, 0.5
UNLABELLED, LABELLED, VALIDATED = 1000, 2, 60


def two_textures() -> Dataset:
    """Each image is cut in two at a random place; its halves are textures of different kinds."""
    rng = np.random.default_rng(0)
    count = UNLABELLED + LABELLED + VALIDATED
    patterns = np.sign(rng.standard_normal((2, PATTERN, PATTERN)))
    tiled = np.tile(patterns, (1, SIZE // PATTERN, SIZE // PATTERN))
    lines = np.mgrid[:SIZE, :SIZE]
    images = np.zeros((count, 1, SIZE, SIZE), np.uint8)
    masks = np.zeros((count, SIZE, SIZE), np.uint8)
    for image, mask in zip(images, masks, strict=True):
        is_first = lines[rng.integers(2)] < rng.integers(SIZE // 4, 3 * SIZE // 4)
        mask[:] = is_first ^ (rng.random() < 0.5)
        signs = rng.choice([-1, 1], 2)
        texture = np.where(mask, signs[1] * tiled[1], signs[0] * tiled[0])
        noisy = STRENGTH * texture + rng.standard_normal((SIZE, SIZE))
        image[0] = np.clip(128 + 32 * noisy, 0, 255)
    masks[:UNLABELLED] = 255
    splits = ["pretrain"] * UNLABELLED + ["train"] * LABELLED + ["val"] * VALIDATED
    names = [str(number) for number in range(count)]
    return dataclasses.replace(
        toy.discs(),
        size=(SIZE, SIZE),
        classes=["one texture", "other texture"],
        mean=(float(images.mean() / 255),),
        std=(float(images.std() / 255),),
        images=images,
        masks=masks,
        names=names,
        groups=names,
        splits=np.array(splits),
    )


@pytest.fixture(scope="module")
def last_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What segmentation begins from -> every value at the end of its trial."""
    folder, data = tmp_path_factory.mktemp("planted"), two_textures()
    settings: dict[str, Any] = {
        "model": {"size": "pico", "patch": PATTERN, "decoder": {"depth": 1, "width": 64}},
        "masking": {"ratio": {"name": "constant", "value": 0.5}},
        "pretrain": {"epochs": 20, "batch": 32, "optimizer": {"name": "adamw", "base_lr": 1.6e-2}},
    }
    found = {}
    for encoder in ("finetune", "frozen", "random-init"):
        diary = toy.Diary()
        config = TrialConfig.model_validate(
            settings
            | {
                "segment": {
                    "encoder": encoder,
                    "epochs": 400,
                    "batch": 8,
                    "decoder_first": 0.5,
                    "features": 8,
                    "optimizer": {"name": "adamw", "base_lr": 6e-2},
                }
            }
        )
        context = toy.context(
            folder / encoder, diary, rungs=(1.0,), shared=folder / "shared", checkpoint_seconds=60.0
        )
        assert run_trial(config, 0, data, ProbeConfig(unit=PATTERN), context) == "complete"
        found[encoder] = {name: row["value"] for (_, _, name), row in diary.values.items()}
    return found


def test_only_pretraining_tells_the_two_textures_apart(
    last_rows: dict[str, dict[str, float]],
) -> None:
    scores = {encoder: values["miou"] for encoder, values in last_rows.items()}
    assert scores["finetune"] > 0.8
    assert scores["finetune"] > scores["random-init"] + 0.08
    assert scores["frozen"] > scores["random-init"]


def test_neither_thresholds_nor_raw_pixels_do(last_rows: dict[str, dict[str, float]]) -> None:
    """Half of the pixels are of either texture, so that chance has an IoU of a third."""
    values = last_rows["finetune"]
    assert values["threshold_miou"] < 0.5 and values["ridge_pixels_miou"] < 0.6


def test_the_encoder_fills_in_what_no_trivial_filling_knows(
    last_rows: dict[str, dict[str, float]],
) -> None:
    assert last_rows["finetune"]["probe_gain"] > 0.4
