"""Augmentations on the device. Run: python -m pytest tests/trainables/test_augment.py"""

import math
from functools import partial

import pytest
import torch

from tests.drawn import drawn
from trainables import counter
from trainables.augment import AUGMENTATIONS, flips
from trainables.config import Augmentation

EVERY_AUGMENTATION = [
    pytest.param(partial(AUGMENTATIONS[name], **setting.options()), id=f"{name} {setting}")
    for name in AUGMENTATIONS
    for setting in drawn(Augmentation, name)
]
SIZES = [(3, 4), (2, 3, 4)]


def batch(size=(3, 4), channels=2, count=8):
    """Images whose channels and masks all hold the same picture."""
    picture = torch.arange(count * torch.tensor(size).prod()).reshape(count, *size)
    return torch.stack([picture.float()] * channels, dim=1), picture


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("augment", EVERY_AUGMENTATION)
def test_what_stands_out_of_an_image_stays_where_its_mask_says(augment, size):
    """Each sample has one bright pixel, at a place of its own, in every channel.

    Of some it may be cut away, and what is enlarged may show it in several pixels.
    """
    count = math.prod(size)
    is_bright = torch.eye(count).reshape(count, *size)
    images = torch.stack([1000 * is_bright, -1000 * is_bright], dim=1)
    changed, masks = augment(images, is_bright.long(), 0, 0, torch.arange(count))
    assert changed.shape == images.shape
    is_there = masks.flatten(1).any(1)
    assert is_there.float().mean() > 0.3
    for channel in changed.flatten(2).unbind(1):
        away = (channel - channel.median(dim=1, keepdim=True).values).abs()
        is_marked = masks.flatten(1).gather(1, away.argmax(1)[:, None])[:, 0] == 1
        assert is_marked[is_there].all()
    alone, none = augment(images, None, 0, 0, torch.arange(count))
    assert torch.equal(alone, changed) and none is None


@pytest.mark.parametrize("size", SIZES)
def test_only_the_axes_that_are_named_are_turned_around(size):
    images, masks = batch(size, count=64)
    samples = torch.arange(64)
    every = flips(images, masks, 0, 0, samples)
    for axes in ((), (0,), (1,), (0, 1)):
        changed, labels = flips(images, masks, 0, 0, samples, flip_axes=axes)
        assert torch.equal(changed[:, 0].long(), labels)
        for axis in range(len(size)):
            is_turned = (labels.diff(dim=1 + axis) < 0).flatten(1).any(1)
            expected = (every[1].diff(dim=1 + axis) < 0).flatten(1).any(1)
            assert torch.equal(is_turned, expected & (axis in axes))
    crops = partial(AUGMENTATIONS["crops"], scale=(1.0, 1.0), stretch=1.0, flip_axes=(0,))
    _, labels = crops(images, masks, 0, 0, samples)
    assert torch.equal(labels, flips(images, masks, 0, 0, samples, flip_axes=(0,))[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("augment", EVERY_AUGMENTATION)
def test_padding_stays_padding(augment, size):
    images, masks = batch(size)
    images[..., -1], masks[..., -1] = torch.nan, 255
    for step in range(4):
        changed, labels = augment(images, masks, 0, step, torch.arange(8))
        assert torch.equal(changed.isnan().all(1), labels == 255)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["none", "flips"])
def test_images_and_masks_change_alike(name, size):
    images, masks = AUGMENTATIONS[name](*batch(size), 0, 0, torch.arange(8))
    for channel in images.unbind(1):
        assert torch.equal(channel.long(), masks)
    alone, none = AUGMENTATIONS[name](batch(size)[0], None, 0, 0, torch.arange(8))
    assert torch.equal(alone, images) and none is None


@pytest.mark.parametrize("augment", EVERY_AUGMENTATION)
def test_two_ranks_change_what_one_would(augment):
    images, masks = batch()
    whole, _ = augment(images, masks, 3, 5, torch.arange(8))
    ranks = [
        augment(images[rows], masks[rows], 3, 5, torch.arange(8)[rows])[0]
        for rows in (slice(0, 4), slice(4, 8))
    ]
    assert torch.equal(whole, torch.cat(ranks))


def test_each_axis_is_turned_around_on_its_own():
    images, masks = batch(count=64)
    turned, _ = flips(images, masks, 0, 0, torch.arange(64))
    is_flipped = counter.uniform(0, "flip", 0, torch.arange(64), 2) < 0.5
    assert len(is_flipped.unique(dim=0)) == 4
    for image, result, (rows, columns) in zip(images, turned, is_flipped.tolist(), strict=True):
        axes = [axis for axis, flipped in ((1, rows), (2, columns)) if flipped]
        assert torch.equal(result, image.flip(axes))


def test_another_step_turns_others():
    images, masks = batch()
    results = [flips(images, masks, 0, step, torch.arange(8))[0] for step in (0, 1)]
    assert not torch.equal(*results)


@pytest.mark.parametrize("size", [(32, 32), (16, 16, 16)])
def test_crops_keep_the_share_that_was_asked_for(size):
    """A ramp along each axis shows how much of it is seen: its slope."""
    axes = len(size)
    lines = torch.meshgrid(*[torch.linspace(0, 1, edge) for edge in size], indexing="ij")
    images = torch.stack(lines)[None].expand(512, -1, *size)
    crops = AUGMENTATIONS["crops"]
    changed, _ = crops(images, None, 0, 0, torch.arange(512), scale=(0.3, 0.8))
    seen = changed.flatten(2)
    # between the outermost pixels' centres lies one pixel less than the whole
    edges_BA = seen.amax(2) - seen.amin(2)
    share_B = edges_BA.prod(1)
    assert share_B.min() > 0.27 and share_B.max() < 0.85 and 0.5 < share_B.mean() < 0.6
    ratio_B = edges_BA.amax(1) / edges_BA.amin(1)
    assert 1.2 < ratio_B.max() < 4 / 3 + 0.05
    assert len({tuple(row) for row in edges_BA.tolist()}) == 512
    assert changed.isfinite().all() and axes == changed.shape[1]


def test_crops_of_the_whole_are_the_image():
    images, masks = batch((5, 6))
    whole, labels = AUGMENTATIONS["crops"](
        images, masks, 0, 0, torch.arange(8), scale=(1.0, 1.0), stretch=1.0
    )
    expected, turned = flips(images, masks, 0, 0, torch.arange(8))
    torch.testing.assert_close(whole, expected)
    assert torch.equal(labels, turned)
