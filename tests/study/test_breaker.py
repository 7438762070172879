"""When everything has failed in one way.  pytest tests/study/test_breaker.py"""

import pytest

from study.breaker import ARMS, FIRST, failing_alike
from study.ledger import Outcome, Result


def ended(outcome=Outcome.FAILED, error="Traceback\nValueError: 3 is odd", failures=0):
    return Result("t", outcome, 1.0, error, {}, failures)


def told(results, arms=99):
    """What is said of trials of so many arms, which take turns."""
    return failing_alike([(f"arm {number % arms}", one) for number, one in enumerate(results)])


def test_the_first_five_that_fail_alike_are_told_with_their_reason():
    assert (FIRST, ARMS) == (5, 3)
    assert told([ended()] * 4) is None
    assert told([ended()] * 5) == "failed (ValueError: 3 is odd)"
    assert told([ended(Outcome.DIVERGED, None)] * 5) == "diverged"
    assert told([ended(Outcome.OUT_OF_MEMORY, "")] * 7) == "out-of-memory"


def test_seeds_of_one_or_two_arms_say_nothing_of_the_others():
    assert told([ended()] * 12, arms=1) is told([ended()] * 12, arms=2) is None
    assert told([ended()] * 5, arms=3) is not None


def test_numbers_in_a_reason_make_no_other_kind():
    errors = [ended(error=f"RuntimeError: tried to allocate {n}.5 GiB") for n in range(5)]
    assert told(errors) == "failed (RuntimeError: tried to allocate 0.5 GiB)"


@pytest.mark.parametrize(
    "other",
    [
        ended(Outcome.COMPLETE, None),
        ended(Outcome.STOPPED, None),
        ended(Outcome.DIVERGED, None),
        ended(error="KeyError: 'x'"),
    ],
)
def test_one_of_them_that_ended_otherwise_is_hope(other):
    for place in range(5):
        history = [ended()] * 4
        history.insert(place, other)
        assert told(history + [ended()] * 20) is None


def test_stopped_and_complete_trials_are_no_failure():
    assert told([ended(Outcome.COMPLETE, None)] * 9) is None
    assert told([ended(Outcome.STOPPED, None)] * 9) is None


def test_what_the_infrastructure_did_does_not_count():
    lost = ended(error="infrastructure: node lost", failures=1)
    assert told([lost] * 9) is None
    assert told([lost, ended(), lost] + [ended()] * 4) == "failed (ValueError: 3 is odd)"
