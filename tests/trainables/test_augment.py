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
    """Each sample has one bright pixel, at a place of its own, in every channel."""
    count = math.prod(size)
    is_bright = torch.eye(count).reshape(count, *size)
    images = torch.stack([1000 * is_bright, -1000 * is_bright], dim=1)
    changed, masks = augment(images, is_bright.long(), 0, 0, torch.arange(count))
    assert changed.shape == images.shape and masks.flatten(1).sum(1).tolist() == [1] * count
    for channel in changed.flatten(2).unbind(1):
        away = (channel - channel.median(dim=1, keepdim=True).values).abs()
        assert torch.equal(away.argmax(1), masks.flatten(1).argmax(1))
    alone, none = augment(images, None, 0, 0, torch.arange(count))
    assert torch.equal(alone, changed) and none is None


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
