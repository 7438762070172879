"""A whole study on a real Ray cluster, killed and resumed.  pytest tests/test_study.py"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch

from study.folder import StudyFolder
from study.ledger import Outcome, read_results, read_rows, read_suggestions
from tests.conftest import TINY_STUDY
from tests.timm_models import create_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

# long enough to be hit in the middle; about 4 s of training a trial
STUDY = TINY_STUDY.replace("epochs: 4, batch: 8", "epochs: 60, batch: 8")
# seven trials, each by two workers that may lie on two nodes
TWO_WORKERS = STUDY.replace("workers: 1,", "workers: 2, hang_minutes: 0.2,").replace(
    "trials: 4", "trials: 7"
)
CLOCKED = ("images_per_second", "device_seconds", "peak_memory")  # measured, not computed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return undisturbed(tmp_path_factory.mktemp("whole"))


def test_a_study_runs_every_trial_once_and_resuming_it_does_nothing(
    uninterrupted: StudyFolder,
) -> None:
    suggestions, results = read_suggestions(uninterrupted), read_results(uninterrupted)
    assert [s.origin for s in suggestions] == ["control", "control:random-init", "search", "search"]
    assert len({s.arm for s in suggestions}) == 4
    assert {r.outcome for r in results.values()} == {Outcome.COMPLETE}
    before = comparable(uninterrupted)
    began = time.monotonic()
    code, printed = run(uninterrupted.root.parent.parent / "tiny.yaml")
    assert code == 0
    assert "nothing is left to do" in printed
    assert time.monotonic() - began < 30
    pd.testing.assert_frame_equal(comparable(uninterrupted), before)


def test_the_best_encoder_is_handed_over_to_timm(
    uninterrupted: StudyFolder, tmp_path: Path
) -> None:
    output = tmp_path / "encoder"
    command = ["export", str(uninterrupted.root), "--output", str(output)]
    subprocess.run([sys.executable, "-m", "study", *command], check=True, capture_output=True)
    described = json.loads((output / "encoder.json").read_text())
    encoder = create_model(
        described["timm"]["model"],
        checkpoint_path=str(output / "encoder.safetensors"),
        **described["timm"]["kwargs"],
    )
    with torch.no_grad():
        tokens = encoder.forward_features(torch.zeros(1, 3, 32, 32))
    assert tokens.shape[-1] == 64
    assert torch.isfinite(tokens).all()


def test_a_killed_driver_loses_nothing_and_repeats_nothing(
    uninterrupted: StudyFolder, tmp_path: Path
) -> None:
    path = write_study(tmp_path)
    folder = folder_of(path)
    driver = start(path)
    wait_until(lambda: third_trial_is_under_way(folder), driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    ended = set(read_results(folder))
    rows = read_rows(folder)
    assert len(ended) == 2

    path.unlink()  # by its name, a study goes on without the file it was begun with
    code, printed = run(path, command=["resume", "tiny", "--storage", str(folder.root.parent)])
    assert code == 0, printed
    assert "goes on with" in printed
    assert folder.report.exists()
    kept = read_rows(folder).merge(rows, how="inner")
    assert len(kept) == len(rows), "rows of before the kill have changed"
    pd.testing.assert_frame_equal(comparable(folder), comparable(uninterrupted))


def test_two_workers_find_what_one_finds(uninterrupted: StudyFolder, tmp_path: Path) -> None:
    two = STUDY.replace("workers: 1", "workers: 2").replace("trials: 4", "trials: 1")
    path = write_study(tmp_path, two + "controls: []\n")
    code, printed = run(path)
    assert code == 0, printed
    mine = comparable(folder_of(path))
    theirs = comparable(uninterrupted)
    theirs = theirs[theirs.trial.isin(mine.trial)].reset_index(drop=True)
    keys = ["trial", "phase", "step", "metric"]
    pd.testing.assert_frame_equal(mine[keys], theirs[keys])
    psnr = mine.metric == "probe_psnr"
    pd.testing.assert_series_equal(mine.value[psnr], theirs.value[psnr], rtol=0.02)


def test_a_second_driver_is_refused_and_the_first_one_heeds_stop(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    driver = start(path)
    try:
        wait_until(lambda: folder_of(path).spec.exists(), driver)
        code, printed = run(path, log="second.log")
        assert code == 75
        assert str(driver.pid) in printed
        stop = [sys.executable, "-m", "study", "stop", str(path)]
        subprocess.run(stop, check=True, capture_output=True)
        assert driver.wait(120) == 130
        assert "nothing is lost" in path.with_suffix(".log").read_text()
    finally:
        driver.kill()


# A driver that tells, when it shuts Ray down, which threads still wait for workers in Ray's C++
TELLING = """\
import threading, ray
from study.__main__ import main

shutdown = ray.shutdown

def tell_and_shut_down():
    print("still waiting:", [t.name for t in threading.enumerate() if "-slot-" in t.name])
    shutdown()

ray.shutdown = tell_and_shut_down
main()
"""


def test_a_storage_that_fails_midway_ends_the_run_with_74(tmp_path: Path) -> None:
    path = write_study(tmp_path, STUDY.replace("trials: 4", "trials: 1") + "controls: []\n")
    folder = folder_of(path)
    driver = start(path, program=["-c", TELLING])
    wait_until(lambda: folder.suggestion(0).exists(), driver)
    rows = folder.rows(read_suggestions(folder)[0].trial)
    wait_until(rows.parent.is_dir, driver)
    rows.write_text("where a folder should be")
    assert driver.wait(120) == 74
    printed = path.with_suffix(".log").read_text()
    assert "rows" in printed
    assert "Traceback" not in printed
    assert "still waiting: []" in printed, "Ray frees what such a thread uses"
    rows.unlink()
    code, printed = run(path)
    assert code == 0, printed


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
            env={**os.environ, **variables},
        )


def run(path: Path, *, log: str = "tiny.log", command: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and what was printed."""
    driver = start(path, log=log, command=command)
    return driver.wait(240), (path.parent / log).read_text()


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


def candidates() -> Iterator[Path]:
    return (process for process in Path("/proc").iterdir() if process.name.isdigit())
