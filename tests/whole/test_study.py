"""A whole study on a real Ray cluster, killed and resumed.  pytest tests/whole/test_study.py"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from study.folder import StudyFolder
from study.ledger import Outcome, read_results, read_rows, read_suggestions
from tests.studies import (
    STUDY,
    comparable,
    driving,
    first_trials,
    folder_of,
    run,
    third_trial_is_under_way,
    wait_until,
    write_study,
)
from tests.timm_models import create_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_a_study_runs_every_trial_once_and_resuming_it_does_nothing(
    by_one_worker: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    suggestions, results = read_suggestions(by_one_worker), read_results(by_one_worker)
    assert [s.origin for s in suggestions] == ["control", "control:random-init", "search", "search"]
    assert len({s.arm for s in suggestions}) == 4
    assert {r.outcome for r in results.values()} == {Outcome.COMPLETE}
    before = comparable(by_one_worker)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody is there: it is not even asked
    code, printed = run(by_one_worker.root.parent.parent / "tiny.yaml")
    assert code == 0
    assert "nothing is left to do" in printed
    pd.testing.assert_frame_equal(comparable(by_one_worker), before)


def test_the_best_encoder_is_handed_over_to_timm(
    by_one_worker: StudyFolder, tmp_path: Path
) -> None:
    output = tmp_path / "encoder"
    command = ["export", str(by_one_worker.root), "--output", str(output)]
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
    by_one_worker: StudyFolder, tmp_path: Path
) -> None:
    path = write_study(tmp_path)
    folder = folder_of(path)
    with driving(path) as driver:
        wait_until(lambda: third_trial_is_under_way(folder), driver)
    rows = read_rows(folder)
    assert 2 <= len(read_results(folder)) < 4, "it was not killed midway"

    path.unlink()  # by its name, a study goes on without the file it was begun with
    code, printed = run(path, command=["resume", "tiny", "--storage", str(folder.root.parent)])
    assert code == 0, printed
    assert "resumes trial" in printed
    assert folder.report.exists()
    kept = read_rows(folder).merge(rows, how="inner")
    assert len(kept) == len(rows), "rows of before the kill have changed"
    pd.testing.assert_frame_equal(comparable(folder), comparable(by_one_worker))


@pytest.mark.usefixtures("on_the_head")
def test_two_workers_find_what_one_finds(by_one_worker: StudyFolder, tmp_path: Path) -> None:
    two = STUDY.replace("workers: 1", "workers: 2").replace("trials: 4", "trials: 1")
    path = write_study(tmp_path, two + "controls: []\n")
    code, printed = run(path)
    assert code == 0, printed
    mine, theirs = first_trials(folder_of(path), by_one_worker, 1)
    keys = ["trial", "phase", "step", "metric"]
    pd.testing.assert_frame_equal(mine[keys], theirs[keys])
    psnr = mine.metric == "probe_psnr"
    pd.testing.assert_series_equal(mine.value[psnr], theirs.value[psnr], rtol=0.02)


@pytest.mark.usefixtures("on_the_head")
def test_a_second_driver_is_refused_and_the_first_one_heeds_stop(tmp_path: Path) -> None:
    path = write_study(tmp_path, STUDY.replace("trials: 4", "trials: 400"))
    with driving(path) as driver:
        wait_until(lambda: folder_of(path).spec.exists(), driver)
        code, printed = run(path, log="second.log")
        assert code == 75
        assert str(driver.pid) in printed
        stop = [sys.executable, "-m", "study", "stop", str(path)]
        subprocess.run(stop, check=True, capture_output=True)
        assert driver.wait(120) == 130
        assert "nothing is lost" in path.with_suffix(".log").read_text()


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


@pytest.mark.usefixtures("on_the_head")
def test_a_storage_that_fails_midway_ends_the_run_with_74(tmp_path: Path) -> None:
    path = write_study(tmp_path, STUDY.replace("trials: 4", "trials: 1") + "controls: []\n")
    folder = folder_of(path)
    with driving(path, program=["-c", TELLING]) as driver:
        wait_until(lambda: folder.suggestion(0).exists(), driver)
        rows = folder.rows(read_suggestions(folder)[0].trial)
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text("where a folder should be")
        assert driver.wait(120) == 74
    printed = path.with_suffix(".log").read_text()
    assert "rows" in printed
    assert "Traceback" not in printed
    assert "still waiting: []" in printed, "Ray frees what such a thread uses"
    rows.unlink()
    code, printed = run(path)
    assert code == 0, printed


@pytest.mark.usefixtures("on_the_head")
def test_a_worker_that_fits_on_no_node_is_refused_at_once(tmp_path: Path) -> None:
    path = write_study(tmp_path, STUDY.replace("cpus_per_worker: 1", "cpus_per_worker: 500"))
    code, printed = run(path)
    assert code == 2, printed
    assert "resources: a trial needs 1 worker with 500 CPUs, and each must fit on one" in printed
    assert "Traceback" not in printed
