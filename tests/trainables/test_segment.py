"""python -m pytest tests/trainables/test_segment.py"""

import dataclasses
import itertools
import multiprocessing
from dataclasses import replace
from pathlib import Path

import monai.losses
import numpy as np
import pytest
import torch
from PIL import Image

from tests import toy
from tests.trainables.test_store import source_of
from trainables import checkpoint
from trainables.blocks import Block, ResidualBlock
from trainables.checkpoint import Saved
from trainables.config import TrialConfig
from trainables.context import Context
from trainables.data import Dataset, open_dataset
from trainables.data.rows import cut
from trainables.data.source import tile_corners
from trainables.data.store import write
from trainables.errors import UserError
from trainables.labelled import labelled_rows
from trainables.mae import build_mae
from trainables.segment import (
    dice_cross_entropy,
    evaluate,
    layer_decay,
    make_learner,
    predictions,
    segment,
)
from trainables.unetr import build_unetr

torch.set_num_threads(1)


SIZE = (16, 32)


def cells(train=6, val=3, test=2):
    """Discs of two classes on noise; the last line of every image is not labelled."""
    rng = np.random.default_rng(0)
    count = train + val + test
    masks = np.zeros((count, *SIZE), np.uint8)
    row, column = np.mgrid[: SIZE[0], : SIZE[1]]
    for mask in masks:
        for label, radius in ((1, 4), (2, 1.5)):
            y, x = rng.uniform(4, 12), rng.uniform(4, 28)
            mask[(row - y) ** 2 + (column - x) ** 2 < radius**2] = label
    noise = rng.normal(0.2, 0.05, (count, 1, *SIZE))
    images = (255 * (noise + 0.3 * masks[:, None])).clip(0, 255).astype(np.uint8)
    masks[:, :, -1] = 255
    return Dataset(
        folder=Path(),
        fingerprint="cells",
        name="cells",
        size=SIZE,
        channels=1,
        classes=["background", "cell", "platelet"],
        small_classes=[2],
        mean=(0.5,),
        std=(0.25,),
        low=0,
        high=255,
        object_edges=(4.0, 6.0),
        is_labelled=True,
        images=images,
        masks=masks,
        instances=None,
        names=[str(number) for number in range(count)],
        groups=[str(number) for number in range(count)],
        splits=np.array(["train"] * train + ["val"] * val + ["test"] * test),
        about={},
    )


TILE = (16, 16)


def tiled(tmp_path, masks, cells=None, pictures=None):
    """Images cut into tiles, for validation but the first one, which is grey where a class is."""
    masks = [np.pad([[1]], 15).astype(np.uint8), *masks]
    pictures = [120 * (mask % 255) for mask in masks[: 1 if pictures else None]] + (pictures or [])
    cells = cells and [masks[0].astype(np.uint16), *cells]
    corners = [tile_corners(mask.shape, TILE) for mask in masks]
    ends = np.cumsum([0, *map(len, corners)]).tolist()
    source = source_of(
        np.zeros((ends[-1], 1, *TILE), np.uint8),
        splits=["train"] * ends[1] + ["val"] * (ends[-1] - ends[1]),
        classes=["background", "cell", "platelet"],
        has_instances=cells is not None,
        parts=[range(*pair) for pair in itertools.pairwise(ends)],
        cut_from=[mask.shape for mask in masks],
        decode=lambda part: cut(
            pictures[part][None], masks[part], None if cells is None else cells[part], TILE
        ),
    )
    return replace(open_dataset(write(source, tmp_path)), object_edges=(6.0, 12.0))


class Reads(torch.nn.Module):
    """Knows what the grey of these pictures means."""

    def __init__(self, dataset):
        super().__init__()
        self.mean, self.std = dataset.mean[0], dataset.std[0]

    def forward(self, images):
        label = (images * self.std + self.mean) * 255 / 120
        return -(label - torch.arange(3).view(-1, 1, 1)).square()


def config(**settings):
    given = {"epochs": 2, "batch": 2, "features": 4, "precision": "fp32"}
    given |= {"encoder": "random-init"} | settings
    return TrialConfig.model_validate({"model": {"size": "pico", "patch": 8}, "segment": given})


def context(folder, told, stop_at=None, **settings):
    def report(rows):
        told.append(rows)
        return rows[0]["step"] == stop_at

    given = {
        "device": torch.device("cpu"),
        "folder": folder,
        "attempt": "first",
        "rungs": (0.5, 1.0),
        "report": report,
        "heartbeat": lambda *_: None,
    }
    return Context(**(given | settings))


def run(
    folder,
    *,
    dataset=None,
    encoder_state=None,
    stop_at=None,
    resume=None,
    parts=1,
    recomputes=False,
    **settings,
):
    """(outcome, rows of every rung, newest checkpoint's tensors)."""
    told = []
    outcome = segment(
        config(**settings),
        0,
        dataset or cells(),
        encoder_state,
        context(folder, told, stop_at, micro_batches=parts, recomputes=recomputes),
        resume,
    )
    newest = checkpoint.load_latest(folder / "checkpoints")
    return outcome, told, newest and newest[0]


def values(rows):
    timed = {"images_per_second", "device_seconds", "peak_memory"}
    return {row["metric"]: row["value"] for row in rows if row["metric"] not in timed}


def test_the_loss_by_hand():
    """Two pixels, two classes: beliefs in class 1 are 3/4 (true) and 1/4 (background)."""
    scores = torch.tensor([[[0.0, 0.0]], [[np.log(3.0), -np.log(3.0)]]]).reshape(1, 2, 1, 2)
    truth = torch.tensor([[[1, 0]]])
    dice = 2 * 0.75 / (1 + 1)
    assert dice_cross_entropy(scores, truth).item() == pytest.approx(
        -np.log(0.75) + 1 - dice, abs=1e-5
    )


def test_the_loss_is_monais_where_all_is_labelled_and_every_class_is_there():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, 9, 7, generator=generator)
    truth = torch.randint(0, 4, (3, 9, 7), generator=generator)
    theirs = monai.losses.DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    ours = dice_cross_entropy(scores, truth)
    assert ours.item() == pytest.approx(theirs(scores, truth[:, None]).item(), abs=1e-5)


def test_ignored_pixels_are_as_if_they_were_cut_off():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 8, 8, generator=generator)
    truth = torch.randint(0, 3, (2, 8, 8), generator=generator)
    truth[:, :, 5:] = 255
    cut = dice_cross_entropy(scores[..., :5], truth[..., :5])
    for edited in (scores, scores.clone()):
        edited[..., 5:] *= 7
        edited.requires_grad_()
        loss = dice_cross_entropy(edited, truth)
        loss.backward()
        assert loss.item() == pytest.approx(cut.item(), abs=1e-6)
        assert not edited.grad[..., 5:].any() and edited.grad[..., :5].all()


def test_an_image_without_labels_adds_nothing():
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    truth = torch.full((2, 4, 4), 255)
    assert dice_cross_entropy(scores, truth).item() == 0.0
    truth[0] = 1
    alone = dice_cross_entropy(scores[:1], truth[:1])
    assert dice_cross_entropy(scores, truth).item() == pytest.approx(alone.item() / 2)


def test_a_class_the_image_lacks_is_not_in_its_dice():
    truth = torch.tensor([[[0, 1]]])
    scores = torch.tensor([[[0.0, 1.0]], [[0.5, 2.0]], [[-30.0, -30.0]]]).reshape(1, 3, 1, 2)
    two = dice_cross_entropy(scores[:, :2], truth).item()
    assert dice_cross_entropy(scores, truth).item() == pytest.approx(two, abs=1e-5)


def test_the_loss_of_a_batch_is_the_mean_over_its_parts():
    scores, truth = torch.randn(4, 3, 5, 5), torch.randint(0, 3, (4, 5, 5))
    truth[0, :4] = 255
    parts = [dice_cross_entropy(scores[i::2], truth[i::2]).item() for i in range(2)]
    assert dice_cross_entropy(scores, truth).item() == pytest.approx(sum(parts) / 2, abs=1e-6)


def test_rungs_report_every_metric_and_the_last_one_the_test_split(tmp_path):
    outcome, (half, full), _ = run(tmp_path)
    assert outcome == "complete"
    names = {row["metric"] for row in half}
    assert names >= {
        "loss",
        "miou",
        "miou_with_background",
        "iou/cell",
        "iou/platelet",
        "iou/background",
        "dice",
        "dice/cell",
        "object_f1",
        "images_per_second",
        "device_seconds",
        "flops",
        "planned_flops",
        "peak_memory",
    }
    assert not any(name.startswith("test_") for name in names)
    assert {"test_miou", "test_iou/cell", "test_object_f1"} <= {row["metric"] for row in full}
    assert {(r["phase"], r["step"], r["epoch"], r["progress"]) for r in half} == {
        ("segment", 3, 1.0, 0.5)
    }
    assert {(r["step"], r["epoch"], r["progress"]) for r in full} == {(6, 2.0, 1.0)}
    half, full = values(half), values(full)
    assert half["flops"] * 2 == full["flops"] == half["planned_flops"] == full["planned_flops"] > 0
    assert "test_miou" not in values(run(tmp_path / "b", dataset=cells(test=0))[1][-1])


def test_the_reported_loss_is_the_mean_since_the_rung_before(tmp_path, monkeypatch):
    losses = []

    def recorded(scores, truth):
        losses.append(dice_cross_entropy(scores, truth))
        return losses[-1]

    monkeypatch.setattr("trainables.segment.dice_cross_entropy", recorded)
    _, (half, full), _ = run(tmp_path, epochs=4)  # two passes to each rung
    values_of_steps = [loss.item() for loss in losses]
    assert len(values_of_steps) == 12
    assert values(half)["loss"] == pytest.approx(sum(values_of_steps[:6]) / 6, abs=1e-5)
    assert values(full)["loss"] == pytest.approx(sum(values_of_steps[6:]) / 6, abs=1e-5)


def test_a_picture_of_the_validation_images_is_left(tmp_path):
    run(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "pictures" / "segmentation.png"))
    assert picture.shape[2] == 3 and picture.shape[0] > 3 * 128  # three images, enlarged


def test_a_stopped_and_resumed_run_ends_bit_equal(tmp_path):
    _, expected, expected_tensors = run(tmp_path / "whole")
    outcome, told, _ = run(tmp_path / "parts", stop_at=3)
    assert outcome == "stopped" and len(told) == 1
    tensors, state, _ = checkpoint.load_latest(tmp_path / "parts" / "checkpoints")
    assert (state["phase"], state["step"]) == ("segment", 3)
    outcome, told, ended = run(tmp_path / "parts", resume=Saved(tensors, state, ""))
    assert outcome == "complete"
    assert [values(rows) for rows in told] == [values(rows) for rows in expected]
    assert ended.keys() == expected_tensors.keys()
    for name, value in expected_tensors.items():
        assert torch.equal(ended[name], value), name


def test_blocks_that_recompute_change_no_number(tmp_path, monkeypatch):
    _, expected, expected_tensors = run(tmp_path / "whole")
    recomputed = toy.recomputing(monkeypatch)
    _, told, tensors = run(tmp_path / "sparing", recomputes=True)
    assert recomputed == {(Block, True), (ResidualBlock, True)}
    assert [values(rows) for rows in told] == [values(rows) for rows in expected]
    assert all(torch.equal(tensors[name], value) for name, value in expected_tensors.items())


def test_a_run_resumed_between_rungs_averages_the_same_loss(tmp_path, monkeypatch):
    _, expected, _ = run(tmp_path / "whole", epochs=4)
    saved = []
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda folder, name, tensors, state, remote: saved.append(
            Saved({k: v.clone() for k, v in tensors.items()}, state, name)
        ),
    )
    told = []
    segment(
        config(epochs=4),
        0,
        cells(),
        None,
        context(tmp_path / "often", told, checkpoint_seconds=0.0),
        None,
    )
    assert [each.state["step"] for each in saved] == [3, 6, 9, 12]
    _, told, _ = run(tmp_path / "again", epochs=4, resume=saved[0])
    assert [values(rows) for rows in told] == [values(rows) for rows in expected]


def encoder_of(tensors):
    return checkpoint.weights(tensors, "encoder")


def test_a_frozen_encoder_is_bit_identical_and_a_finetuned_one_is_not(tmp_path):
    pretrained = build_mae(config(), SIZE, 1, seed=7).encoder.state_dict()
    for kind, is_same in (("frozen", True), ("finetune", False)):
        _, _, tensors = run(tmp_path / kind, encoder_state=pretrained, encoder=kind)
        after = encoder_of(tensors)
        assert after.keys() == pretrained.keys()
        assert all(torch.equal(after[k], pretrained[k]) for k in after) is is_same
        moved = any(name.startswith("optimizer/encoder.") for name in tensors)
        assert moved is not is_same


def test_finetuning_begins_at_the_pretrained_encoder_and_the_control_at_a_fresh_one(tmp_path):
    pretrained = build_mae(config(), SIZE, 1, seed=7).encoder.state_dict()
    slow = {"optimizer": {"name": "adamw", "base_lr": 1e-12, "weight_decay": 0}}
    _, _, tensors = run(tmp_path / "a", encoder_state=pretrained, encoder="finetune", **slow)
    assert all(torch.allclose(v, pretrained[k]) for k, v in encoder_of(tensors).items())
    _, _, tensors = run(tmp_path / "b", encoder="random-init", **slow)
    fresh = build_mae(config(), SIZE, 1, seed=0).encoder.state_dict()
    assert all(torch.allclose(v, fresh[k]) for k, v in encoder_of(tensors).items())


def test_only_a_pretrained_encoder_is_spared_by_layer_decay():
    assert layer_decay(config(encoder="finetune", layer_decay=0.75).segment) == 0.75
    assert layer_decay(config(encoder="random-init").segment) is None


def test_one_image_is_learnt_by_heart(tmp_path):
    dataset = cells(train=2, val=0, test=0)
    dataset.splits[1] = "val"
    dataset.images[1], dataset.masks[1] = dataset.images[0], dataset.masks[0]
    adamw = {"name": "adamw", "base_lr": 1.0, "weight_decay": 0.0}
    _, told, _ = run(
        tmp_path,
        dataset=dataset,
        batch=1,
        epochs=80,
        features=8,
        optimizer=adamw,
        augment={"name": "none"},
    )
    scores = values(told[-1])
    assert scores["miou"] > 0.9 and scores["object_f1"] == 1.0


def test_a_loss_that_is_not_a_number_ends_the_trial(tmp_path):
    outcome, told, tensors = run(tmp_path, optimizer={"name": "adamw", "base_lr": 1e30})
    assert (outcome, told, tensors) == ("diverged", [], None)


def test_scores_of_a_known_prediction(tmp_path):
    """A model that sees a cell everywhere: precision is the share of cells."""
    dataset = cells()

    class Seescells(torch.nn.Module):
        def forward(self, images):
            scores = torch.zeros(len(images), 3, *images.shape[2:])
            scores[:, 1] = 1
            return scores

    got = evaluate(Seescells(), config().segment, dataset, "val", context(tmp_path, []))
    labelled = dataset.masks[dataset.rows("val")][..., :-1]
    assert got["iou/cell"] == pytest.approx((labelled == 1).mean())
    assert got["miou"] == pytest.approx((labelled == 1).mean() / 2)
    assert got["object_f1/large"] == got["object_f1"] == 0.0


def test_an_object_cut_by_four_tiles_is_one_of_its_uncut_size(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[12:20, 12:20] = 1  # diameter 9.0: medium; in each tile 4.5, small, and at a border
    dataset = tiled(tmp_path, [mask])
    for batch in (1, 3, 8):
        settings = config(batch=batch).segment
        scores = evaluate(Reads(dataset), settings, dataset, "val", context(tmp_path, []))
        assert scores["iou/cell"] == scores["object_f1"] == scores["detection/medium"] == 1
        assert {name for name in scores if "_f1" in name} == {"object_f1", "object_f1/medium"}
        assert scores["count_error"] == 0


def test_images_of_every_shape_are_judged_as_wholes(tmp_path):
    """What their tiles see is put together where they were cut, whatever the batch."""
    rng = np.random.default_rng(0)
    shapes = [(16, 16), (32, 48), (20, 40), (33, 16)]
    masks = [rng.integers(0, 3, shape).astype(np.uint8) for shape in shapes]
    masks[1][:3] = 255
    seen = [120 * rng.integers(0, 3, shape).astype(np.uint8) for shape in shapes]
    cells = [rng.integers(0, 999, shape).astype(np.uint16) for shape in shapes]
    dataset = tiled(tmp_path, masks, cells, seen)
    settings = config(batch=5).segment
    for rank, of_rank in ((0, [0, 2]), (1, [1, 3])):
        here = context(tmp_path, [], rank=rank, world_size=2)
        found = list(predictions(Reads(dataset), settings, dataset, "val", here))
        assert len(found) == len(of_rank)
        for image, judged in zip(of_rank, found, strict=True):
            np.testing.assert_array_equal(judged.truth_BS[0], masks[image])
            np.testing.assert_array_equal(judged.predicted_BS[0] * 120, seen[image])
            np.testing.assert_array_equal(judged.instances_BS[0], cells[image])
    idle = context(tmp_path, [], rank=4, world_size=5)
    assert list(predictions(Reads(dataset), settings, dataset, "val", idle)) == []


def test_where_tiles_overlap_the_mean_score_decides_and_a_pixel_counts_once(tmp_path):
    class Sides(torch.nn.Module):
        """The left tile, which is dark, says cell by 3; the right one says platelet by 2."""

        def forward(self, images):
            scores = torch.zeros(len(images), 3, *TILE)
            is_left = images.flatten(1).mean(dim=1) < 0
            scores[is_left, 1], scores[~is_left, 2] = 3, 2
            return scores

    mask = np.ones((16, 24), np.uint8)
    picture = np.zeros((16, 24), np.uint8)
    picture[:, 16:] = 240
    dataset = replace(tiled(tmp_path, [mask], pictures=[picture]), mean=(0.25,))
    settings = config().segment
    (judged,) = predictions(Sides(), settings, dataset, "val", context(tmp_path, []))
    assert judged.predicted_BS[0, 0].tolist() == [1] * 16 + [2] * 8
    scores = evaluate(Sides(), settings, dataset, "val", context(tmp_path, []))
    assert scores["iou/cell"] == pytest.approx(16 / 24)


def test_instances_of_uncut_images_are_told_apart_too(tmp_path):
    """Two cells touch in every image; what sees them as one is not blamed, but for the number."""
    labels, instances = np.zeros((2, 6, 16, 16), np.uint8)
    labels[:, 4:8, 2:10] = 1
    instances[:, 4:8, 2:6], instances[:, 4:8, 6:10] = 1, 2
    images = 120 * labels[:, None]
    dataset = replace(
        cells(train=1, val=5, test=0),
        size=(16, 16),
        images=images,
        masks=labels,
        instances=instances,
        mean=(0.5,),
    )
    settings = config(batch=2).segment
    found = evaluate(Reads(dataset), settings, dataset, "val", context(tmp_path, []))
    assert found["object_f1"] == 1 and found["count_error"] == 0.5


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_refused(tmp_path, split):
    with pytest.raises(UserError, match=f"no labelled image of cells is in the {split} split"):
        run(tmp_path, dataset=cells(**{split: 0}))


def test_a_batch_that_workers_cannot_share_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"segment\.batch: 3 images .* 2 workers"):
        segment(config(batch=3), 0, cells(), None, context(tmp_path, [], world_size=2), None)


def cut_images(folder):
    """Three images in tiles, whose scores are between nothing and everything."""
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 3, shape).astype(np.uint8) for shape in [(32, 48), (20, 40), (16, 16)]]
    seen = [120 * np.where(rng.random(mask.shape) < 0.5, mask, 0) for mask in masks]
    columns = [np.arange(mask.shape[1], dtype=np.uint16) // 4 for mask in masks]
    instances = [mask + 3 * column for mask, column in zip(masks, columns, strict=True)]
    return tiled(folder / "cache", masks, instances, [grey.astype(np.uint8) for grey in seen])


HELD = {"batch": 4, "encoder": "finetune", "decoder_first": 0.5}


def worker(rank, folder, told, scores):
    """One of two workers of two runs, from random and from held weights.

    `told` collects rank 0's rows of both, `scores` those of cut images.
    """
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    try:
        here = context(folder / str(rank), told, rank=rank, world_size=2)
        assert segment(config(batch=4), 0, cells(), None, here, None) == "complete"
        held = context(folder / f"held-{rank}", told, rank=rank, world_size=2)
        assert segment(config(**HELD), 0, cells(), pretrained(), held, None) == "complete"
        dataset = cut_images(folder)
        scores |= evaluate(Reads(dataset), config(batch=4).segment, dataset, "val", here)
    finally:
        torch.distributed.destroy_process_group()


def test_a_batch_is_learnt_in_parts_as_it_is_whole(tmp_path):
    _, whole, _ = run(tmp_path / "whole", batch=4)
    _, parts, _ = run(tmp_path / "parts", batch=4, parts=3)
    assert [values(rows) for rows in parts] == [
        pytest.approx(values(rows), rel=1e-3, abs=1e-3) for rows in whole
    ]


def test_two_workers_learn_what_one_learns(tmp_path):
    _, alone, tensors = run(tmp_path / "alone", batch=4)
    _, held, held_tensors = run(tmp_path / "held", encoder_state=pretrained(), **HELD)
    other = multiprocessing.get_context("spawn").Process(
        target=worker, args=(1, tmp_path, [], {}), daemon=True
    )
    dataset = cut_images(tmp_path)
    other.start()
    together, scores = [], {}
    worker(0, tmp_path, together, scores)
    other.join()
    assert other.exitcode == 0
    assert [values(rows) for rows in together] == [
        pytest.approx(values(rows), rel=1e-3, abs=1e-3) for rows in [*alone, *held]
    ]
    for place, expected in (("0", tensors), ("held-0", held_tensors)):
        shared, _, _ = checkpoint.load_latest(tmp_path / place / "checkpoints")
        for name, value in expected.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert not (tmp_path / "1").exists()
    of_all = evaluate(Reads(dataset), config().segment, dataset, "val", context(tmp_path, []))
    assert scores == of_all and scores["count_error"] > 0
    assert all(0 < scores[name] < 1 for name in ("miou", "object_f1", "detection"))


# Few labels, and the decoder first


def test_with_few_labels_it_learns_as_many_steps_from_those_alone(tmp_path):
    """Images beyond the chosen ones could be anything."""
    dataset = cells(train=8)
    chosen = labelled_rows(config(labels=2).segment, dataset, 0)
    strange = dataclasses.replace(dataset, images=dataset.images.copy())
    strange.images[[row for row in range(8) if row not in chosen]] = 77
    _, told, tensors = run(tmp_path / "few", dataset=dataset, labels=2)
    _, _, same = run(tmp_path / "strange", dataset=strange, labels=2)
    _, all_told, others = run(tmp_path / "all", dataset=dataset)
    assert told[-1][0]["step"] == all_told[-1][0]["step"] == 8
    assert all(tensors[name].equal(same[name]) for name in tensors)
    assert not all(tensors[name].equal(others[name]) for name in tensors)


def pretrained(seed=3):
    return build_mae(config(), SIZE, 1, seed).encoder.state_dict()


def test_the_decoder_learns_alone_first_and_the_encoder_after_it(tmp_path):
    settings = {"encoder": "finetune", "encoder_state": pretrained(), "decoder_first": 0.5}
    _, _, half = run(tmp_path, stop_at=3, **settings)
    assert all(half[f"model/encoder.{name}"].equal(value) for name, value in pretrained().items())
    assert not any(name.startswith("optimizer/encoder") for name in half)
    _, _, done = run(tmp_path / "whole", **settings)
    changed = [
        not encoder_of(done)[name].equal(value)
        for name, value in pretrained().items()
        if value.ndim > 1
    ]
    assert all(changed)


@pytest.mark.parametrize("decoder_first", [0.7, 0.4])
def test_interrupted_while_the_encoder_is_held_or_after_it_ends_alike(tmp_path, decoder_first):
    settings = {
        "dataset": cells(train=12),
        "encoder": "finetune",
        "encoder_state": pretrained(),
        "decoder_first": decoder_first,
        "epochs": 2,
    }
    _, told, whole = run(tmp_path / "whole", **settings)
    run(tmp_path / "broken", stop_at=6, **settings)
    resume = checkpoint.load_latest(tmp_path / "broken" / "checkpoints")
    _, again, resumed = run(tmp_path / "broken", resume=Saved(*resume), **settings)
    assert values(told[-1]) == values(again[-1])
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_gradients_are_clipped(tmp_path):
    """So short that Adam's floor is felt: the weights hardly move."""

    def moved(clip):
        _, _, tensors = run(tmp_path / str(clip), clip=clip)
        fresh = make_learner(config(), 0, cells(), None, context(tmp_path, []), 6).model
        return sum(
            (tensors[f"model/{name}"] - value).abs().sum()
            for name, value in fresh.state_dict().items()
            if name.startswith("head")
        )

    assert moved(1e-9) < 0.1 * moved(None)


def test_without_the_images_skip_the_decoder_sees_tokens_alone(tmp_path):
    """When nothing of a token gets through, all images look alike."""

    def difference(image_skip):
        model = build_unetr(config(encoder="frozen", image_skip=image_skip), SIZE, 1, 3)
        for skip in model.token_skips:
            torch.nn.init.zeros_(skip.map.weight)
        one, other = model(torch.randn(2, 1, *SIZE))
        return (one - other).abs().max()

    assert difference(image_skip=True) > 1e-2
    assert difference(image_skip=False) == 0
