"""A study that version 0.1.0 began, and left in the middle.  pytest tests/study/test_kept_study.py

fixtures/study-0.1/kept was written by that version: two controls, an arm that was enqueued and lost
its workers once, one that failed, and one whose workers were lost twice and that is to be run
again. Checkpoints, encoders and pictures are left out. It stays as it is: what a later version
writes in another way, it must still read in this one.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from analysis.report import build_report
from study.conductor import Conductor, DataView
from study.folder import StudyFolder
from study.ledger import (
    Ledger,
    Outcome,
    Suggestion,
    damage,
    read_results,
    read_rows,
    read_suggestions,
)
from study.ledger.parts import REPORTED
from study.loading import changes, load_spec, spec_of
from study.state import State, outlook_of, state_of
from study.steps import Continue
from tests.studies import CLOCKED
from trainables.config import TrialConfig
from trainables.context import Context
from trainables.data import Dataset, default_cache, open_dataset, prepare
from trainables.trial import run_trial

KEPT = Path(__file__).parents[1] / "fixtures" / "study-0.1" / "kept"
LOST = "8a8af88b3e63"
# since then touching cells are told apart, and what the border of an image cuts off has no size
RECOUNTED = "object_f1"


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    shutil.copytree(KEPT, tmp_path / "kept")
    return StudyFolder(tmp_path / "kept")


def begun(folder: StudyFolder, ledger: Ledger) -> tuple[Conductor, Dataset]:
    spec = spec_of(folder)
    dataset = open_dataset(prepare(spec.data, Path(), default_cache()))
    return Conductor(spec, ledger, DataView(Path(), dataset.fingerprint, True)), dataset


def train(conductor: Conductor, dataset: Dataset, suggestion: Suggestion, place: Path) -> Any:
    """Run a trial in this process; its rows go to the conductor."""
    job = conductor.job(suggestion)
    context = Context(
        device=torch.device("cpu"),
        folder=place,
        attempt=job["attempt"],
        rungs=tuple(conductor.spec.rungs),
        report=lambda rows: conductor.rows(suggestion, rows, job["attempt"]),
        heartbeat=lambda *_: None,
    )
    config = TrialConfig.model_validate(job["config"])
    return run_trial(config, suggestion.seed, dataset, conductor.spec.probe, context)


def test_it_is_read_as_it_was_written(folder: StudyFolder) -> None:
    assert damage(folder) == []
    suggestions, results = read_suggestions(folder), read_results(folder)
    assert [each.origin for each in suggestions] == [
        "control",
        "control:random-init",
        *["search"] * 3,
    ]
    outcomes = [results[each.trial].outcome for each in suggestions]
    assert outcomes == [Outcome.COMPLETE] * 3 + [Outcome.FAILED] * 2
    planted, lost = (results[each.trial] for each in suggestions[3:])
    assert (planted.infrastructure_failures, lost.infrastructure_failures) == (0, 2)
    found = outlook_of(folder)
    assert found.total == 9 and state_of(folder, found) is State.INTERRUPTED


def test_its_gain_over_the_mean_filling_is_called_so(folder: StudyFolder, tmp_path: Path) -> None:
    """Version 0.1 called it probe_gain, which now is the gain over the best trivial filling."""
    rows = read_rows(folder)
    gains = rows[rows["metric"].str.startswith("probe_gain")]
    assert set(gains["metric"]) == {"probe_gain/mean"} and len(gains) == 6
    trial = next(each for each in read_suggestions(folder) if each.origin == "control")
    old = gains[gains["trial"] == trial.trial].iloc[0]
    with Ledger.open(folder, {}) as ledger:  # the same rung, measured again today
        row = {name: old[name] for name in REPORTED} | {"step": int(old["step"])}
        again = [
            {**row, "metric": "probe_gain", "value": -1.5},
            {**row, "metric": "probe_gain/mean", "value": 9.0},
            {**row, "metric": "probe_gain/laplace", "value": -1.5},
        ]
        ledger.commit(trial, again, "000002-0001")
    rows = read_rows(folder, trial.trial)
    mine = rows[(rows["step"] == old["step"]) & rows["metric"].str.startswith("probe_gain")]
    found = dict(zip(mine["metric"], mine["value"], strict=True))
    assert found == {
        "probe_gain": -1.5,
        "probe_gain/mean": old["value"],  # the first committed one counts
        "probe_gain/laplace": -1.5,
    }
    assert "probe_gain" not in set(rows.loc[rows["step"] != old["step"], "metric"])


def test_it_goes_on_to_its_end_and_is_reported(folder: StudyFolder, tmp_path: Path) -> None:
    with Ledger.open(folder, {}) as ledger:
        conductor, dataset = begun(folder, ledger)
        step = conductor.next_step()
        assert isinstance(step, Continue) and step.suggestion.trial == LOST
        while isinstance(suggestion := conductor.next(), Suggestion):
            place = tmp_path / suggestion.trial
            conductor.done(suggestion, train(conductor, dataset, suggestion, place), None)
    assert state_of(folder, outlook_of(folder)) is State.FINISHED
    suggestions, results = read_suggestions(folder), read_results(folder)
    # 5 in the budget, one more asked for, one enqueued; then the best arm and the control again
    assert len(suggestions) == 9
    assert [results[each.trial].outcome for each in suggestions].count(Outcome.FAILED) == 1
    page = build_report(folder, tmp_path / "report.html").read_text()
    assert "ValueError: planted" in page and "Does it run?" in page


def test_its_trials_have_the_same_rows_today(folder: StudyFolder, tmp_path: Path) -> None:
    """As far as another processor rounds alike."""
    before = read_rows(folder)
    with Ledger.open(folder, {}) as ledger:
        conductor, dataset = begun(folder, ledger)
        heard: list[dict[str, Any]] = []
        for suggestion in conductor.suggestions[:3]:
            conductor.rows = lambda s, rows, _: (  # type: ignore[method-assign]
                heard.extend({**row, "trial": s.trial} for row in rows) or False
            )
            train(conductor, dataset, suggestion, tmp_path / suggestion.trial)
    key = ["trial", "phase", "step", "metric"]
    now = pd.DataFrame(heard)
    now = now[now["metric"].isin(before["metric"])]  # others are measured since
    before, now = (rows[~rows["metric"].str.contains(RECOUNTED)] for rows in (before, now))
    both = before.merge(now, on=key, how="outer", suffixes=("_before", "_now"))
    both = both[~both["metric"].isin(CLOCKED)]
    assert len(both) > 200 and not both[["value_before", "value_now"]].isna().any(axis=None)
    assert both["value_now"].to_numpy() == pytest.approx(both["value_before"].to_numpy(), rel=1e-3)
    for what in ("goal", "unit", "epoch", "progress"):
        assert (both[f"{what}_before"] == both[f"{what}_now"]).all()


def test_what_its_file_does_not_say_is_what_it_was(folder: StudyFolder, tmp_path: Path) -> None:
    spec = spec_of(folder)
    assert (spec.trial.model.positions, spec.trial.segment.clip) == ("pixels", None)
    file = tmp_path / "kept.yaml"
    file.write_text(folder.spec.read_text() + f"storage: {tmp_path}\n")
    assert load_spec(file).trial == spec.trial
    assert [each.path for each in changes(folder, load_spec(file))] == ["storage"]
    # a study of another name begins by today's
    file.write_text(file.read_text().replace("study: kept", "study: new"))
    assert load_spec(file).trial.model.positions == "patches"
