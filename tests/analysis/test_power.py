"""Run: python -m pytest tests/analysis/test_power.py"""

from __future__ import annotations

import numpy as np
import pytest

from analysis.power import EFFECTS, NOISES, NUM_ARMS, PLANS, RECORDED, play, played, recorded_arms

VERDICT = PLANS["confirm 3 x 2, verdict 10"]
SEEDS = PLANS["3 seeds"]


def quiet(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.normal(scale=1e-6, size=shape)


def test_plans_cost_what_they_say() -> None:
    assert {name: plan.trials for name, plan in PLANS.items()} == {
        "3 seeds, each arm by itself": 39,  # 13 arms with the control
        "3 seeds": 39,
        "confirm 3 x 5": 13 + 4 * 5,
        "confirm 3 x 2, verdict 10": 13 + 3 * 2 + 2 * 10,
    }


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_without_noise_every_plan_shows_the_best_arm_and_nothing_that_is_not_so(plan) -> None:
    found = play(plan, EFFECTS["spread by 1"], quiet, np.random.default_rng(0))
    assert (found.is_best, found.is_better, found.is_false) == (True, True, False)
    assert found.regret == 0 and abs(found.bias) < 1e-4


def test_a_claim_of_what_is_not_so_is_seen() -> None:
    """Of arms that are all alike, one that is ahead in every draw."""

    def biased(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return quiet(rng, shape) + np.eye(1, shape[0]).T

    found = play(VERDICT, EFFECTS["all alike"], biased, np.random.default_rng(0))
    assert found.is_false and not found.is_better
    assert found.bias == pytest.approx(1, abs=1e-4) and not found.covers_score


def test_a_verdict_shows_more_than_three_seeds_for_every_arm() -> None:
    for effect in ("a ladder, 1 apart", "spread by 1"):
        few, fresh = (played(plan, effect, "normal", 150) for plan in (SEEDS, VERDICT))
        assert fresh.is_best > 0.3 > 0.25 > few.is_best
        assert fresh.is_false < 0.03
    alike = played(VERDICT, "all alike", "every other arm's threefold", 150)
    assert alike.is_false < 0.12 and abs(alike.bias) < 0.2


def test_every_noise_has_mean_zero() -> None:
    rng = np.random.default_rng(0)
    for noise in NOISES.values():
        drawn = noise(rng, (NUM_ARMS + 1, 40_000))
        assert drawn.shape == (NUM_ARMS + 1, 40_000)
        assert np.abs(drawn.mean(1)).max() < 0.06


def test_recorded_arms_are_those_of_the_table() -> None:
    means, scales = recorded_arms()
    assert len(means) == len(scales) == 216
    assert np.sqrt((scales**2).mean()) == pytest.approx(1)
    assert scales.max() / scales.min() > 4  # at high rates some arms diverge
    assert played(VERDICT, RECORDED, RECORDED, 5).is_false in (0, 0.2)
