"""The display.  pytest tests/study/test_progress.py"""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from study.ledger import Outcome, Suggestion
from study.progress import Patience, Progress, duration
from tests.machine import wait_until


def suggestion(number: int, origin: str = "search", seed: int = 0) -> Suggestion:
    return Suggestion(
        number=number,
        trial=f"{number:012x}",
        arm=f"{number:08x}",
        seed=seed,
        origin=origin,
        config={},
        params={"model.patch": 4, "masking.ratio": "constant"},
        labels={},
    )


def played() -> Progress:
    progress = Progress(study="cells", total=6, done=2, metrics=["segment/miou"])
    progress.console = Console(width=160, record=True, file=io.StringIO())
    for number, miou in ((0, 0.4), (1, 0.6)):
        one = suggestion(number)
        progress.suggested(one, resumed=False)
        progress.rung(one, "segment", 1.0, {"segment/miou": miou})
        progress.finished(one, Outcome.COMPLETE, None)
    progress.best = "best segment/miou 0.6 (patch 4)"
    progress.suggested(suggestion(2, "control"), resumed=True)
    progress.beat(f"{2:012x}", "pretrain", 0.5, 123.0)
    return progress


def test_it_counts_what_earlier_runs_finished_too() -> None:
    assert played().num_done == 4


def test_time_left_is_the_mean_duration_of_what_is_left() -> None:
    progress = played()
    for line in progress.lines.values():
        line.seconds = 10.0
        line.began -= 4  # the running one has been at it for 4 s
    left = progress.seconds_left()
    assert left is not None
    assert abs(left - (10 + 6)) < 1  # one waits, one has 6 s to go
    progress.slots = 2
    assert abs(progress.seconds_left() - 8) < 1  # type: ignore[operator]


def test_pretraining_that_trials_share_is_expected_once_a_seed() -> None:
    progress = Progress(study="cells", total=9, done=0, metrics=[], pretrainings=3)
    progress.console = Console(file=io.StringIO())
    for number, seed in enumerate((0, 0, 1)):
        one = suggestion(number, seed=seed)
        progress.suggested(one, resumed=False)
        progress.rung(one, "pretrain", 1.0, {})
        if number < 2:
            progress.finished(one, Outcome.COMPLETE, None)
    first, second, third = progress.lines.values()
    first.seconds, first.pretraining = 110.0, 100.0
    second.seconds, second.pretraining = 10.5, 0.5
    third.pretraining = 100.0
    third.began -= 40
    # six trials at 10 s, the pretraining of the last seed, and 110 - 40 s of the third
    assert progress.seconds_left() == pytest.approx(6 * 10 + 100 + 70, abs=1)


def test_the_table_shows_arm_phase_best_and_time_left() -> None:
    progress = played()
    progress.console.print(progress.table())
    text = progress.console.export_text()
    for word in (
        "cells: 4/6",
        "best segment/miou 0.6",
        "patch 4",
        "pretrain",
        "50%",
        "123",
        "left",
    ):
        assert word in text, text


def test_waiting_for_the_first_step_is_summed_up_cold_and_warm() -> None:
    progress = played()
    for seconds, is_warm in ((14.0, False), (0.1, True), (20.0, True), (0.2, True), (None, True)):
        progress.first_step(seconds, is_warm=is_warm)
    progress.say_first_steps()
    text = progress.console.export_text()
    assert "14.0 s in a cold" in text
    assert "0.20 s (median of 3; longest 20.00 s)" in text


def test_durations_are_rounded_for_people() -> None:
    assert [duration(s) for s in (5, 89, 300, 7200)] == ["5 s", "89 s", "5 min", "2.0 h"]


def test_a_log_hears_what_a_trial_waits_for_when_that_changes() -> None:
    progress = played()
    trial = f"{2:012x}"
    progress.lines[trial].began -= 7
    for text in ("Ray is starting its workers", *["its workers are importing torch"] * 3):
        progress.waiting(trial, text)
    progress.lines[trial].reminded -= 6
    progress.waiting(trial, "its workers are importing torch")
    progress.beat(trial, "pretrain", 0.6, 123.0)
    progress.waiting("of another run", "Ray is starting its workers")
    lines = [line for line in progress.console.export_text().splitlines() if "workers" in line]
    assert [line.partition("]: ")[2] for line in lines] == [
        "Ray is starting its workers (7 s)",
        *["its workers are importing torch (7 s)"] * 2,
    ]
    assert progress.lines[trial].phase == "pretrain"


def test_nobody_is_told_to_wait_for_a_moment() -> None:
    progress = played()
    progress.waiting(f"{2:012x}", "its workers are about to start")
    assert "about to begin" not in progress.console.export_text()


def test_what_takes_long_is_shown_with_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.progress.MOMENT_SECONDS", 0.05)
    monkeypatch.setattr("study.progress.REMIND_SECONDS", 0.05)
    log = Console(width=160, record=True, file=io.StringIO())
    with Patience(log, "checking the data") as patience:
        wait_until(lambda: "checking the data (0 s)" in log.export_text(clear=False))
        patience.say("decoding: 120 of 4,000 parts")
        wait_until(lambda: "decoding: 120 of 4,000 parts (0 s)" in log.export_text(clear=False))
