"""Intervals and differences over the seeds of an arm.

Student's t, not the percentile bootstrap: with 3, 5 and 10 seeds the bootstrap's 95 % intervals
cover the truth in 73, 82 and 91 % of cases, those of t in 95.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
LEVEL = 0.05  # below which an adjusted p is a difference shown
FEWEST_SEEDS = 3  # fewer never carry a claim: with two, chance alone looks certain too often
FEWEST_POOLED = 4  # arms beside the control whose noise is learnt together
POOL_MARGIN = 1.25  # on the pooled variance, as the arms' may differ (power.py)
FEWEST_ARMS = 5  # whose order is compared: of four, one of 24 orders is right by chance
RESAMPLES = 2000


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    n: int


class Difference(NamedTuple):
    """a - b with its interval and the two-sided p of no difference; n: pairs, or the smaller group.

    `sd` is that of one pair's difference (unpaired: of one value of a less one of b).
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    sd: float
    paired: bool


class Correlation(NamedTuple):
    """Spearman's, with its interval; n pairs."""

    value: float
    low: float
    high: float
    n: int


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Interval of the mean of independent values."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 seeds, got {n}")
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    half = _quantile(n - 1, confidence) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def mean_and_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean, low and high; of a single value only the mean is a number."""
    found = [float(value) for value in values]
    if len(found) < 2:
        return found[0], np.nan, np.nan
    mean, low, high, _ = t_interval(found)
    return mean, low, high


def difference(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """a - b from seed -> value. Paired over common seeds (two or more), else Welch's.

    None if either side has fewer than two values: then nothing is known of chance.
    """
    common = [seed for seed in a if seed in b]
    if len(common) >= 2:
        gaps = [a[seed] - b[seed] for seed in common]
        n, sd = len(gaps), float(np.std(gaps, ddof=1))
        error = sd / math.sqrt(n)
        return _difference(float(np.mean(gaps)), error, n - 1, n, sd, True, confidence)
    if min(len(a), len(b)) < 2:
        return None
    of_a, of_b = list(a.values()), list(b.values())
    share_a = float(np.var(of_a, ddof=1)) / len(of_a)
    share_b = float(np.var(of_b, ddof=1)) / len(of_b)
    freedom = 1.0
    if share_a + share_b > 0:
        freedom = (share_a + share_b) ** 2 / (
            share_a**2 / (len(of_a) - 1) + share_b**2 / (len(of_b) - 1)
        )
    return _difference(
        float(np.mean(of_a) - np.mean(of_b)),
        math.sqrt(share_a + share_b),
        freedom,
        min(len(of_a), len(of_b)),
        float(np.sqrt(np.var(of_a, ddof=1) + np.var(of_b, ddof=1))),
        False,
        confidence,
    )


def against_control(
    values: Mapping[str, Mapping[Hashable, float]],
    control: Mapping[Hashable, float],
    confidence: float = CONFIDENCE,
) -> dict[str, Difference | None]:
    """Each arm - control from arm -> seed -> value.

    Arms that share the same two or more seeds with the control, FEWEST_POOLED or more of them, are
    compared as blocks (`block_errors`); others one by one (`difference`).
    """
    found = {arm: difference(own, control, confidence) for arm, own in values.items()}
    alike: dict[frozenset[Hashable], list[str]] = {}
    for arm, own in values.items():
        alike.setdefault(frozenset(own.keys() & control.keys()), []).append(arm)
    for common, arms in alike.items():
        seeds = [seed for seed in control if seed in common]
        if len(arms) < FEWEST_POOLED or len(seeds) < 2:
            continue
        block = [[values[arm][seed] for seed in seeds] for arm in arms]
        block.append([control[seed] for seed in seeds])
        errors, freedoms = block_errors(np.array(block))
        for arm, own_values, error, freedom in zip(arms, block, errors, freedoms, strict=False):
            gaps = np.subtract(own_values, block[-1])
            n, sd = len(seeds), float(error) * math.sqrt(len(seeds))
            found[arm] = _difference(
                float(gaps.mean()), float(error), float(freedom), n, sd, True, confidence
            )
    return found


def block_errors(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., arms + 1, seeds), the control last -> (..., arms): standard errors and freedoms.

    Of the arms' means less the control's. What a seed does to all arms alike is taken out first (a
    randomised block design, Cox, Planning of Experiments, 1958, chapter 3). The variance of an arm
    is the mean of all arms' and a quarter on top, or its own where that is larger; the control's is
    its own always, as every comparison rests on it. Freedoms by Satterthwaite, 1946. The quarter is
    ours: without it false claims exceed 5 % where the noise of arms differs threefold (power.py).
    """
    num_arms, n = values.shape[-2] - 1, values.shape[-1]
    seeds = values[..., :-1, :].mean(axis=-2, keepdims=True)
    variances = (values - seeds).var(axis=-1, ddof=1)
    own = variances[..., :-1] * num_arms / (num_arms - 1)  # of which the blocks took their share
    of_control = variances[..., -1:]
    pooled = POOL_MARGIN * own.mean(axis=-1, keepdims=True)
    is_own = own > pooled
    of_arms = np.where(is_own, own, pooled)
    freedom = np.where(is_own, n - 1, (n - 1) * num_arms)
    squared = (of_arms + of_control) / n
    with np.errstate(invalid="ignore", divide="ignore"):
        freedoms = (of_arms + of_control) ** 2 / (of_arms**2 / freedom + of_control**2 / (n - 1))
    return np.sqrt(squared), np.where(squared > 0, freedoms, n - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p in the given order: the family-wise error stays below the level (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def rank_correlation(
    x: Sequence[float], y: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0
) -> Correlation | None:
    """Spearman's rank correlation of pairs, ties at their mean rank, and a bootstrap interval.

    The interval lies between percentiles of resamples of the pairs; those in which one side is
    all alike have no correlation and are left out. Of 800 normal samples it covered the truth in
    88 to 92 % with 5 pairs, in 95 to 98 % with 8 to 20. None for fewer than FEWEST_ARMS pairs, or
    where one side is all alike.
    """
    pairs, n = np.array([x, y], float), len(x)
    if n < FEWEST_ARMS or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    value = _rank_correlations(pairs[:, None])[0]
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    found = _rank_correlations(pairs[:, drawn])
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(found, [tail, 1 - tail])
    return Correlation(float(value), float(low), float(high), n)


def _rank_correlations(pairs: np.ndarray) -> np.ndarray:
    """Of each of many samples, (2, samples, n) -> (samples,); NaN where one side is all alike."""
    ranks = stats.rankdata(pairs, axis=2)
    x, y = ranks - ranks.mean(axis=2, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1)))


def detectable_difference(sd: float, n: int, power: float = 0.8, level: float = LEVEL) -> float:
    """Smallest true paired difference that n pairs show with this power; sd of one pair's."""
    if n < 2:
        raise ValueError(f"a detectable difference needs at least 2 seeds, got {n}")
    critical = float(stats.t.ppf(1 - level / 2, n - 1))
    # scipy's noncentral t is NaN in its far tail: average over the estimated sd instead
    shares = (np.arange(2000) + 0.5) / 2000
    reach = critical * np.sqrt(stats.chi2.ppf(shares, n - 1) / (n - 1))

    def missing_power(effect: float) -> float:
        shift = effect * math.sqrt(n)
        shown = stats.norm.sf(reach - shift) + stats.norm.cdf(-reach - shift)
        return float(np.mean(shown)) - power

    return sd * float(optimize.brentq(missing_power, 1e-6, 50.0))


def _difference(
    mean: float, error: float, freedom: float, n: int, sd: float, paired: bool, confidence: float
) -> Difference:
    half = _quantile(freedom, confidence) * error
    # identical values are copies, not replicates: they show nothing
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom)) if error > 0 else 1.0
    return Difference(mean, mean - half, mean + half, p, n, sd, paired)


def _quantile(freedom: float, confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, freedom))
