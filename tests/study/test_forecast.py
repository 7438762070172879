"""How many steps pretraining takes to learn anything.  pytest tests/study/test_forecast.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from study.commands.forecast import in_words
from study.forecast import Forecast, Point, Verdict, forecast, rehearsals
from tests.terminal import call
from trainables.config import TrialConfig


def law(crossing: float, exponent: float, scale: float) -> list[Point]:
    """Rehearsals of 32 to 1024 steps, all of them beyond the mean."""
    steps = [32 * 2**k for k in range(6)]
    gains = [scale * (crossing**-exponent - step**-exponent) for step in steps]
    return [Point(step, gain, 1.0) for step, gain in zip(steps, gains, strict=True)]


@pytest.mark.parametrize(("crossing", "exponent", "scale"), [(3000, 0.3, 6.0), (5000, 0.5, 30.0)])
def test_a_law_without_noise_is_continued_to_its_crossing(
    crossing: float, exponent: float, scale: float
) -> None:
    found = forecast(law(crossing, exponent, scale))
    assert found.steps == pytest.approx(crossing, rel=0.1)
    assert found.low < crossing and (found.high is None or crossing < found.high)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held, told = 0, 60
    for _ in range(told):
        crossing, exponent = float(rng.uniform(1500, 6000)), float(rng.uniform(0.2, 0.6))
        clean = law(crossing, exponent, 5.0)
        noisy = [point._replace(decibels=point.decibels + rng.normal(0, 0.1)) for point in clean]
        found = forecast(noisy)
        held += found.low <= crossing and (found.high is None or crossing <= found.high)
    assert held / told > 0.8


def test_what_has_crossed_is_told_as_measured() -> None:
    points = [Point(64, -1.0, 2.0), Point(128, -0.3, 2.8), Point(256, 0.4, 3.4)]
    found = forecast(points)
    assert found == Forecast(points, steps=256, low=128, high=256)
    assert found.verdict(256) is Verdict.ENOUGH and found.verdict(128) is Verdict.TOO_FEW
    assert found.verdict(200) is Verdict.OPEN
    assert forecast([Point(64, -1.0, 2.0), Point(128, 0.1, 2.0)]) == Forecast(
        [Point(64, -1.0, 2.0), Point(128, 0.1, 2.0)], low=64
    )  # it may be chance
    beyond = [Point(64, -1.0, 0.1), *(Point(64 * 2**k, 1.0 + k, 4.0) for k in range(1, 6))]
    assert forecast(beyond) == Forecast(beyond, steps=128, low=64, high=128)
    more = forecast([*points, Point(512, 1.0, 4.0), Point(1024, 1.6, 4.6)])
    assert more.steps is not None and 128 < more.steps < 256
    assert more.high is not None and more.low < more.steps < more.high < 512


def test_nothing_is_claimed_before_the_mean_is_left_behind() -> None:
    """A model stays at the mean for a while; the rise up to there says nothing of what follows."""
    points = [Point(8 * 2**k, -3.2 - 1.6 * 2.0**-k, -1.6 * 2.0**-k) for k in range(6)]
    found = forecast(points)
    assert (found.steps, found.high) == (None, None) and found.low == 256
    assert found.verdict(5000) is Verdict.UNKNOWN
    assert found.verdict(256) is Verdict.TOO_FEW
    (said,) = in_words(found, 5000, TrialConfig())
    assert "cannot be told from 256 (this study plans 5,000)" in said
    assert "not yet beyond the mean" in said


def test_a_curve_that_levels_off_below_zero_has_no_crossing() -> None:
    points = [Point(step, -1.0 - 20 / step, 2.0) for step in (32, 64, 128, 256, 512, 1024)]
    found = forecast(points)
    assert found.steps is None and found.low == 30 * 1024 and found.high is None
    assert found.verdict(20_000) is Verdict.TOO_FEW and found.verdict(40_000) is Verdict.UNKNOWN


def test_too_few_steps_are_told_with_the_epochs_to_plan() -> None:
    trial = TrialConfig.model_validate({"pretrain": {"epochs": 10}})
    found = Forecast([Point(512, -1.0, 2.0)], steps=2500, low=1800, high=4000)
    said, way_out = in_words(found, 1000, trial)
    assert said == (
        "warning: the probe gain crosses zero after about 2,500 steps (90% interval 1,800 to "
        "4,000); this study plans 1,000: too few to learn more than trivial fillings know"
    )
    assert way_out == "set pretrain.epochs to 25 or more (now 10)"
    assert in_words(found, 4000, trial)[0].endswith("plans 4,000: enough")
    assert in_words(found, 2600, trial)[0].endswith("plans 2,600: it may be enough or not")
    unbounded = found._replace(high=None)
    assert "interval 1,800 or more" in in_words(unbounded, 2600, trial)[0]


def test_rehearsals_grow_while_time_is_left_and_go_no_farther_than_the_plan() -> None:
    def steps_in(planned: int, seconds: float) -> list[int]:
        now = 0.0

        def rehearse(steps: int) -> Point:
            nonlocal now
            now += steps
            return Point(steps, -1.0, 1.0)

        return [point.steps for point in rehearsals(rehearse, planned, seconds, lambda: now)]

    assert steps_in(10_000, 50) == [8, 11, 16]  # 35 s are spent, 23 more are too many
    assert steps_in(10_000, 100) == [8, 11, 16, 23, 32]
    assert steps_in(20, 1000) == [8, 11, 16, 20]
    assert steps_in(3, 1000) == [3]


def test_check_rehearses_the_studys_own_trial(
    tiny_study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("check", tiny_study) == 0
    assert "forecast" not in capsys.readouterr().out
    assert call("check", tiny_study, "--forecast", "60") == 0
    printed = capsys.readouterr().out
    assert "pretrained 8 steps" in printed and "pretrained 12 steps" in printed
    assert "plans 12: too few to learn more than trivial fillings know" in printed
