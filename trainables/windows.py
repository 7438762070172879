"""Scores of a whole volume, put together from windows that overlap.

Each voxel's scores are the mean over the windows that it lies in. A window's weight falls as a
Gaussian from its centre to its faces, near which a network sees least of what is around (nnU-Net,
Isensee et al. 2021). Places, weights and the order of sums are those of MONAI's
sliding_window_inference(mode="gaussian"), and so are the scores: on a CPU bit for bit.

B windows at a time · C channels · K scores of a voxel · *S voxels along every axis of the volume
*W voxels along every axis of a window
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVIATION = 1 / 8  # of the Gaussian, in edges of the window
LEAST_WEIGHT = 1e-3  # in the corners, where only one window may lie: no division by nothing

Place = tuple[slice, ...]


def stitched_scores(
    scores_of: Callable[[Tensor], Tensor],
    volume: Tensor,
    window: Sequence[int],
    num_scores: int,
    *,
    batch: int,
    overlap: float,
    device: torch.device,
) -> Tensor:
    """(1, C, *S) -> float32 (1, K, *S), both where the volume is; no window is larger than it.

    `scores_of`: (B, C, *W) -> float32 (B, K, *W), both on `device`, `batch` windows at a time; its
    result is overwritten.
    `overlap`: the share of a window's edge, below 1, that the next one shares with it at least.
    """
    size = volume.shape[2:]
    places = window_places(size, window, overlap)
    weight = window_weight(window).to(device)
    weight_there = weight.to(volume.device)
    scores = torch.zeros(num_scores, *size, device=volume.device)
    total = torch.zeros(size, device=volume.device)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        windows = torch.cat([volume[:, :, *place] for place in some])
        weighted = scores_of(windows.to(device)).mul_(weight).to(volume.device)
        for place, of_window in zip(some, weighted, strict=True):
            scores[:, *place] += of_window
            total[place] += weight_there
    return scores.div_(total)[None]


def likeliest_between(scores: Tensor, shape: Sequence[int], steps: Sequence[float]) -> Tensor:
    """The class (*shape) of highest score (K, *S) at other voxels, `steps` apart, uint8.

    Both grids have one middle. Scores are linear between voxels, and go on beyond the last ones; a
    class at a time, as whole volumes are large.
    """
    best = torch.full(tuple(shape), -math.inf, device=scores.device)
    likeliest = torch.zeros(tuple(shape), dtype=torch.uint8, device=scores.device)
    for label, of_class in enumerate(scores):
        between = of_class
        for axis, (count, step) in enumerate(zip(shape, steps, strict=True)):
            between = _along(between, axis, count, step)
        is_better = between > best
        best = torch.where(is_better, between, best)
        likeliest.masked_fill_(is_better, label)
    return likeliest


def _along(values: Tensor, axis: int, count: int, step: float) -> Tensor:
    """`count` values along an axis, `step` old ones apart, in the middle of the old ones."""
    old = values.shape[axis]
    if count == old and step == 1:
        return values
    place = torch.arange(count, dtype=torch.float64, device=values.device) - (count - 1) / 2
    place = (place * step + (old - 1) / 2).clamp(0, old - 1)
    before = place.floor().long().clamp(max=max(0, old - 2))
    share = (place - before).float().reshape(-1, *[1] * (values.ndim - 1 - axis))
    below = values.index_select(axis, before)
    above = values.index_select(axis, (before + 1).clamp(max=old - 1))
    return below.lerp(above, share)


def window_places(size: Sequence[int], window: Sequence[int], overlap: float) -> list[Place]:
    """Where the windows lie, row-major: a step apart from the start on, the last one at the end."""
    starts = []
    for edge, width in zip(size, window, strict=True):
        assert width <= edge
        step = max(1, int(width * (1 - overlap)))
        steps = math.ceil((edge - width) / step)
        starts.append([min(number * step, edge - width) for number in range(steps + 1)])
    return [
        tuple(slice(start, start + width) for start, width in zip(corner, window, strict=True))
        for corner in itertools.product(*starts)
    ]


def window_weight(window: Sequence[int]) -> Tensor:
    """float32 (*W): what each voxel of a window counts."""
    weight = torch.ones(())
    for edge in window:
        from_centre = torch.arange(edge) - (edge - 1) / 2
        gaussian = torch.exp(from_centre**2 / (-2 * (DEVIATION * edge) ** 2))
        weight = weight[..., None] * gaussian
    return weight.clamp(min=LEAST_WEIGHT)
