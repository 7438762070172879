"""Trials on whole volumes of several shapes, some smaller than a crop: trained, judged, resumed."""

from __future__ import annotations

import math
import multiprocessing
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from monai.inferers import sliding_window_inference
from torch import nn

from tests import toy
from tests.balls import PROBE, SHAPES, SIZE, SPLITS, ball, balls, trial
from tests.trainables.test_store import source_of
from trainables.data import open_dataset
from trainables.data.batches import Resident, to_device, whole_volume
from trainables.data.source import Decoded, Grids, Whole
from trainables.data.store import write
from trainables.losses import LOSSES
from trainables.masking import MASKING
from trainables.segment import evaluate, predict, predict_volume
from trainables.trial import run_trial
from trainables.unetr import build_unetr
from trainables.windows import likeliest_between

torch.set_num_threads(1)


def run(config, dataset, folder, **context):
    diary = context.pop("diary", None) or toy.Diary()
    outcome = run_trial(config, 3, dataset, PROBE, toy.context(folder, diary, **context))
    return outcome, diary


# --- trials ---


@pytest.mark.parametrize("name", MASKING)
def test_every_strategy_learns_on_volumes_with_padding(tmp_path, name):
    dataset = balls(tmp_path)
    assert dataset.is_padded
    strategy = {"name": name}
    if name in ("anatomask", "hpm"):
        strategy["guided"] = {"name": "constant", "value": 0.5}
    if name == "amlp":
        strategy |= {"category_weight": 0.1, "features": "encoder", "lesion": "highest_loss"}
    config = trial(masking__strategy=strategy)
    outcome, diary = run(config, dataset, tmp_path / "trial")
    assert outcome == "complete"
    assert all(math.isfinite(row["value"]) for row in diary.values.values())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("target", ["pixels", "normalised"])
def test_every_loss_decoder_and_target_works_with_padding(tmp_path, loss, attention, target):
    decoder = {"depth": 1, "width": 64, "attention": attention}
    config = trial(
        model__decoder=decoder,
        pretrain__loss={"name": loss},
        pretrain__target=target,
        pretrain__visible_weight=0.5 if attention == "self" else 0.0,
        masking__secondary=0.2,
        segment__encoder="frozen",
    )
    outcome, diary = run(config, balls(tmp_path), tmp_path / "trial", rungs=(1.0,))
    assert outcome == "complete"
    assert all(math.isfinite(row["value"]) for row in diary.values.values())


def test_an_interrupted_trial_goes_on_bit_for_bit(tmp_path):
    dataset = balls(tmp_path)
    config = trial(
        masking__strategy={"name": "anatomask", "guided": {"name": "constant", "value": 0.5}},
        pretrain__epochs=2,
    )
    expected = toy.repeatable(run(config, dataset, tmp_path / "one")[1])
    diary = toy.Diary()
    places = sorted({place[:2] for place in expected}, key=lambda p: (p[0] == "segment", p[1]))
    for attempt, place in enumerate([places[1], places[-1]]):
        diary.crash_after = place
        with pytest.raises(toy.Interrupted):
            run(config, dataset, tmp_path / "two", diary=diary, attempt=f"a{attempt}")
    diary.crash_after = None
    outcome, _ = run(config, dataset, tmp_path / "two", diary=diary, attempt="a9")
    assert outcome == "complete" and toy.repeatable(diary) == expected


def test_whole_volumes_are_scored_in_millimetres_and_learnt(tmp_path):
    dataset = balls(tmp_path, [(14, 16, 12)] * 6, spacing=(2.0, 1.0, 0.75))
    assert not dataset.is_padded
    config = trial(
        pretrain__epochs=1,
        segment__epochs=40,
        segment__batch=4,
        segment__optimizer={"name": "adamw", "base_lr": 0.3},
        segment__encoder="random-init",
    )
    outcome, diary = run(config, dataset, tmp_path / "trial", rungs=(1.0,))
    scores = {row["metric"]: row for row in diary.values.values() if row["phase"] == "segment"}
    assert outcome == "complete" and scores["hd95"]["unit"] == "mm"
    assert scores["dice/ball"]["value"] > 0.7 and scores["case_dice/ball"]["value"] > 0.7
    assert scores["nsd"]["value"] > 0.5 and scores["hd95"]["value"] < 6
    assert scores["object_f1"]["value"] > 0


def test_objects_are_small_or_large_in_millimetres(tmp_path, monkeypatch):
    dataset = balls(tmp_path, [(14, 16, 12)] * 6, spacing=(2.0, 2.0, 2.0))  # no border is near
    settings, model = unetr(dataset)
    monkeypatch.setattr(
        "trainables.segment.predict_volume",
        lambda model, dataset, volume, *_, **__: torch.tensor(dataset.mask_of(volume))[None],
    )
    scores = evaluate(model, settings, dataset, "val", toy.context(tmp_path, toy.Diary()))
    low, high = dataset.object_edges
    sizes = set()
    for volume in (4, 5):
        cubic_millimetres = 8 * (dataset.mask_of(volume) == 1).sum()
        diameter = 2 * (cubic_millimetres * 3 / (4 * np.pi)) ** (1 / 3)
        sizes.add("small" if diameter < low else "large" if diameter >= high else "medium")
    assert sizes != {"small"}  # as all would be if voxels were taken for millimetres
    assert {f"object_f1/{size}" for size in sizes} == {n for n in scores if "object_f1/" in n}
    assert scores["object_f1"] == 1 and scores["hd95"] == 0 and scores["nsd"] == 1


class Bright(nn.Module):
    """Finds balls by their brightness."""

    def forward(self, images):
        return torch.cat([1.5 - images, images - 1.5], dim=1)


def test_a_resampled_volume_is_judged_by_the_labels_of_its_file(tmp_path):
    """Scores of the voxels that the model saw, linear between them, against all voxels."""
    shapes, filed = [(8, 12, 9)] * 6, [(16, 12, 18)] * 6
    source = source_of(
        np.zeros((6, 1, *SIZE), np.uint16),
        splits=SPLITS,
        classes=["background", "ball"],
        window=(0, 65535),
        decode=lambda part: Decoded(
            *(a[None, ..., ::2, :, ::2] for a in ball(part, filed[part])),
            truth=ball(part, filed[part])[1][None],
        ),
        whole=Whole(
            shapes, [(2.0, 1.0, 2.0)] * 6, 0.5, 1.0, 1, Grids(filed, [(1.0, 1.0, 1.0)] * 6)
        ),
    )
    dataset = open_dataset(write(source, tmp_path / "cache"))
    settings, model = unetr(dataset)[0], Bright()
    found = predict_volume(model, dataset, 4, settings, CPU, as_filed=True)[0]
    assert found.shape == (16, 12, 18)
    seen = predict_volume(model, dataset, 4, settings, CPU)[0]
    assert seen.shape == (8, 12, 9) and found.sum() > 2 * seen.sum()
    scores_KS = model(whole_volume(dataset, 4, CPU))[0]
    assert torch.equal(found, likeliest_between(scores_KS, filed[4], (0.5, 1.0, 0.5)))
    scores = evaluate(model, settings, dataset, "val", toy.context(tmp_path, toy.Diary()))
    truth = ball(4, filed[4])[1], ball(5, filed[5])[1]
    guess = [
        predict_volume(model, dataset, volume, settings, CPU, as_filed=True)[0].numpy()
        for volume in (4, 5)
    ]
    shared = sum(int((t & (g == 1)).sum()) for t, g in zip(truth, guess, strict=True))
    total = sum(int(t.sum() + (g == 1).sum()) for t, g in zip(truth, guess, strict=True))
    assert scores["dice/ball"] == pytest.approx(2 * shared / total)
    assert 0.6 < scores["dice/ball"] < 1


def test_training_draws_its_crops_and_only_segmentation_looks_for_classes(tmp_path, monkeypatch):
    dataset, drawn = balls(tmp_path), []
    draw = Resident.draw

    def spy(self, index_B, seed, step, samples_B, *, foreground=0.0):
        found = draw(self, index_B, seed, step, samples_B, foreground=foreground)
        drawn.append((foreground, found[1] is not None))
        return found

    monkeypatch.setattr(Resident, "draw", spy)
    config = trial(segment__foreground=0.75)
    run(config, dataset, tmp_path / "trial")
    rows = len(dataset.rows("train"))
    expected = [(0.0, False)] * round(rows / 4) + [(0.75, True)] * round(rows / 4)
    assert drawn == expected


def _worker(rank, folder, diary):
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", timedelta(seconds=60), rank=rank, world_size=2
    )
    config = trial(masking__strategy={"name": "anatomask"}, segment__foreground=0.5)
    try:
        run(config, balls(folder), folder / "trial", diary=diary, rank=rank, world_size=2)
    finally:
        dist.destroy_process_group()


def test_two_workers_come_to_what_one_comes_to(tmp_path):
    balls(tmp_path)  # decoded before both want it
    config = trial(masking__strategy={"name": "anatomask"}, segment__foreground=0.5)
    alone = toy.repeatable(run(config, balls(tmp_path), tmp_path / "alone")[1])
    other = multiprocessing.get_context("spawn").Process(
        target=_worker, args=(1, tmp_path, toy.Diary()), daemon=True
    )
    other.start()
    together = toy.Diary()
    _worker(0, tmp_path, together)
    other.join()
    assert other.exitcode == 0
    found = toy.repeatable(together)
    assert found.keys() == alone.keys()
    names = {metric for _, _, metric in found}
    assert {"case_dice/ball", "hd95", "nsd", "probe_psnr"} <= names
    for place, value in alone.items():
        assert found[place] == pytest.approx(value, rel=2e-3, abs=2e-3), place


# --- windows ---


def unetr(dataset, seed=0):
    config = trial(segment__encoder="random-init")
    model = build_unetr(
        config,
        dataset.size,
        dataset.channels,
        len(dataset.classes),
        seed,
        is_padded=dataset.is_padded,
    )
    return config.segment, model


CPU = torch.device("cpu")


def test_a_volume_of_the_size_of_a_crop_is_predicted_as_that_crop(tmp_path):
    dataset = balls(tmp_path, [SIZE, SIZE])
    settings, model = unetr(dataset)
    images, _ = to_device(dataset, np.array([1]), "cpu").batch(torch.tensor([0]))
    expected = predict(model, images, settings, CPU)
    assert expected.unique().tolist() == [0, 1]
    assert torch.equal(predict_volume(model, dataset, 1, settings, CPU), expected.to(torch.uint8))


def test_a_volume_smaller_than_a_crop_is_predicted_without_its_padding(tmp_path):
    dataset = balls(tmp_path)
    settings, model = unetr(dataset)
    found = predict_volume(model, dataset, 5, settings, CPU)
    assert found.shape == (1, 6, 12, 9) and model.training
    row = int(np.flatnonzero(dataset.volumes.owner == 5)[0])
    images, _ = to_device(dataset, np.array([row]), "cpu").batch(torch.tensor([0]))
    first = predict(model, images, settings, CPU)[:, :6, :, :1]
    assert torch.equal(found[:, :, :, :1].long(), first)  # the other window does not reach there


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_classes_are_those_of_monais_windows_also_where_a_window_is_larger(tmp_path, overlap):
    dataset = balls(tmp_path, overlap=overlap)
    settings, model = unetr(dataset)
    for volume, shape in enumerate(SHAPES):
        found = predict_volume(model, dataset, volume, settings, CPU)
        model.eval()
        scores = sliding_window_inference(
            whole_volume(dataset, volume, CPU), SIZE, 2, model, overlap=overlap, mode="gaussian"
        )
        x, y, z = shape
        assert torch.equal(found, scores.argmax(dim=1)[:, :x, :y, :z].to(torch.uint8))


def test_windows_that_overlap_are_their_weighted_mean(tmp_path):
    """Two windows along the last axis, put together by hand."""
    dataset = balls(tmp_path, [SIZE, (8, 12, 12)])
    settings, model = unetr(dataset)
    whole = whole_volume(dataset, 1, CPU)
    model.eval()
    with torch.no_grad():
        left, right = (model(whole[..., z : z + 8]) for z in (0, 4))
    # Gaussians of an eighth of the window along every axis, but never nothing
    x, y, z = (
        torch.exp(-((torch.arange(edge) - (edge - 1) / 2) ** 2) / 2 / (edge / 8) ** 2)
        for edge in SIZE
    )
    weight = (x[:, None, None] * y[:, None] * z).clamp(min=1e-3)
    scores, total = torch.zeros(1, 2, 8, 12, 12), torch.zeros(8, 12, 12)
    for window, first in ((left, 0), (right, 4)):
        scores[..., first : first + 8] += window * weight
        total[..., first : first + 8] += weight
    expected = (scores / total).argmax(dim=1)
    assert torch.equal(predict_volume(model, dataset, 1, settings, CPU).long(), expected)


class Local(nn.Module):
    """Sees three voxels in every direction and nothing else."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 2, 5, padding=2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, images):
        return self.second(self.first(images).relu())


@pytest.mark.parametrize("overlap", [0.5, 0.75])
def test_crops_and_whole_volume_agree_on_interior_voxels(tmp_path, overlap):
    """Each window is right where it can see all around, and the others there weigh next to nothing.

    A local model makes one truth for each voxel: what it says of the whole volume at once.
    """
    dataset = balls(tmp_path, [(40, 12, 8), (40, 44, 36)], size=(24, 24, 20), overlap=overlap)
    settings = trial().segment
    model = Local()
    whole = whole_volume(dataset, 1, CPU)
    with torch.no_grad():
        scores = model(whole)
    margin = scores[:, 0].sub(scores[:, 1]).abs()
    found = predict_volume(model, dataset, 1, settings, CPU)
    interior = (slice(None), *[slice(3, -3)] * 3)
    is_clear = margin[interior] > margin.quantile(0.2)
    agrees = found[interior] == scores.argmax(dim=1)[interior]
    assert agrees[is_clear].float().mean() > 0.995


def test_without_overlap_windows_stand_side_by_side(tmp_path):
    dataset = balls(tmp_path, [SIZE, (16, 12, 8)], overlap=0.0)
    settings, model = unetr(dataset)
    images, _ = to_device(dataset, np.array([1, 2]), "cpu").batch(torch.tensor([0, 1]))
    expected = torch.cat(list(predict(model, images, settings, CPU)), dim=0)
    assert torch.equal(predict_volume(model, dataset, 1, settings, CPU)[0].long(), expected)


def test_the_scores_of_a_split_are_those_of_its_volumes(tmp_path):
    """By hand: Dice of all voxels, and the mean over volumes. Every window is a sign of life."""
    dataset, signs = balls(tmp_path), []
    settings, model = unetr(dataset)
    context = toy.context(tmp_path, toy.Diary(), alive=lambda: signs.append(None))
    scores = evaluate(model, settings, dataset, "val", context)
    assert len(signs) > len(dataset.volumes_of("val"))
    shared, both, cases = 0, 0, []
    for volume in (4, 5):
        found = predict_volume(model, dataset, volume, settings, CPU)[0].numpy() == 1
        truth = dataset.mask_of(volume) == 1
        shared, both = shared + (found & truth).sum(), both + found.sum() + truth.sum()
        cases.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
    assert scores["dice/ball"] == pytest.approx(2 * shared / both)
    assert scores["case_dice/ball"] == pytest.approx(np.mean(cases))
