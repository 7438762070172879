"""A whole study in a store of objects: killed, its mirror deleted, the store stopped, resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from study import mirror
from study.folder import Storage, StudyFolder
from study.ledger import read_results, read_rows
from tests.clusters import cluster_of, held_still
from tests.studies import (
    MARK,
    STUDY,
    TWO_WORKERS,
    driving,
    first_trials,
    run,
    wait_until,
    write_study,
)
from trainables.storage import store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.parametrize("bucket_server", ["s3"], indirect=True),
]

TWO_TRIALS = STUDY.replace("trials: 4", "trials: 2")
BY_TWO_WORKERS = TWO_WORKERS.replace("trials: 7", "trials: 2")


def begun(tmp_path: Path, bucket: Any, text: str = TWO_TRIALS) -> tuple[Path, StudyFolder]:
    """A study file with its storage in the bucket, and where that is."""
    path = write_study(tmp_path, f"{text}storage: {bucket.uri}\n")
    return path, Storage.of(bucket.uri).study("tiny")


def has_a_checkpoint(folder: StudyFolder) -> bool:
    names = store(folder.remote).entries("trials")
    return any(name.endswith("manifest.json") for name in names)


@pytest.mark.chaos(1)
def test_a_killed_study_goes_on_on_another_machine_and_finds_the_same(
    by_one_worker: StudyFolder, bucket: Any, tmp_path: Path
) -> None:
    path, folder = begun(tmp_path, bucket)
    with driving(path) as driver:
        wait_until(lambda: has_a_checkpoint(folder), driver)
        with held_still(f"{MARK}={path}"):
            elsewhere = str(tmp_path / "second")
            with driving(path, log="second.log", MASKSTUDY_CACHE=elsewhere) as second:
                assert second.wait(120) == 75
            printed = (tmp_path / "second.log").read_text()
            assert f"{bucket.uri}/tiny: held by" in printed and f"pid {driver.pid}" in printed
            driver.kill()
    assert len(read_results(folder)) < 2, "it was over before it was killed"
    shutil.rmtree(tmp_path / "cache")

    path.unlink()
    code, printed = run(path, command=["resume", "tiny", "--storage", bucket.uri])
    assert code == 0, printed
    assert "resumes trial" in printed
    assert store(folder.remote).exists("report.html")
    shutil.rmtree(tmp_path / "cache" / "mirrors")
    mirror.pull(folder)
    pd.testing.assert_frame_equal(*first_trials(folder, by_one_worker, 2))
    kept = store(folder.remote).entries("trials")
    assert sum(name.endswith("encoder.safetensors") for name in kept) == 1
    assert sum(name.endswith("segmentation.png") for name in kept) == 2


def test_a_store_that_stops_midway_ends_the_run_with_74_and_it_goes_on_later(
    by_one_worker: StudyFolder, bucket: Any, tmp_path: Path
) -> None:
    path, folder = begun(tmp_path, bucket)
    with driving(path) as driver:
        wait_until(lambda: has_a_checkpoint(folder), driver)
        bucket.stop()
        try:
            assert driver.wait(240) == 74, path.with_suffix(".log").read_text()
        finally:
            bucket.start()
    printed = path.with_suffix(".log").read_text()
    assert f"maskstudy: {bucket.uri}/tiny/" in printed and "run the same command again" in printed
    assert "Traceback" not in printed
    code, printed = run(path)
    assert code == 0, printed
    mirror.pull(folder)
    pd.testing.assert_frame_equal(*first_trials(folder, by_one_worker, 2))


@pytest.mark.chaos(1)
def test_a_trial_goes_on_on_nodes_that_have_seen_nothing_of_it(
    by_two_workers: StudyFolder, bucket: Any, tmp_path: Path
) -> None:
    path, folder = begun(tmp_path, bucket, BY_TWO_WORKERS)
    with cluster_of() as cluster:

        def add_node(name: str) -> None:
            cluster.add_node(num_cpus=1, env_vars={"MASKSTUDY_CACHE": str(tmp_path / name)})

        add_node("first")
        add_node("second")
        cluster.wait_for_nodes(timeout=60)
        with driving(path, RAY_ADDRESS=cluster.address) as driver:
            wait_until(lambda: has_a_checkpoint(folder), driver)
            for node in list(cluster.worker_nodes):
                cluster.remove_node(node, allow_graceful=False)
            add_node("third")
            add_node("fourth")
            assert driver.wait(240) == 0, path.with_suffix(".log").read_text()
    attempts = read_rows(folder).groupby("trial").attempt.nunique()
    assert attempts.max() == 2, "it was over before its nodes were lost"
    for name in ("first", "second", "third", "fourth"):
        assert (tmp_path / name).is_dir(), f"the {name} node had no cache of its own"
    pd.testing.assert_frame_equal(*first_trials(folder, by_two_workers, 2))
