"""Trials in a storage of Optuna's own.  pytest tests/study/test_optuna_copy.py"""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from study.conductor import Conductor
from study.folder import StudyFolder
from study.ledger import Ledger
from study.loading import parse_spec
from study.optuna_copy import optuna_storage
from tests.conftest import TINY_STUDY
from tests.study.test_conductor import DATA, play
from tests.study.test_requests import begin
from tests.terminal import call
from trainables.endings import Ending
from trainables.metrics import rows as metric_rows

TEXT = TINY_STUDY.replace("trials: 4", "trials: 6")


def copies(where: str) -> list[optuna.trial.FrozenTrial]:
    study = optuna.load_study(study_name="tiny", storage=optuna_storage(where))
    return list(study.get_trials())


@pytest.mark.parametrize("place", ["sqlite:///{}/copy.db", "{}/copy.log"])
def test_a_copy_follows_a_study_trial_by_trial(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, where = begin(tmp_path, TEXT), place.format(tmp_path)
    spec = parse_spec(TEXT, Path(), where="study.yaml")
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA)
        ended = [play(conductor, score) for score in (0.5, 0.4, 0.7)]
        running = conductor.next()
        assert call("export", folder.root, "--optuna", where) == 0
        assert "4 of 4 trials were new or had news" in capsys.readouterr().out
        first = copies(where)
        assert [one.state for one in first] == [TrialState.COMPLETE] * 3 + [TrialState.RUNNING]
        assert [one.user_attrs["origin"] for one in first] == [one.origin for one in ended] + [
            "search"
        ]
        assert first[2].values[0] == 0.7 and first[2].params == ended[2].params
        assert first[2].user_attrs["segment/miou"] == 0.7

        conductor.done(running, Ending.DIVERGED, "the loss is NaN")
        stopped = conductor.next()
        values = metric_rows(
            {"miou": 0.2}, phase="segment", seconds=1, step=1, epoch=1, progress=0.5
        )
        conductor.rows(stopped, values, "a")
        conductor.done(stopped, Ending.STOPPED, None)
    assert call("export", folder.root, "--optuna", where) == 0
    assert "2 of 5 trials were new or had news" in capsys.readouterr().out
    second = copies(where)
    assert [one.state for one in second[3:]] == [TrialState.FAIL, TrialState.PRUNED]
    assert second[3].user_attrs["outcome"] == "diverged"
    assert second[:3] == first[:3]
    assert call("export", folder.root, "--optuna", where) == 0
    assert "had news" not in capsys.readouterr().out and copies(where) == second


def test_rungs_of_a_running_trial_are_copied_as_they_come(tmp_path: Path) -> None:
    folder, where = begin(tmp_path), f"sqlite:///{tmp_path}/copy.db"
    spec = parse_spec(TINY_STUDY, Path(), where="study.yaml")
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA)
        trial = conductor.next()
        for progress in (0.25, 0.5):
            about = {"seconds": 1, "step": round(100 * progress), "epoch": 1, "progress": progress}
            rows = metric_rows({"miou": progress / 2}, phase="segment", **about)
            conductor.rows(trial, rows, "a")
            assert call("export", folder.root, "--optuna", where) == 0
        (copy,) = copies(where)
        assert copy.intermediate_values == {25: 0.125, 50: 0.25}


def test_a_study_of_that_name_that_is_no_copy_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, where = begin(tmp_path), f"sqlite:///{tmp_path}/mine.db"
    mine = optuna.create_study(storage=where, study_name="tiny", direction="maximize")
    mine.tell(mine.ask(), 1.0)
    assert call("export", folder.root, "--optuna", where) == 2
    assert "that is no copy of this one" in capsys.readouterr().err
    assert len(mine.trials) == 1


def test_another_study_of_the_same_name_is_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"sqlite:///{tmp_path}/copy.db"
    for seed in (0, 1):
        folder = begin(tmp_path / str(seed), TEXT + f"seed: {seed}\n")
        with Ledger.open(folder, {}) as ledger:
            spec = parse_spec(TEXT + f"seed: {seed}\n", Path(), where="study.yaml")
            play(Conductor(spec, ledger, DATA), 0.5)
        assert call("export", folder.root, "--optuna", where) == 2 * seed
    assert "that is no copy of this one" in capsys.readouterr().err
    assert len(copies(where)) == 1


@pytest.mark.parametrize("where", ["", "sqlite:////none/x.db", "{}", "foo://bar", "{}/none/x.log"])
def test_a_storage_that_cannot_be_opened_is_told(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begin(tmp_path / "s")
    assert call("export", folder.root, "--optuna", where.format(tmp_path)) == 2
    told = capsys.readouterr().err
    assert "--optuna: given" in told and "expected a URL such as sqlite:///optuna.db" in told


def test_to_follow_is_asked_of_a_copy_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", begin(tmp_path).root, "--follow") == 2
    assert "given --follow without --optuna" in capsys.readouterr().err


def test_a_study_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert call("export", StudyFolder(tmp_path / "none").root, "--optuna", "x.log") == 2
    assert not (tmp_path / "x.log").exists()
