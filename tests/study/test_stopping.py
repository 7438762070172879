"""Early stopping on hand-made rungs."""

import math
import random
from functools import partial
from pathlib import Path

import pytest

from study.ledger import Suggestion
from study.loading import parse_spec
from study.measured import collect, final_value, rung_of
from study.spec import Stopper
from study.stopping import STOPPERS, Rung, goes_on, halving
from tests.drawn import drawn
from trainables.metrics import metric_of, sign

PSNR, COST = "pretrain/probe_psnr", "pretrain/device_seconds"


def rung(own, others, metric=PSNR):
    return Rung({metric: own}, [{metric: other} for other in others])


RULES = [
    pytest.param(partial(STOPPERS[name], **setting.options()), id=f"{name} {setting.options()}")
    for name in STOPPERS
    for setting in drawn(Stopper, name)
]


def lets_go_on(rule, own, others):
    """Whether the rule does, of values in its metric's unit, turned so that more is better."""
    metric = rule.keywords.get("metric", PSNR)
    turned = sign(metric_of(metric).goal)
    return rule(rung(turned * own, [turned * other for other in others], metric))


@pytest.mark.parametrize("rule", RULES)
def test_a_trial_that_is_better_than_all_others_goes_on(rule):
    assert lets_go_on(rule, 30.0, [10.0 + index for index in range(20)])


@pytest.mark.parametrize("rule", RULES)
def test_a_trial_with_nobody_or_nothing_to_be_compared_with_goes_on(rule):
    assert lets_go_on(rule, 1.0, [])
    assert rule(Rung({}, [{}] * 20))
    assert rule(Rung({"pretrain/other": 1.0}, [{PSNR: 2.0, COST: 1.0}] * 20))


@pytest.mark.parametrize("rule", RULES)
def test_whoever_is_better_than_one_that_goes_on_goes_on(rule):
    chance = random.Random(0)
    for count in range(1, 20):
        others = [chance.uniform(10, 20) for _ in range(count)]
        decisions = [lets_go_on(rule, own, others) for own in range(9, 22)]
        assert decisions == sorted(decisions)


@pytest.mark.parametrize("rule", RULES)
def test_a_decision_depends_on_the_values_alone(rule):
    chance = random.Random(1)
    for count in range(1, 20):
        others = [chance.choice([chance.uniform(10, 20), math.nan]) for _ in range(count)]
        own = chance.uniform(10, 20)
        first = lets_go_on(rule, own, others)
        assert isinstance(first, bool)
        chance.shuffle(others)
        assert lets_go_on(rule, own, others) == first


def test_the_best_third_goes_on():
    others = [10.0, 11.0, 12.0, 13.0, 14.0]
    assert halving(rung(14.5, others))  # best of 6, 2 go on
    assert halving(rung(13.5, others))  # second of 6
    assert not halving(rung(12.5, others))  # third of 6
    assert halving(rung(12.5, others), reduction=2)  # third of 6, 3 go on
    assert not halving(rung(11.5, others), reduction=2)


def test_equals_go_on_together():
    assert halving(rung(10.0, [10.0] * 8))


def test_nobody_is_stopped_before_enough_have_come():
    assert halving(rung(0.0, [10.0, 11.0, 12.0, 13.0]))  # the fifth
    assert not halving(rung(0.0, [10.0, 11.0, 12.0, 13.0, 14.0]))  # the sixth
    assert not halving(rung(0.0, [10.0]), min_trials=2)


def test_smaller_is_better_where_the_goal_says_so():
    others = [10.0, 11.0, 12.0, 13.0, 14.0]
    assert halving(rung(9.0, others, COST), metric=COST)
    assert not halving(rung(15.0, others, COST), metric=COST)


def test_a_trial_without_the_metric_goes_on_and_one_without_a_finite_value_does_not():
    assert halving(rung(0.0, [1.0] * 9, COST))
    for value in (math.nan, math.inf, -math.inf):
        assert not halving(rung(value, []))


def test_values_that_are_not_finite_are_worse_than_any():
    assert halving(rung(1.0, [math.nan] * 9))
    assert halving(rung(1.0, [-math.inf] * 9))


def spec(stopping="{name: halving, min_trials: 2}"):
    text = f"""\
study: s
data: {{source: smears, size: 64}}
trial: {{model: {{size: pico}}}}
search: {{model.patch: {{choices: [4, 8, 16]}}}}
objectives: [{{metric: pretrain/probe_psnr, goal: maximize}}]
budget: {{trials: 9}}
seeds: 2
stopping: {stopping}
"""
    return parse_spec(text, Path(), where="s.yaml")


def suggestion(trial, seed=0, origin="search"):
    return Suggestion(0, trial, f"arm-{trial}", seed, origin, {}, {}, {})


def row(trial, value, progress=0.25, phase="pretrain", metric="probe_psnr"):
    return {
        "trial": trial, "phase": phase, "metric": metric, "progress": progress, "value": value
    }  # fmt: skip


def test_only_trials_with_the_same_seed_at_the_same_rung_are_compared():
    suggestions = [suggestion("a"), suggestion("b", seed=1), suggestion("c"), suggestion("d")]
    rows = [row("a", 20.0), row("b", 30.0), row("c", 30.0, progress=0.5), row("d", 19.0)]
    measured = collect(rows)
    assert goes_on(spec(), suggestions, measured, "a", "pretrain", 0.25)
    assert not goes_on(spec(), suggestions, measured, "d", "pretrain", 0.25)
    assert goes_on(spec(), suggestions, measured, "b", "pretrain", 0.25)
    assert goes_on(spec("none"), suggestions, measured, "d", "pretrain", 0.25)


@pytest.mark.parametrize("origin", ["control", "control:frozen", "confirm"])
def test_controls_and_confirmations_are_never_stopped(origin):
    suggestions = [suggestion("a"), suggestion("b", origin=origin)]
    measured = collect([row("a", 20.0), row("b", 1.0)])
    assert goes_on(spec(), suggestions, measured, "b", "pretrain", 0.25)


def test_searched_arms_are_compared_with_the_control_but_not_with_its_twins():
    measured = collect([row("a", 20.0), row("b", 30.0)])
    control = [suggestion("a"), suggestion("b", origin="control")]
    twin = [suggestion("a"), suggestion("b", origin="control:frozen")]
    assert not goes_on(spec(), control, measured, "a", "pretrain", 0.25)
    assert goes_on(spec(), twin, measured, "a", "pretrain", 0.25)


def test_nobody_is_stopped_at_the_last_rung_or_by_another_phase():
    suggestions = [suggestion("a"), suggestion("b")]
    measured = collect([row("a", 20.0, 1.0), row("b", 1.0, 1.0)])
    assert goes_on(spec(), suggestions, measured, "b", "pretrain", 1.0)
    measured = collect([row("a", 20.0), row("b", 1.0), row("b", 0.1, phase="segment")])
    assert goes_on(spec(), suggestions, measured, "b", "segment", 0.25)


def test_decisions_are_the_same_when_rows_are_read_back_from_the_ledger():
    suggestions = [suggestion(name) for name in "abcdef"]
    rows = [row(name, value) for name, value in zip("abcdef", [3, 1, 2, 6, 5, 4], strict=True)]
    live, kept = collect([]), []
    for index, one in enumerate(rows):
        collect([one], live)
        kept.append(goes_on(spec(), suggestions, live, one["trial"], "pretrain", 0.25))
        again = collect(rows[: index + 1])
        assert again == live
    assert kept == [True, False, False, True, False, False]


def test_the_first_of_equal_rows_counts_and_the_end_is_progress_one():
    measured = collect([row("a", 1.0, 1.0), row("a", 2.0, 1.0), row("a", 3.0, 0.5)])
    assert final_value(measured, "a", PSNR) == 1.0
    assert final_value(measured, "a", COST) is None
    assert final_value(measured, "b", PSNR) is None


def test_a_rung_is_the_nearest_one():
    assert [rung_of(p, [0.25, 0.5, 1.0]) for p in (0.2, 0.3, 0.5, 0.6, 0.99, 1.0)] == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip
