"""What is measured, and in which direction it is better.

Every row that a trial reports carries a name whose part before "@" or "/" is a key of METRICS. To
add a metric, add a line to METRICS and report its value where the numbers are at hand.

Conventions of segmentation:
- overlaps (IoU, Dice) come from ONE confusion matrix pooled over all pixels of all images;
- a class that neither the truth nor the prediction contains has no score and is left out of means;
- "without background" leaves out class 0;
- pixels without a label (255) are counted nowhere, and belong to no object;
- an object is a set of touching pixels (corners count) of one class. Objects of truth and
  prediction are matched one to one at IoU >= 0.5 and counted over all images. Found and missed
  objects count in the size bin of the true object, false alarms in the bin of their own size.
- scores of whole volumes (case_dice, hd95, nsd) are those of surfaces.py.

Letters of shapes: B images, *S pixels (any number of axes), K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
AT_ONCE = 2**22  # pixels counted in one go, as int64
BEST_PSNR = 100.0  # dB; of a perfect picture, which would be infinite

Goal = Literal["minimize", "maximize", "none"]
Counts = npt.NDArray[np.int64]


class Metric(NamedTuple):
    """Direction, unit and meaning of a measured number."""

    goal: Goal
    unit: str
    explains: str


def metric_of(name: str) -> Metric:
    """The entry of METRICS that a reported name belongs to: `iou/platelet` is an `iou`."""
    return METRICS[re.split("[@/]", name, maxsplit=1)[0]]


def rows(
    values: Mapping[str, float],
    *,
    phase: str,
    step: int,
    epoch: float,
    progress: float,
    seconds: float,
) -> list[dict[str, Any]]:
    """One row per value, with goal and unit; values that do not exist (NaN) are left out."""
    return [
        {
            "phase": phase,
            "step": step,
            "epoch": epoch,
            "progress": progress,
            "metric": name,
            "value": float(value),
            "goal": metric_of(name).goal,
            "unit": metric_of(name).unit,
            "seconds": seconds,
        }
        for name, value in values.items()
        if not math.isnan(value)
    ]


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


def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Pixel counts (K, K), rows the true class, columns the predicted one. Labels of any shape."""
    unlabelled = num_classes * num_classes
    counted = torch.zeros(unlabelled + 1, dtype=torch.int64, device=truth.device)
    parts = (torch.split(labels.flatten(), AT_ONCE) for labels in (truth, predicted))
    for true, guess in zip(*parts, strict=True):
        cell = torch.where(true == IGNORED, unlabelled, true.long() * num_classes + guess.long())
        counted += torch.bincount(cell, minlength=unlabelled + 1)
    return counted[:unlabelled].view(num_classes, num_classes)


def overlap_scores(confusion_KK: Counts, classes: Sequence[str]) -> dict[str, float]:
    """IoU and Dice per class and their means from a pooled confusion matrix."""
    hits = confusion_KK.diagonal().astype(float)
    true, predicted = confusion_KK.sum(axis=1), confusion_KK.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0: the class occurs nowhere
        iou = hits / (true + predicted - hits)
        dice = 2 * hits / (true + predicted)
    scores = {
        "miou": mean_of_present(iou[1:]),
        "miou_with_background": mean_of_present(iou),
        "dice": mean_of_present(dice[1:]),
    }
    scores |= {f"iou/{name}": float(value) for name, value in zip(classes, iou, strict=True)}
    scores |= {f"dice/{name}": float(value) for name, value in zip(classes, dice, strict=True)}
    return present(scores)


def object_counts(
    truth: npt.NDArray[Any],
    predicted: npt.NDArray[Any],
    num_classes: int,
    edges: tuple[float, float],
    voxel: float = 1.0,
) -> Counts:
    """Found, falsely seen and missed objects per size bin (3, 3) over a stack of labels (B, *S).

    `edges` are the two diameters that separate small, medium and large objects, in the unit of
    length of `voxel`, the volume (or area) of one voxel: mm with mm^3, pixels with 1.
    """
    counts = np.zeros((len(SIZE_BINS), 3), np.int64)
    is_labelled = truth != IGNORED
    for label in range(1, num_classes):
        seen = (predicted == label) & is_labelled
        counts += _object_counts_of_class(truth == label, seen, edges, voxel)
    return counts


def object_scores(counts: Counts) -> dict[str, float]:
    """F1 of objects, over all and by size bin, from `object_counts`."""
    scores = {"object_f1": _f1(counts.sum(axis=0))}
    scores |= {f"object_f1/{name}": _f1(line) for name, line in zip(SIZE_BINS, counts, strict=True)}
    return present(scores)


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


def present(scores: dict[str, float]) -> dict[str, float]:
    """The scores that exist, that is, are not NaN."""
    return {name: value for name, value in scores.items() if not math.isnan(value)}


def _object_counts_of_class(
    truth: npt.NDArray[np.bool_],
    predicted: npt.NDArray[np.bool_],
    edges: tuple[float, float],
    voxel: float,
) -> Counts:
    true_label, true_area = _components(truth)
    seen_label, seen_area = _components(predicted)
    both = truth & predicted
    pair = true_label[both].astype(np.int64) * (len(seen_area) + 1) + seen_label[both]
    pair, shared = np.unique(pair, return_counts=True)
    true_index, seen_index = np.divmod(pair, len(seen_area) + 1)
    true_index, seen_index = true_index - 1, seen_index - 1
    union = true_area[true_index] + seen_area[seen_index] - shared
    # One to one by itself: an object could reach 0.5 twice only with two halves that fill it, and
    # those would touch and be one object.
    is_match = shared >= MATCH_IOU * union
    true_index, seen_index = true_index[is_match], seen_index[is_match]

    true_bin = np.digitize(diameter(true_area, truth.ndim - 1, voxel), edges)
    seen_bin = np.digitize(diameter(seen_area, truth.ndim - 1, voxel), edges)
    found = np.bincount(true_bin[true_index], minlength=len(SIZE_BINS))
    missed = np.bincount(np.delete(true_bin, true_index), minlength=len(SIZE_BINS))
    false = np.bincount(np.delete(seen_bin, seen_index), minlength=len(SIZE_BINS))
    return np.stack([found, false, missed], axis=1)


def _components(is_class: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], Counts]:
    """Labels from 1 on of touching pixels in each image of a stack (B, *S), and their areas."""
    touching = np.zeros((3,) * is_class.ndim, bool)
    touching[1] = True  # neighbours within an image, none in the image before or after
    label, count = ndimage.label(is_class, structure=touching)
    return label, np.bincount(label.ravel(), minlength=count + 1)[1:]


def _f1(counts: Counts) -> float:
    found, false, missed = counts.tolist()
    objects = 2 * found + false + missed
    return 2 * found / objects if objects else math.nan


_SEGMENTATION = {
    "miou": Metric("maximize", "", "mean IoU of the classes without background"),
    "miou_with_background": Metric("maximize", "", "mean IoU of all classes"),
    "iou": Metric("maximize", "", "intersection over union of one class, pooled over pixels"),
    "dice": Metric("maximize", "", "Dice, mean of the classes without background, or of one class"),
    "object_f1": Metric("maximize", "", "F1 of objects matched at IoU 0.5, over all or by size"),
    "case_dice": Metric(
        "maximize",
        "",
        "Dice of a volume, mean over the volumes that truly have or are predicted to have a class; "
        "mean of the classes without background, or of one class",
    ),
    "hd95": Metric(
        "minimize",
        "mm",
        "95th percentile of the distances between true and predicted surface, means as of "
        "case_dice; the volume's diagonal where only one of them has the class",
    ),
    "nsd": Metric(
        "maximize",
        "",
        "share of the true and predicted surface within a tolerance of the other, means as of "
        "case_dice; 0 where only one of them has the class",
    ),
}

METRICS: dict[str, Metric] = {
    "loss": Metric("minimize", "", "training loss, mean since the rung before; not comparable"),
    "probe_psnr": Metric(
        "maximize", "dB", "PSNR of the probe's hidden pixels, alike for all trials"
    ),
    "probe_ssim": Metric("maximize", "", "SSIM around the probe's hidden pixels"),
    "probe_gain": Metric(
        "maximize", "dB", "probe PSNR above filling in the mean of visible pixels"
    ),
    "native_psnr_hidden": Metric(
        "maximize", "dB", "PSNR of hidden pixels at the trial's own ratio"
    ),
    "native_psnr_all": Metric("maximize", "dB", "PSNR of all pixels at the trial's own ratio"),
    "ratio": Metric("none", "", "share of mask units that are hidden"),
    "images_per_second": Metric("maximize", "images/s", "training speed, all workers together"),
    "device_seconds": Metric("minimize", "s", "time spent training, without evaluation"),
    "flops": Metric("minimize", "FLOP", "operations of the training done so far, computed"),
    "planned_flops": Metric("minimize", "FLOP", "operations of the whole planned training"),
    "peak_memory": Metric("minimize", "bytes", "most memory in use on one device"),
    **_SEGMENTATION,
    **{
        f"test_{name}": Metric(entry.goal, entry.unit, f"on the test split: {entry.explains}")
        for name, entry in _SEGMENTATION.items()
    },
}
