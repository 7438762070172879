"""Processes that hang, and end themselves.  pytest tests/test_watch.py"""

from __future__ import annotations

import subprocess
import sys
import time

from trainables.watch import watched

HANGING = """
import re, sys, time
from trainables.watch import watched

def around_and_around():
    while True:
        pass

def deep_in_c():
    re.match("(a+)+$", "a" * 60 + "b")  # never lets go of the interpreter

def asleep():
    time.sleep(1000)

began = time.monotonic()
with watched(lambda silent: LIMIT - silent, print) as alive:
    time.sleep(LIMIT / 2)
    alive()
    globals()[sys.argv[1]]()
"""


def hang(how: str, limit: float = 1.0) -> tuple[int, str, str, float]:
    """(exit code, what it told, standard error, seconds)."""
    began = time.monotonic()
    code = HANGING.replace("LIMIT", str(limit))
    done = subprocess.run(
        [sys.executable, "-u", "-c", code, how], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def test_a_process_that_makes_no_progress_says_where_and_ends() -> None:
    for how in ("around_and_around", "asleep"):
        code, told, _, seconds = hang(how)
        assert code == 1
        assert f"in {how}" in told
        assert 1.5 <= seconds < 5


def test_a_process_whose_interpreter_is_blocked_ends_too_and_its_log_says_where() -> None:
    code, told, log, seconds = hang("deep_in_c")
    assert code == 1
    assert told == ""
    assert "in deep_in_c" in log
    assert seconds < 10


def test_a_sign_of_progress_now_and_then_is_enough_and_the_end_is_the_end() -> None:
    told: list[str] = []
    with watched(lambda silent: 1.0 - silent, told.append) as alive:
        for _ in range(15):
            time.sleep(0.1)
            alive()
    time.sleep(1.5)
    assert told == []


def test_who_does_not_answer_ends_nothing() -> None:
    def ask(silent: float) -> float:
        raise ConnectionError("not now")

    with watched(ask, print):
        time.sleep(1.2)
