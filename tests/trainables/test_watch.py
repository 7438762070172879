"""Processes that hang, and end themselves.  pytest tests/trainables/test_watch.py"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from trainables import watch
from trainables.watch import watched

HANGING = """
import re, sys, time
from trainables import watch
from trainables.watch import watched

watch.GRACE_SECONDS = MOST

def around_and_around():
    while True:
        pass

def deep_in_c():
    re.match("(a+)+$", "a" * 60 + "b")  # never lets go of the interpreter

def asleep():
    time.sleep(1000)

began = time.monotonic()
def tell(stacks):
    print(time.monotonic() - began, stacks)

with watched(lambda silent: LIMIT - silent, tell) as alive:
    time.sleep(LIMIT / 2)
    alive()
    globals()[sys.argv[1]]()
"""


def hang(how: str, *, grace: float) -> tuple[int, str, str]:
    """(exit code, what it told, standard error)."""
    code = HANGING.replace("LIMIT", "1.0").replace("MOST", str(grace))
    done = subprocess.run(
        [sys.executable, "-u", "-c", code, how], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_a_process_that_makes_no_progress_says_where_and_ends() -> None:
    for how in ("around_and_around", "asleep"):
        code, told, _ = hang(how, grace=1000)
        assert code == 1
        assert f"in {how}" in told
        assert float(told.split()[0]) >= 1.5, "the sign of progress does not count"


def test_a_process_whose_interpreter_is_blocked_ends_too_and_its_log_says_where() -> None:
    code, told, log = hang("deep_in_c", grace=1)
    assert code == 1
    assert told == ""
    assert "in deep_in_c" in log


def test_a_sign_of_progress_now_and_then_is_enough_and_the_end_is_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.2)
    told: list[str] = []
    with watched(lambda silent: 2.0 - silent, told.append) as alive:
        for _ in range(12):
            time.sleep(0.2)
            alive()
    time.sleep(2.5)
    assert told == []


def test_who_does_not_answer_ends_nothing() -> None:
    def ask(silent: float) -> float:
        raise ConnectionError("not now")

    with watched(ask, print):
        time.sleep(1.2)
