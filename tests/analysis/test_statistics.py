"""Run: python -m pytest tests/analysis/test_statistics.py"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import (
    FEWEST_ARMS,
    FEWEST_POOLED,
    against_control,
    block_errors,
    detectable_difference,
    difference,
    holm,
    rank_correlation,
    t_interval,
)


def test_t_interval_by_hand() -> None:
    mean, low, high, n = t_interval([1.0, 2.0, 3.0])  # sd 1, t(0.975; 2) = 4.302653
    assert (mean, n) == (2.0, 3)
    assert low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        t_interval([0.5])
    assert difference({0: 0.5}, {0: 0.4}) is None
    assert difference({0: 0.5}, {0: 0.4, 1: 0.4}) is None


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_the_truth_in_at_least_93_percent(n: int) -> None:
    rng = np.random.default_rng(n)
    draws = rng.normal(0.6, 0.02, size=(3000, n))
    covered = [low <= 0.6 <= high for _, low, high, _ in map(t_interval, draws)]
    assert np.mean(covered) >= 0.93


@pytest.mark.parametrize("n", [3, 5, 10])
def test_paired_intervals_cover_the_true_difference(n: int) -> None:
    rng = np.random.default_rng(n)
    covered = []
    for _ in range(2000):
        seed_effect = rng.normal(0, 0.1, n)
        a = dict(enumerate(seed_effect + rng.normal(0.03, 0.01, n)))
        b = dict(enumerate(seed_effect + rng.normal(0, 0.01, n)))
        found = difference(a, b)
        assert found is not None
        covered.append(found.low <= 0.03 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_common_seeds_are_paired() -> None:
    """A seed that is hard for both arms does not blur their difference."""
    a, b = {0: 0.50, 1: 0.71, 2: 0.90, 7: 0.1}, {2: 0.80, 0: 0.40, 1: 0.60}
    found = difference(a, b)
    assert found is not None
    gaps = [0.10, 0.11, 0.10]
    assert found.paired and found.n == 3
    assert found.mean == pytest.approx(np.mean(gaps))
    assert found.p == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    assert found.sd == pytest.approx(np.std(gaps, ddof=1))


def test_without_common_seeds_welch_is_used() -> None:
    a, b = {0: 0.50, 1: 0.52, 2: 0.57}, {3: 0.40, 4: 0.45}
    found = difference(a, b)
    expected = stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False)
    assert found is not None
    assert not found.paired and found.n == 2
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


BLOCK = np.array([[1.0, 3, 2], [0, 2, 1], [2, 4, 3], [1, 3, 8], [0.5, 1, 0]])  # control last


def test_what_a_seed_does_to_all_arms_is_taken_out_by_hand() -> None:
    """Less the arms' means at the seeds, 1, 3, 3.5, the first arm is 0, 0, -1.5, and so on."""
    errors, freedoms = block_errors(BLOCK)
    # the rest of arms 1 to 3 has the variance .75, that of arm 4 6.75; each had 3 of 4 shares
    own, of_arm_4 = 0.75 * 4 / 3, 6.75 * 4 / 3
    pooled = 1.25 * (3 * own + of_arm_4) / 4
    rest = np.array([-0.5, -2.0, -3.5])  # of the control
    control = rest.var(ddof=1)
    assert own < pooled < of_arm_4
    expected = [pooled] * 3 + [of_arm_4]
    assert errors == pytest.approx([((one + control) / 3) ** 0.5 for one in expected])
    parts = [(one, 8) for one in expected[:3]] + [(of_arm_4, 2)]
    assert freedoms == pytest.approx(
        [(one + control) ** 2 / (one**2 / free + control**2 / 2) for one, free in parts]
    )


def test_arms_of_the_same_seeds_learn_their_noise_together() -> None:
    values = {f"a{place}": dict(enumerate(line)) for place, line in enumerate(BLOCK[:-1].tolist())}
    control = dict(enumerate(BLOCK[-1].tolist()))
    found = against_control(values | {"late": {0: 1.0, 1: 2.5}}, control)
    errors, freedoms = block_errors(BLOCK)
    for arm, error, freedom in zip(values, errors, freedoms, strict=True):
        one, alone = found[arm], difference(values[arm], control)
        assert one is not None and alone is not None
        assert one.mean == pytest.approx(alone.mean) and (one.n, one.paired) == (3, True)
        half = stats.t.ppf(0.975, freedom) * error
        assert (one.low, one.high) == pytest.approx((one.mean - half, one.mean + half))
        assert one.p == pytest.approx(2 * stats.t.sf(abs(one.mean) / error, freedom))
    assert found["late"] == difference({0: 1.0, 1: 2.5}, control)
    few = dict(list(values.items())[: FEWEST_POOLED - 1])
    assert against_control(few, control) == {
        arm: difference(own, control) for arm, own in few.items()
    }


@pytest.mark.parametrize("scales", [[1] * 13, [1] * 12 + [3], [3] + [1] * 12, [3, 1] * 6 + [1]])
def test_of_arms_that_are_all_alike_at_most_one_study_in_twenty_claims_one(
    scales: list[float],
) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(3000, 13, 3)) * np.array(scales)[:, None] + rng.normal(size=(1, 3))
    errors, freedoms = block_errors(drawn)
    gaps = drawn[:, :-1].mean(2) - drawn[:, -1:].mean(2)
    smallest = 2 * stats.t.sf(abs(gaps) / errors, freedoms).min(1)
    assert 0.01 < np.mean(smallest * 12 < 0.05) < 0.05


def test_equal_values_show_nothing() -> None:
    """Copies of one run are no replicates: sure of everything, they must claim nothing."""
    same = {0: 0.6, 1: 0.6, 2: 0.6}
    blocks = against_control(dict.fromkeys("abcd", same), {0: 0.5, 1: 0.5, 2: 0.5})
    assert [one and one.p for one in blocks.values()] == [1.0] * 4
    found = difference(same, {0: 0.5, 1: 0.5, 2: 0.5})
    assert found is not None
    assert found.p == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("n", "effect"), [(3, 3.3), (5, 1.7), (6, 1.4), (8, 1.2), (10, 1.0), (15, 0.8)]
)
def test_detectable_difference_in_standard_deviations(n: int, effect: float) -> None:
    assert detectable_difference(1.0, n) == pytest.approx(effect, abs=0.051)


def test_detectable_difference_is_found_in_four_of_five_studies() -> None:
    effect = detectable_difference(0.02, 5)
    rng = np.random.default_rng(0)
    gaps = rng.normal(effect, 0.02, size=(4000, 5))
    assert np.mean(stats.ttest_1samp(gaps, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("n", [5, 8, 30])
def test_rank_correlation_is_that_of_scipy_also_with_ties(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        x, y = rng.integers(0, 6, n).tolist(), rng.normal(size=n).tolist()
        found = rank_correlation(x, y)
        if found is None:
            assert len(set(x)) == 1
            continue
        assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
        assert -1 <= found.low <= found.value <= found.high <= 1 and found.n == n


def test_the_interval_of_a_rank_correlation_is_that_of_scipys_bootstrap() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=25)
    y = x + rng.normal(size=25)
    found = rank_correlation(x.tolist(), y.tolist())
    expected = stats.bootstrap(
        (x, y),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=1500,
        rng=1,
    ).confidence_interval
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.04)
    assert rank_correlation(x.tolist(), y.tolist()) == found  # the same resamples each time


def test_an_order_of_few_or_of_equals_is_not_compared() -> None:
    rising = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert rank_correlation(rising[:4], rising[:4]) is None and FEWEST_ARMS == 5
    assert rank_correlation([], []) is None
    assert rank_correlation(rising, [1.0] * 5) is None
    found = rank_correlation(rising, rising)
    assert found is not None and (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
