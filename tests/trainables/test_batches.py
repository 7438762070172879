"""Crops: where they lie, what they hold, and that training draws them as it says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainables.test_store import source_of
from trainables.data import open_dataset
from trainables.data.batches import to_device, whole_volume
from trainables.data.source import Decoded, Whole, tile_corners
from trainables.data.store import write

SHAPES = [(9, 17, 8), (5, 12, 10), (8, 8, 8), (20, 9, 11)]
SIZE = (6, 8, 4)
SPLITS = ["train", "train", "val", "train"]


def levels_of(number, channels=2):
    """No two voxels of any volume are the same, so that a crop tells where it comes from."""
    shape = SHAPES[number]
    count = channels * int(np.prod(shape))
    first = 10_000 * number + 1
    return np.arange(first, first + count, dtype=np.uint16).reshape(channels, *shape)


def labels_of(number):
    """Class 1 in one corner of every volume but the third, class 2 in two voxels of the fourth."""
    labels = np.zeros(SHAPES[number], np.uint8)
    if number != 2:
        labels[:2, :2, :2] = 1
    if number == 3:
        labels[19, 8, 10] = labels[10, 4, 5] = 2
    return labels


def dataset_of(tmp_path, size=SIZE, numbers=(0, 1, 2, 3)):
    shapes = [SHAPES[number] for number in numbers]
    source = source_of(
        np.zeros((len(shapes), 2, *size), np.uint16),
        splits=SPLITS[: len(shapes)],
        classes=["background", "common", "rare"],
        window=(0, 65535),
        decode=lambda part: Decoded(levels_of(numbers[part])[None], labels_of(numbers[part])[None]),
        whole=Whole(
            shapes=shapes,
            spacings=[(1.0, 1.0, 1.0)] * len(shapes),
            overlap=0.5,
            tolerance=1.0,
            decode_bytes=1,
        ),
    )
    return open_dataset(write(source, tmp_path))


def as_levels(dataset, images):
    """What standardising did, undone."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (dataset.mean, dataset.std)
    )
    return ((images.double() * std + mean) * 65535).round()


def test_rows_are_crops_that_cover_each_volume_and_hold_what_lies_there(tmp_path):
    dataset = dataset_of(tmp_path)
    rows = np.arange(len(dataset.names))
    images, masks = to_device(dataset, rows, "cpu").batch(torch.from_numpy(rows))
    found, row = as_levels(dataset, images), 0
    for number, shape in enumerate(SHAPES):
        seen = np.zeros(shape, int)
        for corner in tile_corners(shape, SIZE):
            assert dataset.volumes.owner[row] == number
            inside = [
                min(c + edge, end) - c for c, edge, end in zip(corner, SIZE, shape, strict=True)
            ]
            there = tuple(slice(c, c + count) for c, count in zip(corner, inside, strict=True))
            kept = tuple(slice(count) for count in inside)
            expected = levels_of(number)[(slice(None), *there)]
            assert (found[row][(slice(None), *kept)].numpy() == expected).all()
            assert (masks[row][kept].numpy() == labels_of(number)[there]).all()
            # behind the end of the second volume, whose first axis has 5 of 6 voxels
            assert images[row].isnan().sum() == 2 * (np.prod(SIZE) - np.prod(inside))
            assert (masks[row] == 255).sum() == np.prod(SIZE) - np.prod(inside)
            seen[there] += 1
            row += 1
        assert seen.min() == 1
    assert row == len(rows) and dataset.is_padded


@pytest.mark.parametrize("size", [(12, 8, 4), (6, 16, 4), (6, 8, 14), (12, 16, 14)])
def test_the_last_volume_of_the_store_may_be_smaller_than_a_crop(tmp_path, size):
    dataset = dataset_of(tmp_path, size, numbers=(0, 1))
    last = to_device(dataset, np.array([len(dataset.names) - 1]), "cpu")
    images, masks = last.batch(torch.tensor([0]))
    corner = dataset.volumes.corners[-1]
    inside = [min(c + e, end) - c for c, e, end in zip(corner, size, SHAPES[1], strict=True)]
    kept = tuple(slice(count) for count in inside)
    there = tuple(slice(c, c + count) for c, count in zip(corner, inside, strict=True))
    found = as_levels(dataset, images)[0][(slice(None), *kept)].numpy()
    assert (found == levels_of(1)[(slice(None), *there)]).all()
    assert (masks != 255).sum() == np.prod(inside) == images[0, 0].isfinite().sum()


def test_a_batch_is_in_the_order_asked_for_and_knows_only_its_rows(tmp_path):
    dataset = dataset_of(tmp_path)
    rows = dataset.rows("val")
    resident = to_device(dataset, rows, "cpu")
    images, _ = resident.batch(torch.tensor([2, 0, 2]))
    assert len(resident) == len(rows) and (images[0] == images[2]).all()
    assert as_levels(dataset, images)[1, 0, 0, 0, 0] == levels_of(2)[0, 0, 0, 0]


def test_random_crops_lie_anywhere_in_their_volume_and_are_the_same_bits_again(tmp_path):
    dataset = dataset_of(tmp_path)
    row = int(np.flatnonzero(dataset.volumes.owner == 0)[0])
    resident = to_device(dataset, np.array([row]), "cpu")
    many = torch.zeros(2000, dtype=torch.long)
    images, masks = resident.draw(many, 7, 3, torch.arange(2000))
    first = as_levels(dataset, images)[:, 0, 0, 0, 0].long() - int(levels_of(0)[0, 0, 0, 0])
    corners = np.stack(np.unravel_index(first.numpy(), SHAPES[0]), axis=1)
    room = np.array(SHAPES[0]) - SIZE
    assert (corners.min(axis=0) == 0).all() and (corners.max(axis=0) == room).all()
    for axis in range(3):  # all places alike probable: five deviations
        share = np.bincount(corners[:, axis]) / 2000
        even = 1 / (room[axis] + 1)
        assert share == pytest.approx(even, abs=5 * (even / 2000) ** 0.5)
    expected = [
        labels_of(0)[tuple(slice(c, c + e) for c, e in zip(k, SIZE, strict=True))] for k in corners
    ]
    assert (masks.numpy() == np.stack(expected)).all()

    again, _ = resident.draw(many[:5], 7, 3, torch.arange(100, 105))
    assert torch.equal(again, images[100:105])
    other, _ = resident.draw(many[:5], 7, 4, torch.arange(5))
    assert not torch.equal(other, images[:5])


def test_a_share_of_crops_shows_a_class_and_every_class_of_the_volume_alike(tmp_path):
    dataset = dataset_of(tmp_path)
    row = int(np.flatnonzero(dataset.volumes.owner == 3)[0])
    resident = to_device(dataset, np.array([row]), "cpu")
    many, samples = torch.zeros(3000, dtype=torch.long), torch.arange(3000)
    _, masks = resident.draw(many, 1, 0, samples, foreground=1.0)
    shown = Counter()
    for mask in masks:
        labels = set(mask.unique().tolist()) - {0, 255}
        assert labels
        shown.update(labels)
    # half is drawn for each class, and the rare one is never beside the common one
    assert shown[2] / 3000 == pytest.approx(0.5, abs=0.05) and sum(shown.values()) == 3000
    _, masks = resident.draw(many, 1, 0, samples, foreground=0.5)
    _, plain = resident.draw(many, 1, 0, samples, foreground=0.0)
    by_chance = (plain == 2).flatten(1).any(dim=1).float().mean().item()
    share = (masks == 2).flatten(1).any(dim=1).float().mean().item()
    assert share == pytest.approx(0.5 * 0.5 + 0.5 * by_chance, abs=0.05) and by_chance < 0.3


def test_a_crop_is_centred_on_what_it_shows_where_the_border_allows(tmp_path):
    dataset = dataset_of(tmp_path)
    row = int(np.flatnonzero(dataset.volumes.owner == 3)[0])
    resident = to_device(dataset, np.array([row]), "cpu")
    _, masks = resident.draw(torch.zeros(400).long(), 0, 0, torch.arange(400), foreground=1.0)
    places = {tuple(place) for mask in masks for place in (mask == 2).nonzero().tolist()}
    # (10, 4, 5) in the middle of 6 x 8 x 4, but only 9 voxels along the second axis: room for 1;
    # (19, 8, 10) is the last voxel of the volume, and of its crop
    assert places == {(3, 4, 2), (5, 7, 3)}


UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # which CUDA can hold, but not index


class Indexed(TorchDispatchMode):
    """Types of the tensors that were indexed."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_select):
            self.types.add(args[0].dtype)
        return operation(*args, **(kwargs or {}))


def test_nothing_is_indexed_that_cuda_cannot_index(tmp_path):
    dataset = dataset_of(tmp_path)
    resident = to_device(dataset, dataset.rows("train"), "cpu")
    with Indexed() as seen:
        resident.draw(torch.arange(4), 1, 0, torch.arange(4), foreground=1.0)
    assert {torch.bool, torch.int16, torch.uint8} <= seen.types  # classes, images, masks
    assert not seen.types.intersection(UNSIGNED)


def test_a_volume_without_any_class_is_cropped_anywhere(tmp_path):
    dataset = dataset_of(tmp_path)
    row = int(np.flatnonzero(dataset.volumes.owner == 2)[0])
    resident = to_device(dataset, np.array([row]), "cpu")
    many = torch.zeros(50, dtype=torch.long)
    expected, _ = resident.draw(many, 0, 0, torch.arange(50), foreground=0.0)
    images, masks = resident.draw(many, 0, 0, torch.arange(50), foreground=1.0)
    assert torch.equal(images, expected) and (masks == 0).all()


def test_pretraining_never_sees_a_label_not_even_through_where_it_looks(tmp_path):
    dataset = dataset_of(tmp_path)
    rows = dataset.rows("pretrain")
    resident = to_device(dataset, rows, "cpu", labels=False)
    assert resident.masks is None and resident.spots is None and resident.has_class is None
    index, samples = torch.arange(len(rows)), torch.arange(len(rows))
    images, masks = resident.draw(index, 0, 0, samples)
    blind = replace(dataset, masks=np.zeros_like(dataset.masks))
    assert masks is None
    assert torch.equal(
        to_device(blind, rows, "cpu").draw(index, 0, 0, samples)[0].nan_to_num(),
        images.nan_to_num(),
    )


def test_a_picture_is_the_one_crop_of_itself(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 3, 6, 5)).astype(np.uint8)
    dataset = open_dataset(write(source_of(images), tmp_path))
    resident = to_device(dataset, np.array([2, 0]), "cpu")
    index = torch.tensor([1, 0, 0])
    for batch, _ in (resident.batch(index), resident.draw(index, 5, 9, torch.arange(3))):
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (dataset.mean, dataset.std))
        assert ((batch * std + mean) * 255).round().numpy().astype(int).tolist() == images[
            [0, 2, 2]
        ].tolist()


def test_a_whole_volume_is_standardised_like_its_crops(tmp_path):
    dataset = dataset_of(tmp_path)
    whole = whole_volume(dataset, 1, torch.device("cpu"))
    assert whole.shape == (1, 2, 6, 12, 10) and whole[0, :, 5].isnan().all()
    assert (as_levels(dataset, whole)[0, :, :5].numpy() == levels_of(1)).all()
    row = int(np.flatnonzero(dataset.volumes.owner == 1)[0])
    crop, _ = to_device(dataset, np.array([row]), "cpu").batch(torch.tensor([0]))
    assert torch.equal(crop[:, :, :5], whole[:, :, :5, :8, :4])


def test_the_mean_the_shares_and_the_objects_are_of_whole_training_volumes(tmp_path):
    dataset = dataset_of(tmp_path)
    training = [levels_of(number) / 65535 for number in (0, 1, 3)]
    for channel in range(2):
        values = np.concatenate([volume[channel].ravel() for volume in training])
        assert dataset.mean[channel] == pytest.approx(values.mean())
        assert dataset.std[channel] == pytest.approx(values.std())
    objects = dataset.about["objects"]
    assert objects["common"]["train"] == 3 and objects["rare"]["train"] == 2
    voxels = sum(int(np.prod(SHAPES[number])) for number in (0, 1, 3))
    assert dataset.about["pixel_share"]["common"] == pytest.approx(24 / voxels, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_the_gpu_cuts_the_same_crops_resident_or_not(tmp_path, monkeypatch, share):
    monkeypatch.setattr("trainables.data.batches.RESIDENT_SHARE", share)
    dataset = dataset_of(tmp_path)
    rows = dataset.rows("train")
    index, samples = torch.arange(len(rows)).flip(0), torch.arange(len(rows))
    host, device = to_device(dataset, rows, "cpu"), to_device(dataset, rows, "cuda")
    place = device.rows.device
    assert (place.type == "cuda") == (share > 0)
    for expected, found in (
        (host.batch(index), device.batch(index)),
        (
            host.draw(index, 3, 5, samples, foreground=0.5),
            device.draw(index, 3, 5, samples.to(place), foreground=0.5),
        ),
    ):
        torch.testing.assert_close(found[0].cpu(), expected[0], equal_nan=True)
        assert torch.equal(found[1].cpu(), expected[1])


def test_drawing_makes_no_tensor_of_numbers_of_the_host(tmp_path, monkeypatch):
    """On a GPU everybody would wait until they are there, at each step."""
    resident = to_device(dataset_of(tmp_path), np.arange(4), "cpu")
    index_B = samples_B = torch.arange(4)

    def waits(*_, **__):
        raise AssertionError("a tensor of numbers of the host")

    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, waits)
    resident.draw(index_B, 1, 2, samples_B, foreground=0.5)
    resident.batch(index_B)
