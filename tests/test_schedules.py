"""Schedules of the mask ratio. Run: python -m pytest tests/test_schedules.py"""

import pytest

from trainables.schedules import SCHEDULES, constant, cosine, linear, step

ASKED = (0, 0.25, 0.5, 0.75, 1)


def test_constant_is_the_same_throughout():
    assert [constant(p, value=0.6) for p in ASKED] == [0.6] * 5


def test_linear_by_hand():
    values = [linear(p, start=0.2, end=0.8) for p in ASKED]
    assert values == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8])


def test_cosine_by_hand():
    values = [cosine(p, start=0.2, end=0.8) for p in ASKED]
    # (1 - cos 45 deg) / 2 = 0.1464
    assert values == pytest.approx([0.2, 0.28787, 0.5, 0.71213, 0.8], abs=1e-5)


def test_schedules_may_fall():
    for name in ("linear", "cosine"):
        values = [SCHEDULES[name](p, start=0.9, end=0.1) for p in ASKED]
        assert values == sorted(values, reverse=True)


def test_a_step_holds_from_its_turning_point_on():
    values = [step(p, values=[0.3, 0.6, 0.9], at=[0.25, 0.75]) for p in (0, 0.24, 0.25, 0.74, 0.75)]
    assert values == [0.3, 0.3, 0.6, 0.6, 0.9]


@pytest.mark.parametrize("at", [[0.5], [0.7, 0.2], [0.5, 0.5]])
def test_steps_that_do_not_go_together_are_refused(at):
    with pytest.raises(ValueError, match=r"one more value than rising turning points, got \[0.1"):
        step(0.0, values=[0.1, 0.5, 0.9], at=at)
