"""Trials across several nodes, which are lost, and a head that is.  pytest tests/test_nodes.py"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import pytest
from ray.cluster_utils import Cluster

from study.folder import StudyFolder
from study.ledger import read_rows
from tests.test_study import (
    STUDY,
    candidates,
    comparable,
    folder_of,
    run,
    start,
    third_trial_is_under_way,
    wait_until,
    write_study,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # Ray's own, about processes that the test ends
]

TWO_WORKERS = STUDY.replace("workers: 1", "workers: 2")
SOON = {  # seconds until a silent node, or a silent head, is given up
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
    "gcs_rpc_server_reconnect_timeout_s": 5,
}


@contextmanager
def nodes(count: int) -> Iterator[Cluster]:
    """A head without CPUs and nodes of one CPU each, so that a trial of two workers needs two."""
    head = {"num_cpus": 0, "_system_config": SOON, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes(timeout=60)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    path = write_study(tmp_path_factory.mktemp("whole"), TWO_WORKERS)
    code, printed = run(path)
    assert code == 0, printed
    return folder_of(path)


def test_a_trial_whose_node_is_lost_goes_on_elsewhere(
    undisturbed: StudyFolder, tmp_path: Path
) -> None:
    path = write_study(tmp_path, TWO_WORKERS)
    folder = folder_of(path)
    with nodes(3) as cluster:
        driver = start(path, RAY_ADDRESS=cluster.address)
        wait_until(lambda: third_trial_is_under_way(folder), driver)
        by_raylet = {raylet_of(node): node for node in cluster.worker_nodes}
        busy = {parent(pid) for pid in processes_called("ray::RayTrainWorker")} & by_raylet.keys()
        assert len(busy) == 2, "the two workers are not on two nodes"
        cluster.remove_node(by_raylet[min(busy)], allow_graceful=False)
        assert driver.wait(400) == 0, path.with_suffix(".log").read_text()
    assert sorted(read_rows(folder).groupby("trial").attempt.nunique()) == [1, 1, 1, 2]
    pd.testing.assert_frame_equal(comparable(folder), comparable(undisturbed))


def test_a_study_whose_head_is_lost_goes_on_under_a_new_one(
    undisturbed: StudyFolder, tmp_path: Path
) -> None:
    path = write_study(tmp_path, TWO_WORKERS)
    folder = folder_of(path)
    with nodes(2) as cluster:
        driver = start(path, RAY_ADDRESS=cluster.address)
        wait_until(lambda: third_trial_is_under_way(folder), driver)
        before = read_rows(folder)
        cluster.head_node.kill_gcs_server()
        assert driver.wait(120) != 0
    with nodes(2) as cluster:
        driver = start(path, log="again.log", RAY_ADDRESS=cluster.address)
        assert driver.wait(400) == 0, (tmp_path / "again.log").read_text()
    assert len(read_rows(folder).merge(before, how="inner")) == len(before)
    pd.testing.assert_frame_equal(comparable(folder), comparable(undisturbed))


def processes_called(title: str) -> list[int]:
    found = []
    for process in candidates():
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if (process / "cmdline").read_text().startswith(title):
                found.append(int(process.name))
    return found


def raylet_of(node: object) -> int:
    return int(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("PPid")).split()[1])
