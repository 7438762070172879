"""TensorBoard, MLflow and W&B hear of every row once.  pytest tests/study/test_loggers.py"""

from __future__ import annotations

import importlib.util
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from study import loggers
from study.__main__ import main
from study.conductor import Conductor, DataView
from study.folder import StudyFolder
from study.ledger import Ledger, Suggestion, read_rows
from study.loading import difference, parse_spec
from study.loggers import LOGGERS, PACKAGES, Journal, Page, check_packages
from study.spec import StudySpec
from tests.conftest import TINY_STUDY
from trainables.endings import Ending
from trainables.errors import UserError
from trainables.metrics import rows as metric_rows

ALL = TINY_STUDY + "log: [tensorboard, mlflow]\n"


def spec_of(text: str = ALL) -> StudySpec:
    return parse_spec(text, Path(), where="study.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "tiny")


class Driver:
    """One life of a driver: a conductor whose news go to the study's loggers."""

    def __init__(self, folder: StudyFolder, text: str = ALL) -> None:
        spec = spec_of(text)
        self.said: list[str] = []
        self.ledger = Ledger.open(folder, {})
        self.conductor = Conductor(spec, self.ledger, DataView(Path(), "f" * 64, True))
        known = self.conductor.suggestions
        backlog = [(each, self.conductor.results.get(each.trial)) for each in known]
        self.journal = Journal("tiny", folder, spec.log, backlog, self.said.append)
        self.conductor.on_durable = self.journal.notice

    def begin(self) -> Suggestion:
        suggestion = self.conductor.next()
        assert isinstance(suggestion, Suggestion)
        return suggestion

    def rung(self, trial: Suggestion, progress: float) -> None:
        values = {"loss": 1 - progress, "probe_psnr@0.75": 20 + progress}
        place = {"step": round(100 * progress), "epoch": progress, "progress": progress}
        rows = metric_rows(values, phase="pretrain", seconds=progress, **place)
        self.conductor.rows(trial, rows, "a")

    def end(self) -> None:
        self.journal.close()
        self.ledger.close()


def in_tensorboard(folder: StudyFolder) -> dict[str, list[tuple[int, float]]]:
    """trial/tag -> (step, value)s, all events of all files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for place in sorted((folder.root / "tensorboard").iterdir()):
        read = EventAccumulator(str(place), purge_orphaned_data=False).Reload()
        for tag in read.Tags()["scalars"]:
            events = [(event.step, pytest.approx(event.value)) for event in read.Scalars(tag)]
            found[f"{place.name.partition('-')[2]}/{tag}"] = events
    return found


def in_mlflow(folder: StudyFolder) -> dict[str, list[tuple[int, float]]]:
    client = mlflow_client(folder)
    found = {}
    for run in mlflow_runs(folder):
        for key in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, key)
            name = f"{run.data.tags['maskstudy.trial']}/{key.replace(':', '@')}"
            assert name not in found, "two runs of one trial"
            found[name] = sorted((metric.step, metric.value) for metric in history)
    return found


def mlflow_client(folder: StudyFolder) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder.root}/mlflow.db")


def mlflow_runs(folder: StudyFolder) -> list[Any]:
    client = mlflow_client(folder)
    experiment = client.get_experiment_by_name("tiny")
    return list(client.search_runs([experiment.experiment_id], order_by=["start_time"]))


def in_ledger(folder: StudyFolder) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(folder).to_dict("records"):
        name = f"{row['trial']}/{row['phase']}/{row['metric']}"
        found.setdefault(name, []).append((row["step"], row["value"]))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_row_is_a_scalar_once_though_the_driver_died_at_the_worst_moments(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Driver(folder)
    done, failed = first.begin(), first.begin()
    first.rung(done, 0.5)
    first.end()

    # this one dies after each page was written and before that was noted
    keep = loggers._keep
    monkeypatch.setattr(
        loggers,
        "_keep",
        lambda folder, path, note: keep(folder, path, note) if note["handle"] is None else None,
    )
    second = Driver(folder)
    assert [second.begin(), second.begin()] == [done, failed]
    second.rung(done, 1.0)
    second.conductor.done(done, Ending.COMPLETE, None)
    second.rung(failed, 0.5)
    second.end()
    monkeypatch.setattr(loggers, "_keep", keep)

    third = Driver(folder)
    assert third.begin() == failed
    third.rung(failed, 1.0)
    third.conductor.done(failed, Ending.FAILED, "a traceback\nValueError: planted")
    third.end()
    Driver(folder).end()  # and one that has nothing to do

    for driver in (first, second, third):
        assert driver.said == []
    assert len(in_ledger(folder)) == 4
    assert in_tensorboard(folder) == in_ledger(folder)
    assert in_mlflow(folder) == in_ledger(folder)

    good, bad = mlflow_runs(folder)
    assert (good.info.status, bad.info.status) == ("FINISHED", "FAILED")
    assert bad.data.tags["maskstudy.outcome"] == "failed: ValueError: planted"
    assert good.info.run_name == f"0000-{done.trial}"
    assert good.data.params["model.patch"] == "8"
    assert good.data.params["masking.ratio.value"] == "0.5"
    assert good.data.params["arm"] == done.arm


# Not W&B: offline it begins a folder for every page, and online it wants an account
LOCAL = [name for name in LOGGERS if name != "wandb"]


def files_of(folder: StudyFolder) -> dict[str, int]:
    """Every file of the study, with its size."""
    found = (path for path in folder.root.rglob("*") if path.is_file())
    return {path.relative_to(folder.root).as_posix(): path.stat().st_size for path in found}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", LOCAL)
def test_a_page_that_is_written_once_more_changes_nothing(name: str, folder: StudyFolder) -> None:
    pytest.importorskip(PACKAGES.get(name, "json"))
    driver = Driver(folder, TINY_STUDY)
    trial = driver.begin()
    driver.rung(trial, 0.5)
    driver.rung(trial, 1.0)
    driver.conductor.done(trial, Ending.COMPLETE, None)
    driver.end()
    rows = [{str(k): v for k, v in row.items()} for row in read_rows(folder).to_dict("records")]
    first = Page("tiny", folder, trial, rows[:2], 0, None, None, is_again=False)
    write, before = LOGGERS[name], files_of(folder)
    handle = write(first)
    written = files_of(folder)
    assert written != before, "nothing of it stands in the study folder"
    assert write(replace(first, is_again=True)) == handle
    assert files_of(folder) == written
    result = driver.conductor.results[trial.trial]
    for more in (
        Page("tiny", folder, trial, rows[2:], 2, None, handle, is_again=False),
        Page("tiny", folder, trial, [], 4, result, handle, is_again=False),
    ):
        assert write(more) == handle
        written = files_of(folder)
        assert write(more) == handle
        assert files_of(folder) == written


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", LOCAL)
def test_every_logger_takes_good_ends_and_bad_ones(name: str, folder: StudyFolder) -> None:
    pytest.importorskip(PACKAGES.get(name, "json"))
    driver = Driver(folder, TINY_STUDY + f"log: [{name}]\n")
    good, bad = driver.begin(), driver.begin()
    driver.rung(good, 1.0)
    driver.conductor.done(good, Ending.COMPLETE, None)
    driver.conductor.done(bad, Ending.FAILED, "a traceback\nValueError: 'a', \"b\", ümlaut")
    driver.end()
    assert driver.said == []
    for trial, rows, outcome in ((good, 2, "complete"), (bad, 0, "failed")):
        note = json.loads(folder.logged(name, trial.trial).read_text())
        assert (note["rows"], note["outcome"]) == (rows, outcome)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_has_settings_and_outcome(folder: StudyFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    driver = Driver(folder, TINY_STUDY + "log: [tensorboard]\n")
    trial = driver.begin()
    driver.rung(trial, 1.0)
    driver.conductor.done(trial, Ending.COMPLETE, None)
    driver.end()
    read = EventAccumulator(str(next((folder.root / "tensorboard").iterdir()))).Reload()
    texts = {
        tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in read.Tags()["tensors"]
        if tag in ("origin", "outcome")
    }
    assert texts == {"origin": "control", "outcome": "complete"}
    hparams = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"pretrain.optimizer.base_lr" in hparams
    assert trial.trial.encode() in hparams


def test_a_logger_that_fails_is_told_once_stops_nothing_and_catches_up_later(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[tuple[str, int, int]] = []

    def fails(page: Page) -> str:
        raise ConnectionError("no route to host")

    def works(page: Page) -> str:
        got.append((page.trial.trial, page.number, len(page.rows)))
        return "mine"

    monkeypatch.setitem(LOGGERS, "tensorboard", fails)
    text = TINY_STUDY + "log: [tensorboard]\n"
    driver = Driver(folder, text)
    trial = driver.begin()
    driver.rung(trial, 0.5)
    driver.rung(trial, 1.0)
    driver.end()
    assert len(driver.said) == 2
    assert "no route to host; the study goes on" in driver.said[0]
    assert "running it again adds what it lacks" in driver.said[1]

    monkeypatch.setitem(LOGGERS, "tensorboard", works)
    driver = Driver(folder, text)
    assert driver.begin() == trial
    driver.rung(trial, 1.0)  # measured again: the first one counts
    driver.end()
    assert driver.said == []
    assert got == [(trial.trial, 0, 4)]
    Driver(folder, text).end()
    assert len(got) == 1


def test_a_slow_logger_keeps_neither_the_driver_nor_its_end_waiting(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch, released: Callable[[], None]
) -> None:
    driver = Driver(folder, TINY_STUDY + "log: [tensorboard]\n")
    driver.rung(driver.begin(), 1.0)
    driver.journal.close(timeout=0.1)
    assert "tensorboard lacks some of the study" in driver.said[0]
    released()
    driver.ledger.close()


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes TensorBoard wait until this is called."""
    import threading

    event = threading.Event()

    def slow(page: Page) -> str:
        event.wait(60)
        return "mine"

    monkeypatch.setitem(LOGGERS, "tensorboard", slow)
    yield event.set
    event.set()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_told_before_anything_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda module, *rest: None if module == PACKAGES[name] else find_spec(module, *rest),
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_STUDY + f"log: [{name}]\n")
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(path)])
    assert f"pip install 'maskstudy[{name}]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_logger_needs_is_an_extra_of_its_name() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert PACKAGES.keys() <= LOGGERS.keys()
    assert PACKAGES.keys() <= pyproject["project"]["optional-dependencies"].keys()


def test_options_stand_in_the_study_file_and_a_study_may_go_on_with_another_log() -> None:
    text = TINY_STUDY + "log: [tensorboard, {name: mlflow, experiment: cells}]\n"
    first, second = spec_of(text).log
    assert (first.name, first.options()) == ("tensorboard", {})
    assert second.options() == {"tracking_uri": None, "experiment": "cells"}
    assert all(change.is_compatible for change in difference(TINY_STUDY, text))
    check_packages([first, second])


@pytest.mark.parametrize(
    ("log", "problem"),
    [
        ("[tensorbord]", "did you mean 'tensorboard'"),
        ("[{name: wandb, projekt: cells}]", "did you mean 'project'"),
        ("[mlflow, {name: mlflow, experiment: cells}]", "expected each once"),
    ],
)
def test_mistakes_are_told(log: str, problem: str) -> None:
    with pytest.raises(UserError, match="log") as raised:
        spec_of(TINY_STUDY + f"log: {log}\n")
    assert problem in str(raised.value)


def test_notes_name_no_place_and_nothing_is_left_aside(folder: StudyFolder) -> None:
    driver = Driver(folder, TINY_STUDY + "log: [tensorboard]\n")
    trial = driver.begin()
    driver.rung(trial, 1.0)
    driver.end()
    note = json.loads(folder.logged("tensorboard", trial.trial).read_text())
    assert note == {"rows": 2, "outcome": None, "handle": "written"}
    assert not [*folder.root.rglob("*.tmp"), *folder.root.rglob("*.partial")]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_a_run_offline(folder: StudyFolder) -> None:
    driver = Driver(folder, TINY_STUDY + "log: [{name: wandb, mode: offline}]\n")
    trial = driver.begin()
    driver.rung(trial, 1.0)
    driver.conductor.done(trial, Ending.COMPLETE, None)
    driver.end()
    assert driver.said == []
    assert list((folder.root / "wandb").glob(f"offline-run-*-{trial.trial}"))
