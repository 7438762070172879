"""Trivial ways to fill in hidden pixels: what an encoder has to beat before it has learnt anything.

To add one, write a function and an entry in FILLINGS: it then counts among those that the metric
`probe_gain` is measured against, and has a part of that metric.

Distances and neighbours are those of the grid of pixels, whatever the spacing of a volume
(interpretation). Padding is neither hidden nor visible: nothing is read from it.

C channels · S pixels along every axis · N hidden pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainables.late import Late

if TYPE_CHECKING:
    from scipy import ndimage, sparse
    from scipy.sparse import linalg
else:
    ndimage = Late("scipy.ndimage")
    sparse = Late("scipy.sparse")
    linalg = Late("scipy.sparse.linalg")

RESIDUAL = 1e-6  # by which a harmonic voxel may miss its neighbours' mean, in intensities

Floats = npt.NDArray[np.floating[Any]]
Flags = npt.NDArray[np.bool_]

# (intensities (C, *S), is_visible (*S), is_hidden (*S)) -> (C, *S), of which hidden pixels count;
# something is visible
Fill = Callable[[Floats, Flags, Flags], Floats]


class Filling(NamedTuple):
    """An entry of FILLINGS."""

    fill: Fill
    in_words: str  # what it does, as the subject of a sentence


class Gain(NamedTuple):
    """How much better than every trivial filling an encoder fills in hidden pixels."""

    decibels: float
    over: str | None  # the filling that is hardest to beat, a key of FILLINGS; None: not told

    @property
    def is_learnt(self) -> bool:
        """Whether it knows more of the images than the trivial fillings use."""
        return self.decibels > 0


def gain_of(values: Mapping[str, float]) -> Gain | None:
    """The gain among a trial's values, metric of pretraining -> value; None if it has none."""
    decibels = values.get("probe_gain", math.nan)
    if not math.isfinite(decibels):
        return None
    parts = {key: values[f"probe_gain/{key}"] for key in FILLINGS if f"probe_gain/{key}" in values}
    return Gain(decibels, min(parts, key=parts.__getitem__, default=None))


def mean(image: Floats, is_visible: Flags, _: Flags) -> Floats:
    """Each channel's mean over the visible pixels, everywhere."""
    level_C = image[:, is_visible].mean(axis=1)
    return np.broadcast_to(level_C.reshape(-1, *[1] * is_visible.ndim), image.shape)


def nearest(image: Floats, is_visible: Flags, _: Flags) -> Floats:
    """The visible pixel that is nearest in a straight line; of several, any one."""
    places = ndimage.distance_transform_edt(
        ~is_visible, return_distances=False, return_indices=True
    )
    return image[(slice(None), *places)]


def laplace(image: Floats, is_visible: Flags, is_hidden: Flags) -> Floats:
    """Harmonic inpainting: each hidden pixel is the mean of its neighbours along the axes.

    The discrete Laplace equation with the visible pixels as boundary values (Chan and Shen 2002,
    "Mathematical models for local nontexture inpaintings"). Nothing flows through the border of the
    image or into padding (interpretation); a region that touches nothing visible is the mean of the
    visible pixels (interpretation). Pictures are solved directly; volumes, where that takes too
    much memory, by conjugate gradients until no voxel misses by more than RESIDUAL.
    """
    filled = mean(image, is_visible, is_hidden).astype(np.float64)
    is_hidden = is_hidden & _is_reached(is_visible, is_hidden)
    if not is_hidden.any():
        return filled
    matrix_NN, beside_NS = _laplacian(is_visible, is_hidden)
    known_SC = np.where(is_visible, image, 0.0).reshape(len(image), -1).T
    bound_NC = beside_NS @ known_SC
    if is_hidden.ndim == 2:
        found_NC = linalg.splu(
            matrix_NN.tocsc(),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0,
            options={"SymmetricMode": True},
        ).solve(bound_NC)
    else:
        found_NC = _conjugate_gradients(matrix_NN, bound_NC, filled[:, is_hidden].T)
    filled[:, is_hidden] = found_NC.T
    return filled


def _is_reached(is_visible: Flags, is_hidden: Flags) -> Flags:
    """Which pixels lie in a region of real pixels, touching along the axes, with a visible one."""
    region, count = ndimage.label(is_visible | is_hidden)
    has_visible = np.zeros(count + 1, bool)
    has_visible[region[is_visible]] = True
    is_reached: Flags = has_visible[region]
    return is_reached


def _laplacian(is_visible: Flags, is_hidden: Flags) -> tuple[Any, Any]:
    """Sparse (N, N) and (N, S): the first times the hidden pixels equals the second times all.

    A row of the first holds a pixel's number of neighbours, and -1 for each that is hidden; a row
    of the second 1 for each that is visible.
    """
    count = int(np.count_nonzero(is_hidden))
    number = np.full(is_hidden.shape, -1)
    number[is_hidden] = np.arange(count)
    place = np.arange(is_hidden.size).reshape(is_hidden.shape)
    hidden_pairs, visible_pairs = [], []
    for axis in range(is_hidden.ndim):
        before = (*[slice(None)] * axis, slice(None, -1))
        behind = (*[slice(None)] * axis, slice(1, None))
        for own, other in ((before, behind), (behind, before)):
            both = is_hidden[own] & is_hidden[other]
            rim = is_hidden[own] & is_visible[other]
            hidden_pairs.append((number[own][both], number[other][both]))
            visible_pairs.append((number[own][rim], place[other][rim]))
    among_NN = _ones(hidden_pairs, (count, count))
    beside_NS = _ones(visible_pairs, (count, is_hidden.size))
    num_neighbours = np.asarray(among_NN.sum(axis=1) + beside_NS.sum(axis=1)).ravel()
    return sparse.diags(num_neighbours).tocsr() - among_NN, beside_NS


def _ones(pairs: list[tuple[Any, Any]], shape: tuple[int, int]) -> Any:
    rows, columns = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape)


def _conjugate_gradients(matrix_NN: Any, bound_NC: Floats, guess_NC: Floats) -> Floats:
    """Solve for every channel at once; crops of 32x40x24 take 150 rounds."""
    found, residual = guess_NC, bound_NC - matrix_NN @ guess_NC
    direction, square_C = residual, (residual**2).sum(axis=0)
    while np.abs(residual).max() > RESIDUAL:
        image = matrix_NN @ direction
        length_C = _ratio(square_C, (direction * image).sum(axis=0))
        found, residual = found + length_C * direction, residual - length_C * image
        before_C, square_C = square_C, (residual**2).sum(axis=0)
        direction = residual + _ratio(square_C, before_C) * direction
    return found


def _ratio(one: Floats, other: Floats) -> Floats:
    """0 where there is nothing left to divide by: a channel that is solved."""
    return np.divide(one, other, out=np.zeros_like(one), where=other > 0)


FILLINGS: dict[str, Filling] = {
    "mean": Filling(mean, "filling in the mean of the visible pixels"),
    "nearest": Filling(nearest, "copying the nearest visible pixel"),
    "laplace": Filling(laplace, "harmonic inpainting"),
}
