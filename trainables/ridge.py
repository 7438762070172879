"""The classes of a patch's pixels from what is known of the patch, by ridge regression.

1. Least squares on the classes as 0 and 1, in closed form: all pixels of a patch share one Gram
   matrix, and everything is computed from sums over folds, in float64 (Hastie, Tibshirani &
   Friedman 2009, section 3.4.1; the intercept is not penalised).
2. Cross-validation over groups: no patient, slide or field is on both sides. The penalty of a fold
   is the one with the least squared error on the other folds, each told without itself (by
   regressions that have seen this one, as in stacking: Wolpert 1992; it moves a single number).
3. A decision by weighted scores. Least squares hardly minds rare classes, but a score estimates how
   probable a class is, and what is best for a function of the confusion matrix is the class with
   the highest of some linear functions of these probabilities (Narasimhan et al. 2015); of two
   classes it is a threshold, half the best Dice (Lipton, Elkan & Naryanaswamy 2014).
   Interpretation: one weight for each class instead of a matrix, for a mean of IoUs too. For a fold
   the weights are those of the highest mIoU on the other folds, class after class, SWEEPS times.

A pixel without a label is scored nowhere, and is told the mean of its patch's labelled ones;
patches without any are to be left out.

N patches · D values that are known of a patch · Q pixels of a patch · K classes · F folds · O
outputs, Q * (K - 1) · A penalties · M pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.scores import IGNORED, confusion, mious_of

FOLDS = 5
PENALTIES = tuple(10.0**power for power in range(-6, 2))  # in units of the mean eigenvalue
SWEEPS = 2
OCTAVES, PER_OCTAVE = 6, 8  # weights that are tried: powers of two up and down, and steps of each
MOST_WEIGHED = 2**17  # pixels by which weights are chosen
LEAST_SCORE = 1e-6  # so that a weight cannot turn the order of negative ones


class Patches(NamedTuple):
    """What is known of patches, and what is to be told of them."""

    values_ND: Tensor  # float32
    labels_NQ: Tensor  # uint8, 255: not labelled
    fold_N: Tensor  # int64; a group is in one fold

    def where(self, chosen_N: Tensor) -> Patches:
        """Some of them."""
        return Patches(*(each[chosen_N] for each in self))


class Moments(NamedTuple):
    """Sums over patches, float64: all that least squares asks of them."""

    patches: float
    values_D: Tensor
    targets_O: Tensor
    gram_DD: Tensor
    cross_DO: Tensor
    square: float  # of all targets

    def about(self, centre_D: Tensor, centre_O: Tensor) -> Moments:
        """The same, when something is taken from all values and from all targets."""
        values_D = self.values_D - self.patches * centre_D
        targets_O = self.targets_O - self.patches * centre_O
        gram_DD = torch.outer(self.values_D, centre_D) + torch.outer(centre_D, values_D)
        cross_DO = torch.outer(self.values_D, centre_O) + torch.outer(centre_D, targets_O)
        square = float((self.targets_O + targets_O) @ centre_O)
        return Moments(
            self.patches,
            values_D,
            targets_O,
            self.gram_DD - gram_DD,
            self.cross_DO - cross_DO,
            self.square - square,
        )


class Ridge:
    """Regressions on some patches for every penalty, from one eigendecomposition."""

    def __init__(self, sums: Moments) -> None:
        self.centre_D, self.centre_O = sums.values_D / sums.patches, sums.targets_O / sums.patches
        centred = sums.about(self.centre_D, self.centre_O)
        eigenvalue_D, self.basis_DD = torch.linalg.eigh(centred.gram_DD)
        self.eigenvalue_D = eigenvalue_D.clamp(min=0)
        self.cross_DO = self.basis_DD.T @ centred.cross_DO
        self.unit = float(self.eigenvalue_D.mean()) or 1.0  # where all patches are alike

    def weights(self, penalty: float) -> tuple[Tensor, Tensor]:
        """(slope (D, O), intercept (O,)) in float64."""
        slope_DO = self.basis_DD @ (self._gain_D(penalty)[:, None] * self.cross_DO)
        return slope_DO, self.centre_O - self.centre_D @ slope_DO

    def errors(self, others: Moments, penalties: Sequence[float]) -> list[float]:
        """Summed squared error on other patches, for each penalty."""
        other = others.about(self.centre_D, self.centre_O)
        gram_DD = self.basis_DD.T @ other.gram_DD @ self.basis_DD
        gram_DD = gram_DD * (self.cross_DO @ self.cross_DO.T)
        cross_D = ((self.basis_DD.T @ other.cross_DO) * self.cross_DO).sum(dim=1)
        gains = [self._gain_D(penalty) for penalty in penalties]
        return [
            float(other.square - 2 * gain_D @ cross_D + gain_D @ gram_DD @ gain_D)
            for gain_D in gains
        ]

    def _gain_D(self, penalty: float) -> Tensor:
        gain_D: Tensor = 1 / (self.eigenvalue_D + penalty * self.unit)
        return gain_D


class Segmenter(NamedTuple):
    """A regression and the weights of the classes."""

    slope_DO: Tensor
    intercept_O: Tensor
    weights_K: Tensor

    def classes(self, values_ND: Tensor) -> Tensor:
        """The class of each pixel, int64 (N, Q)."""
        scores_NQK = _scores(values_ND, self.slope_DO, self.intercept_O, len(self.weights_K))
        return decide(scores_NQK, self.weights_K)


def folds_of(groups: Sequence[str], most: int = FOLDS) -> NDArray[np.int64]:
    """The fold of each row, int64: a group stays whole, the largest first into the least full."""
    names, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    load = np.zeros(min(most, len(names)), np.int64)
    fold_of = np.zeros(len(names), np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        fold_of[group] = load.argmin()
        load[fold_of[group]] += sizes[group]
    return fold_of[group_of]


def out_of_fold(patches: Patches, num_classes: int) -> Tensor:
    """How probable each class is of each pixel, told by the other folds: float32 (N, Q, K)."""
    fits, errors_FA, _ = _by_fold(patches, num_classes)
    scores = patches.values_ND.new_zeros(*patches.labels_NQ.shape, num_classes)
    for number, (fit, is_in_N) in enumerate(zip(fits, _folds(patches.fold_N), strict=True)):
        penalty = _best(np.delete(errors_FA, number, axis=0))
        scores[is_in_N] = _scores(patches.values_ND[is_in_N], *fit.weights(penalty), num_classes)
    return scores


def segmenter(patches: Patches, num_classes: int) -> Segmenter:
    """Fitted to all folds, with the penalty and the weights that suit each told by the others."""
    fits, errors_FA, sums = _by_fold(patches, num_classes)
    scores_NQK = patches.values_ND.new_zeros(*patches.labels_NQ.shape, num_classes)
    penalty = _best(errors_FA)
    for fit, is_in_N in zip(fits, _folds(patches.fold_N), strict=True):
        told = _scores(patches.values_ND[is_in_N], *fit.weights(penalty), num_classes)
        scores_NQK[is_in_N] = told
    weights_K = class_weights(scores_NQK.flatten(0, 1), patches.labels_NQ.flatten())
    return Segmenter(*Ridge(_added(sums)).weights(penalty), weights_K)


def cross_validated(scores_NQK: Tensor, labels_NQ: Tensor, fold_N: Tensor) -> NDArray[np.int64]:
    """The confusion matrix (K, K) of scores out of fold, each fold decided as suits the others."""
    num_classes = scores_NQK.shape[-1]
    pixels_KK = np.zeros((num_classes, num_classes), np.int64)
    for is_in_N in _folds(fold_N):
        others_MK, labels_M = scores_NQK[~is_in_N].flatten(0, 1), labels_NQ[~is_in_N].flatten()
        predicted_NQ = decide(scores_NQK[is_in_N], class_weights(others_MK, labels_M))
        pixels_KK += confusion(labels_NQ[is_in_N], predicted_NQ, num_classes).cpu().numpy()
    return pixels_KK


def decide(scores: Tensor, weights_K: Tensor) -> Tensor:
    """The class with the highest weighted score; scores (..., K) -> int64 (...)."""
    found: Tensor = (scores.clamp(min=LEAST_SCORE) * weights_K).argmax(dim=-1)
    return found


def class_weights(scores_MK: Tensor, labels_M: Tensor) -> Tensor:
    """What to multiply the classes' scores with for the highest mIoU (K,); of background 1.

    The highest of all weights tried is found from one count: a pixel goes over to a class at the
    weight at which that class outdoes the best of the others.
    """
    num_classes = scores_MK.shape[1]
    stride = math.ceil(len(labels_M) / MOST_WEIGHED)
    scores_MK, labels_M = scores_MK[::stride], labels_M[::stride]
    is_labelled_M = labels_M != IGNORED
    scores_MK, labels_M = scores_MK[is_labelled_M].clamp(min=LEAST_SCORE), labels_M[is_labelled_M]
    weights_K = scores_MK.new_ones(num_classes)
    for _ in range(SWEEPS if num_classes > 2 else 1):
        for label in range(1, num_classes):
            weights_K[label] = _best_weight(scores_MK, labels_M.long(), weights_K, label)
    return weights_K


def _best_weight(scores_MK: Tensor, labels_M: Tensor, weights_K: Tensor, label: int) -> float:
    """Of one class, the others as they are; of equals the one closest to 1."""
    num_classes, last = len(weights_K), 2 * OCTAVES * PER_OCTAVE
    others_MK = scores_MK * weights_K
    others_MK[:, label] = 0
    rival_M, other_M = others_MK.max(dim=1)
    needed_M = (rival_M / scores_MK[:, label]).log2()
    place_M = ((needed_M + OCTAVES) * PER_OCTAVE).floor().long() + 1  # of the first that suffices
    cell_M = (place_M.clamp(0, last + 1) * num_classes + labels_M) * num_classes + other_M
    counts = torch.bincount(cell_M, minlength=(last + 2) * num_classes**2)
    moved_WKK = counts.view(-1, num_classes, num_classes).cumsum(dim=0).cpu().numpy()
    pixels_WKK = moved_WKK[-1] - moved_WKK
    pixels_WKK[..., label] += moved_WKK.sum(axis=2)
    found_W = mious_of(pixels_WKK[: last + 1])
    highest = np.flatnonzero(found_W == found_W.max())
    if len(highest) == 0:
        return 1.0  # no class but the background is there
    best = highest[np.abs(highest - last // 2).argmin()]
    return float(2.0 ** (best / PER_OCTAVE - OCTAVES))


def _by_fold(
    patches: Patches, num_classes: int
) -> tuple[list[Ridge], NDArray[np.float64], list[Moments]]:
    """(the regression without each fold, its errors on that fold (F, A), the sums of each)."""
    targets_NO = _targets(patches.labels_NQ, num_classes)
    sums = [
        _moments(patches.values_ND[is_in_N], targets_NO[is_in_N])
        for is_in_N in _folds(patches.fold_N)
    ]
    fits = [Ridge(_added(sums[:number] + sums[number + 1 :])) for number in range(len(sums))]
    errors = [fit.errors(own, PENALTIES) for fit, own in zip(fits, sums, strict=True)]
    return fits, np.array(errors), sums


def _best(errors_FA: NDArray[np.float64]) -> float:
    return PENALTIES[int(errors_FA.sum(axis=0).argmin())]


def _folds(fold_N: Tensor) -> list[Tensor]:
    """Which patches are in each fold."""
    return [fold_N == fold for fold in sorted(set(fold_N.tolist()))]


def _scores(values_ND: Tensor, slope_DO: Tensor, intercept_O: Tensor, num_classes: int) -> Tensor:
    told = (values_ND.double() @ slope_DO + intercept_O).float()
    scores_NQK = told.view(len(values_ND), -1, num_classes - 1)
    # the targets of all classes add to 1, and so do what a linear map with an intercept tells
    return torch.cat([1 - scores_NQK.sum(dim=-1, keepdim=True), scores_NQK], dim=-1)


def _targets(labels_NQ: Tensor, num_classes: int) -> Tensor:
    """1 where a pixel is of a class other than the background, else 0: float32 (N, O)."""
    label = torch.arange(1, num_classes, device=labels_NQ.device)
    is_class_NQK = (labels_NQ[..., None] == label).float()
    is_labelled_NQ1 = (labels_NQ != IGNORED)[..., None]
    mean_N1K = is_class_NQK.sum(dim=1, keepdim=True) / is_labelled_NQ1.sum(dim=1, keepdim=True)
    return torch.where(is_labelled_NQ1, is_class_NQK, mean_N1K).flatten(1)


def _moments(values_ND: Tensor, targets_NO: Tensor) -> Moments:
    values, targets = values_ND.double(), targets_NO.double()
    return Moments(
        len(values),
        values.sum(dim=0),
        targets.sum(dim=0),
        values.T @ values,
        values.T @ targets,
        float(targets.square().sum()),
    )


def _added(parts: Sequence[Moments]) -> Moments:
    """Of all patches together."""
    return Moments(*(sum(same[1:], start=same[0]) for same in zip(*parts, strict=True)))
