"""Studies that are hit while they run: how they are started, waited for and compared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from study.folder import StudyFolder
from study.ledger import read_rows, read_suggestions
from tests.conftest import TINY_STUDY

# long enough to be hit in the middle; about 4 s of training a trial
STUDY = TINY_STUDY.replace("epochs: 4, batch: 8", "epochs: 60, batch: 8")
# seven trials, each by two workers that may lie on two nodes
TWO_WORKERS = STUDY.replace("workers: 1,", "workers: 2, hang_minutes: 0.2,").replace(
    "trials: 4", "trials: 7"
)
MARK = "MASKSTUDY_TEST"  # the variable by which all processes of a study are known
CLOCKED = ("images_per_second", "device_seconds", "peak_memory")  # measured, not computed


def write_study(folder: Path, text: str = STUDY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def undisturbed(folder: Path, text: str = STUDY) -> StudyFolder:
    """What a study comes to that nobody hits."""
    path = write_study(folder, text)
    code, printed = run(path)
    assert code == 0, printed
    return folder_of(path)


def folder_of(path: Path) -> StudyFolder:
    return StudyFolder(path.parent / "studies" / "tiny")


def start(
    path: Path,
    *,
    log: str = "tiny.log",
    command: Sequence[str] = (),
    program: Sequence[str] = ("-m", "study"),
    **variables: str,
) -> subprocess.Popen[bytes]:
    """Run the study; what it prints goes to a file, as Ray's processes may outlive it."""
    command = command or ["run", str(path), "--no-report"]
    with (path.parent / log).open("wb") as printed:
        return subprocess.Popen(
            [sys.executable, *program, *command],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: str(path), **variables},
        )


@contextmanager
def driving(path: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The same, and it is killed at the end if it still runs."""
    driver = start(path, **options)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def run(
    path: Path, *, log: str = "tiny.log", command: Sequence[str] = (), seconds: float = 240
) -> tuple[int, str]:
    """Exit code and what was printed."""
    with driving(path, log=log, command=command) as driver:
        return driver.wait(seconds), (path.parent / log).read_text()


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert driver.poll() is None, "the driver has ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def third_trial_is_under_way(folder: StudyFolder) -> bool:
    if len(list(folder.suggestions.glob("*.json"))) < 3:
        return False
    third = read_suggestions(folder)[2].trial
    checkpoints = folder.checkpoints(third)
    return checkpoints.is_dir() and any(
        (checkpoint / "manifest.json").exists() for checkpoint in checkpoints.iterdir()
    )


def comparable(folder: StudyFolder) -> pd.DataFrame:
    """What must be equal, bit for bit, however often a study was interrupted."""
    rows = read_rows(folder)
    rows = rows[~rows.metric.isin(CLOCKED)]
    columns = ["trial", "arm", "seed", "phase", "step", "progress", "metric", "value"]
    return rows[columns].sort_values(columns[:7]).reset_index(drop=True)


def first_trials(
    folder: StudyFolder, whole: StudyFolder, count: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What must be equal of a study of so many trials and of one that goes on after them."""
    mine, all_of_it = comparable(folder), comparable(whole)
    assert mine.trial.nunique() == count
    return mine, all_of_it[all_of_it.trial.isin(mine.trial)].reset_index(drop=True)
