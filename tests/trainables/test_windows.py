"""A volume's scores out of overlapping windows.

pytest tests/trainables/test_windows.py
"""

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from trainables.data.volumes import resampled
from trainables.windows import likeliest_between, stitched_scores, window_places, window_weight

torch.set_num_threads(1)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "window", "overlap", "starts"),
    [
        (10, 4, 0.5, [0, 2, 4, 6]),
        (9, 4, 0.5, [0, 2, 4, 5]),  # the last one ends with the volume
        (10, 4, 0.0, [0, 4, 6]),
        (8, 4, 0.0, [0, 4]),
        (12, 5, 0.25, [0, 3, 6, 7]),  # a step of 3.75 voxels is one of 3
        (5, 3, 0.9, [0, 1, 2]),  # never less than one voxel
        (4, 4, 0.5, [0]),
    ],
)
def test_places_by_hand(size, window, overlap, starts):
    places = window_places([size], [window], overlap)
    assert places == [(slice(start, start + window),) for start in starts]


def test_places_of_several_axes_are_row_major():
    assert window_places((4, 3), (2, 3), 0.5) == [
        (slice(0, 2), slice(0, 3)),
        (slice(1, 3), slice(0, 3)),
        (slice(2, 4), slice(0, 3)),
    ]
    corners = [[place.start for place in places] for places in window_places((4, 3), (3, 2), 0.0)]
    assert corners == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_weight_is_a_gaussian_of_an_eighth_of_the_window_but_never_0():
    # edge 8: deviation 1, centres of voxels at ±0.5, ±1.5, ... from the centre
    half = [0.8825, 0.3247, 0.0439, 0.0022]
    expected = torch.tensor(half[::-1] + half)
    torch.testing.assert_close(window_weight([8]), expected, atol=5e-5, rtol=0)
    weight = window_weight((8, 8))
    assert weight[3, 2].item() == pytest.approx(0.8825 * 0.3247, abs=1e-4)
    assert weight[0, 0] == pytest.approx(1e-3)


def test_where_two_windows_lie_scores_are_their_weighed_mean():
    said = iter([1.0, 2.0])
    scores = stitched_scores(
        lambda windows: torch.full_like(windows, next(said)),
        torch.zeros(1, 1, 3),
        [2],  # both voxels of a window are as far from its centre, so they count the same
        1,
        batch=1,
        overlap=0.5,
        device=CPU,
    )
    assert scores.tolist() == [[[1.0, 1.5, 2.0]]]


class Network(nn.Module):
    """Windows to scores of 3 classes, others where the same voxel lies elsewhere in its window."""

    def __init__(self, axes, channels):
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.convolution = kind(channels, 3, 3, padding=1)
        self.batches = []

    def forward(self, windows):
        self.batches.append(len(windows))
        return self.convolution(windows)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    ("size", "window", "channels"),
    [
        ((17,), (5,), 1),
        ((11, 16), (4, 7), 2),
        ((12, 5), (12, 4), 1),
        ((9, 8, 10), (4, 8, 5), 1),
        ((6, 7, 9), (4, 5, 6), 2),
        ((4, 6, 5), (4, 6, 5), 1),
    ],
    ids=str,
)
def test_scores_are_monais_bit_for_bit(size, window, channels, overlap, batch):
    generator = torch.Generator().manual_seed(len(size))
    volume = torch.randn(1, channels, *size, generator=generator)
    ours, theirs = Network(len(size), channels), Network(len(size), channels)
    scores = stitched_scores(
        ours, volume.clone(), window, 3, batch=batch, overlap=overlap, device=CPU
    )
    expected = sliding_window_inference(
        volume, window, batch, theirs, overlap=overlap, mode="gaussian"
    )
    assert torch.equal(scores, expected)
    assert ours.batches == theirs.batches and max(ours.batches) <= batch


@pytest.mark.parametrize("shape", [(9, 10, 16), (6, 7, 8), (6, 14, 11)])
def test_classes_between_voxels_are_those_of_linear_scores(shape):
    """As resampling has it, of which this is the way back."""
    scores = torch.randn(3, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    steps = [old / new for old, new in zip((6, 7, 8), shape, strict=True)]
    expected = np.stack([resampled(of_class.numpy(), shape, steps) for of_class in scores])
    found = likeliest_between(scores, shape, steps)
    assert torch.equal(found, torch.from_numpy(expected.argmax(axis=0)).to(torch.uint8))


def test_classes_of_fewer_voxels_are_those_of_the_nearest_two():
    scores = torch.tensor([[[0.0, 1, 0, 5]], [[0.5, 0.5, 3, 0.5]]])
    assert likeliest_between(scores, (1, 2), (1.0, 2.0)).tolist() == [[0, 0]]
    assert likeliest_between(scores, (1, 1), (1.0, 4.0)).tolist() == [[1]]
