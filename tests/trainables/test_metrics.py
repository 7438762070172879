"""python -m pytest tests/trainables/test_metrics.py"""

import math

import monai.metrics
import numpy as np
import pytest
import scipy
import torch

from trainables.metrics import (
    METRICS,
    PHASES,
    known,
    metric_of,
    on_test,
    parse,
    place_of,
    rows,
    sign,
    split_scores,
    title_of,
)
from trainables.scores import Counted, confusion, object_counts, psnr
from trainables.surfaces import case_sums

CLASSES = ["background", "cell", "platelet"]


def scores(truth, predicted, classes=CLASSES):
    counts = confusion(torch.as_tensor(truth), torch.as_tensor(predicted), len(classes))
    return split_scores(Counted(classes, counts.numpy(), np.zeros((3, 3), int)))


def object_scores(counts):
    """All that is scored of objects."""
    found = split_scores(Counted(CLASSES, np.zeros((3, 3), int), counts))
    return {name: value for name, value in found.items() if name.startswith("object_f1")}


def objects(truth, predicted, edges=(2.0, 4.0)):
    return object_counts(np.array(truth)[None], np.array(predicted)[None], 3, edges)


def test_overlaps_by_hand():
    got = scores([[0, 0, 1, 1], [2, 0, 1, 0]], [[0, 1, 1, 1], [2, 2, 0, 0]])
    assert got["iou/background"] == pytest.approx(2 / 5)
    assert got["iou/cell"] == pytest.approx(2 / 4)
    assert got["iou/platelet"] == pytest.approx(1 / 2)
    assert got["dice/cell"] == pytest.approx(4 / 6)
    assert got["miou"] == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert got["miou_with_background"] == pytest.approx((2 / 5 + 2 / 4 + 1 / 2) / 3)
    assert got["dice"] == pytest.approx((4 / 6 + 2 / 3) / 2)


def test_rows_of_the_confusion_matrix_are_the_true_class():
    counts = confusion(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 1]), 3)
    assert counts.tolist() == [[0, 0, 0], [1, 1, 0], [0, 1, 0]]


def test_many_pixels_are_counted_in_portions(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    truth, predicted = (torch.randint(0, 3, (2, 5, 7), generator=generator) for _ in range(2))
    truth[0, 0, :3] = 255
    expected = confusion(truth, predicted, 3)
    monkeypatch.setattr("trainables.scores.AT_ONCE", 8)
    assert torch.equal(confusion(truth, predicted, 3), expected) and expected.sum() == 67


def test_a_class_that_occurs_nowhere_is_left_out_of_names_and_means():
    got = scores([[0, 1]], [[0, 1]])
    assert "iou/cell" in got and not any(name.endswith("/platelet") for name in got)
    assert got["miou"] == 1.0
    got = scores([[0, 0]], [[0, 0]])
    assert {parse(f"segment/{name}").of for name in got} == {"", "background"}
    of_overlaps = ("iou", "dice", "miou", "miou_with_background")
    assert {name: got[name] for name in got if name.split("/")[0] in of_overlaps} == {
        "miou_with_background": 1.0,
        "iou/background": 1.0,
        "dice/background": 1.0,
    }


def test_a_missing_class_that_is_predicted_scores_zero():
    assert scores([[0, 1, 1]], [[2, 1, 1]])["miou"] == pytest.approx((1 + 0) / 2)


def test_unlabelled_pixels_are_counted_nowhere():
    truth = np.array([[0, 1, 255, 255, 1]])
    counted = [
        confusion(torch.tensor(truth), torch.tensor([[0, 1, a, b, 0]]), 3)
        for a, b in [(0, 0), (1, 2), (2, 1)]
    ]
    assert all(torch.equal(counts, counted[0]) for counts in counted)
    assert counted[0].sum() == 3
    assert object_counts(truth, np.array([[0, 1, 2, 1, 1]]), 3, (2, 4)).tolist() == (
        object_counts(truth, np.array([[0, 1, 0, 0, 1]]), 3, (2, 4)).tolist()
    )


def test_overlaps_agree_with_monai():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (1, 40, 30), generator=generator)
    predicted = torch.where(torch.rand(truth.shape, generator=generator) < 0.7, truth, 1)
    got = scores(truth, predicted)
    one_hot = [torch.nn.functional.one_hot(x, 3).movedim(-1, 1) for x in (predicted, truth)]
    iou = monai.metrics.compute_iou(*one_hot)[0]
    dice = monai.metrics.compute_dice(*one_hot)[0]
    for index, name in enumerate(CLASSES):
        assert got[f"iou/{name}"] == pytest.approx(iou[index].item(), abs=1e-6)
        assert got[f"dice/{name}"] == pytest.approx(dice[index].item(), abs=1e-6)


def test_an_object_is_found_at_half_overlap_and_not_below():
    truth = [[1, 1, 1, 1, 0, 0]]
    assert objects(truth, [[1, 1, 0, 0, 0, 0]]).sum(axis=0).tolist() == [1, 0, 0]
    assert objects(truth, [[0, 1, 1, 0, 0, 0]]).sum(axis=0).tolist() == [1, 0, 0]
    assert objects(truth, [[0, 1, 1, 0, 0, 1]]).sum(axis=0).tolist() == [1, 1, 0]
    assert objects(truth, [[0, 0, 1, 1, 1, 0]]).sum(axis=0).tolist() == [0, 1, 1]  # 2 of 5
    assert objects(truth, [[2, 2, 2, 2, 0, 0]]).sum(axis=0).tolist() == [0, 1, 1]


def test_no_object_is_matched_twice():
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth, seen = rng.integers(0, 2, (2, 1, 6, 6))
        structure = np.ones((3, 3))
        num_true = scipy.ndimage.label(truth[0], structure)[1]
        num_seen = scipy.ndimage.label(seen[0], structure)[1]
        found, false, missed = object_counts(truth, seen, 2, (2, 4)).sum(axis=0)
        assert found + missed == num_true and found + false == num_seen


def test_objects_touch_at_corners_but_not_across_images():
    diagonal = np.array([[1, 0], [0, 1]])
    assert objects(diagonal, diagonal).sum(axis=0).tolist() == [1, 0, 0]
    stack = np.array([[[1, 1]], [[1, 1]]])
    assert object_counts(stack, stack, 3, (2, 4)).sum(axis=0).tolist() == [2, 0, 0]


def test_sizes_are_those_of_the_true_object_and_of_the_false_alarm():
    truth = np.zeros((1, 20, 20), int)
    truth[0, 0, 0] = 1  # diameter 1.1: small, found
    truth[0, 2:5, 0:3] = 1  # diameter 3.4: medium, found although seen large
    truth[0, 10:16, 0:6] = 2  # diameter 6.8: large, missed
    seen = np.zeros_like(truth)
    seen[0, 0, 0] = 1
    seen[0, 2:6, 0:4] = 1  # diameter 4.5, IoU 9/16
    seen[0, 10, 10:12] = 2  # diameter 1.6: a small false alarm
    counts = object_counts(truth, seen, 3, (2.0, 4.0))
    assert counts.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert object_scores(counts) == {
        "object_f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1)),
        "object_f1/small": pytest.approx(2 / 3),
        "object_f1/medium": 1.0,
        "object_f1/large": 0.0,
    }


def test_sizes_without_objects_have_no_score():
    assert object_scores(np.array([[0, 0, 0], [2, 0, 0], [0, 0, 0]])) == {
        "object_f1": 1.0,
        "object_f1/medium": 1.0,
    }


def test_objects_of_a_volume_are_measured_as_balls():
    cube = np.zeros((1, 6, 6, 6), int)
    cube[0, 1:5, 1:5, 1:5] = 1  # 64 voxels: diameter 4.96 as a ball, 9.0 as a disc
    assert object_counts(cube, cube, 2, (4.0, 6.0))[1].tolist() == [1, 0, 0]


def test_objects_are_as_large_as_their_voxels_make_them():
    cube = np.zeros((1, 6, 6, 6), int)
    cube[0, 1:5, 1:5, 1:5] = 1  # 64 voxels of 2 x 1 x 4 mm: 512 mm^3, a ball of 9.93 mm
    seen = np.zeros_like(cube)
    seen[0, 0, 0, 0] = 1  # 8 mm^3: 2.48 mm
    for edges, place, false in [((4.0, 9.9), 2, 0), ((2.4, 10.0), 1, 1), ((10.0, 11.0), 0, 0)]:
        counts = object_counts(cube, cube, 2, edges, voxel=8.0)
        assert np.argwhere(counts).tolist() == [[place, 0]]
        assert object_counts(cube, seen, 2, edges, voxel=8.0)[:, 1].argmax() == false
    sheet = np.ones((1, 3, 3), int)  # 9 pixels of 0.25 mm^2: a disc of 1.69 mm
    assert np.argwhere(object_counts(sheet, sheet, 2, (1.6, 1.7), voxel=0.25)).tolist() == [[1, 0]]
    assert object_counts(cube, seen, 2, (2, 5)).tolist() == (
        object_counts(cube, seen, 2, (2, 5), voxel=1.0).tolist()
    )


def test_psnr_by_hand():
    truth = torch.full((2, 1, 2, 2), 0.5)
    predicted = truth.clone()
    predicted[0] += 0.1
    predicted[1, 0, 0, 0] = 1.5  # clipped to 1: an error of 0.5 in one pixel of four
    assert psnr(predicted, truth).tolist() == pytest.approx([20.0, 10 * math.log10(16)], abs=1e-4)
    first = torch.tensor([[[True, False], [False, False]]] * 2)
    assert psnr(predicted, truth, first).tolist() == pytest.approx(
        [20.0, 10 * math.log10(4)], abs=1e-4
    )
    assert psnr(truth, truth).tolist() == pytest.approx([100.0, 100.0])


def test_rows_leave_out_what_does_not_exist():
    made = rows(
        {"iou/cell": 0.5, "miou": math.nan},
        phase="segment",
        step=3,
        epoch=1.5,
        progress=0.25,
        seconds=2.0,
    )
    assert made == [
        {
            "phase": "segment",
            "step": 3,
            "epoch": 1.5,
            "progress": 0.25,
            "metric": "iou/cell",
            "value": 0.5,
            "goal": "maximize",
            "unit": "",
            "seconds": 2.0,
        }
    ]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_direction_and_meaning(name):
    metric = METRICS[name]
    goal, unit, explains = metric.goal, metric.unit, metric.explains
    assert metric.title and set(metric.phases) <= set(PHASES)
    assert goal in ("minimize", "maximize", "none")
    assert isinstance(unit, str) and len(explains) > 10
    assert not set(name) & set("@/")


def test_names_with_a_class_or_a_ratio_belong_to_their_metric():
    assert metric_of("segment/iou/red/cell") is METRICS["iou"]
    assert metric_of("pretrain/probe_psnr@0.25") is METRICS["probe_psnr"]
    assert metric_of("segment/test_object_f1/small").goal == "maximize"
    hd95 = metric_of("segment/test_hd95/organ")
    assert (hd95.goal, hd95.unit) == ("minimize", "mm")
    for name in ("segment/case_dice/organ", "segment/nsd/organ"):
        assert (metric_of(name).goal, metric_of(name).unit) == ("maximize", "")


def test_names_are_taken_apart_and_told_in_words():
    assert parse("segment/iou/red/cell") == ("segment", "iou", "/red/cell")
    assert parse("pretrain/probe_psnr@0.25") == ("pretrain", "probe_psnr", "@0.25")
    assert parse("planned_flops") == ("", "planned_flops", "")
    titles = {
        "segment/iou/red cell": "IoU, red cell",
        "pretrain/probe_psnr@0.25": "probe PSNR@0.25",
        "segment/test_miou": "test mIoU",
        "planned_flops": "planned FLOPs",
        "segment/glow_worm/red cell": "glow worm, red cell",
    }
    assert {name: title_of(name) for name in titles} == titles
    assert known("segment/glow_worm") is None


def test_every_score_of_the_validation_split_has_a_twin_on_the_test_split():
    for key, metric in METRICS.items():
        has_twin = metric.of_split is not None and not metric.is_held_out
        twin = known(on_test(f"segment/{key}"))
        assert (twin is not None and twin.is_held_out) == has_twin, key
    assert on_test("segment/iou/red/cell") == "segment/test_iou/red/cell"


def test_a_phase_of_a_newer_version_comes_last():
    assert sorted(["later", *reversed(PHASES)], key=place_of) == [*PHASES, "later"]


@pytest.mark.parametrize("name", [key for key, metric in METRICS.items() if metric.of_split])
def test_a_perfect_segmentation_beats_a_wrong_one_and_nothing_has_no_score(name):
    def scored(predicted, truth=TRUTH):
        seen = object_counts(truth, predicted, 3, (2.0, 4.0))
        pixels = confusion(torch.as_tensor(truth), torch.as_tensor(predicted), 3).numpy()
        sums, counts = case_sums(truth[0], predicted[0], 3, (1.0, 1.0), 1.0)
        return METRICS[name].of_split(Counted(CLASSES, pixels, seen, sums, counts))

    def whole(values):
        parts = values if isinstance(values, dict) else {"": values}
        return parts.get("", parts.get("cell"))

    better = sign(METRICS[name].goal)
    assert better * whole(scored(TRUTH)) > better * whole(scored(WRONG))
    nothing = np.full_like(TRUTH, 255)
    values = scored(TRUTH, nothing)
    for value in values.values() if isinstance(values, dict) else [values]:
        assert math.isnan(value)


TRUTH = np.array([[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 0, 0]]], np.uint8)
WRONG = np.array([[[1, 1, 0, 0], [0, 0, 2, 2], [0, 0, 1, 1]]], np.uint8)
