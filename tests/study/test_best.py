"""Which arm is best, and whose encoder is handed over.  pytest tests/study/test_best.py"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from study.best import (
    Final,
    NoEncoder,
    Stage,
    ahead,
    best,
    best_encoder,
    finals,
    in_short,
    of_study,
    standings,
    to_confirm,
)
from study.ledger import Outcome, Result, Suggestion
from study.loading import parse_spec
from study.measured import collect
from study.spec import StudySpec


def study(seeds: int = 2, goal: str = "maximize", metric: str = "segment/miou") -> StudySpec:
    text = f"""\
study: s
data: {{source: smears, size: 64}}
trial: {{model: {{size: pico, patch: 8}}}}
search: {{segment.epochs: {{low: 1, high: 99}}}}
objectives: [{{metric: {metric}, goal: {goal}}}]
seeds: {seeds}
budget: {{trials: 9}}
"""
    return parse_spec(text, Path(), where="s.yaml")


def trials(*names: str) -> list[Suggestion]:
    """Of names such as a0: arm a, seed 0; of the arm called c, the control's."""
    return [
        Suggestion(
            number=number,
            trial=name,
            arm=name[0],
            seed=int(name[1]),
            origin="control" if name[0] == "c" else "search",
            params={},
            labels={},
            config={},
        )
        for number, name in enumerate(names)
    ]


def chosen(
    names: Sequence[str],
    values: dict[str, float],
    with_encoder: Sequence[str],
    arm: str | None = None,
    spec: StudySpec | None = None,
) -> str | NoEncoder:
    spec = spec or study()
    phase, _, metric = spec.objectives[0].metric.partition("/")
    rows = [
        {"trial": trial, "phase": phase, "metric": metric, "progress": 1.0, "value": value}
        for trial, value in values.items()
    ]
    results = {name: Result(name, Outcome.COMPLETE, 1.0, None, {}) for name in values}
    measured, every = collect(rows), trials(*names)
    able = [one for one in every if one.trial in with_encoder]
    ranked = of_study(spec, every, results, measured)
    found = best_encoder(able, ranked, spec.objectives[0], measured, arm)
    return found if isinstance(found, NoEncoder) else found.trial


NAMES = ("c0", "c1", "a0", "a1", "b0", "b1")
VALUES = {"c0": 0.9, "c1": 0.9, "a0": 0.5, "a1": 0.6, "b0": 0.4, "b1": 0.8}


def test_the_best_seed_of_the_searched_arm_with_the_best_mean() -> None:
    assert chosen(NAMES, VALUES, NAMES) == "b1"
    assert chosen(NAMES, VALUES | {"b1": 0.65}, NAMES) == "a1"


def test_a_lower_value_is_the_better_one_where_that_is_the_goal() -> None:
    spec = study(goal="minimize", metric="segment/planned_flops")
    assert chosen(NAMES, VALUES, NAMES, spec=spec) == "a0"


def test_arms_and_trials_without_an_encoder_are_passed_over() -> None:
    assert chosen(NAMES, VALUES, ("c0", "a0", "a1")) == "a1"
    assert chosen(NAMES, VALUES, ("b0", "a0", "a1")) == "b0"


def test_an_arm_that_is_named_need_be_neither_searched_nor_the_best() -> None:
    assert chosen(NAMES, VALUES, NAMES, arm="a") == "a1"
    assert chosen(NAMES, VALUES, NAMES, arm="c") == "c0"


def test_without_a_searched_arm_that_has_a_score_none_is_chosen() -> None:
    assert chosen(("c0", "b0", "a0"), {}, ("b0", "a0")) == NoEncoder(("a", "b"))
    assert chosen(("c0", "b0", "a0"), {"c0": 0.9}, ("c0", "b0")) == NoEncoder(("b", "c"))
    assert chosen(("c0", "b0", "a0"), {"b0": 0.1}, ("c0", "b0", "a0")) == "b0"


@pytest.mark.parametrize("last", [None, float("nan")])
def test_a_trial_without_a_value_is_the_last_choice(last: float | None) -> None:
    values = VALUES | ({"a0": last} if last is not None else {})
    if last is None:
        del values["a0"]
    assert chosen(NAMES, values, ("a0", "a1"), arm="a") == "a1"


def test_without_an_encoder_the_arms_that_have_one_are_told() -> None:
    assert chosen(NAMES, VALUES, ("c0", "a0", "b0"), arm="x") == NoEncoder(("b", "a", "c"))
    assert chosen(NAMES, VALUES, ("c0",)) == NoEncoder(("c",))
    assert chosen(NAMES, VALUES, ()) == NoEncoder(())


def ranked(
    *trials: tuple[str, str, int, float | None], goal: str = "maximize", seeds: int = 1
) -> list[str]:
    found = standings([Final(*each) for each in trials], goal, seeds=seeds, confirm_seeds=2)
    return [one.arm for one in found]


def test_arms_rank_by_their_mean_and_of_equals_the_older_comes_first() -> None:
    arms = [("z", "search", 0, 0.6), ("a", "search", 0, 0.6), ("b", "search", 0, 0.7)]
    assert ranked(*arms) == ["b", "z", "a"]
    assert ranked(*arms, goal="minimize") == ["z", "a", "b"]
    # a mean, not the best trial
    two = [("a", "search", 0, 0.7), ("a", "search", 1, 0.4), ("b", "search", 0, 0.6)]
    assert ranked(*two, ("b", "search", 1, 0.62), seeds=2) == ["b", "a"]


def test_an_arm_that_lacks_a_seed_comes_after_those_that_have_all() -> None:
    lacking = [("a", "search", 0, 0.7), ("a", "search", 1, None)]
    whole = [("b", "search", 0, 0.6), ("b", "search", 1, 0.62)]
    assert ranked(*lacking, *whole, seeds=2) == ["b", "a"]


def test_a_confirmed_arm_is_judged_by_fresh_seeds_alone_and_stands_first() -> None:
    drawn = [("lucky", "search", 0, 0.70), ("good", "search", 0, 0.69), ("c", "control", 0, 0.68)]
    fresh = [("lucky", "confirm", 1, 0.60), ("good", "confirm", 1, 0.66), ("c", "confirm", 1, 0.5)]
    found = standings(
        [Final(*each) for each in drawn + fresh], "maximize", seeds=1, confirm_seeds=1
    )
    assert [(one.arm, round(one.mean, 2)) for one in found] == [
        ("good", 0.66),
        ("lucky", 0.60),
        ("c", 0.59),  # nobody picked the control: all its seeds count
    ]
    assert ranked(*drawn, ("good", "confirm", 1, 0.55)) == ["good", "lucky", "c"]


def test_first_of_all_stands_the_arm_that_has_a_verdict_on_its_seeds_alone() -> None:
    drawn = [("a", "search", 0, 0.9), ("b", "search", 0, 0.8), ("c", "control", 0, 0.5)]
    fresh = [("a", "confirm", 1, 0.7), ("b", "confirm", 1, 0.6)]
    last = [("b", "verdict", 2, 0.5), ("b", "verdict", 3, 0.54), ("c", "verdict", 2, 0.4)]
    trials = [Final(*each) for each in drawn + fresh + last]
    found = standings(trials, "maximize", seeds=1, confirm_seeds=1, verdict_seeds=2)
    assert [(one.arm, round(one.mean, 2), one.stage, one.is_whole) for one in found] == [
        ("b", 0.52, Stage.VERDICT, True),
        ("c", 0.45, Stage.VERDICT, False),
        ("a", 0.7, Stage.CONFIRM, True),
    ]


def test_the_best_arm_is_a_searched_one_and_controls_that_are_ahead_are_named() -> None:
    trials = [
        ("c", "control", 0, 0.60),
        ("r", "control:random-init", 0, 0.65),
        ("f", "control:frozen", 0, 0.2),
        ("a", "search", 0, 0.55),
        ("c", "search", 1, 0.99),  # the control's arm once more stays the control
    ]
    found = standings([Final(*each) for each in trials], "maximize", seeds=1, confirm_seeds=0)
    leader = best(found)
    assert leader is not None and leader.arm == "a"
    assert [one.group for one in ahead(found, "maximize")] == ["control", "random-init"]
    objective = study().objectives[0]
    assert in_short(found, objective, str.upper) == (
        "best segment/miou 0.55 (A), behind the control 0.795 and random weights 0.65"
    )
    only = [one for one in found if one.group == "control"]
    assert in_short(only, objective, str.upper) == "segment/miou: the control 0.795"
    assert in_short([], objective, str.upper) == ""
    level = standings(
        [Final("c", "control", 0, 0.5), Final("a", "search", 0, 0.5)],
        "maximize",
        seeds=1,
        confirm_seeds=0,
    )
    assert ahead(level, "maximize") == []


def test_only_complete_trials_with_a_finite_value_at_the_end_speak_for_an_arm() -> None:
    names = ("a0", "b0", "d0", "e0", "g0")
    outcomes = dict.fromkeys(names, Outcome.COMPLETE) | {"b0": Outcome.OUT_OF_MEMORY}
    results = {name: Result(name, end, 1.0, None, {}) for name, end in outcomes.items()}
    ends = {"a0": 0.5, "b0": 0.9, "d0": float("nan"), "e0": float("inf")}
    rows = [
        {"trial": name, "phase": "segment", "metric": "miou", "progress": 1.0, "value": value}
        for name, value in ends.items()
    ]
    early = {"trial": "g0", "phase": "segment", "metric": "miou", "progress": 0.5, "value": 0.8}
    measured = collect([*rows, early])
    found = finals(trials(*names), results, measured, "segment/miou")
    assert [each.value for each in found] == [0.5, None, None, None, None]
    assert to_confirm(study(seeds=1), trials(*names), results, measured) == ["a"]
