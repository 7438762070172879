"""Generated textures: what they promise of lesions: pytest tests/trainables/test_textures.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trainables.data.textures import textures


def pictures(count: int = 200, **options: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images and instances (count, H, W) of the labelled ones."""
    source = textures(Path(), images=count, **options)
    decoded = [source.decode(row) for row in range(count)]
    instances = [each.instances for each in decoded]
    return np.stack([each.images[0, 0] for each in decoded]), np.concatenate(instances)


def test_no_pixel_tells_a_lesion_from_its_ground() -> None:
    images, instances = pictures()
    lesion, ground = images[instances > 0].astype(float), images[instances == 0].astype(float)
    assert abs(lesion.mean() - ground.mean()) < 0.5
    assert lesion.std() == pytest.approx(ground.std(), rel=0.02)


@pytest.mark.parametrize("pattern", [2, 4, 8])
def test_both_patterns_repeat_and_have_nothing_in_common(pattern: int) -> None:
    images, instances = pictures(pattern=pattern, strength=3.0)
    signs = np.sign(images.astype(float) - 128)
    tiles = signs.reshape(-1, 32 // pattern, pattern, 32 // pattern, pattern).swapaxes(2, 3)
    whole = instances.reshape(-1, 32 // pattern, pattern, 32 // pattern, pattern).swapaxes(2, 3)
    means = []
    for is_inside in ((whole > 0).all((3, 4)), (whole == 0).all((3, 4))):
        values = tiles[is_inside].reshape(-1, pattern**2)
        means.append(np.sign((values * values[:, :1]).mean(axis=0)))  # of whichever sign
        assert means[-1].sum() == 0
    assert means[0] @ means[1] == 0


def test_every_image_has_a_lesion_of_about_that_diameter() -> None:
    _, instances = pictures(size=64, lesions=0, diameter=12)
    areas = (instances > 0).sum((1, 2))
    assert areas.min() > 0 and instances.max() == 1
    assert np.sqrt(np.quantile(areas, 0.8) * 4 / np.pi) == pytest.approx(12, abs=1.5)


def test_more_unlabelled_images_change_no_labelled_one() -> None:
    few = textures(Path(), images=3, unlabelled=1)
    many = textures(Path(), images=3, unlabelled=9)
    assert few.identity == many.identity
    assert np.array_equal(few.decode(2).images, many.decode(2).images)
    unlabelled = many.decode(many.splits.index("pretrain"))
    assert (unlabelled.masks == 255).all() and unlabelled.instances is not None
    assert not unlabelled.instances.any()
