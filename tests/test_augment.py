"""Augmentations on the device. Run: python -m pytest tests/test_augment.py"""

import pytest
import torch

from trainables import counter
from trainables.augment import AUGMENTATIONS, flips


def batch(size=(3, 4), channels=2, count=8):
    """Images whose channels and masks all hold the same picture."""
    picture = torch.arange(count * torch.tensor(size).prod()).reshape(count, *size)
    return torch.stack([picture.float()] * channels, dim=1), picture


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_and_masks_change_alike(name, size):
    images, masks = AUGMENTATIONS[name](*batch(size), 0, 0, torch.arange(8))
    for channel in images.unbind(1):
        assert torch.equal(channel.long(), masks)
    alone, none = AUGMENTATIONS[name](batch(size)[0], None, 0, 0, torch.arange(8))
    assert torch.equal(alone, images) and none is None


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_two_ranks_change_what_one_would(name):
    images, masks = batch()
    whole, _ = AUGMENTATIONS[name](images, masks, 3, 5, torch.arange(8))
    ranks = [
        AUGMENTATIONS[name](images[rows], masks[rows], 3, 5, torch.arange(8)[rows])[0]
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
