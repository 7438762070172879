"""Generated blood smears with exact masks: nothing to download, and object sizes as a knob.

Stained cells absorb light, and where cells overlap their absorbances add up (Beer-Lambert), so a
picture is light * 10^(-sum of stain amounts x stain colours), blurred, with noise.
Lengths are in pixels; N objects of one kind are drawn at once in windows of k x k pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from trainables.data.generated import Count, Edge, Picture, generated
from trainables.data.source import Hears, Source, unheard
from trainables.late import Late

if TYPE_CHECKING:
    from scipy import ndimage
else:
    ndimage = Late("scipy.ndimage")

Floats = npt.NDArray[np.float32]
Placed = tuple[Floats, Floats]  # radii (N,), centres (N, 2)
Window = tuple[slice, slice]
Diameter = Annotated[float, Field(ge=1.0, le=1024.0)]
Mean = Annotated[
    float | None, Field(ge=0.0, le=5000.0, description="mean count per image; null: by area")
]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

CLASSES = ["background", "red cell", "white cell", "platelet"]
RED, WHITE, PLATELET = 1, 2, 3
# share of the picture that each class covers when the study file gives no count
COVER = {RED: 0.36, WHITE: 0.09, PLATELET: 0.02}
# absorbance per unit of stain in red, green, blue light
EOSIN = (0.07, 0.21, 0.17)
AZURE = (0.42, 0.60, 0.17)
BULGE = 1.35  # farthest that an outline reaches, in radii
BEYOND = 0.03  # how far outside the picture a centre may lie, in picture edges
DARTS = 24  # tries to place an object


def smears(
    root: Path,
    looked_at: Hears = unheard,
    *,
    size: Edge | tuple[Edge, Edge] = 64,
    images: Annotated[int, Field(ge=1)] = 256,
    val: Annotated[int, Field(ge=1)] = 64,
    test: Count = 64,
    unlabelled: Count = 0,
    seed: Count = 0,
    red_diameter: Diameter = 14.0,
    white_diameter: Diameter = 24.0,
    platelet_diameter: Diameter = 5.0,
    spread: Annotated[Share, Field(description="standard deviation of diameters, relative")] = 0.1,
    red_cells: Mean = None,
    white_cells: Mean = None,
    platelets: Mean = None,
    overlap: Annotated[
        Share, Field(description="0: cells keep apart; 1: they fall anywhere")
    ] = 0.3,
    stain: Share = 0.5,
    light: Share = 0.5,
    noise: Share = 0.5,
) -> Source:
    """Blood smears, generated: mean diameters in px and mean counts per image are settings."""
    height_width = (size, size) if isinstance(size, int) else size
    look = Look(
        size=height_width,
        diameters={RED: red_diameter, WHITE: white_diameter, PLATELET: platelet_diameter},
        counts={RED: red_cells, WHITE: white_cells, PLATELET: platelets},
        spread=spread,
        overlap=overlap,
        stain=stain,
        light=light,
        noise=noise,
    )
    return generated(
        "smears",
        partial(smear, look),
        counts={"train": images, "val": val, "test": test, "pretrain": unlabelled},
        seed=seed,
        about=look.as_json(),
        size=height_width,
        channels=3,
        classes=list(CLASSES),
        small_classes=[PLATELET],
    )


def example(folder: Path) -> dict[str, Any]:
    """A few smears; nothing is read."""
    return {"size": 32, "images": 4, "val": 2, "test": 1, "unlabelled": 1}


@dataclass(frozen=True)
class Nucleus:
    """Lobes of a nucleus; lengths in units of the cell's radius, the arc in radians."""

    lobes: tuple[int, int]
    orbit: float
    arc: float
    size: float


# neutrophil, monocyte, lymphocyte
NUCLEI = (
    Nucleus(lobes=(3, 5), orbit=0.52, arc=4.2, size=0.26),
    Nucleus(lobes=(5, 5), orbit=0.42, arc=2.6, size=0.30),
    Nucleus(lobes=(1, 1), orbit=0.08, arc=0.0, size=0.76),
)
NUCLEI_SHARE = (0.6, 0.15, 0.25)


@dataclass(frozen=True)
class Look:
    """What the smears of a data set have in common."""

    size: tuple[int, int]
    diameters: dict[int, float]
    counts: dict[int, float | None]
    spread: float
    overlap: float
    stain: float
    light: float
    noise: float

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "size"}

    def mean_count(self, label: int) -> float:
        """Objects of a class in an image, on average."""
        count = self.counts[label]
        if count is not None:
            return count
        return COVER[label] * math.prod(self.size) / (math.pi / 4 * self.diameters[label] ** 2)


def smear(look: Look, rng: np.random.Generator) -> Picture:
    """One picture, with its classes and its cells."""
    placed: dict[int, Placed] = {}
    for label in (WHITE, RED, PLATELET):  # white cells push the others aside
        placed[label] = _place(look, label, placed, rng)
    reach = max(radii.max(initial=0) for radii, _ in placed.values()) * BULGE
    margin = math.ceil(reach + BEYOND * max(look.size)) + 2
    canvas = Canvas(look, margin, rng)
    for label, draw in DRAW.items():  # later ones lie on top
        draw(canvas, *placed[label], rng)
    picture = _expose(look, canvas, rng)
    return Picture(picture, canvas.inner(canvas.classes), canvas.inner(canvas.instances))


class Canvas:
    """Stain amounts, classes and instances of a picture with a margin, so that windows fit."""

    def __init__(self, look: Look, margin: int, rng: np.random.Generator) -> None:
        shape = (look.size[0] + 2 * margin, look.size[1] + 2 * margin)
        self.margin = margin
        self.eosin = np.zeros(shape, np.float32)
        self.azure = np.zeros(shape, np.float32)
        self.classes = np.zeros(shape, np.uint8)
        self.instances = np.zeros(shape, np.uint16)
        self.num_instances = 0
        self.grain = _grain(shape, max(0.7, 0.035 * look.diameters[WHITE]), rng)

    def inner(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The picture without its margin."""
        return array[self.margin : -self.margin, self.margin : -self.margin]

    def windows(self, radii_N: Floats, centres_N2: Floats) -> tuple[Floats, Floats, list[Window]]:
        """Offsets y, x (N, k, k) of the pixels of each window from its object's centre."""
        half = math.ceil(float(radii_N.max()) * BULGE) + 1
        corner_N2 = np.floor(centres_N2).astype(int) - half + self.margin
        steps = np.arange(2 * half + 1, dtype=np.float32)
        away_N2k = steps + (corner_N2 - self.margin - centres_N2)[..., None].astype(np.float32)
        windows = [
            (slice(y, y + len(steps)), slice(x, x + len(steps))) for y, x in corner_N2.tolist()
        ]
        return away_N2k[:, 0, :, None], away_N2k[:, 1, None, :], windows

    def paste(self, label: int, window: Window, inside: npt.NDArray[np.bool_]) -> None:
        """Lay the next object of a class on top of what is there."""
        self.num_instances += 1
        self.classes[window][inside] = label
        self.instances[window][inside] = self.num_instances


def _place(look: Look, label: int, placed: dict[int, Placed], rng: np.random.Generator) -> Placed:
    """Radii (N,) and centres (N, 2) of a class: darts that miss what is placed already."""
    count = rng.poisson(look.mean_count(label))
    wobble = np.clip(1 + look.spread * rng.standard_normal(count), 0.5, 1.5)
    radii_N = (look.diameters[label] / 2 * wobble).astype(np.float32)
    others = list(placed.values())
    start = sum(len(radii) for radii, _ in others)
    radii = np.concatenate([*(radii for radii, _ in others), radii_N])
    centres = np.concatenate([*(where for _, where in others), np.zeros((count, 2), np.float32)])
    darts = rng.uniform(-BEYOND, 1 + BEYOND, (count, DARTS, 2)).astype(np.float32) * look.size
    end = start
    for radius, darts_D2 in zip(radii_N, darts, strict=True):
        gap_D2 = darts_D2[:, None] - centres[:end]
        apart = (1 - look.overlap) * (radius + radii[:end])
        is_free_D = (np.square(gap_D2).sum(-1) >= apart**2).all(axis=1)
        if is_free_D.any():  # else the picture is full, and this one is left out
            radii[end], centres[end] = radius, darts_D2[is_free_D.argmax()]
            end += 1
    return radii[start:end], centres[start:end]


def _draw_red(
    canvas: Canvas, radii_N: Floats, centres_N2: Floats, rng: np.random.Generator
) -> None:
    """Discs with a pale centre and a darker rim; where two overlap, both are seen."""
    if not len(radii_N):
        return
    y, x, windows = canvas.windows(radii_N, centres_N2)
    depth = _outline(y, x, radii_N, 0.05, rng)
    pallor = _each(rng.uniform(0.35, 0.85, len(radii_N)) * (rng.random(len(radii_N)) > 0.12))
    width = _each(rng.uniform(0.38, 0.6, len(radii_N)))
    amount = _each(rng.uniform(0.8, 1.2, len(radii_N)))
    body = 1 - pallor * np.exp(-((depth / width) ** 3))
    body += 0.2 * np.exp(-(((depth - 0.86) / 0.09) ** 2))
    body *= amount * _soft_edge(depth, radii_N)
    for window, stain, inside in zip(windows, body, depth < 1, strict=True):
        canvas.eosin[window] += stain
        canvas.azure[window] += 0.07 * stain
        canvas.paste(RED, window, inside)


def _draw_white(
    canvas: Canvas, radii_N: Floats, centres_N2: Floats, rng: np.random.Generator
) -> None:
    """Granular pale cytoplasm around a nucleus that is round, kidney-shaped or in lobes."""
    if not len(radii_N):
        return
    y, x, windows = canvas.windows(radii_N, centres_N2)
    depth = _outline(y, x, radii_N, 0.03, rng)
    cell = _soft_edge(depth, radii_N)
    nucleus = np.stack(
        [
            _nucleus(y[n], x[n], radius, NUCLEI[kind], rng)
            for n, (radius, kind) in enumerate(
                zip(radii_N, rng.choice(len(NUCLEI), len(radii_N), p=NUCLEI_SHARE), strict=True)
            )
        ]
    )
    nucleus *= cell
    dark = rng.uniform(0.85, 1.15, len(radii_N))
    for n, window in enumerate(windows):
        grain = canvas.grain[window]
        canvas.eosin[window] *= 1 - 0.8 * cell[n]
        canvas.eosin[window] += cell[n] * (0.36 + 0.07 * grain) + 0.3 * nucleus[n]
        canvas.azure[window] *= 1 - 0.8 * cell[n]
        canvas.azure[window] += cell[n] * (0.14 + 0.035 * grain)
        canvas.azure[window] += dark[n] * nucleus[n] * (0.72 + 0.13 * grain)
        canvas.paste(WHITE, window, depth[n] < 1)


def _draw_platelets(
    canvas: Canvas, radii_N: Floats, centres_N2: Floats, rng: np.random.Generator
) -> None:
    """Small ragged discs with purple granules that thin out towards the edge."""
    if not len(radii_N):
        return
    y, x, windows = canvas.windows(radii_N, centres_N2)
    depth = _outline(y, x, radii_N, 0.09, rng)
    dark = _each(rng.uniform(0.45, 0.8, len(radii_N)))
    body = dark * _soft_edge(depth, radii_N) * (1.1 - 0.6 * np.minimum(depth, 1) ** 2)
    for window, stain, inside in zip(windows, body, depth < 1, strict=True):
        grain = 1 + 0.3 * canvas.grain[window]
        canvas.azure[window] += 0.75 * stain * grain
        canvas.eosin[window] += 0.5 * stain
        canvas.paste(PLATELET, window, inside)


def _nucleus(
    y: Floats, x: Floats, radius: float, nucleus: Nucleus, rng: np.random.Generator
) -> Floats:
    """Soft mask (k, k) of lobes strung along an arc."""
    lobes = int(rng.integers(nucleus.lobes[0], nucleus.lobes[1] + 1))
    turn = rng.uniform(0, 2 * math.pi)
    few = math.sqrt(nucleus.lobes[1] / lobes)  # fewer lobes are larger and closer together
    angle_L = turn + nucleus.arc / few * (np.arange(lobes) / max(1, lobes - 1) - 0.5)
    angle_L += 0.12 * rng.standard_normal(lobes)
    distance_L = nucleus.orbit * radius * rng.uniform(0.85, 1.15, lobes)
    shift_y, shift_x = -0.6 * nucleus.orbit * radius * np.array([np.sin(turn), np.cos(turn)])
    size_L = nucleus.size * few * radius * rng.uniform(0.85, 1.15, lobes)
    field = np.zeros(np.broadcast_shapes(y.shape, x.shape), np.float32)
    for angle, distance, size in zip(angle_L, distance_L, size_L, strict=True):
        to_y = y - (distance * math.sin(angle) + shift_y)
        to_x = x - (distance * math.cos(angle) + shift_x)
        field += np.exp2(-((to_y**2 + to_x**2) / size**2).astype(np.float32))
    # at half height the field falls by ln(2) / size per pixel
    slope = nucleus.size * radius / math.log(2)
    return np.asarray(np.clip((field - 0.5) * slope + 0.5, 0, 1))


def _outline(
    y: Floats, x: Floats, radii_N: Floats, raggedness: float, rng: np.random.Generator
) -> Floats:
    """Distance (N, k, k) from the centre in units of the way to a wavy outline: 1 is the edge."""
    angle = np.arctan2(y, x)
    wave = np.ones_like(angle)
    for order in (2, 3, 4, 5):  # together at most 0.3, see BULGE
        height = np.clip(rng.normal(0, raggedness, len(radii_N)), -0.12, 0.12) * (2 / order) ** 1.6
        phase = rng.uniform(0, 2 * math.pi, len(radii_N))
        wave += _each(height) * np.cos(order * angle + _each(phase))
    # a wavy disc has the area of a plain one
    wave /= np.sqrt((wave**2).mean(axis=(1, 2), keepdims=True))
    return np.asarray(np.hypot(y, x) / (_each(radii_N) * wave), np.float32)


def _soft_edge(depth: Floats, radii_N: Floats) -> Floats:
    """1 inside, 0 outside, and over one pixel in between."""
    return np.asarray(np.clip((1 - depth) * _each(radii_N) + 0.5, 0, 1))


def _expose(look: Look, canvas: Canvas, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The picture (3, H, W) that a camera takes of the stained slide."""
    height, width = look.size
    strength = np.exp(0.22 * look.stain * rng.standard_normal(2))
    eosin, azure = (
        np.array(colour) + 0.035 * look.stain * rng.standard_normal(3) for colour in (EOSIN, AZURE)
    )
    absorbed = (strength[0] * eosin)[:, None, None].astype(np.float32) * canvas.inner(
        canvas.eosin
    ) + (strength[1] * azure)[:, None, None].astype(np.float32) * canvas.inner(canvas.azure)
    lamp = 226 + 12 * look.light * rng.standard_normal() + 7 * look.light * rng.standard_normal(3)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] - rng.uniform(-0.5, 0.5)
    x = np.linspace(-1, 1, width, dtype=np.float32) - rng.uniform(-0.5, 0.5)
    falloff = 1 - look.light * rng.uniform(0.05, 0.2) * (y**2 + x**2).astype(np.float32)
    light = np.clip(lamp, 150, 250)[:, None, None].astype(np.float32) * falloff
    picture = light * np.exp(-math.log(10) * np.maximum(absorbed, 0))
    picture = ndimage.gaussian_filter(picture, (0, 0.55, 0.55))
    shot = rng.standard_normal(picture.shape, np.float32) * np.sqrt(picture / 200)
    return np.asarray(np.clip(np.rint(picture + 5 * look.noise * shot), 0, 255), np.uint8)


def _grain(shape: tuple[int, int], sigma: float, rng: np.random.Generator) -> Floats:
    """Smooth noise of mean 0 and standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma)
    return np.asarray(noise / noise.std())


def _each(values_N: npt.NDArray[Any]) -> Floats:
    """One value per window, as (N, 1, 1)."""
    return np.asarray(values_N, np.float32)[:, None, None]


DRAW = {RED: _draw_red, WHITE: _draw_white, PLATELET: _draw_platelets}
