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
from trainables.scores import (
    Counted,
    ObjectCounts,
    confusion,
    miou_of,
    mious_of,
    object_counts,
    psnr,
)
from trainables.surfaces import case_sums

CLASSES = ["background", "cell", "platelet"]
NO_OBJECTS = ObjectCounts(np.zeros((4, 4), int), np.zeros((3, 2), int))


def scores(truth, predicted, classes=CLASSES):
    counts = confusion(torch.as_tensor(truth), torch.as_tensor(predicted), len(classes))
    return split_scores(Counted(classes, counts.numpy(), NO_OBJECTS))


def object_scores(counts, key):
    """Whatever is scored of objects by that metric."""
    found = split_scores(Counted(CLASSES, np.zeros((3, 3), int), counts))
    return {name: value for name, value in found.items() if parse(f"segment/{name}").key == key}


def objects(truth, predicted, instances=None, edges=(2.0, 4.0)):
    """What is counted in one image of two classes."""
    given = None if instances is None else np.array(instances)[None]
    return object_counts(np.array(truth)[None], np.array(predicted)[None], 3, edges, 1.0, given)


def over_all(counts):
    """Found, false, missed, detected."""
    return counts.sizes.sum(axis=0).tolist()


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


def test_many_confusion_matrices_score_as_each_alone():
    counts = np.random.default_rng(0).integers(0, 9, (20, 4, 4))
    counts[5], counts[6, 2], counts[6, :, 2] = 0, 0, 0
    found = mious_of(counts)
    assert found == pytest.approx([miou_of(one) for one in counts], nan_ok=True)
    assert np.isnan(found).tolist() == [number == 5 for number in range(20)]


def test_a_missing_class_that_is_predicted_scores_zero_and_joins_no_mean():
    """Else a good arm that mistakes one pixel would be worth half of a bad one that does not."""
    got = scores([[0, 1, 1, 1]], [[2, 1, 1, 1]])
    assert got["iou/platelet"] == got["dice/platelet"] == 0
    assert got["miou"] == got["dice"] == 1
    assert got["miou_with_background"] == pytest.approx((0 + 1) / 2)
    bad = scores([[0, 1, 1, 1]], [[0, 0, 0, 1]])
    assert bad["miou"] == pytest.approx(1 / 3) and "iou/platelet" not in bad


def test_unlabelled_pixels_are_counted_nowhere():
    truth = np.array([[0, 1, 255, 255, 1]])
    counted = [
        confusion(torch.tensor(truth), torch.tensor([[0, 1, a, b, 0]]), 3)
        for a, b in [(0, 0), (1, 2), (2, 1)]
    ]
    assert all(torch.equal(counts, counted[0]) for counts in counted)
    assert counted[0].sum() == 3
    wild, tame = ([0, 1, 2, 1, 1], [0, 1, 0, 0, 1])
    for counts, same in zip(objects(truth[0], wild), objects(truth[0], tame), strict=True):
        assert counts.tolist() == same.tolist()


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
    assert over_all(objects(truth, [[1, 1, 0, 0, 0, 0]])) == [1, 0, 0, 1]
    assert over_all(objects(truth, [[0, 1, 1, 0, 0, 0]])) == [1, 0, 0, 1]
    assert over_all(objects(truth, [[0, 1, 1, 0, 0, 1]])) == [1, 1, 0, 1]
    assert over_all(objects(truth, [[0, 0, 1, 1, 1, 0]])) == [0, 1, 1, 1]  # 2 of 5
    assert over_all(objects(truth, [[2, 2, 2, 2, 0, 0]])) == [0, 1, 1, 0]


def test_no_object_is_matched_twice():
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth, seen = rng.integers(0, 2, (2, 1, 6, 6))
        structure = np.ones((3, 3))
        num_true = scipy.ndimage.label(truth[0], structure)[1]
        num_seen = scipy.ndimage.label(seen[0], structure)[1]
        found, false, missed, _ = over_all(object_counts(truth, seen, 2, (2, 4)))
        assert found + missed == num_true and found + false == num_seen


def test_objects_touch_at_corners_but_not_across_images():
    diagonal = np.array([[1, 0], [0, 1]])
    assert over_all(objects(diagonal, diagonal)) == [1, 0, 0, 1]
    stack = np.array([[[1, 1]], [[1, 1]]])
    assert over_all(object_counts(stack, stack, 3, (2, 4))) == [2, 0, 0, 2]
    counts = object_counts(stack, stack, 3, (2, 4), 1.0, np.array([[[7, 7]], [[7, 9]]]))
    assert over_all(counts) == [3, 0, 0, 3]  # the same number in another image is another object


def test_sizes_are_those_of_the_true_object_and_of_the_false_alarm():
    truth = np.zeros((20, 20), int)
    truth[1, 1] = 1  # diameter 1.1: small, found
    truth[3:6, 1:4] = 1  # diameter 3.4: medium, found although seen large
    truth[10:16, 1:7] = 2  # diameter 6.8: large, missed
    seen = np.zeros_like(truth)
    seen[1, 1] = 1
    seen[3:7, 1:5] = 1  # diameter 4.5, IoU 9/16
    seen[10, 10:12] = 2  # diameter 1.6: a small false alarm
    counts = objects(truth, seen)
    assert counts.sizes.tolist() == [[1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert object_scores(counts, "object_f1") == {
        "object_f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1)),
        "object_f1/small": pytest.approx(2 / 3),
        "object_f1/medium": 1.0,
        "object_f1/large": 0.0,
    }


def test_sizes_without_objects_have_no_score():
    found = ObjectCounts(np.zeros((4, 4), int), np.zeros((3, 2), int))
    found.sizes[1] = (2, 0, 0, 2)
    for key in ("object_f1", "detection"):
        assert object_scores(found, key) == {key: 1.0, f"{key}/medium": 1.0}
    assert object_scores(found, "count_error") == {}  # there is no true object of any class


def test_objects_at_the_border_are_counted_but_are_of_no_size():
    """Its true size is unknown: neither that of a true object, nor that of a false alarm."""
    truth = np.zeros((8, 8), int)
    truth[0, 2:4] = truth[3:5, 7] = 1  # found at one border, missed at another
    truth[3, 3:5] = 1  # found inside
    seen = np.where(truth == 1, 1, 0)
    seen[3:5, 7] = 0
    seen[7, 0] = 2  # a false alarm in a corner
    seen[5, 3] = 2  # and one inside
    counts = objects(truth, seen, edges=(5.0, 6.0))
    assert counts.sizes.tolist() == [[1, 1, 0, 1], [0] * 4, [0] * 4, [1, 1, 1, 1]]
    assert object_scores(counts, "object_f1") == {
        "object_f1": pytest.approx(2 * 2 / (2 * 2 + 2 + 1)),
        "object_f1/small": pytest.approx(2 / 3),
    }
    volume = np.zeros((1, 4, 4, 4), int)
    volume[0, 1, 1, 0] = volume[0, 1, 1, 2] = 1  # one of them at a face across the last axis
    counts = object_counts(volume, volume, 2, (5.0, 6.0))
    assert counts.sizes[:, 0].tolist() == [1, 0, 0, 1]


def test_touching_instances_are_told_apart():
    """Two cells side by side, 3 and 5 pixels wide; no prediction of classes can part them."""
    truth = np.zeros((5, 12), int)
    truth[1:4, 1:9] = 1
    cells = np.zeros_like(truth)
    cells[1:4, 1:4], cells[1:4, 4:9] = 7, 4
    counts = objects(truth, truth, cells, edges=(4.0, 9.0))
    assert counts.sizes.tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [0] * 4, [0] * 4]
    assert object_scores(counts, "count_error") == {"count_error": 0.5, "count_error/cell": 0.5}
    assert over_all(objects(truth, truth)) == [1, 0, 0, 1]  # without instances they are one
    # shared out: the columns 1 to 3 are nearest to the left cell, 9 to 11 to the right one
    wide = truth.copy()
    wide[1:4, 9:11] = 1
    assert over_all(objects(truth, wide, cells)) == [2, 0, 0, 2]
    wide[0:5, 9:12] = 1  # 15 of 15 + 15: still found; and one more pixel is too much
    assert over_all(objects(truth, wide, cells)) == [2, 0, 0, 2]
    wide[0, 8] = 1
    assert over_all(objects(truth, wide, cells)) == [1, 0, 1, 2]


def matched_slowly(truth, predicted, instances):
    """(found, false alarms, missed) of one class in one image, object by object, pixel by pixel."""
    ring = np.ones((3, 3))
    of_seen, num_seen = scipy.ndimage.label(
        (predicted == 1) & ((truth == 0) | (instances > 0)), ring
    )
    owner = np.zeros_like(instances)  # the instance that each predicted pixel is shared out to
    for number in range(1, num_seen + 1):
        places = np.argwhere(of_seen == number)
        shared = [place for place in places if instances[tuple(place)]]
        for place in places if shared else ():
            nearest = min(((place - other) ** 2).sum() for other in shared)
            close = {
                instances[tuple(other)]
                for other in shared
                if ((place - other) ** 2).sum() == nearest
            }
            if len(close) > 1:
                return None  # as near to two instances: either may have it
            owner[tuple(place)] = close.pop()
    found, hits = 0, set()
    for instance in set(instances[instances > 0].tolist()):
        is_own = instances == instance
        whole = [np.isin(of_seen, of_seen[is_own & (of_seen > 0)])]
        if scipy.ndimage.label(is_own, ring)[1] == 1:
            whole = [of_seen == number for number in set(of_seen[is_own].tolist()) - {0}]
        for pieces in whole:
            piece = pieces & (owner == instance)
            if (piece & is_own).sum() >= 0.5 * max(1, (piece | is_own).sum()):
                found += 1
                hits |= set(of_seen[pieces & is_own].tolist())
                break
    count = len(set(instances[instances > 0].tolist()))
    return [found, num_seen - len(hits - {0}), count - found]


def test_what_is_shared_out_is_what_a_slow_count_shares_out():
    rng, compared, found = np.random.default_rng(0), 0, 0
    for _ in range(120):
        blocks = np.kron(rng.integers(0, 4, (3, 3)), np.ones((3, 3), int))
        truth = (blocks > 0).astype(int)
        seen = np.where(rng.random(truth.shape) < 0.75, truth, rng.integers(0, 2, truth.shape))
        expected = matched_slowly(truth, seen, blocks)
        if expected is not None:
            assert over_all(objects(truth, seen, blocks))[:3] == expected
            compared, found = compared + 1, found + expected[0]
    assert compared > 30 and found > 20


def test_what_is_shared_out_is_a_false_alarm_only_if_no_piece_of_it_matches():
    truth = np.zeros((5, 12), int)
    truth[1:4, 1:9] = 1
    cells = np.zeros_like(truth)
    cells[1:4, 1:4], cells[1:4, 4:9] = 1, 2
    grazing = np.where(cells == 1, 1, 0)
    grazing[2, 4] = 1  # one pixel of the other cell
    assert over_all(objects(truth, grazing, cells)) == [1, 0, 1, 1]
    sliver = np.zeros_like(truth)
    sliver[1, 3:5] = 1
    assert over_all(objects(truth, sliver, cells)) == [0, 1, 2, 0]


def test_an_instance_in_two_parts_is_found_by_both_together():
    truth = np.zeros((5, 9), int)
    truth[1:4, 1:8] = 1
    truth[1:4, 4] = 2  # a platelet lies across the cell
    cells = np.zeros_like(truth)
    cells[truth == 1], cells[truth == 2] = 1, 2
    assert over_all(objects(truth, truth, cells)) == [2, 0, 0, 2]
    half = np.where(truth == 1, 0, truth)
    half[1:4, 1:4] = 1
    half[1:2, 5:7] = 1  # 9 + 2 of 18 pixels
    assert over_all(objects(truth, half, cells)) == [2, 0, 0, 2]
    half[1:2, 5] = 0  # in two pieces, of which one is 1 pixel: 10 of 18
    assert over_all(objects(truth, half, cells)) == [2, 0, 0, 2]
    # a whole cell that is seen in three fragments is no such thing
    whole, fragments = np.zeros((2, 5, 9), int)
    whole[1:4, 1:8] = 1
    fragments[1:4, 1:6], fragments[1, 7], fragments[3, 7] = 1, 1, 1
    assert over_all(objects(whole, fragments, whole)) == [1, 2, 0, 1]


def test_an_instance_is_of_the_class_that_most_of_its_pixels_have():
    truth = np.array([[1, 1, 1, 2, 0, 2, 1, 255, 255]])
    cells = np.array([[5, 5, 5, 5, 5, 6, 0, 6, 6]])
    counts = objects(truth, truth, cells)
    # the cell's pixel of class 2 and the pixel without an instance belong to no object
    assert over_all(counts) == [2, 0, 0, 2] and counts.numbers.tolist() == [[0, 0], [0, 1], [0, 1]]
    assert over_all(objects(truth, np.array([[1, 1, 1, 1, 0, 2, 2, 0, 0]]), cells)) == [2, 0, 0, 2]
    background = np.array([[0, 0, 1]])
    assert over_all(objects(background, background, [[3, 3, 3]])) == [0, 0, 0, 0]


def test_detection_asks_for_half_of_the_pixels_and_nothing_else():
    truth = np.zeros((6, 10), int)
    truth[2:4, 1:5] = truth[2:4, 6:9] = 1
    seen = np.zeros_like(truth)
    seen[2, 1:5] = 1  # 4 of 8
    seen[2, 6:8] = 1  # 2 of 6
    assert over_all(objects(truth, seen)) == [1, 1, 1, 1]
    seen[3, 6] = 1  # 3 of 6, in the end of everything
    assert over_all(objects(truth, seen)) == [2, 0, 0, 2]
    assert over_all(objects(truth, np.ones_like(truth))) == [0, 1, 2, 2]
    assert object_scores(objects(truth, np.ones_like(truth)), "detection")["detection"] == 1
    seen[2:4, 1:3] = 2  # another class
    assert over_all(objects(truth, seen))[3] == 1


def test_the_error_of_the_count_is_of_each_image_and_class():
    """Two cells merged in one image and one too many in another do not make up for each other."""
    truth = np.zeros((2, 5, 9), int)
    truth[0, 2, [1, 3, 5]] = 1
    truth[1, 2, 1], truth[1, 2, 5] = 1, 2
    seen = truth.copy()
    seen[0, 2, 2] = 1  # merges two of three
    seen[1, 2, 7] = 1
    counts = object_counts(truth, seen, 3, (2.0, 4.0))
    assert counts.numbers.tolist() == [[0, 0], [2, 4], [0, 1]]
    assert object_scores(counts, "count_error") == {
        "count_error": pytest.approx(2 / 5),
        "count_error/cell": pytest.approx(2 / 4),
        "count_error/platelet": 0.0,
    }
    # nor does the help that the truth gives to F1
    cells = np.where(truth > 0, np.arange(9), 0)
    again = object_counts(truth, seen, 3, (2.0, 4.0), 1.0, cells)
    assert again.numbers.tolist() == counts.numbers.tolist()


def test_objects_of_a_volume_are_measured_as_balls():
    cube = np.zeros((1, 6, 6, 6), int)
    cube[0, 1:5, 1:5, 1:5] = 1  # 64 voxels: diameter 4.96 as a ball, 9.0 as a disc
    assert object_counts(cube, cube, 2, (4.0, 6.0)).sizes[1].tolist() == [1, 0, 0, 1]


def test_objects_are_as_large_as_their_voxels_make_them():
    def sizes(truth, seen, edges, **voxel):
        return object_counts(truth, seen, 2, edges, **voxel).sizes

    cube = np.zeros((1, 8, 8, 8), int)
    cube[0, 1:5, 1:5, 1:5] = 1  # 64 voxels of 2 x 1 x 4 mm: 512 mm^3, a ball of 9.93 mm
    seen = np.zeros_like(cube)
    seen[0, 6, 6, 6] = 1  # 8 mm^3: 2.48 mm
    for edges, place, false in [((4.0, 9.9), 2, 0), ((2.4, 10.0), 1, 1), ((10.0, 11.0), 0, 0)]:
        assert np.argwhere(sizes(cube, cube, edges, voxel=8.0)).tolist() == [[place, 0], [place, 3]]
        assert sizes(cube, seen, edges, voxel=8.0)[:, 1].argmax() == false
    sheet = np.pad(np.ones((1, 3, 3), int), ((0, 0), (1, 1), (1, 1)))
    # 9 pixels of 0.25 mm^2: a disc of 1.69 mm
    assert sizes(sheet, sheet, (1.6, 1.7), voxel=0.25)[:, 0].tolist() == [0, 1, 0, 0]
    assert (sizes(cube, seen, (2, 5)) == sizes(cube, seen, (2, 5), voxel=1.0)).all()


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
        is_scored = metric.of_split is not None or metric.is_trivial
        has_twin = is_scored and not metric.is_held_out
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
