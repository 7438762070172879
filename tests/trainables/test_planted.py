"""What is planted in generated images is found: pytest tests/trainables/test_planted.py

Lesions and their ground differ by a texture that no pixel and no linear map of a patch tells (see
trainables/data/textures.py). A thousand images without labels show what repeats; eight labelled
ones do not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from tests import toy
from trainables.config import ProbeConfig, TrialConfig
from trainables.data import DataConfig, open_dataset, prepare
from trainables.trial import run_trial

torch.set_num_threads(1)

PATTERN = 4


@pytest.fixture(scope="module")
def last_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What segmentation begins from -> every value at the end of its trial."""
    folder = tmp_path_factory.mktemp("planted")
    source = {"source": "textures", "pattern": PATTERN, "val": 60, "test": 0}
    config = TypeAdapter(DataConfig).validate_python(source)
    data = open_dataset(prepare(config, folder, folder / "cache"))
    settings: dict[str, Any] = {
        "model": {"size": "pico", "patch": PATTERN, "decoder": {"depth": 1, "width": 64}},
        "masking": {"ratio": {"name": "constant", "value": 0.5}},
        "pretrain": {"epochs": 14, "batch": 32, "optimizer": {"name": "adamw", "base_lr": 1.6e-2}},
    }
    found = {}
    for encoder in ("finetune", "frozen", "random-init"):
        diary = toy.Diary()
        config = TrialConfig.model_validate(
            settings
            | {
                "segment": {
                    "encoder": encoder,
                    "epochs": 200,
                    "batch": 8,
                    "decoder_first": 0.5,
                    "augment": "flips",  # a pattern is known by its size
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


def test_only_pretraining_tells_lesions_from_their_ground(
    last_rows: dict[str, dict[str, float]],
) -> None:
    scores = {encoder: values["miou"] for encoder, values in last_rows.items()}
    assert scores["finetune"] > 0.6
    assert scores["finetune"] > scores["random-init"] + 0.35
    assert scores["frozen"] > scores["random-init"] + 0.35


def test_neither_thresholds_nor_raw_pixels_do(last_rows: dict[str, dict[str, float]]) -> None:
    """The best that they know is that all might be lesion, which a quarter of the pixels is."""
    values = last_rows["finetune"]
    assert values["threshold_miou"] < 0.3 and values["ridge_pixels_miou"] < 0.3


def test_the_encoder_fills_in_what_no_trivial_filling_knows(
    last_rows: dict[str, dict[str, float]],
) -> None:
    assert last_rows["finetune"]["probe_gain"] > 0.4
