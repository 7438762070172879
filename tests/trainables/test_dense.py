"""What frozen tokens know of classes: `pytest tests/trainables/test_dense.py`."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import toy
from tests.balls import PATCH, balls
from trainables import checkpoint, dense, phase
from trainables.data.batches import to_device
from trainables.dense import Prober, neighbour_scores, probed, raw_values
from trainables.mae import build_mae, patchify
from trainables.pretrain import pretrain
from trainables.ridge import Patches, cross_validated

torch.set_num_threads(1)

KEYS = {"dense_miou", "dense_knn_miou", "dense_miou_random", "dense_miou_pixels"}


def prober(tmp_path, data, config=None, seed=5, rows=None):
    """Of these data as they are now: another object, of which nothing is remembered."""
    context = toy.context(tmp_path, toy.Diary())
    rows = data.rows("train") if rows is None else rows
    return Prober(config or toy.trial(), seed, replace(data), rows, context)


def encoder(data, config=None, seed=5):
    config = config or toy.trial()
    return build_mae(config, data.size, data.channels, seed, is_padded=data.is_padded).encoder


def noisy_discs(**changes):
    """Of which no token tells everything."""
    data = toy.discs(**changes)
    noise = np.random.default_rng(0).normal(0, 60, data.images.shape)
    data.images[:] = np.clip(data.images + noise, 0, 255)
    return data


def test_bright_discs_are_told_by_tokens_neighbours_and_pixels(tmp_path):
    data = toy.discs(num_images=120)
    found = prober(tmp_path, data).scores(encoder(data))
    assert found.keys() == KEYS
    assert found["dense_miou_pixels"] > 0.95  # a grey level is all it takes
    assert found["dense_miou"] > 0.8 and found["dense_knn_miou"] > 0.5
    data.masks[:] = data.masks[np.random.default_rng(0).permutation(120)]
    shuffled = prober(tmp_path, data).scores(encoder(data))
    assert all(value < 0.3 for value in shuffled.values())


def test_the_random_start_is_that_of_the_trials_seed(tmp_path):
    data = noisy_discs()
    own, other = (prober(tmp_path, data).scores(encoder(data, seed=seed)) for seed in (5, 6))
    assert own["dense_miou"] == own["dense_miou_random"] == other["dense_miou_random"]
    assert other["dense_miou"] != own["dense_miou"]


def test_what_training_does_not_change_is_measured_once(tmp_path, monkeypatch):
    data, built = toy.discs(), []
    monkeypatch.setattr(
        dense, "build_mae", lambda *args, **options: built.append(1) or build_mae(*args, **options)
    )
    asked = prober(tmp_path, data)
    assert asked.scores(encoder(data)) == asked.scores(encoder(data)) and built == [1]


def test_only_labels_of_the_given_rows_are_used(tmp_path):
    data = toy.discs()
    rows = data.rows("train")[::2]
    before = prober(tmp_path, data, rows=rows).scores(encoder(data))
    is_other = np.ones(len(data.masks), bool)
    is_other[rows] = False
    data.masks[is_other] = 1 - data.masks[is_other]
    assert prober(tmp_path, data, rows=rows).scores(encoder(data)) == before
    data.masks[rows[:4]] = 1 - data.masks[rows[:4]]
    assert prober(tmp_path, data, rows=rows).scores(encoder(data)) != before


def test_without_labels_or_with_one_group_there_is_nothing_to_tell(tmp_path):
    data = toy.discs(labelled=False)
    assert prober(tmp_path, data).scores(encoder(data)) == {}
    data = replace(toy.discs(), groups=["one"] * 24)
    assert prober(tmp_path, data).scores(encoder(data)) == {}


def test_as_many_rows_as_have_so_many_pixels_together_evenly_spread():
    rows = np.arange(1000) * 2
    assert len(probed(replace(toy.discs(), size=(64, 64)), rows)) == dense.ROWS == 128
    assert len(probed(replace(toy.discs(), size=(8, 8)), rows)) == 128
    assert len(probed(replace(toy.discs(), size=(128, 128)), rows)) == 32
    assert len(probed(replace(toy.discs(), size=(96, 96, 96)), rows)) == dense.FEWEST_ROWS
    assert np.diff(probed(replace(toy.discs(), size=(64, 64)), rows)).max() <= 16


def test_tokens_that_are_no_number_are_told_as_such(tmp_path):
    data = toy.discs()
    broken = encoder(data)
    broken.norm.weight.data[0] = math.nan
    assert math.isnan(prober(tmp_path, data).scores(broken)["dense_miou"])


def test_a_model_goes_on_in_training_mode(tmp_path):
    data = toy.discs()
    model = encoder(data)
    modes = []
    model.register_forward_hook(lambda *_: modes.append(model.training))
    prober(tmp_path, data).scores(model)
    assert model.training and modes and not any(modes)


def test_pretraining_is_the_same_bit_by_bit_with_and_without(tmp_path, monkeypatch):
    def run(name):
        diary, folder = toy.Diary(), tmp_path / name
        context = toy.context(folder, diary)
        _, weights = pretrain(toy.trial(), 5, toy.discs(), toy.PROBE, context)
        return toy.repeatable(diary), weights

    values, weights = run("with")
    monkeypatch.setattr(Prober, "scores", lambda *_: {})
    others, bare = run("without")
    measured = {key for key in values if key[2] in KEYS}
    assert {key[1] for key in measured} == {4, 7, 14} and len(measured) == 3 * len(KEYS)
    assert {key: value for key, value in values.items() if key not in measured} == others
    assert all(weights[name].equal(bare[name]) for name in weights)


def test_rows_after_an_interruption_are_those_of_an_uninterrupted_run(tmp_path, monkeypatch):
    def run(name, diary, resume=None):
        context = toy.context(tmp_path / name, diary)
        return pretrain(toy.trial(), 5, toy.discs(), toy.PROBE, context, resume)

    whole, cut = toy.Diary(), toy.Diary()
    run("whole", whole)

    def update(learner, loss, plan, step, real=phase.update):
        if step == 9:
            raise toy.Interrupted
        return real(learner, loss, plan, step)

    with monkeypatch.context() as crashing, pytest.raises(toy.Interrupted):
        crashing.setattr(phase, "update", update)
        run("cut", cut)
    run("cut", cut, checkpoint.load_latest(tmp_path / "cut" / "checkpoints"))
    assert toy.repeatable(cut) == toy.repeatable(whole)


def test_raw_values_are_the_pixels_and_of_large_patches_means():
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert raw_values(images, (8, 8)).equal(patchify(images, (8, 8)))
    volume = torch.arange(32.0**3).view(1, 1, 32, 32, 32)
    values = raw_values(volume, (16, 16, 16))
    assert values.shape == (1, 8, 512)
    assert values[0, 0, 0] == volume[0, 0, :2, :2, :2].mean()
    volume[..., -1] = math.nan
    assert raw_values(volume, (4, 4, 4)).isfinite().all()


def test_the_nearest_patches_are_those_of_other_folds_and_count_alike(monkeypatch):
    monkeypatch.setattr(dense, "NEIGHBOURS", 2)
    angle = torch.tensor([0.0, 0.1, 0.2, 1.4, 1.5, 1.6]) + 0.01
    values = torch.stack([angle.cos(), angle.sin()], dim=1) * torch.arange(1.0, 7)[:, None]
    labels = torch.tensor([[1, 0], [0, 0], [1, 255], [0, 1], [0, 1], [0, 1]], dtype=torch.uint8)
    fold = torch.tensor([0, 1, 2, 0, 1, 2])
    scores_NQK = neighbour_scores(Patches(values, labels, fold), 2)
    # patch 0 is told by 1 and 2, whose second pixel has one label
    assert scores_NQK[0].tolist() == [[0.5, 0.5], [0.5, 0.0]]
    assert scores_NQK[3].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    monkeypatch.setattr(dense, "AT_ONCE", 1)
    assert neighbour_scores(Patches(values, labels, fold), 2).equal(scores_NQK)
    assert cross_validated(scores_NQK, labels, fold).sum() == 11


def test_padding_of_volumes_is_left_out(tmp_path):
    data = balls(tmp_path)
    assert data.is_padded
    config = toy.trial(model__patch=PATCH)
    asked = prober(tmp_path, data, config)
    patches = asked._patches(asked._tokens(encoder(data, config)))
    every = to_device(data, data.rows("train"), "cpu").batch(torch.arange(len(data.rows("train"))))
    labels_BPQ = patchify(every[1][:, None], PATCH)
    has_label = (labels_BPQ != 255).any(dim=-1)
    assert patches.labels_NQ.equal(labels_BPQ[has_label].to(torch.uint8))
    assert len(patches.labels_NQ) < labels_BPQ.shape[0] * labels_BPQ.shape[1]
    assert patches.values_ND.isfinite().all()
    owner = [data.groups[row] for row in data.rows("train")]
    fold_of = dict(zip(owner, dense.folds_of(owner).tolist(), strict=True))
    rows = has_label.nonzero()[:, 0].tolist()
    assert patches.fold_N.tolist() == [fold_of[owner[row]] for row in rows]
    found = asked.scores(encoder(data, config))
    assert found.keys() == KEYS and found["dense_miou_pixels"] > 0.8
