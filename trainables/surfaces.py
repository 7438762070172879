"""Segmentation scores of whole volumes: how well bodies overlap, and how far apart surfaces lie.

Each volume is scored by itself, class by class; a class's score is the mean over the volumes that
count for it. (The overlaps of scores.py pool all voxels of all images instead.)

- case_dice: Dice of one volume.
- hd95: the 95th percentile of the distances, in mm, from each voxel of one surface to the nearest
  voxel of the other; the larger of "predicted to true" and "true to predicted". Distances lie
  between centres of voxels, and the percentile between two of them by linear interpolation.
- nsd, normalised surface Dice (Nikolov et al., arXiv:1809.04430): the share of the voxels of both
  surfaces that lie within a tolerance in mm of the other surface.

The surface of a class is every voxel of it with a neighbour across a face that is not of it; what
lies outside the volume is not of it. Where both sides have the class, the three agree with MONAI's
compute_dice, compute_hausdorff_distance(percentile=95) and compute_surface_dice.

Conventions:
- a class that neither the truth nor the prediction has in a volume is left out for that volume;
- a class that only one of them has scores dice 0, nsd 0 and, as hd95, the length of the volume's
  diagonal. That length is ours: there is no convention, and MONAI gives NaN or infinity, with which
  no mean over volumes exists. A volume whose class was missed altogether thus weighs on the mean;
- background (class 0) has no score;
- voxels without a label (255) count nowhere: the prediction is background there, as the truth is.

Every class is looked at within its bounding box only, which changes nothing. Measured for one class
in 256x256x160 voxels on one core: a ball of radius 60 and a shifted one 0.2 s; the same with one
far voxel predicted 0.3 s; a ball and noise, as an untrained model predicts it, 3 to 4 s; noise on
both sides, the worst there is, 5 s and 0.7 GiB.

Letters of shapes: *S voxels along every axis, K classes, N NAMES, E voxels of a surface.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trainables.late import Late
from trainables.scores import IGNORED, Counted, Counts, Floats, mean_of_present

if TYPE_CHECKING:
    from scipy import ndimage, spatial
else:
    ndimage, spatial = Late("scipy.ndimage"), Late("scipy.spatial")

NAMES = ("case_dice", "hd95", "nsd")
PERCENTILE = 95
VOXELS_PER_POINT = 40  # of a box, where a map of it takes as long as a search from each point

Flags = npt.NDArray[np.bool_]


def case_sums(
    truth: npt.NDArray[np.uint8],
    predicted: npt.NDArray[np.uint8],
    num_classes: int,
    spacing: Sequence[float],
    tolerance: float,
) -> tuple[Floats, Counts]:
    """What one volume (*S) adds to the sums of scores and to the counts of volumes (K, N).

    `spacing` is in mm per voxel along each axis, `tolerance` of nsd in mm.
    """
    assert truth.shape == predicted.shape and len(spacing) == truth.ndim
    sums = np.zeros((num_classes, len(NAMES)))
    counts = np.zeros((num_classes, len(NAMES)), np.int64)
    predicted = np.where(truth == IGNORED, 0, predicted)
    diagonal = math.hypot(*(edge * mm for edge, mm in zip(truth.shape, spacing, strict=True)))
    true_boxes = ndimage.find_objects(truth, num_classes - 1)
    seen_boxes = ndimage.find_objects(predicted, num_classes - 1)
    for label in range(1, num_classes):
        true_box, seen_box = true_boxes[label - 1], seen_boxes[label - 1]
        if true_box is None and seen_box is None:
            continue
        counts[label] = 1
        if true_box is None or seen_box is None:
            sums[label] = (0, diagonal, 0)
            continue
        box = tuple(
            slice(min(one.start, other.start), max(one.stop, other.stop))
            for one, other in zip(true_box, seen_box, strict=True)
        )
        sums[label] = _scores(truth[box] == label, predicted[box] == label, spacing, tolerance)
    return sums, counts


def case_score(counted: Counted, *, name: str) -> dict[str, float]:
    """One of NAMES: of each class the mean over the volumes that count, and the mean of those."""
    if counted.case_sums is None or counted.case_counts is None:
        return {}
    column = NAMES.index(name)
    with np.errstate(invalid="ignore"):  # 0 / 0: the class occurs in no volume
        means = counted.case_sums[1:, column] / counted.case_counts[1:, column]
    by_class = dict(zip(counted.classes[1:], means.tolist(), strict=True))
    return {"": mean_of_present(means)} | by_class


def _scores(
    truth: Flags, predicted: Flags, spacing: Sequence[float], tolerance: float
) -> tuple[float, float, float]:
    """NAMES of a class that both sides have."""
    dice = 2 * np.count_nonzero(truth & predicted) / (truth.sum() + predicted.sum())
    true_surface, seen_surface = _surface(truth), _surface(predicted)
    there = _distances(seen_surface, true_surface, spacing)
    back = _distances(true_surface, seen_surface, spacing)
    hd95 = max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE))
    # As float32, so that 3 voxels of 0.1 mm lie within 0.3 mm although 3 * 0.1 > 0.3
    is_near = np.concatenate([there, back]).astype(np.float32) <= np.float32(tolerance)
    return float(dice), float(hd95), float(is_near.mean())


def _surface(is_class: Flags) -> Flags:
    # Voxels outside count as eroded, so a box needs no margin
    surface: Flags = is_class & ~ndimage.binary_erosion(is_class)
    return surface


def _distances(surface: Flags, other: Flags, spacing: Sequence[float]) -> Floats:
    """Distance (E,) in mm of each voxel of a surface to the nearest of the other."""
    places, others = np.argwhere(surface), np.argwhere(other)
    if surface.size > VOXELS_PER_POINT * (len(places) + len(others)):
        found, _ = spatial.KDTree(others * spacing).query(places * spacing)
        return np.asarray(found)
    nearest: npt.NDArray[Any] = ndimage.distance_transform_edt(
        ~other, sampling=spacing, return_distances=False, return_indices=True
    )
    return np.asarray(np.linalg.norm((nearest[:, surface].T - places) * spacing, axis=1))
