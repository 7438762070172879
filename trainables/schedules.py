"""Schedules: progress in [0, 1] (share of the planned budget done) and chance -> a value in [0, 1].

The mask ratio follows one; so do the guided share of a strategy and the momentum of its teacher.
`chance` in [0, 1) is the step's own random number, which only random schedules look at.

To add one, write the function with keyword-only options and add it to SCHEDULES. Options that
contradict each other raise a ValueError whatever the progress.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter

from trainables.named import Choice, named

Share = Annotated[float, Field(ge=0, le=1)]
Turn = Annotated[float, Field(gt=0, lt=1)]
Above = Annotated[float, Field(gt=0)]

LEAST_WEIGHT = 1e-300  # of the part of a normal that is left; less has no exact quantiles

# Pairs of progress and chance to take means over: either takes 200 evenly spaced values once, and
# together they fill the square (127 / 200 is near the golden ratio, and has no common divisor).
MIDPOINTS = [((place + 0.5) / 200, (place * 127 % 200 + 0.5) / 200) for place in range(200)]


def constant(progress: float, chance: float, *, value: Share = 0.75) -> float:
    """The same value throughout (0.75 in MAE, He et al. 2022)."""
    return value


def linear(progress: float, chance: float, *, start: Share, end: Share) -> float:
    """Straight from `start` to `end` (the guided share of AnatoMask, Li et al. 2024: 0 to 0.5)."""
    return start + (end - start) * progress


def cosine(progress: float, chance: float, *, start: Share, end: Share) -> float:
    """From `start` to `end` along half a cosine: slow, fast, slow."""
    return start + (end - start) * (1 - math.cos(math.pi * progress)) / 2


def power(
    progress: float, chance: float, *, start: Share, end: Share, exponent: Above = 2.0
) -> float:
    """From `start` to `end` by progress**exponent: above 1 late, below 1 early.

    With exponent 2, how SemMAE (Li et al. 2022) goes from parts of objects to whole ones.
    """
    return start + (end - start) * math.pow(progress, exponent)


def step(
    progress: float,
    chance: float,
    *,
    values: Annotated[list[Share], Field(min_length=2)],
    at: Annotated[list[Turn], Field(min_length=1)],
) -> float:
    """`values[0]`, then `values[i + 1]` from progress `at[i]` on; `at` rises."""
    if len(values) != len(at) + 1 or list(at) != sorted(set(at)):
        raise ValueError(
            f"step needs one more value than rising turning points, got {values} at {at}"
        )
    return values[sum(progress >= turn for turn in at)]


def ramp(
    progress: float,
    chance: float,
    *,
    start: Share,
    end: Share,
    until: Annotated[float, Field(gt=0, le=1)],
) -> float:
    """Straight from `start` to `end` at progress `until`, then flat.

    The momentum of a teacher: 0.999 to 0.9999 until 0.25 in AnatoMask, until 0.5 in HPM (Wang et
    al. 2023; 100 of 200 epochs).
    """
    return start + (end - start) * min(progress / until, 1.0)


def piecewise(
    progress: float,
    chance: float,
    *,
    values: Annotated[list[Share], Field(min_length=2)],
    at: Annotated[list[Share], Field(min_length=2)] | None = None,
) -> float:
    """Straight from each value to the next; flat before the first and after the last.

    `at` is the progress of every value, rising; null: evenly spaced from 0 to 1.
    """
    knots = [place / (len(values) - 1) for place in range(len(values))] if at is None else list(at)
    if len(knots) != len(values) or knots != sorted(set(knots)):
        raise ValueError(
            f"piecewise needs as many rising places as values, got {values} at {knots}"
        )
    if progress <= knots[0]:
        return values[0]
    for place in range(1, len(knots)):
        if progress <= knots[place]:
            share = (progress - knots[place - 1]) / (knots[place] - knots[place - 1])
            return linear(share, chance, start=values[place - 1], end=values[place])
    return values[-1]


def amr(
    progress: float,
    chance: float,
    *,
    start: Share = 0.25,
    end: Share = 0.75,
    shape: Literal["linear", "cosine", "power", "step"] = "linear",
    exponent: Annotated[Above | None, Field(description="of shape power; null: 2")] = None,
    levels: Annotated[
        Annotated[int, Field(ge=2)] | None,
        Field(description="of shape step, each held equally long; null: 3"),
    ] = None,
) -> float:
    """AMLP's adaptive (v2: adjustable) masking ratio (Wang et al. 2023), an interpretation.

    The abstract says only that the ratio rises gradually over training; its equation was not seen.
    End points, shapes, exponent and levels are choices of ours.
    """
    if start > end:
        raise ValueError(f"amr rises, so it needs start <= end, got start {start} and end {end}")
    if exponent is not None and shape != "power":
        raise ValueError(f"amr takes an exponent with shape power only, got shape {shape}")
    if levels is not None and shape != "step":
        raise ValueError(f"amr takes levels with shape step only, got shape {shape}")
    if shape == "cosine":
        return cosine(progress, chance, start=start, end=end)
    if shape == "power":
        return power(progress, chance, start=start, end=end, exponent=exponent or 2.0)
    if shape == "step":
        steps = levels or 3
        progress = min(math.floor(progress * steps), steps - 1) / (steps - 1)
    return linear(progress, chance, start=start, end=end)


def uniform(progress: float, chance: float, *, low: Share, high: Share) -> float:
    """Anew at each step, anything from `low` to `high` equally likely (R2MAE, 2025).

    R2MAE's own range was not seen. AttMask (Kakogeorgiou et al. 2022) draws from 0.1 to 0.5.
    """
    if low > high:
        raise ValueError(f"uniform needs low <= high, got low {low} and high {high}")
    return linear(chance, chance, start=low, end=high)


def truncated_normal(
    progress: float,
    chance: float,
    *,
    mean: Share = 0.55,
    deviation: Above = 0.25,
    low: Share = 0.5,
    high: Share = 1.0,
) -> float:
    """Anew at each step, from the part of a normal between `low` and `high` (MAGE, Li et al. 2023).

    `mean` and `deviation` are those of the whole normal. The inverse of its distribution function.
    """
    if not low < high:
        raise ValueError(f"truncated_normal needs low < high, got low {low} and high {high}")
    side = -1 if low > mean else 1  # mirrored, so that a far tail is the small one
    first, last = (_normal_below(side * (edge - mean) / deviation) for edge in (low, high))
    if abs(last - first) < LEAST_WEIGHT:
        raise ValueError(
            f"truncated_normal needs a normal that reaches from low to high, got mean {mean} and "
            f"deviation {deviation}, nothing of which lies between {low} and {high}"
        )
    quantile = first + (last - first) * chance
    if not 0 < quantile < 1:
        return low if quantile == first else high
    value = mean + side * deviation * NormalDist().inv_cdf(quantile)
    return min(max(value, low), high)


def value_at(schedule: Choice, progress: float, chance: float = 0.5) -> float:
    """The value of a schedule as a setting names it."""
    return SCHEDULES[schedule.name](progress, chance, **schedule.options())


def parse(settings: Mapping[str, Any] | str) -> Choice:
    """The schedule that a study file would name so; for the defaults of options."""
    found: Choice = TypeAdapter(Schedule).validate_python(settings)
    return found


def ratio_problem(schedule: Choice) -> str | None:
    """Why this is no mask ratio; None if something is hidden and something visible at all times."""
    for progress in (0, 0.25, 0.5, 0.75, 1):
        for chance in (0, 0.5, 0.999):
            value = value_at(schedule, progress, chance)
            if not 0 < value < 1:
                return f"given {value} at progress {progress}; expected a ratio above 0 and below 1"
    return None


def _normal_below(value: float) -> float:
    """The standard normal's distribution function, exact in the lower tail too."""
    return math.erfc(-value / math.sqrt(2)) / 2


def _options_go_together(schedule: Choice) -> Choice:
    value_at(schedule, 0.0)
    return schedule


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "power": power,
    "step": step,
    "ramp": ramp,
    "piecewise": piecewise,
    "amr": amr,
    "uniform": uniform,
    "truncated_normal": truncated_normal,
}

if TYPE_CHECKING:
    Schedule = Choice
else:
    Schedule = Annotated[named(SCHEDULES), AfterValidator(_options_go_together)]
