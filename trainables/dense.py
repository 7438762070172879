"""The dense probe: what a frozen encoder knows of the class of every pixel. Nothing is trained.

    dense_miou          ridge regression from the encoder's tokens to the classes of their pixels
    dense_knn_miou      classes of the pixels of the nearest patches, by the cosine of their tokens
    dense_miou_random   the first of the same encoder at its random start
    dense_miou_pixels   the same regression on the raw pixels of a patch

The last two are what the first has to be compared with: what it is ahead of them, pretraining has
brought. All are mean IoU without background, over predictions out of their fold (see ridge.py).

Images, or crops of volumes, are evenly spread over all labelled ones of train, never those of val
and test, and the same for every trial of a study, however few labels its segmentation learns from
(`segment.labels`): the probe judges the encoder, which such trials share. All patches are
visible, and tokens are those of the last block, normed, as an export gives them (as the linear and
k-NN probes of Oquab et al. 2023, DINOv2, sections 7.1 and 7.4, which train by gradient descent, or
on classes of images). Interpretation: nearest patches count alike, not by their likeness.

N patches · D width · Q pixels of a patch · K classes · B batch · P patches of an image
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trainables import counter, distributed, padding
from trainables.config import TrialConfig
from trainables.context import Context
from trainables.data import Dataset
from trainables.data.batches import to_device
from trainables.mae import Encoder, build_mae, patchify
from trainables.probe import at_rest, probe_rows
from trainables.remembered import remembered
from trainables.ridge import Patches, cross_validated, folds_of, out_of_fold
from trainables.scores import IGNORED, miou_of

ROWS, FEWEST_ROWS = 128, 16  # images or crops: at most, and even where they are large
PIXELS = ROWS * 64 * 64  # that all of them should have together
MOST_VALUES = 768  # of a patch's raw pixels; larger ones are averaged to so many
NEIGHBOURS = 20
MOST_COMPARED = 4096  # patches that are compared with one another
AT_ONCE = 1024  # of them, with all others
SEED = 0  # of which patches these are

_of_pixels: dict[Hashable, float] = {}


class Prober:
    """The probed images of a data set, ready on the device for model after model.

    `rows` are those whose labels may be used; without two groups of them nothing is measured.
    """

    def __init__(
        self,
        config: TrialConfig,
        seed: int,
        dataset: Dataset,
        rows: NDArray[np.int64],
        context: Context,
    ) -> None:
        self.config, self.seed, self.dataset, self.context = config, seed, dataset, context
        self.patch = config.patch_edges(len(dataset.size))
        self.chunk = max(1, config.pretrain.batch // context.world_size)
        self.rows = probed(dataset, rows) if dataset.is_labelled else rows[:0]
        self.baselines: dict[str, float] | None = None

    @torch.no_grad()
    def scores(self, encoder: Encoder) -> dict[str, float]:
        """Every number that there is; a collective, in which rank 0 measures.

        NaN where tokens are not finite. What does not depend on training is measured once.
        """
        if len({self.dataset.groups[row] for row in self.rows}) < 2:
            return {}
        found = self._measured(encoder) if self.context.is_main else None
        everywhere: dict[str, float] = distributed.decided_by_main(found, self.context)
        return everywhere

    def _measured(self, encoder: Encoder) -> dict[str, float]:
        patches = self._patches(self._tokens(encoder))
        if len(set(patches.fold_N.tolist())) < 2:
            return {}
        if not patches.values_ND.isfinite().all():
            return {"dense_miou": math.nan}
        if self.baselines is None:
            self.baselines = self._untrained()
        found = {"dense_miou": self._ridge(patches), "dense_knn_miou": self._nearest(patches)}
        found |= self.baselines
        return {key: value for key, value in found.items() if not math.isnan(value)}

    def _untrained(self) -> dict[str, float]:
        """What no training changes."""
        data = self.dataset
        start = build_mae(
            self.config, data.size, data.channels, self.seed, is_padded=data.is_padded
        ).encoder.to(self.context.device)
        pixels = partial(raw_values, patch=self.patch)
        about = (data, self.patch, self.rows.tobytes())
        return {
            "dense_miou_random": self._ridge(self._patches(self._tokens(start))),
            "dense_miou_pixels": remembered(
                _of_pixels, about, lambda: self._ridge(self._patches(pixels))
            ),
        }

    def _ridge(self, patches: Patches) -> float:
        self.context.alive()
        return _miou(out_of_fold(patches, len(self.dataset.classes)), patches)

    def _nearest(self, patches: Patches) -> float:
        self.context.alive()
        order_N = counter.permutation(SEED, "dense", 0, len(patches.fold_N))
        some = patches.where(order_N[:MOST_COMPARED].sort().values.to(self.context.device))
        return _miou(neighbour_scores(some, len(self.dataset.classes)), some)

    def _tokens(self, encoder: Encoder) -> Callable[[Tensor], Tensor]:
        """(images (B, C, *S)) -> (B, P, D), at the trial's precision."""

        def tokens(images: Tensor) -> Tensor:
            with at_rest(encoder, self.config.pretrain, self.context.device):
                found: Tensor = encoder(patchify(images, self.patch))
            return found[:, 1:].float()

        return tokens

    def _patches(self, values_of: Callable[[Tensor], Tensor]) -> Patches:
        device, alive = self.context.device, self.context.alive
        return labelled_patches(
            self.dataset, self.rows, self.patch, values_of, device, self.chunk, alive
        )


def probed(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the rows that are used: as many as have PIXELS together, evenly spread."""
    most = max(FEWEST_ROWS, min(ROWS, PIXELS // math.prod(dataset.size)))
    return probe_rows(rows, most)


def labelled_patches(
    dataset: Dataset,
    rows: NDArray[np.int64],
    patch: Sequence[int],
    values_of: Callable[[Tensor], Tensor],
    device: torch.device,
    chunk: int,
    alive: Callable[[], None] = lambda: None,
) -> Patches:
    """All patches of these rows that have a label, with folds of their groups.

    `values_of`: images (B, C, *S) -> (B, P, D), `chunk` images at a time.
    """
    fold = torch.from_numpy(folds_of([dataset.groups[row] for row in rows])).to(device)
    parts = []
    for places_B, images, labels_BPQ in batches(dataset, rows, patch, device, chunk, alive):
        fold_BP = fold[places_B, None].expand(labels_BPQ.shape[:2])
        has_label_BP = (labels_BPQ != IGNORED).any(dim=-1)
        parts.append([each[has_label_BP] for each in (values_of(images), labels_BPQ, fold_BP)])
    return Patches(*map(torch.cat, zip(*parts, strict=True)))


def batches(
    dataset: Dataset,
    rows: NDArray[np.int64],
    patch: Sequence[int],
    device: torch.device,
    chunk: int,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(places among the rows (B,), images (B, C, *S), labels uint8 (B, P, Q)) of labelled rows."""
    resident = to_device(dataset, rows, device)
    for places_B in torch.split(torch.arange(len(rows), device=device), chunk):
        alive()
        images, labels = resident.batch(places_B)
        assert labels is not None
        yield places_B, images, patchify(labels[:, None], patch).to(torch.uint8)


def raw_values(images: Tensor, patch: Sequence[int]) -> Tensor:
    """The raw pixels of each patch, 0 where there is padding: float32 (B, P, D).

    Averaged over blocks of 2, 4, ... pixels of edge where there would be more than MOST_VALUES.
    """
    images, edges = padding.filled(images), list(patch)
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(edges) - 1]
    while math.prod(edges) * images.shape[1] > MOST_VALUES and not any(e % 2 for e in edges):
        images, edges = pool(images, 2), [edge // 2 for edge in edges]
    return patchify(images, edges)


def neighbour_scores(patches: Patches, num_classes: int) -> Tensor:
    """The classes of the same pixel of the nearest patches in other folds, averaged: (N, Q, K)."""
    values_ND, labels_NQ, fold_N = patches
    unit_ND = functional.normalize(values_ND, dim=1)
    scores_NQK = values_ND.new_zeros(*labels_NQ.shape, num_classes)
    for fold in sorted(set(fold_N.tolist())):
        own_N, others_N = (numbers.nonzero()[:, 0] for numbers in (fold_N == fold, fold_N != fold))
        for some_N in torch.split(own_N, AT_ONCE):
            likeness = unit_ND[some_N] @ unit_ND[others_N].T
            nearest = likeness.topk(min(NEIGHBOURS, len(others_N)), dim=1).indices
            near = labels_NQ[others_N][nearest]
            for label in range(num_classes):
                scores_NQK[some_N, :, label] = (near == label).float().mean(dim=1)
    return scores_NQK


def _miou(scores_NQK: Tensor, patches: Patches) -> float:
    return miou_of(cross_validated(scores_NQK, patches.labels_NQ, patches.fold_N))
