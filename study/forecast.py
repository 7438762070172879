"""How many steps pretraining takes until it fills in hidden pixels better than trivial methods do.

Whole pretrainings of few steps, each with its own warm-up and decay, are extrapolated: losses fall
with the length of training like a power law that saturates (Kaplan et al. 2020, "Scaling laws for
neural language models", section 4). That the gain in dB does too, gain = b (N^-c - n^-c) after n
steps, is interpretation; N is where it crosses zero. The interval of N is its profile likelihood:
every N is kept that some exponent c makes as good as the best curve, but for noise.

Before it learns anything else, a model learns the mean, and may stay there for long. So only
rehearsals that are better than the mean are extrapolated, and before there are enough of them
nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainables.late import Late

stats = Late("scipy.stats")

FEWEST_STEPS = 8  # of the first rehearsal
GROWTH = math.sqrt(2)  # steps of a rehearsal, to those of the one before
FEWEST_POINTS = 4  # a curve has three parameters
MOST_POINTS = 6  # the newest are fitted, as the law is one of late training
CONFIDENCE = 0.9  # of the interval
NOISE = 0.1  # dB that gains of equal settings differ by at the least
CLEAR = 2 * NOISE  # dB from zero at which a single rehearsal counts
ESCAPED = 0.2  # dB over the mean filling from which on a rehearsal is beyond it
FARTHEST = 30  # times the longest rehearsal, beyond which nothing is claimed
CROSSINGS = 400  # that are tried
EXPONENTS = np.geomspace(0.02, 2, 400)[:, None]  # the least: nearly a line in log(steps)

Floats = npt.NDArray[np.float64]


class Point(NamedTuple):
    """A rehearsal and what came of it."""

    steps: int
    decibels: float  # its probe gain
    over_mean: float  # dB above filling in the mean alone


class Verdict(Enum):
    """What a forecast says to a plan."""

    ENOUGH = auto()
    OPEN = auto()  # the plan lies within the interval
    TOO_FEW = auto()
    UNKNOWN = auto()


class Forecast(NamedTuple):
    """The steps until the gain crosses zero."""

    points: list[Point]
    steps: int | None = None  # the best guess; None: there is none, or none that is near enough
    low: int = 1  # fewer are not enough
    high: int | None = None  # more are enough; None: nothing is said

    def verdict(self, planned: int) -> Verdict:
        """What it says to so many planned steps."""
        if planned <= self.low:
            return Verdict.TOO_FEW
        if self.high is not None and planned >= self.high:
            return Verdict.ENOUGH
        return Verdict.UNKNOWN if self.steps is None else Verdict.OPEN


def rehearsals(
    rehearse: Callable[[int], Point],
    planned: int,
    seconds: float,
    clock: Callable[[], float],
) -> list[Point]:
    """Rehearse with 8, 11, 16, ... steps as long as time is left, and no more than are planned.

    `rehearse` trains for so many steps; `clock` tells seconds.
    """
    points: list[Point] = []
    began = clock()
    while True:
        steps = min(round(FEWEST_STEPS * GROWTH ** len(points)), planned)
        before = clock()
        points.append(rehearse(steps))
        now = clock()
        if steps == planned or now - began + GROWTH * (now - before) > seconds:
            return points


def forecast(points: Sequence[Point]) -> Forecast:
    """Where the curve through the newest rehearsals crosses zero."""
    points = sorted(points)
    fitted = [point for point in points if point.over_mean > ESCAPED][-MOST_POINTS:]
    if len(fitted) < FEWEST_POINTS or fitted[0].decibels > 0:
        return _as_measured(points)
    steps = np.array([point.steps for point in fitted], float)
    gains = np.array([point.decibels for point in fitted])
    crossings = np.geomspace(steps[0], FARTHEST * steps[-1], CROSSINGS)
    errors = np.array([_error(steps, gains, crossing) for crossing in crossings])
    least = min(errors.min(), _error_below(steps, gains))
    degrees = len(fitted) - 3
    noise = max(least / degrees, NOISE**2)
    is_kept = errors <= least + noise * stats.t.ppf((1 + CONFIDENCE) / 2, degrees) ** 2
    if not is_kept.any():  # it levels off below zero, or crosses it farther away
        return Forecast(points, low=round(crossings[-1]))
    kept, best = crossings[is_kept], int(errors.argmin())
    return Forecast(
        points,
        steps=round(crossings[best]) if best < CROSSINGS - 1 else None,
        low=round(kept[0]),
        high=None if is_kept[-1] else round(kept[-1]),
    )


def _as_measured(points: Sequence[Point]) -> Forecast:
    """What rehearsals say that are too few for a curve."""
    low = max((point.steps for point in points if point.decibels < -CLEAR), default=1)
    enough = [point.steps for point in points if point.decibels > CLEAR and point.steps > low]
    first = enough[0] if enough else None
    return Forecast(list(points), steps=first, low=low, high=first)


def _error(steps: Floats, gains: Floats, crossing: float) -> float:
    """Sum of squares that the best curve leaves which crosses zero there."""
    shapes = crossing**-EXPONENTS - steps**-EXPONENTS
    scales = (shapes @ gains / (shapes**2).sum(axis=1)).clip(min=0)
    return float(((gains - scales[:, None] * shapes) ** 2).sum(axis=1).min())


def _error_below(steps: Floats, gains: Floats) -> float:
    """The same of the best curve that never crosses zero."""
    shapes = -(steps**-EXPONENTS)
    rises = shapes - shapes.mean(axis=1, keepdims=True)
    scales = (rises @ gains / (rises**2).sum(axis=1)).clip(min=0)
    rest = gains - scales[:, None] * shapes
    plateaus = rest.mean(axis=1, keepdims=True).clip(max=0)
    return float(((rest - plateaus) ** 2).sum(axis=1).min())
