"""Generated images in which nothing but unlabelled images tells lesions from what surrounds them.

Ground and lesions are each covered by a pattern of few pixels that repeats, of either sign, under
noise. Both patterns have as many bright pixels as dark ones, and no correlation: neither the
brightness of a pixel nor any linear map of a patch gives a lesion away. Many images show what
repeats, and a few labels do not: a known answer for what pretraining is to bring.
Lengths are in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from trainables.data.generated import Count, Edge, Picture, generated
from trainables.data.source import Hears, Source, unheard

CLASSES = ["background", "lesion"]
GREY, CONTRAST = 128.0, 32.0  # of the mean, and of a standard deviation of the noise, in 0 to 255
SPREAD = 0.15  # standard deviation of diameters, relative


def textures(
    root: Path,
    looked_at: Hears = unheard,
    *,
    size: Edge | tuple[Edge, Edge] = 32,
    images: Annotated[int, Field(ge=1)] = 8,
    val: Annotated[int, Field(ge=1)] = 64,
    test: Count = 64,
    unlabelled: Count = 1000,
    seed: Count = 0,
    diameter: Annotated[float, Field(ge=3, le=1024, description="of a lesion, on average")] = 16.0,
    lesions: Annotated[float, Field(ge=0, le=5000, description="mean count, at least one")] = 1.5,
    pattern: Annotated[
        int, Field(ge=2, le=64, multiple_of=2, description="edge of what repeats, even")
    ] = 4,
    strength: Annotated[
        float, Field(gt=0, le=3, description="of the patterns, in standard deviations of the noise")
    ] = 0.5,
) -> Source:
    """Lesions, generated, that differ from their ground by their texture alone."""
    height_width = (size, size) if isinstance(size, int) else size
    patterns_2HW = _tiled(_patterns(pattern, np.random.default_rng(seed)), height_width)

    def draw(rng: np.random.Generator) -> Picture:
        instances = _lesions(height_width, lesions, diameter, rng)
        is_lesion = instances > 0
        signs = rng.choice([-1.0, 1.0], 2)
        texture = np.where(is_lesion, signs[1] * patterns_2HW[1], signs[0] * patterns_2HW[0])
        levels = GREY + CONTRAST * (strength * texture + rng.standard_normal(height_width))
        image = np.clip(levels.round(), 0, 255).astype(np.uint8)
        return Picture(image[None], is_lesion.astype(np.uint8), instances)

    return generated(
        "textures",
        draw,
        counts={"train": images, "val": val, "test": test, "pretrain": unlabelled},
        seed=seed,
        about={
            "diameter": diameter,
            "lesions": lesions,
            "pattern": pattern,
            "strength": strength,
        },
        size=height_width,
        channels=1,
        classes=list(CLASSES),
        small_classes=[1],
    )


def example(folder: Path) -> dict[str, Any]:
    """A few images; nothing is read."""
    return {"size": 32, "images": 4, "val": 2, "test": 1, "unlabelled": 1}


def _patterns(edge: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Two patterns (2, edge, edge) of -1 and 1: each sums to 0, and so does their product."""
    order = rng.permutation(edge**2)
    both = np.full((2, edge**2), -1.0)
    half, quarter = edge**2 // 2, edge**2 // 4
    both[0, order[:half]] = 1
    both[1, order[:quarter]] = both[1, order[half : half + quarter]] = 1
    return both.reshape(2, edge, edge)


def _tiled(patterns: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    edge = patterns.shape[1]
    tiled = np.tile(patterns, (1, -(-size[0] // edge), -(-size[1] // edge)))
    return tiled[:, : size[0], : size[1]]


def _lesions(
    size: tuple[int, int], mean: float, diameter: float, rng: np.random.Generator
) -> npt.NDArray[np.uint16]:
    """Discs anywhere in the image, numbered from 1; later ones lie on top. At least one is seen."""
    instances = np.zeros(size, np.uint16)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    for number in range(1, max(1, rng.poisson(mean)) + 1):
        centre = rng.random(2) * size
        radius = diameter / 2 * np.clip(1 + SPREAD * rng.standard_normal(), 0.5, 1.5)
        instances[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = number
    return instances
