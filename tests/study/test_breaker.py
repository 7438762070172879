"""When everything has failed in one way.  pytest tests/study/test_breaker.py"""

import pytest

from study.breaker import FIRST, failing_alike
from study.ledger import Outcome, Result


def ended(outcome=Outcome.FAILED, error="Traceback\nValueError: 3 is odd", failures=0):
    return Result("t", outcome, 1.0, error, {}, failures)


def test_the_first_five_that_fail_alike_are_told_with_their_reason():
    assert FIRST == 5
    assert failing_alike([ended()] * 4) is None
    assert failing_alike([ended()] * 5) == "failed (ValueError: 3 is odd)"
    assert failing_alike([ended(Outcome.DIVERGED, None)] * 5) == "diverged"
    assert failing_alike([ended(Outcome.OUT_OF_MEMORY, "")] * 7) == "out-of-memory"


def test_numbers_in_a_reason_make_no_other_kind():
    errors = [ended(error=f"RuntimeError: tried to allocate {n}.5 GiB") for n in range(5)]
    assert failing_alike(errors) == "failed (RuntimeError: tried to allocate 0.5 GiB)"


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
        assert failing_alike(history + [ended()] * 20) is None


def test_stopped_and_complete_trials_are_no_failure():
    assert failing_alike([ended(Outcome.COMPLETE, None)] * 9) is None
    assert failing_alike([ended(Outcome.STOPPED, None)] * 9) is None


def test_what_the_infrastructure_did_does_not_count():
    lost = ended(error="infrastructure: node lost", failures=1)
    assert failing_alike([lost] * 9) is None
    assert failing_alike([lost, ended(), lost] + [ended()] * 4) == "failed (ValueError: 3 is odd)"
