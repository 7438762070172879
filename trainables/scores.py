"""What a trained model's predictions are worth: scores of images, of segmented pixels and objects.

Which scores a trial reports, and in which direction each is better, says metrics.py.

Conventions of segmentation:
- overlaps (IoU, Dice) come from ONE confusion matrix pooled over all pixels of all images;
- a class that neither the truth nor the prediction contains has no score (NaN), and is left out of
  means;
- "without background" leaves out class 0;
- pixels without a label (255) are counted nowhere, and belong to no object;
- images are whole: where they were cut into tiles, the tiles' predictions are put together first,
  and each pixel of an image counts once;
- scores of whole volumes (case_dice, hd95, nsd) are those of surfaces.py.

Conventions of objects, which are counted over all images:
- a true object is an instance where the data have instances, of the class that most of its pixels
  have in the mask; else it is a set of touching pixels (corners count) of one class. Pixels of an
  instance that are of another class, and labelled pixels that no instance has, belong to no object,
  and predicting their class is neither right nor wrong;
- a predicted object is a set of touching pixels of one predicted class, also if it is one pixel:
  a smallest size would hide false alarms, of which small ones are typical;
- an object is found if a predicted one matches it at IoU >= 0.5. Instances may touch, which classes
  of pixels cannot tell apart: see `_shared_out` for whom a predicted object belongs to that lies
  over several. A predicted object that matches none is a false alarm;
- found and missed objects count in the size bin of the true object, false alarms in that of their
  own size. Objects at the border of the image, true ones and false alarms, count over all but in no
  size bin: the image cuts them off, so that their true size is unknown. (Objects beside unlabelled
  pixels keep their bin, as masks often leave the rim of every object unlabelled.)
- "detection" forgives what F1 asks of outlines, "count error" asks whether objects are kept apart.

Letters of shapes: B images, C channels, *S pixels (any number of axes), K classes, N objects, P
pairs of a true and a predicted object that overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainables.late import Late

if TYPE_CHECKING:
    import torch
    from scipy import ndimage
    from torch import Tensor
else:
    torch = Late("torch")
    ndimage = Late("scipy.ndimage")

IGNORED = 255  # label of pixels that are not labelled
SIZE_BINS = ("small", "medium", "large")
MATCH_IOU = 0.5
DETECTED_SHARE = 0.5  # of an object's pixels
FOUND, FALSE, MISSED, DETECTED = range(4)  # what objects are counted as
AT_ONCE = 2**22  # pixels counted in one go, as int64
SSIM_1, SSIM_2 = 0.01**2, 0.03**2  # (Wang et al. 2004) for a data range of 1
BEST_PSNR = 100.0  # dB; of a perfect picture, which would be infinite

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Objects(NamedTuple):
    """The objects of a stack of images."""

    number_BS: npt.NDArray[np.int32]  # which object each pixel belongs to, from 1 on; 0: to none
    label_N: Counts  # the class of each
    image_N: Counts  # its place in the stack
    area_N: Counts  # pixels
    is_cut_N: npt.NDArray[np.bool_]  # it touches the border of its image


class ObjectCounts(NamedTuple):
    """What is counted of objects; adds up over images."""

    # (4, 4): lines SIZE_BINS and objects at the border; columns FOUND, FALSE, MISSED, DETECTED
    sizes: Counts
    numbers: Counts  # (K, 2): sums over images of |predicted - true| numbers and of true ones


class Counted(NamedTuple):
    """What was counted over all images of a split."""

    classes: Sequence[str]  # background first
    confusion_KK: Counts  # pixels: rows the true class, columns the predicted one
    objects: ObjectCounts
    case_sums: Floats | None = None  # of whole volumes (K, N), see surfaces.case_sums
    case_counts: Counts | None = None


def psnr(predicted: Tensor, truth: Tensor, is_counted: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each image (B,) in dB; intensities (B, C, *S) in [0, 1].

    The prediction is clipped to [0, 1]; the data range is 1. With `is_counted` (B, *S) only those
    pixels are compared.
    """
    error = (predicted.clamp(0, 1) - truth).square().mean(dim=1).flatten(1)
    if is_counted is None:
        mean_square = error.mean(dim=1)
    else:
        weight = is_counted.flatten(1).to(error.dtype)
        mean_square = (error * weight).sum(dim=1) / weight.sum(dim=1)
    return -10 * torch.log10(mean_square.clamp(min=10 ** (-BEST_PSNR / 10)))


def ssim(predicted: Tensor, truth: Tensor, where_BS: Tensor) -> Tensor:
    """Structural similarity of each image, its map averaged over the pixels `where_BS` -> (B,).

    Visible pixels are the truth, as a window at the rim of a hidden region sees both. The window is
    the usual Gaussian (sigma 1.5, 11 pixels); below 11 pixels of edge it shrinks with the image.
    torchmetrics agrees, whose window is no product of axes: in 3D it took 60 times as long.
    """
    composite, truth = torch.where(where_BS[:, None], predicted, truth).double(), truth.double()
    sigma = 1.5 * min(1.0, min(truth.shape[2:]) / 11)
    mean, true_mean, square, true_square, product = (
        _blurred(values, sigma)
        for values in (composite, truth, composite**2, truth**2, composite * truth)
    )
    variance, true_variance = (square - mean**2).clamp(min=0), (true_square - true_mean**2).clamp(0)
    luminance = (2 * mean * true_mean + SSIM_1) / (mean**2 + true_mean**2 + SSIM_1)
    structure = 2 * (product - mean * true_mean) + SSIM_2
    map_BCS = luminance * structure / (variance + true_variance + SSIM_2)
    return mean_where(map_BCS.mean(dim=1), where_BS).float()


def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Pixel counts (K, K), rows the true class, columns the predicted one. Labels of any shape."""
    unlabelled = num_classes * num_classes
    counted = torch.zeros(unlabelled + 1, dtype=torch.int64, device=truth.device)
    parts = (torch.split(labels.flatten(), AT_ONCE) for labels in (truth, predicted))
    for true, guess in zip(*parts, strict=True):
        cell = torch.where(true == IGNORED, unlabelled, true.long() * num_classes + guess.long())
        counted += torch.bincount(cell, minlength=unlabelled + 1)
    return counted[:unlabelled].view(num_classes, num_classes)


def iou(counted: Counted) -> dict[str, float]:
    """Intersection over union of every class."""
    return _by_class(_overlaps(counted.confusion_KK)[0], counted.classes)


def miou(counted: Counted) -> float:
    """Mean IoU of the classes, without background, that the truth has: the same for all arms."""
    return miou_of(counted.confusion_KK)


def miou_of(confusion_KK: Counts) -> float:
    """The same of a confusion matrix."""
    return mean_of_present(_of_true_classes(_overlaps(confusion_KK)[0], confusion_KK)[1:])


def mious_of(confusion_NKK: Counts) -> Floats:
    """The same of many (N,)."""
    overlap_NK = _of_true_classes(_overlaps(confusion_NKK)[0], confusion_NKK)[:, 1:]
    is_there_NK = ~np.isnan(overlap_NK)
    with np.errstate(invalid="ignore"):  # 0 / 0: there is no class but the background
        means_N = np.where(is_there_NK, overlap_NK, 0.0).sum(axis=1) / is_there_NK.sum(axis=1)
    return np.asarray(means_N, np.float64)


def miou_with_background(counted: Counted) -> float:
    """Mean IoU of all classes that the truth has."""
    overlap_K = _overlaps(counted.confusion_KK)[0]
    return mean_of_present(_of_true_classes(overlap_K, counted.confusion_KK))


def dice(counted: Counted) -> dict[str, float]:
    """Dice, mean of the classes, without background, that the truth has; and of every class."""
    values = _overlaps(counted.confusion_KK)[1]
    mean = mean_of_present(_of_true_classes(values, counted.confusion_KK)[1:])
    return {"": mean} | _by_class(values, counted.classes)


def objects_in(
    labels_BS: npt.NDArray[Any],
    num_classes: int,
    instances_BS: npt.NDArray[Any] | None = None,
) -> Objects:
    """The objects of a stack of labels (B, *S): instances, or without them touching pixels.

    `instances_BS` are whole numbers, 0 where there is no object; each is unique in its image.
    """
    if instances_BS is None:
        number_BS, label_N = _touching(labels_BS, num_classes)
    else:
        number_BS, label_N = _instances(labels_BS, num_classes, instances_BS)
    count = len(label_N)
    area_N = np.bincount(number_BS.ravel(), minlength=count + 1)[1:]
    image_N = np.zeros(count, np.int64)
    for image in range(len(number_BS)):
        image_N[_present(number_BS[image : image + 1], count)] = image
    is_cut_N = np.zeros(count, bool)
    for axis in range(1, number_BS.ndim):
        for border in (0, -1):
            is_cut_N |= _present(number_BS.take([border], axis), count)
    return Objects(number_BS, label_N, image_N, area_N, is_cut_N)


def object_counts(
    truth_BS: npt.NDArray[Any],
    predicted_BS: npt.NDArray[Any],
    num_classes: int,
    edges: tuple[float, float],
    voxel: float = 1.0,
    instances_BS: npt.NDArray[Any] | None = None,
) -> ObjectCounts:
    """What there is of objects in a stack of whole images' labels (B, *S).

    `edges` are the two diameters that separate small, medium and large objects, in the unit of
    length of `voxel`, the volume (or area) of one voxel: mm with mm^3, pixels with 1.
    """
    true = objects_in(truth_BS, num_classes, instances_BS)
    belongs_nowhere = (predicted_BS == truth_BS) & (true.number_BS == 0)
    is_out = belongs_nowhere | (truth_BS == IGNORED)
    seen = objects_in(np.where(is_out, 0, predicted_BS), num_classes)
    is_found_N, is_detected_N, is_false_N = _matched(true, seen, instances_BS is not None)
    true_bin_N, seen_bin_N = (_size_bins(objects, edges, voxel) for objects in (true, seen))
    sizes = np.zeros((len(SIZE_BINS) + 1, 4), np.int64)
    for kind, bins in (
        (FOUND, true_bin_N[is_found_N]),
        (FALSE, seen_bin_N[is_false_N]),
        (MISSED, true_bin_N[~is_found_N]),
        (DETECTED, true_bin_N[is_detected_N]),
    ):
        sizes[:, kind] = np.bincount(bins, minlength=len(sizes))
    true_BK, seen_BK = (_how_many(objects, num_classes) for objects in (true, seen))
    numbers = [abs(seen_BK - true_BK).sum(axis=0), true_BK.sum(axis=0)]
    return ObjectCounts(sizes, np.stack(numbers, axis=1))


def object_f1(counted: Counted) -> dict[str, float]:
    """F1 of objects, over all and by size."""
    return _over_all_and_by_size(counted, _f1)


def detection(counted: Counted) -> dict[str, float]:
    """Share of true objects of whose pixels at least half are predicted as their class.

    Whatever else is predicted: it is no recall of F1's matching, which asks for an outline too.
    """
    return _over_all_and_by_size(counted, _detected)


def count_error(counted: Counted) -> dict[str, float]:
    """Error of the number of objects, relative to the true one: over all, and of every class.

    Sums over images and classes of |predicted - true| and of the true numbers are divided, so that
    too many in one image do not make up for too few in another. Touching objects that are seen as
    one count as one, whether or not classes of pixels could have kept them apart.
    """
    wrong, true = counted.objects.numbers.sum(axis=0).tolist()
    with np.errstate(invalid="ignore", divide="ignore"):
        each = counted.objects.numbers[1:, 0] / counted.objects.numbers[1:, 1]
    each[~np.isfinite(each)] = math.nan  # there is none of the class, so nothing to relate to
    by_class = dict(zip(counted.classes[1:], each.tolist(), strict=True))
    return {"": wrong / true if true else math.nan} | by_class


def diameter(area: Counts, axes: int, voxel: float = 1.0) -> npt.NDArray[np.float64]:
    """Diameter of the disc (or ball) as large as so many pixels, each of the size `voxel`."""
    if axes == 2:
        return np.asarray(np.sqrt(area * voxel * 4 / np.pi))
    ball = math.pi ** (axes / 2) / math.gamma(axes / 2 + 1)  # volume at radius 1
    return np.asarray(2 * (area * voxel / ball) ** (1 / axes))


def mean_of_present(values: npt.NDArray[np.float64]) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else math.nan


def mean_where(values_BS: Tensor, where_BS: Tensor) -> Tensor:
    """Mean of each image over the pixels `where_BS` -> (B,)."""
    weight_BS = where_BS.to(values_BS.dtype)
    return (values_BS * weight_BS).flatten(1).sum(1) / weight_BS.flatten(1).sum(1)


def _blurred(values: Tensor, sigma: float) -> Tensor:
    """A Gaussian window around each pixel of (B, C, *S), mirrored at the borders, axis by axis."""
    reach = int(3.5 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, device=values.device)
    weight = torch.exp(-(offsets.to(values.dtype) ** 2) / (2 * sigma**2))
    for axis in range(2, values.ndim):
        edge = values.shape[axis]
        places = torch.arange(edge, device=values.device)
        from_SW = (places[:, None] + offsets).abs()
        from_SW = (edge - 1) - (edge - 1 - from_SW).abs()
        window_SS = torch.zeros(edge, edge, dtype=values.dtype, device=values.device)
        window_SS.scatter_add_(1, from_SW, (weight / weight.sum()).expand(edge, -1))
        values = (values.movedim(axis, -1) @ window_SS.T).movedim(-1, axis)
    return values


def _overlaps(confusion_KK: Counts) -> tuple[Floats, Floats]:
    """IoU and Dice of every class (K,); of several matrices (..., K)."""
    hits = confusion_KK.diagonal(axis1=-2, axis2=-1).astype(float)
    true, predicted = confusion_KK.sum(axis=-1), confusion_KK.sum(axis=-2)
    with np.errstate(invalid="ignore"):  # 0 / 0: the class occurs nowhere
        return hits / (true + predicted - hits), 2 * hits / (true + predicted)


def _of_true_classes(values: Floats, confusion_KK: Counts) -> Floats:
    """The values (..., K), NaN for classes that the truth lacks.

    Such a class has an IoU of 0 if a single pixel is taken for it, and none otherwise: which
    classes a mean is of must not depend on what is predicted.
    """
    return np.where(confusion_KK.sum(axis=-1) > 0, values, np.nan)


def _by_class(values: Floats, classes: Sequence[str]) -> dict[str, float]:
    return dict(zip(classes, values.tolist(), strict=True))


def _touching(
    labels_BS: npt.NDArray[Any], num_classes: int
) -> tuple[npt.NDArray[np.int32], Counts]:
    """(number_BS, label_N) of sets of touching pixels of one class; no image touches another."""
    touching = np.zeros((3,) * labels_BS.ndim, bool)
    touching[1] = True  # neighbours within an image, none in the image before or after
    number_BS = np.zeros(labels_BS.shape, np.int32)
    labels: list[int] = []
    boxes = ndimage.find_objects(labels_BS, num_classes)[: num_classes - 1]
    for label, box in enumerate(boxes, start=1):
        if box is None:
            continue
        found, count = ndimage.label(labels_BS[box] == label, structure=touching)
        np.add(found, len(labels), out=number_BS[box], where=found > 0)
        labels += [label] * count
    return number_BS, np.array(labels, np.int64)


def _instances(
    labels_BS: npt.NDArray[Any], num_classes: int, instances_BS: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int32], Counts]:
    """(number_BS, label_N) of instances, which have the class of most of their labelled pixels."""
    place_I = np.flatnonzero((instances_BS > 0) & (labels_BS != IGNORED))
    label_I = labels_BS.ravel()[place_I].astype(np.int64)
    most = int(instances_BS.max(initial=0)) + 1
    key_I = place_I // max(1, labels_BS[0].size) * most + instances_BS.ravel()[place_I]
    is_there = np.bincount(key_I, minlength=len(labels_BS) * most) > 0
    which_I = np.cumsum(is_there)[key_I] - 1
    votes_NK = np.bincount(
        which_I * num_classes + label_I, minlength=is_there.sum() * num_classes
    ).reshape(-1, num_classes)
    label_N = votes_NK.argmax(axis=1)
    is_object_N = label_N > 0
    is_own_I = (label_I == label_N[which_I]) & is_object_N[which_I]
    number_BS = np.zeros(labels_BS.shape, np.int32)
    number_BS.ravel()[place_I[is_own_I]] = np.cumsum(is_object_N)[which_I[is_own_I]]
    return number_BS, label_N[is_object_N]


def _present(number: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.bool_]:
    """Which of the objects (N,) have a pixel there."""
    return np.bincount(number.ravel(), minlength=count + 1)[1:] > 0


def _size_bins(objects: Objects, edges: tuple[float, float], voxel: float) -> Counts:
    """Which line of `ObjectCounts.sizes` each object (N,) counts in."""
    diameter_N = diameter(objects.area_N, objects.number_BS.ndim - 1, voxel)
    return np.where(objects.is_cut_N, len(SIZE_BINS), np.digitize(diameter_N, edges))


def _how_many(objects: Objects, num_classes: int) -> Counts:
    """Objects in each image of each class (B, K)."""
    images = len(objects.number_BS)
    of_each = objects.image_N * num_classes + objects.label_N
    return np.bincount(of_each, minlength=images * num_classes).reshape(images, num_classes)


def _matched(
    true: Objects, seen: Objects, may_touch: bool
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(which true objects are found, which are detected, which predicted ones are false alarms).

    `may_touch`: true objects may touch each other or be in parts, as instances are.
    """
    true_P, seen_P, shared_P = _overlapping(true, seen)
    covered_N = np.bincount(true_P, shared_P, minlength=len(true.area_N))
    piece_P = seen.area_N[seen_P]
    if may_touch:
        may_match_P = (covered_N >= MATCH_IOU * true.area_N)[true_P]  # or the rest is in vain
        piece_P = _shared_out(true, seen, true_P, seen_P, may_match_P)
        piece_P, shared_P = _of_parted(true, true_P, piece_P, shared_P, may_match_P)
    is_match_P = shared_P >= MATCH_IOU * (true.area_N[true_P] + piece_P - shared_P)
    # A predicted object, or piece, reaches 0.5 with one true object at most. So does a true one,
    # but for two halves that fill it, and for its own parts: it is found once all the same.
    is_found_N = np.zeros(len(true.area_N), bool)
    is_found_N[true_P[is_match_P]] = True
    is_false_N = np.ones(len(seen.area_N), bool)
    is_false_N[seen_P[is_match_P]] = False
    return is_found_N, covered_N >= DETECTED_SHARE * true.area_N, is_false_N


def _overlapping(true: Objects, seen: Objects) -> tuple[Counts, Counts, Counts]:
    """(true object, predicted object, pixels in both) of each pair (P,) of one class."""
    is_both = (true.number_BS > 0) & (seen.number_BS > 0)
    of_true, of_seen = true.number_BS[is_both] - 1, seen.number_BS[is_both] - 1
    is_same = true.label_N[of_true] == seen.label_N[of_seen]
    pair = of_true[is_same].astype(np.int64) * (len(seen.area_N) + 1) + of_seen[is_same]
    pair_P, shared_P = np.unique(pair, return_counts=True)
    true_P, seen_P = np.divmod(pair_P, len(seen.area_N) + 1)
    return true_P, seen_P, shared_P


def _shared_out(
    true: Objects,
    seen: Objects,
    true_P: Counts,
    seen_P: Counts,
    may_match_P: npt.NDArray[np.bool_],
) -> Counts:
    """How many pixels (P,) of each pair's predicted object belong to its true one, if it may match.

    All, if it overlaps no other true object of its class. Else each goes to the nearest of them, by
    the pixels that the two share. A prediction is thus spared for merging what it may not have been
    able to tell apart, where it can be told whose pixels are whose: the benefit of the doubt, which
    `count_error` does not give. A predicted object that is shared out is a false alarm only if no
    piece of it matches. This rule is ours.
    """
    piece_P = seen.area_N[seen_P]
    pairs_N = np.bincount(seen_P, minlength=len(seen.area_N))
    several = np.unique(seen_P[may_match_P & (pairs_N[seen_P] > 1)])
    if not len(several):
        return piece_P
    boxes = ndimage.find_objects(seen.number_BS)
    for which in several:
        image, *window = boxes[which]
        box = (image.start, *window)
        is_seen = seen.number_BS[box] == which + 1
        number = true.number_BS[box]
        pair = np.flatnonzero(seen_P == which)
        is_shared = is_seen & np.isin(number, true_P[pair] + 1)
        nearest = ndimage.distance_transform_edt(
            ~is_shared, return_distances=False, return_indices=True
        )
        owner = number[tuple(along[is_seen] for along in nearest)] - 1
        piece_P[pair] = np.bincount(owner, minlength=len(true.area_N))[true_P[pair]]
    return piece_P


def _of_parted(
    true: Objects,
    true_P: Counts,
    piece_P: Counts,
    shared_P: Counts,
    may_match_P: npt.NDArray[np.bool_],
) -> tuple[Counts, Counts]:
    """(pieces, shared pixels) of each pair; of a true object in several parts, over all its pairs.

    An instance that another one lies across is found by its parts together.
    """
    pieces_N = np.bincount(true_P, minlength=len(true.area_N))
    several = np.unique(true_P[may_match_P & (pieces_N[true_P] > 1)])
    if not len(several):
        return piece_P, shared_P
    boxes = ndimage.find_objects(true.number_BS)
    is_parted_N = np.zeros(len(true.area_N), bool)
    for which in several:
        image, *window = boxes[which]
        is_own = true.number_BS[(image.start, *window)] == which + 1
        is_parted_N[which] = ndimage.label(is_own, np.ones((3,) * is_own.ndim))[1] > 1
    is_parted_P = is_parted_N[true_P]
    together = (
        np.bincount(true_P, each_P, minlength=len(true.area_N)).astype(np.int64)[true_P]
        for each_P in (piece_P, shared_P)
    )
    piece_P, shared_P = (
        np.where(is_parted_P, all_P, each_P)
        for all_P, each_P in zip(together, (piece_P, shared_P), strict=True)
    )
    return piece_P, shared_P


def _over_all_and_by_size(counted: Counted, score: Callable[[Counts], float]) -> dict[str, float]:
    by_size = zip(SIZE_BINS, counted.objects.sizes[: len(SIZE_BINS)], strict=True)
    return {"": score(counted.objects.sizes.sum(axis=0))} | {
        name: score(line) for name, line in by_size
    }


def _detected(counts: Counts) -> float:
    true = counts[FOUND] + counts[MISSED]
    return float(counts[DETECTED] / true) if true else math.nan


def _f1(counts: Counts) -> float:
    found, false, missed, _ = counts.tolist()
    objects = 2 * found + false + missed
    return 2 * found / objects if objects else math.nan
