"""The exported encoder computes in timm what it computed here.

pytest tests/trainables/test_export.py
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.timm_models import create_model
from trainables import durable
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.export import export_encoder, timm_weights
from trainables.mae import Encoder, initialise, patchify
from trainables.tensors import save_tensors

torch.set_num_threads(1)

CONFIG = TrialConfig()


def dataset_of(size, channels):
    return SimpleNamespace(
        size=size,
        channels=channels,
        low=0.0,
        high=255.0,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        name="cells",
        fingerprint="ab12",
    )


def trained_encoder(size, patch, channels):
    """Every weight away from where it starts, as training would leave it."""
    encoder = Encoder("pico", patch, size, channels)
    initialise(encoder, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder.eval()


@pytest.mark.parametrize(
    ("size", "patch", "channels"),
    [
        ((32, 32), (8, 8), 3),
        ((16, 16), (2, 2), 1),
        ((16, 48), (8, 8), 1),
        ((48, 16), (16, 16), 4),
        ((12, 20), (4, 4), 2),
        ((16, 48), (4, 16), 3),
        ((12, 20), (6, 2), 1),
    ],
)
def test_timm_computes_the_same(tmp_path, size, patch, channels):
    encoder = trained_encoder(size, patch, channels)
    export_encoder(tmp_path, encoder, CONFIG, 7, dataset_of(size, channels), {"loss": 0.5})
    about = json.loads((tmp_path / "encoder.json").read_text())["timm"]
    loaded = create_model(
        about["model"], checkpoint_path=str(tmp_path / "encoder.safetensors"), **about["kwargs"]
    ).eval()
    images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = encoder(patchify(images, patch)), loaded.forward_features(images)
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_the_description_judges_what_was_learnt(tmp_path):
    encoder = trained_encoder((16, 16), (8, 8), 1)
    described = []
    for results in (
        {"probe_gain": -1.25, "probe_gain/mean": 2.0, "probe_gain/laplace": -1.25},
        {"probe_gain": 0.5},
        {"probe_psnr": 21.5},
    ):
        export_encoder(tmp_path, encoder, CONFIG, 7, dataset_of((16, 16), 1), results)
        described.append(json.loads((tmp_path / "encoder.json").read_text())["pretraining"]["gain"])
    assert described == [
        {"decibels": -1.25, "over": "laplace", "is_learnt": False},
        {"decibels": 0.5, "over": None, "is_learnt": True},
        None,
    ]


def test_the_description_says_how_to_feed_and_load_it(tmp_path, monkeypatch):
    encoder = trained_encoder((16, 32), (8, 8), 1)
    export_encoder(tmp_path, encoder, CONFIG, 7, dataset_of((16, 32), 1), {"probe_psnr": 21.5})
    text = (tmp_path / "encoder.json").read_text()
    about = json.loads(text)
    assert about["input"]["size"] == [16, 32] and about["input"]["channels"] == 1
    assert (about["input"]["low"], about["input"]["high"]) == (0, 255)
    assert (about["input"]["mean"], about["input"]["std"]) == ([0.5], [0.25])
    assert TrialConfig.model_validate(about["pretraining"]["config"]) == CONFIG
    assert about["pretraining"]["seed"] == 7
    assert about["pretraining"]["results"] == {"probe_psnr": 21.5}
    assert str(tmp_path) not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.json", "encoder.safetensors"]

    monkeypatch.chdir(tmp_path)
    names = {}
    assert len(about["usage"]) == 3
    exec("\n".join(about["usage"]), names)
    assert names["tokens"].shape == (1, 1 + 2 * 4, 64)


def test_a_power_cut_leaves_no_torn_encoder(tmp_path, monkeypatch):
    """Each file is on the disk before it has its name, the weights before what tells of them."""
    steps, sync, replace = [], durable.sync, durable.os.replace
    monkeypatch.setattr(durable, "sync", lambda path: (steps.append(path.name), sync(path)))
    monkeypatch.setattr(
        durable.os, "replace", lambda old, new: (steps.append(new.name), replace(old, new))
    )
    encoder = trained_encoder((16, 16), (8, 8), 1)
    export_encoder(tmp_path, encoder, CONFIG, 7, dataset_of((16, 16), 1), {})
    assert steps == [
        ".encoder.safetensors.partial",
        "encoder.safetensors",
        ".encoder.json.partial",
        "encoder.json",
    ]


def test_nothing_but_the_encoder_is_in_the_file(tmp_path):
    encoder = trained_encoder((16, 16), (8, 8), 1)
    export_encoder(tmp_path, encoder, CONFIG, 7, dataset_of((16, 16), 1), {})
    names = load_file(tmp_path / "encoder.safetensors")
    assert {name.split(".")[0] for name in names} == {
        "patch_embed",
        "cls_token",
        "pos_embed",
        "blocks",
        "norm",
    }


def test_volumes_are_refused_as_timm_has_none():
    with pytest.raises(UserError, match="images of 2 axes"):
        timm_weights(trained_encoder((8, 8, 8), (4, 4, 4), 1))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_tensors_can_be_read_by_whom_new_files_can_be_read(tmp_path: Path, umask: int) -> None:
    """A colleague exports an encoder of a shared study."""
    before = os.umask(umask)
    try:
        (tmp_path / "new").write_text("")
        save_tensors({"one": torch.ones(2)}, tmp_path / "tensors")
        save_tensors({"one": torch.ones(3)}, tmp_path / "tensors")
    finally:
        os.umask(before)
    modes = {(tmp_path / name).stat().st_mode for name in ("new", "tensors")}
    assert len(modes) == 1 and load_file(tmp_path / "tensors")["one"].tolist() == [1, 1, 1]
