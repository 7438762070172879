"""What happens to a study, without Ray.  pytest tests/study/test_conductor.py"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from study import requests
from study.commands.run import conclude
from study.conductor import Conductor, DataView
from study.environment import DEFAULTS
from study.folder import StudyFolder
from study.ledger import Ledger, Outcome, Suggestion, read_results, read_rows, read_suggestions
from study.loading import parse_spec
from study.owed import RETRIES
from study.space import SearchItem
from study.spec import Resources, StudySpec
from study.steps import Finished, Wait
from tests.conftest import TINY_STUDY
from trainables.endings import Ending
from trainables.metrics import STOPPED_HERE

HALVING = TINY_STUDY.replace(
    "stopping: {name: none}",
    "stopping: {name: halving, metric: segment/miou, reduction: 2, min_trials: 3}",
).replace("trials: 4", "trials: 8")
DATA = DataView(Path(), "f" * 64, is_labelled=True)


@pytest.fixture
def spec() -> StudySpec:
    return parse_spec(HALVING, Path(), where="study.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "tiny")


@pytest.fixture
def conductor(spec: StudySpec, folder: StudyFolder) -> Iterator[Conductor]:
    with Ledger.open(folder, {}) as ledger:
        yield Conductor(spec, ledger, DATA)


def rows(progress: float, miou: float) -> list[dict[str, Any]]:
    return [
        {
            "phase": "segment",
            "step": round(100 * progress),
            "epoch": progress,
            "progress": progress,
            "metric": "miou",
            "value": miou,
            "goal": "maximize",
            "unit": "",
            "seconds": 1.0,
        }
    ]


def play(conductor: Conductor, miou: float) -> Suggestion:
    """Run the next trial at a constant score, heeding the conductor; what it was."""
    suggestion = conductor.next()
    assert isinstance(suggestion, Suggestion)
    for progress in (0.25, 0.5, 1.0):
        if conductor.rows(suggestion, rows(progress, miou), "a"):
            conductor.done(suggestion, Ending.STOPPED, None)
            return suggestion
    conductor.done(suggestion, Ending.COMPLETE, None)
    return suggestion


def reopened(spec: StudySpec, folder: StudyFolder) -> Conductor:
    """As a new driver would find it; the ledger is closed again at once."""
    with Ledger.open(folder, {}) as ledger:
        return Conductor(spec, ledger, DATA)


def test_controls_come_first_and_no_arm_comes_twice(conductor: Conductor) -> None:
    played = [play(conductor, 0.5) for _ in range(8)]
    assert [s.origin for s in played] == ["control", "control:random-init"] + ["search"] * 6
    assert len({s.arm for s in played}) == 8
    assert isinstance(conductor.next(), Finished)


def test_a_bad_trial_is_stopped_and_the_decision_is_kept_beside_its_values(
    conductor: Conductor, folder: StudyFolder
) -> None:
    for miou in (0.5, 0.5, 0.6, 0.7):
        play(conductor, miou)
    bad = play(conductor, 0.1)
    assert conductor.results[bad.trial].outcome is Outcome.STOPPED
    kept = read_rows(folder, bad.trial)
    assert set(kept.metric) == {"miou", STOPPED_HERE}
    assert kept.progress.max() == 0.25
    assert conductor.results[bad.trial].progress == {"segment": 0.25}


def test_a_stop_that_was_decided_before_a_crash_is_carried_out_after_it(
    spec: StudySpec, folder: StudyFolder
) -> None:
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA)
        for miou in (0.5, 0.5, 0.6, 0.7):
            play(conductor, miou)
        bad = conductor.next()
        assert isinstance(bad, Suggestion)
        assert conductor.rows(bad, rows(0.25, 0.1), "a")  # and the driver dies here
    reopened(spec, folder)
    assert read_results(folder)[bad.trial].outcome is Outcome.STOPPED


def test_a_new_driver_goes_on_with_what_was_begun_then_proposes_the_same(
    spec: StudySpec, folder: StudyFolder, tmp_path: Path
) -> None:
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA)
        for miou in (0.5, 0.5, 0.6):
            play(conductor, miou)
        begun = conductor.next()
        assert isinstance(begun, Suggestion)
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA)
        assert conductor.next() == begun
        conductor.rows(begun, rows(1.0, 0.4), "b")
        conductor.done(begun, Ending.COMPLETE, None)
        after_crash = conductor.next()

    whole = StudyFolder(tmp_path / "whole")
    with Ledger.open(whole, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA)
        for miou in (0.5, 0.5, 0.6):
            play(conductor, miou)
        same = conductor.next()
        assert isinstance(same, Suggestion)
        conductor.rows(same, rows(1.0, 0.4), "a")
        conductor.done(same, Ending.COMPLETE, None)
        assert conductor.next() == after_crash


def test_failures_of_the_infrastructure_are_retried_and_then_given_up(
    conductor: Conductor, folder: StudyFolder
) -> None:
    control = conductor.next()
    assert isinstance(control, Suggestion)
    for failures in range(1, RETRIES + 1):
        conductor.done(control, Ending.LOST, "3 worker groups died in it")
        kept = read_results(folder)[control.trial]
        assert kept.infrastructure_failures == failures
        assert kept.error == f"infrastructure (failure {failures} of 4): 3 worker groups died in it"
        assert conductor.next() == control
    conductor.done(control, Ending.LOST, "3 worker groups died in it")
    following = conductor.next()
    assert isinstance(following, Suggestion)
    assert following.trial != control.trial
    assert conductor.num_failed == 1
    assert len(read_suggestions(folder)) == 2


def test_where_a_worker_hung_is_kept_beside_its_trial(
    conductor: Conductor, folder: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    control = conductor.next()
    assert isinstance(control, Suggestion)
    conductor.hung(control, "000001-0001.1", "rank0", "in for_ever")
    (path,) = folder.stacks(control.trial).iterdir()
    assert path.name == "000001-0001.1-rank0.txt"
    assert path.read_text() == "in for_ever"
    assert f"trials/{control.trial}/stacks/{path.name}" in capsys.readouterr().out


def test_nothing_is_started_beyond_the_budget_while_the_last_trial_runs(
    conductor: Conductor,
) -> None:
    for _ in range(7):
        play(conductor, 0.5)
    last = conductor.next()
    assert isinstance(last, Suggestion)
    assert isinstance(conductor.next(), Wait)
    conductor.done(last, Ending.FAILED, "an error")
    assert isinstance(conductor.next(), Finished)


def test_a_trial_that_is_to_be_run_again_does_not_count_as_done(
    conductor: Conductor, spec: StudySpec
) -> None:
    control = conductor.next()
    assert isinstance(control, Suggestion)
    conductor.done(control, Ending.LOST, "its relay died")
    resumed = Conductor(spec, conductor.ledger, DATA)
    assert resumed.progress.num_done == 0
    play(resumed, 0.5)
    assert resumed.progress.num_done == 1


@pytest.mark.parametrize(
    ("changed", "is_shared"),
    [
        ({}, False),
        ({"controls": ["random-init", "frozen"]}, True),
        ({"search": {"segment.labels": SearchItem(choices=[1, 2])}}, True),
    ],
)
def test_pretraining_is_kept_for_others_only_where_there_are_any(
    spec: StudySpec, folder: StudyFolder, changed: dict[str, Any], *, is_shared: bool
) -> None:
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec.model_copy(update=changed), ledger, DATA)
        suggestion = conductor.next()
        assert isinstance(suggestion, Suggestion)
        assert (conductor.job(suggestion)["shared"] is not None) == is_shared


def test_workers_hear_how_the_study_wants_to_save_memory(
    spec: StudySpec, folder: StudyFolder
) -> None:
    asked = Resources(micro_batches=3, activation_checkpointing=True)
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec.model_copy(update={"resources": asked}), ledger, DATA)
        suggestion = conductor.next()
        assert isinstance(suggestion, Suggestion)
        job = conductor.job(suggestion)
    assert (job["micro_batches"], job["recomputes"]) == (3, True)


def fail(conductor: Conductor, ending: Ending = Ending.OUT_OF_MEMORY) -> Suggestion:
    suggestion = conductor.next()
    assert isinstance(suggestion, Suggestion)
    conductor.done(suggestion, ending, None)
    return suggestion


def test_a_study_whose_first_trials_all_fail_alike_ends_and_can_go_on(
    conductor: Conductor, spec: StudySpec, capsys: pytest.CaptureFixture[str]
) -> None:
    running = conductor.next()
    assert isinstance(running, Suggestion)
    for _ in range(5):
        assert conductor.gave_up is None
        fail(conductor)
    assert isinstance(conductor.next(), Wait)  # for the one that still runs
    conductor.done(running, Ending.COMPLETE, None)
    assert isinstance(conductor.next(), Finished)
    assert conductor.gave_up == "out-of-memory"
    assert conclude(conductor, conductor.ledger.folder, None) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "gives up: the first 5 trials have all failed alike, out-of-memory" in said
    resumed = Conductor(spec, conductor.ledger, DATA)
    assert isinstance(resumed.next(), Suggestion)


def test_a_study_that_has_completed_a_trial_never_gives_up(conductor: Conductor) -> None:
    play(conductor, 0.5)
    for _ in range(7):
        fail(conductor)
    assert conductor.gave_up is None


def test_where_nothing_foretells_the_objective_that_is_said_once(
    folder: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = HALVING.replace("min_trials: 3", "min_trials: 50").replace("trials: 8", "trials: 30")
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(parse_spec(text, Path(), where="study.yaml"), ledger, DATA)
        for number in range(14):
            suggestion = conductor.next()
            assert isinstance(suggestion, Suggestion)
            for progress in (0.25, 0.5, 1.0):
                value = 0.3 + 0.01 * number * (-1 if progress < 0.5 else 1)
                assert not conductor.rows(suggestion, rows(progress, value), "a")
            conductor.done(suggestion, Ending.COMPLETE, None)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("nobody is stopped for now") == 1
    assert "at 25% of segment nobody is stopped for now: nothing that is measured there" in said
    assert "is known to foretell segment/miou" in said


def test_an_arm_that_somebody_asked_for_is_never_stopped(
    conductor: Conductor, spec: StudySpec
) -> None:
    for _ in range(6):
        play(conductor, 0.9)
    conductor.ledger.freeze(spec.text, {"defaults": DEFAULTS}, extends=False)
    constant = {"name": "constant", "value": 0.31}
    requests.enqueue(conductor.ledger.folder, {"masking.ratio": constant})
    asked = play(conductor, 0.1)
    assert asked.config["masking"]["ratio"] == constant
    assert conductor.results[asked.trial].outcome is Outcome.COMPLETE
