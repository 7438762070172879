"""Which trial's encoder is handed over, from hand-made ledgers.  pytest tests/test_best.py"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from study.best import NoEncoder, best_encoder
from study.ledger import Suggestion
from study.spec import StudySpec, parse_spec
from study.stopping import collect


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
    found = best_encoder(spec, trials(*names), collect(rows), set(with_encoder), arm)
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


def test_while_no_arm_has_all_its_seeds_any_trial_with_an_encoder_will_do() -> None:
    assert chosen(("c0", "b0", "a0"), {}, ("b0", "a0")) == "a0"
    assert chosen(("c0", "b0", "a0"), {}, ("c0", "b0")) == "b0"


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
