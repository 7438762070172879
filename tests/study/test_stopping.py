"""Early stopping on hand-made rungs."""

import dataclasses
import math
import random
from functools import partial
from pathlib import Path

import pytest
from scipy import stats

from study import stopping
from study.ledger import Suggestion
from study.loading import parse_spec
from study.measured import collect, final_value, rung_of, value_at_rung
from study.spec import Stopper
from study.stopping import (
    FORETELLERS,
    STOPPERS,
    Arrival,
    Foreteller,
    Rung,
    best_foreteller,
    halving,
    hyperband,
    median,
    patience,
    rank_correlation,
    rung_at,
)
from tests.drawn import drawn
from trainables.metrics import metric_of, sign

PSNR, COST, MIOU = "pretrain/probe_psnr", "pretrain/device_seconds", "segment/miou"


def rung(own, others, metric=PSNR, **more):
    arrivals = [Arrival(number, {metric: value}) for number, value in enumerate([own, *others])]
    return Rung(arrivals[0], arrivals[1:], **({"objective": MIOU} | more))


RULES = [
    pytest.param(partial(STOPPERS[name], **setting.options()), id=f"{name} {setting.options()}")
    for name in STOPPERS
    for setting in drawn(Stopper, name)
]


def lets_go_on(rule, own, others):
    """Whether the rule does, of values in its metric's unit, turned so that more is better."""
    metric = rule.keywords.get("metric") or PSNR
    turned = sign(metric_of(metric).goal)
    return rule(rung(turned * own, [turned * other for other in others], metric))


@pytest.mark.parametrize("rule", RULES)
def test_a_trial_that_is_better_than_all_others_goes_on(rule):
    assert lets_go_on(rule, 30.0, [10.0 + index for index in range(20)])


@pytest.mark.parametrize("rule", RULES)
def test_a_trial_with_nobody_or_nothing_to_be_compared_with_goes_on(rule):
    assert lets_go_on(rule, 1.0, [])
    nobody = Arrival(0, {})
    assert rule(Rung(nobody, [nobody] * 20, MIOU))
    other = Arrival(0, {"pretrain/other": 1.0})
    assert rule(Rung(other, [Arrival(1, {PSNR: 2.0, COST: 1.0})] * 20, MIOU))


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
        whole = rung(chance.uniform(10, 20), others)
        first = rule(whole)
        assert isinstance(first, bool)
        shuffled = list(whole.others)
        chance.shuffle(shuffled)
        assert rule(dataclasses.replace(whole, others=shuffled)) == first


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in STOPPERS if name != "none"])
def test_a_trial_without_a_finite_value_is_stopped(name, value):
    assert not STOPPERS[name](rung(value, []))
    assert not STOPPERS[name](rung(value, [1.0] * 9))


@pytest.mark.parametrize("name", STOPPERS)
def test_values_that_are_not_finite_are_worse_than_any(name):
    for value in (math.nan, -math.inf):
        assert STOPPERS[name](rung(1.0, [value] * 9))


# --- the rules, by hand ---


def test_where_the_next_rung_is_twice_as_far_the_better_half_goes_on():
    others = [10.0, 11.0, 12.0, 13.0, 14.0]
    assert halving(rung(12.5, others))  # third of 6, 3 go on
    assert not halving(rung(11.5, others))
    assert halving(rung(10.5, [10.0])) and not halving(rung(9.5, [10.0]))  # 1 of 2
    assert halving(rung(10.5, [10.0, 11.0]))  # 2 of 3


def test_the_nearer_the_next_rung_is_the_more_go_on():
    others = [float(value) for value in range(10, 19)]
    goes = [value for value in range(9, 20) if halving(rung(value + 0.5, others, kept=0.9))]
    assert goes[0] == 10  # all of ten but the worst
    goes = [value for value in range(9, 20) if halving(rung(value + 0.5, others, kept=0.25))]
    assert goes[0] == 16  # three of ten


def test_a_reduction_that_is_given_counts_instead():
    others = [10.0, 11.0, 12.0, 13.0, 14.0]
    assert halving(rung(13.5, others), reduction=3)  # second of 6
    assert not halving(rung(12.5, others), reduction=3)


def test_nobody_is_stopped_before_as_many_have_come_as_are_asked_for():
    assert halving(rung(0.0, [10.0, 11.0, 12.0, 13.0]), min_trials=6)  # the fifth
    assert not halving(rung(0.0, [10.0, 11.0, 12.0, 13.0, 14.0]), min_trials=6)
    assert not halving(rung(0.0, [10.0]))


@pytest.mark.parametrize("name", ["halving", "median"])
def test_equals_go_on_together(name):
    assert STOPPERS[name](rung(10.0, [10.0] * 8))


def test_the_median_rule_lets_the_better_half_go_on():
    others = [10.0, 11.0, 12.0, 13.0]
    assert median(rung(11.5, others)) and not median(rung(11.4, others))
    assert median(rung(0.0, [10.0, 11.0])) and not median(rung(0.0, [10.0, 11.0, 12.0]))


def test_brackets_take_turns_and_begin_one_rung_after_the_other():
    def arrived(arm, number, value=0.0, metric=PSNR):
        others = [Arrival(other, {metric: 1.0}) for other in range(100, 110)]
        phase = metric.split("/")[0]
        return Rung(Arrival(arm, {metric: value}), others, metric, phase, number, count=5)

    def first_judged(arm):
        rungs = (number for number in range(5) if not hyperband(arrived(arm, number)))
        return next(rungs, None)

    assert [first_judged(arm) for arm in range(6)] == [0, 1, 2, 3, 4, 0]
    assert not hyperband(arrived(4, 0, metric=MIOU))
    # two of the others are of its bracket: as good as the one is enough
    whole = arrived(0, 0, value=1.0)
    better = [dataclasses.replace(each, values={PSNR: 2.0}) for each in whole.others]
    mixed = [new if new.arm % 5 else old for new, old in zip(better, whole.others, strict=True)]
    assert hyperband(dataclasses.replace(whole, others=mixed))


def test_patience_is_lost_after_so_many_rungs_that_brought_nothing():
    def after(*curve, rungs=2):
        values = [{PSNR: value} for value in curve]
        own = Arrival(0, values[-1], values[:-1])
        return patience(Rung(own, [], MIOU), rungs=rungs)

    assert after(1.0) and after(1.0, 0.9)
    assert not after(1.0, 0.9, 0.8) and not after(1.0, 1.0, 1.0)
    assert after(1.0, 0.9, 1.1) and after(1.0, 1.1, 0.9)
    assert after(1.0, 0.9, 0.8, rungs=3)


def test_smaller_is_better_where_the_goal_says_so():
    others = [10.0, 11.0, 12.0, 13.0, 14.0]
    assert halving(rung(9.0, others, COST), metric=COST)
    assert not halving(rung(15.0, others, COST), metric=COST)


# --- by what trials are judged ---


def foretold(pairs, metric=PSNR, **more):
    """A rung at which others, of which the ends are known, measured the first of each pair."""
    others = [
        Arrival(number, {metric: value}, final=final)
        for number, (value, final) in enumerate(pairs, 1)
    ]
    return Rung(Arrival(0, {metric: 0.0}), others, **({"objective": MIOU} | more))


def test_a_metric_that_proves_to_foretell_nothing_stops_nobody():
    turned = [(float(number), -float(number)) for number in range(8)]
    assert best_foreteller(foretold(turned)) is None
    assert halving(foretold(turned))
    straight = [(value, -final) for value, final in turned]
    # what is believed counts like six, and eight agree
    likely = (6 * 0.7 * math.sqrt(0.5) + 8) / 14
    assert best_foreteller(foretold(straight)) == Foreteller(PSNR, pytest.approx(likely))
    assert not halving(foretold(straight))


def test_until_it_is_known_a_metric_is_believed_the_more_the_further_trials_have_come():
    for pairs in ([], [(1.0, -1.0), (2.0, -2.0)], [(1.0, None)] * 9, [(1.0, math.nan)] * 9):
        found = best_foreteller(foretold(pairs, progress=0.64))
        assert found == Foreteller(PSNR, pytest.approx(0.7 * 0.8))
        assert best_foreteller(foretold(pairs, progress=0.25)) is None  # .35
    own = Arrival(0, {MIOU: 0.5})
    early, late = (Rung(own, [], MIOU, "segment", progress=at) for at in (0.125, 0.25))
    assert best_foreteller(early) is None and best_foreteller(late) == Foreteller(MIOU, 0.5)


def test_an_early_rung_that_proves_to_foretell_counts():
    straight = [(float(number), float(number)) for number in range(8)]
    assert best_foreteller(foretold([], progress=1 / 16)) is None
    assert best_foreteller(foretold(straight, progress=1 / 16)).metric == PSNR


def test_the_metric_that_foretells_best_counts():
    assert FORETELLERS[0] == PSNR
    dense = "pretrain/dense_miou"
    others = [
        Arrival(number, {PSNR: (number * 5) % 9, dense: float(number)}, final=float(number))
        for number in range(9)
    ]
    own = Arrival(9, {PSNR: 0.0, dense: 0.0})
    assert best_foreteller(Rung(own, others, MIOU)).metric == dense
    assert best_foreteller(Rung(own, others[:2], MIOU)).metric == PSNR


def test_of_another_phase_than_the_given_metrics_the_objective_counts():
    both = {PSNR: 1.0, MIOU: 0.5}
    own = Arrival(0, both)
    assert best_foreteller(Rung(own, [], MIOU, "segment"), PSNR).metric == MIOU
    assert best_foreteller(Rung(own, [], MIOU, "pretrain"), PSNR).metric == PSNR
    assert best_foreteller(Rung(own, [], PSNR, "segment"), PSNR) is None
    assert best_foreteller(Rung(own, [], PSNR, "pretrain")).metric == PSNR


@pytest.mark.parametrize("seed", range(5))
def test_the_correlation_of_ranks_is_scipys(seed):
    chance = random.Random(seed)
    one = [chance.choice([1.0, 2.0, chance.random()]) for _ in range(12)]
    other = [chance.choice([1.0, 2.0, chance.random()]) for _ in range(12)]
    assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert rank_correlation([1.0] * 4, [1.0, 2.0, 3.0, 4.0]) == 0


# --- who is asked ---


def spec(stopping="{name: halving, metric: pretrain/probe_psnr}", objective=PSNR, rest=""):
    text = f"""\
study: s
data: {{source: smears, size: 64}}
trial: {{model: {{size: pico}}}}
search: {{model.patch: {{choices: [4, 8, 16]}}}}
objectives: [{objective}]
budget: {{trials: 9}}
seeds: 2
rungs: [0.25, 0.5, 1.0]
stopping: {stopping}
{rest}"""
    return parse_spec(text, Path(), where="s.yaml")


def suggestion(trial, seed=0, origin="search", arm=None):
    return Suggestion(0, trial, arm or f"arm-{trial}", seed, origin, {}, {}, {})


def goes_on(spec, suggestions, measured, trial, phase, progress, **more):
    rung = rung_at(spec, suggestions, measured, trial, phase, progress)
    own = next(each for each in suggestions if each.trial == trial)
    return stopping.goes_on(spec.stopping, rung, own, first_seed=spec.seed, **more)


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


def test_an_arm_is_judged_by_its_first_seed_alone():
    suggestions = [
        suggestion("a"),
        suggestion("b", arm="arm"),
        suggestion("c", seed=1),
        suggestion("d", seed=1, arm="arm"),
    ]
    measured = collect([row("a", 20.0), row("b", 19.0), row("c", 20.0), row("d", 1.0)])
    assert not goes_on(spec(), suggestions, measured, "b", "pretrain", 0.25)
    assert goes_on(spec(), suggestions, measured, "d", "pretrain", 0.25)


@pytest.mark.parametrize("origin", ["control", "control:frozen", "confirm", "verdict"])
def test_controls_and_confirmations_are_never_stopped(origin):
    suggestions = [suggestion("a"), suggestion("b", origin=origin)]
    measured = collect([row("a", 20.0), row("b", 1.0)])
    assert goes_on(spec(), suggestions, measured, "b", "pretrain", 0.25)


def test_arms_that_a_person_asked_for_are_never_stopped():
    suggestions = [suggestion("a"), suggestion("b")]
    measured = collect([row("a", 20.0), row("b", 1.0)])
    place = (spec(), suggestions, measured, "b", "pretrain", 0.25)
    assert goes_on(*place, spared={"arm-b"})
    assert not goes_on(*place, spared={"arm-a"})


def test_searched_arms_are_compared_with_the_control_but_not_with_its_twins():
    measured = collect([row("a", 20.0), row("b", 30.0)])
    control = [suggestion("a"), suggestion("b", origin="control")]
    twin = [suggestion("a"), suggestion("b", origin="control:frozen")]
    assert not goes_on(spec(), control, measured, "a", "pretrain", 0.25)
    assert goes_on(spec(), twin, measured, "a", "pretrain", 0.25)


def test_whoever_pretrained_badly_is_stopped_before_segmentation_is_paid():
    suggestions = [suggestion(name) for name in "abcdefghijkl"]
    rows = [row(name, 20.0 + number, 1.0) for number, name in enumerate("abcdefghijkl")]
    measured = collect(rows)
    place = (spec(objective=MIOU), suggestions, measured, "a", "pretrain", 1.0)
    # at the next rung it has come 1.25 times as far: ten of twelve go on
    assert rung_at(*place).kept == 0.8
    assert not goes_on(*place)
    assert goes_on(spec(objective=MIOU), suggestions, measured, "c", "pretrain", 1.0)
    # without labels that is the end
    assert goes_on(*place, is_labelled=False)


def test_nobody_is_stopped_at_the_end():
    suggestions = [suggestion(name) for name in "abcdefgh"]
    ends = [row(name, at, 1.0, "segment", "miou") for at, name in enumerate("abcdefgh")]
    assert goes_on(spec(objective=MIOU), suggestions, collect(ends), "a", "segment", 1.0)
    early = [{**one, "progress": 0.25} for one in ends]
    assert not goes_on(spec(objective=MIOU), suggestions, collect(early), "a", "segment", 0.25)


def test_how_far_the_next_rung_is_counts_both_phases_alike():
    measured = collect([row("a", 1.0)])

    def kept(phase, progress):
        return rung_at(spec(), [suggestion("a")], measured, "a", phase, progress).kept

    assert [kept("pretrain", at) for at in (0.25, 0.5, 1.0)] == [0.5, 0.5, 0.8]
    assert [kept("segment", at) for at in (0.25, 0.5, 1.0)] == [1.25 / 1.5, 0.75, 1.0]


def test_decisions_are_the_same_when_rows_are_read_back_from_the_ledger():
    suggestions = [suggestion(name) for name in "abcdef"]
    rows = [row(name, value) for name, value in zip("abcdef", [3, 1, 2, 6, 5, 4], strict=True)]
    live, kept = collect([]), []
    for index, one in enumerate(rows):
        collect([one], live)
        kept.append(goes_on(spec(), suggestions, live, one["trial"], "pretrain", 0.25))
        again = collect(rows[: index + 1])
        assert again == live
    assert kept == [True, False, True, True, True, True]


def test_stopping_has_rungs_from_a_sixteenth_on_unless_they_are_given():
    def rungs(**study):
        text = "study: s\ndata: {source: smears}\nbudget: {trials: 2}\nobjectives: [segment/miou]\n"
        text += "".join(f"{key}: {value}\n" for key, value in study.items())
        return parse_spec(text, Path(), where="s.yaml", **before).rungs

    before = {}
    early = [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert rungs() == rungs(stopping="none") == [0.25, 0.5, 1.0]
    assert rungs(stopping="halving") == rungs(stopping="{name: median}") == early
    assert rungs(stopping="halving", rungs="[0.5, 1.0]") == [0.5, 1.0]
    before = {"defaults": "0.1"}
    assert rungs(stopping="halving") == [0.25, 0.5, 1.0]


def test_a_study_that_0_1_began_stops_as_it_did_then():
    text = "study: s\ndata: {source: smears}\nbudget: {trials: 2}\nobjectives: [segment/miou]\n"
    text += "stopping: {name: halving, min_trials: 4}\n"
    old = parse_spec(text, Path(), where="s.yaml", defaults="0.1").stopping.options()
    assert old == {"metric": PSNR, "reduction": 3, "min_trials": 4}
    new = parse_spec(text, Path(), where="s.yaml").stopping.options()
    assert new == {"metric": None, "reduction": None, "min_trials": 4}


def test_the_first_of_equal_rows_counts_and_the_end_is_progress_one():
    measured = collect([row("a", 1.0, 1.0), row("a", 2.0, 1.0), row("a", 3.0, 0.5)])
    assert final_value(measured, "a", PSNR) == 1.0
    assert final_value(measured, "a", COST) is None
    assert final_value(measured, "b", PSNR) is None


def test_a_rung_is_the_nearest_one():
    assert [rung_of(p, [0.25, 0.5, 1.0]) for p in (0.2, 0.3, 0.5, 0.6, 0.99, 1.0)] == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip
    curve = {0.26: 1.0, 0.49: 2.0, 1.0: 3.0}
    assert [value_at_rung(curve, rung, [0.25, 0.5, 1.0]) for rung in (0, 1, 2)] == [1.0, 2.0, 3.0]
    assert value_at_rung(curve, 0, [0.0625, 0.25, 1.0]) is None
