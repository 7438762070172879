"""Evolution on the unit cube: CMA-ES from what was told, and children of two parents.

Nothing here keeps a state: the distribution of CMA-ES is computed anew from all that was told, in
its order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FIRST_STEP = 1 / 6  # of a range, as in Optuna
SMALLEST = 1e-12  # variance along an axis
DRAWS = 20  # for a point within the cube, before it is moved to the cube's side
CROSSED, CROSSED_EACH = 0.9, 0.5  # chance that parents are crossed, and then each number
ETA = 20.0  # of crossover and mutation: the greater, the nearer is a child


class Normal(NamedTuple):
    """Where CMA-ES draws from; `paths`: sums of its steps, (2, n), for length and direction."""

    mean: Floats  # (n,)
    step: float
    covariance: Floats  # (n, n)
    paths: Floats
    generations: int


def generation_size(dimensions: int) -> int:
    """Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772, table 1."""
    return 4 + int(3 * math.log(dimensions))


def told(points: Floats, losses: Sequence[float], first: int) -> Normal:
    """CMA-ES that has heard of points (number, n) of the unit cube, in that order.

    The `first` ones, spread over the cube, say where to begin: at the weighted mean of their better
    half. Then each `generation_size` points are a generation. Whether CMA-ES drew them is not
    asked: while trials run, some come from an older distribution (`advanced`). Points that do not
    fill a generation yet are left out.
    """
    order = np.argsort(losses[:first], kind="stable")
    half = order[: max(1, len(order) // 2)]
    dimensions = points.shape[1]
    normal = Normal(
        mean=_weights(len(half)) @ points[half],
        step=FIRST_STEP,
        covariance=np.eye(dimensions),
        paths=np.zeros((2, dimensions)),
        generations=0,
    )
    size = generation_size(dimensions)
    for start in range(first, len(points) - size + 1, size):
        order = np.argsort(losses[start : start + size], kind="stable")
        normal = advanced(normal, points[start : start + size][order])
    return normal


def advanced(normal: Normal, points: Floats) -> Normal:
    """After a generation: points (size, n), the best first.

    Equations of the tutorial (arXiv 1604.00772, appendix A, with its negative weights). Steps that
    are longer than the distribution's own are shortened, so that points from elsewhere do no harm
    (Hansen 2011, Injecting External Solutions Into CMA-ES, arXiv 1110.4181: c_y).
    """
    size, n = points.shape
    half = max(1, size // 2)
    weights = _weights(half)
    mass = 1 / float((weights**2).sum())
    sums = (mass + 2) / (n + mass + 5)
    damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + sums
    turns = (4 + mass / n) / (n + 4 + 2 * mass / n)
    of_path = 2 / ((n + 1.3) ** 2 + mass)
    of_points = min(1 - of_path, 2 * (mass - 1.75 + 1 / mass) / ((n + 2) ** 2 + mass))
    usual = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # length of a normal vector
    worse = np.log((size + 1) / 2) - np.log(np.arange(half + 1, size + 1))
    at_most = min(
        1 + of_path / of_points,
        1 + 2 * (worse.sum() ** 2 / (worse**2).sum()) / (mass + 2),
        (1 - of_path - of_points) / (n * of_points),
    )
    all_weights = np.concatenate([weights, at_most * worse / np.abs(worse).sum()])

    axes, lengths = _axes(normal.covariance)
    whiten = axes @ np.diag(1 / lengths) @ axes.T
    steps = (points - normal.mean) / normal.step
    far = np.linalg.norm(steps @ whiten, axis=1)
    shorter = np.minimum(1, (math.sqrt(n) + 2 * n / (n + 2)) / np.maximum(far, SMALLEST))
    steps, far = steps * shorter[:, None], far * shorter
    step = weights @ steps[:half]

    long, turned = normal.paths
    long = (1 - sums) * long + math.sqrt(sums * (2 - sums) * mass) * (whiten @ step)
    length = float(np.linalg.norm(long))
    settled = math.sqrt(1 - (1 - sums) ** (2 * (normal.generations + 1)))
    is_short = length / settled < (1.4 + 2 / (n + 1)) * usual
    turned = (1 - turns) * turned + is_short * math.sqrt(turns * (2 - turns) * mass) * step
    stays = 1 - of_path - of_points * all_weights.sum()
    stays += (not is_short) * of_path * turns * (2 - turns)
    pulls = all_weights * np.where(all_weights < 0, n / np.maximum(far**2, SMALLEST), 1)
    covariance = (
        stays * normal.covariance
        + of_path * np.outer(turned, turned)
        + of_points * (steps.T * pulls) @ steps
    )
    return Normal(
        mean=normal.mean + normal.step * step,
        step=normal.step * math.exp(min(1.0, sums / damping * (length / usual - 1))),
        covariance=covariance,
        paths=np.stack([long, turned]),
        generations=normal.generations + 1,
    )


def drawn(normal: Normal, chance: np.random.Generator) -> Floats:
    """A point of the unit cube, (n,)."""
    axes, lengths = _axes(normal.covariance)
    for _ in range(DRAWS):
        apart = axes @ (lengths * chance.standard_normal(len(lengths)))
        point = normal.mean + normal.step * apart
        if (point >= 0).all() and (point <= 1).all():
            break
    return np.clip(point, 0, 1)


def crossed(one: float, other: float, chance: random.Random) -> float:
    """A number between or beside those of two parents, nearer to `one`, in [0, 1].

    Simulated binary crossover: Deb and Agrawal 1995, Complex Systems 9.
    """
    share = chance.random()
    inside = 2 * share if share <= 0.5 else 1 / (2 * (1 - share))
    spread = math.pow(inside, 1 / (ETA + 1))
    return min(max(((1 + spread) * one + (1 - spread) * other) / 2, 0.0), 1.0)


def mutated(share: float, chance: random.Random) -> float:
    """Polynomial mutation in [0, 1]: Deb and Goyal 1996, as in the code of NSGA-II."""
    draw = chance.random()
    if draw < 0.5:
        inside = 2 * draw + (1 - 2 * draw) * math.pow(1 - share, ETA + 1)
        return max(share + math.pow(inside, 1 / (ETA + 1)) - 1, 0.0)
    inside = 2 * (1 - draw) + (2 * draw - 1) * math.pow(share, ETA + 1)
    return min(share + 1 - math.pow(inside, 1 / (ETA + 1)), 1.0)


def _weights(count: int) -> Floats:
    """(count,): of ranks, falling, with sum 1."""
    raw = math.log(count + 0.5) - np.log(np.arange(1, count + 1))
    weights: Floats = raw / raw.sum()
    return weights


def _axes(covariance: Floats) -> tuple[Floats, Floats]:
    """(axes as columns, standard deviation along each)."""
    values, axes = np.linalg.eigh(covariance)
    return axes, np.sqrt(np.maximum(values, SMALLEST))
