"""What a trained model's predictions are worth: scores of images, of segmented pixels and objects.

Which scores a trial reports, and in which direction each is better, says metrics.py.

Conventions of segmentation:
- overlaps (IoU, Dice) come from ONE confusion matrix pooled over all pixels of all images;
- a class that neither the truth nor the prediction contains has no score (NaN), and is left out of
  means;
- "without background" leaves out class 0;
- pixels without a label (255) are counted nowhere, and belong to no object;
- an object is a set of touching pixels (corners count) of one class. Objects of truth and
  prediction are matched one to one at IoU >= 0.5 and counted over all images. Found and missed
  objects count in the size bin of the true object, false alarms in the bin of their own size.
- scores of whole volumes (case_dice, hd95, nsd) are those of surfaces.py.

Letters of shapes: B images, C channels, *S pixels (any number of axes), K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
AT_ONCE = 2**22  # pixels counted in one go, as int64
SSIM_1, SSIM_2 = 0.01**2, 0.03**2  # (Wang et al. 2004) for a data range of 1
BEST_PSNR = 100.0  # dB; of a perfect picture, which would be infinite

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Counted(NamedTuple):
    """What was counted over all images of a split."""

    classes: Sequence[str]  # background first
    confusion_KK: Counts  # pixels: rows the true class, columns the predicted one
    objects: Counts  # (3, 3), see `object_counts`
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
    return _by_class(_overlaps(counted)[0], counted.classes)


def miou(counted: Counted) -> float:
    """Mean IoU of the classes without background."""
    return mean_of_present(_overlaps(counted)[0][1:])


def miou_with_background(counted: Counted) -> float:
    """Mean IoU of all classes."""
    return mean_of_present(_overlaps(counted)[0])


def dice(counted: Counted) -> dict[str, float]:
    """Dice, mean of the classes without background, and of every class."""
    values = _overlaps(counted)[1]
    return {"": mean_of_present(values[1:])} | _by_class(values, counted.classes)


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


def object_f1(counted: Counted) -> dict[str, float]:
    """F1 of objects, over all and by size."""
    by_size = {name: _f1(line) for name, line in zip(SIZE_BINS, counted.objects, strict=True)}
    return {"": _f1(counted.objects.sum(axis=0))} | by_size


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


def _overlaps(counted: Counted) -> tuple[Floats, Floats]:
    """IoU and Dice of every class (K,)."""
    hits = counted.confusion_KK.diagonal().astype(float)
    true, predicted = counted.confusion_KK.sum(axis=1), counted.confusion_KK.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0: the class occurs nowhere
        return hits / (true + predicted - hits), 2 * hits / (true + predicted)


def _by_class(values: Floats, classes: Sequence[str]) -> dict[str, float]:
    return dict(zip(classes, values.tolist(), strict=True))


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
