"""Slots that come and go: shared clusters, nodes that join, leave or are taken away, autoscalers.

pytest tests/study/test_fleet.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pandas as pd
import pytest

from study.ledger import read_results, read_rows
from tests.clusters import BIN, SOON, cluster_of, held_still, parent, raylet_of, started_head
from tests.machine import free_ports, processes
from tests.studies import (
    MARK,
    STUDY,
    comparable,
    driving,
    folder_of,
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
# Every step of every worker, written down from outside: (steps of the phase, images seen)
WITNESS = """\
import importlib.abc, importlib.machinery, os, sys


class Witness(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "trainables.optimizers":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            learning_rate = module.learning_rate

            def witnessed(seen, total, *rest):
                with open(os.environ["WITNESS"], "a") as log:
                    log.write(f"{total} {seen}\\n")
                return learning_rate(seen, total, *rest)

            module.learning_rate = witnessed

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Witness())
"""


@pytest.mark.chaos(2)
def test_a_node_that_is_to_be_taken_away_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    monkeypatch.setenv("WITNESS", str(tmp_path / "steps"))
    code = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{code}")
    path = write_study(tmp_path, TWO_WORKERS)
    folder = folder_of(path)
    monkeypatch.setenv(MARK, str(path))  # the nodes have it from here
    with cluster_of(1, 1, 1) as cluster, driving(path, RAY_ADDRESS=cluster.address) as driver:
        wait_until(lambda: third_trial_is_under_way(folder), driver)
        with held_still(f"{MARK}={path}"):
            by_raylet = {raylet_of(node): node for node in cluster.worker_nodes}
            busy = {parent(pid) for pid in processes("ray::RayTrainWorker")} & by_raylet.keys()
            assert len(busy) == 2, "the two workers are not on two nodes"
            drain(cluster.address, by_raylet[min(busy)].node_id)
        assert driver.wait(400) == 0, path.with_suffix(".log").read_text()
    printed = path.with_suffix(".log").read_text()
    assert "is leaving a node that is about to be taken away" in printed
    assert sorted(read_rows(folder).groupby("trial").attempt.nunique()) == [1, 1, 1, 2]
    steps = Counter((tmp_path / "steps").read_text().splitlines())
    by_phase: dict[str, set[int]] = {}
    for step, times in steps.items():
        by_phase.setdefault(step.split()[0], set()).add(times)
    # two workers; pretraining is left out by one of the four trials
    assert sorted(map(sorted, by_phase.values())) == [[6], [8]], by_phase


def drain(address: str, node: str) -> None:
    """A notice as a spot instance gets it, ten minutes ahead."""
    command = [str(BIN / "ray"), "drain-node", "--address", address]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed"]
    deadline = ["--deadline-remaining-seconds", "600"]
    done = subprocess.run(
        [*command, "--node-id", node, *reason, *deadline], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.chaos(2)
def test_a_node_that_joins_gets_a_slot_and_one_that_is_lost_hands_its_trial_on(
    tmp_path: Path,
) -> None:
    # the first trial is still under way when there is room for the second, on the other node
    text = STUDY.replace("concurrent: 1", "concurrent: 2").replace("trials: 4", "trials: 6")
    text = text.replace("epochs: 60", "epochs: 400")
    path = write_study(tmp_path, text)
    folder, log = folder_of(path), path.with_suffix(".log")
    with cluster_of(1) as cluster, driving(path, RAY_ADDRESS=cluster.address) as driver:
        wait_until(lambda: "pretrain 25%" in log.read_text(), driver)
        first = cluster.add_node(num_cpus=1)
        wait_until(lambda: "room for more; starting 1 x 1 workers" in log.read_text(), driver)
        wait_until(lambda: "random-init]: segment 25%" in log.read_text(), driver)
        assert len(workers_on(first)) == 1
        cluster.remove_node(first, allow_graceful=False)
        assert driver.wait(600) == 0, log.read_text()
    assert "handed back" in log.read_text()
    results = read_results(folder)
    assert [result.outcome.value for result in results.values()] == ["complete"] * 6
    rows = read_rows(folder)
    assert not rows.duplicated(["trial", "phase", "step", "metric"]).any()


@pytest.mark.chaos(2)
def test_studies_that_each_need_the_whole_cluster_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for name, trials in (("first", 4), ("second", 4), ("third", 1)):
        (tmp_path / name).mkdir()
        text = TWO_WORKERS.replace("trials: 4", f"trials: {trials}") + "controls: []\n"
        paths.append(write_study(tmp_path / name, text))
    logs = [path.with_suffix(".log") for path in paths]
    monkeypatch.setenv(MARK, str(tmp_path))  # the nodes have it from here
    with ExitStack() as stack:
        cluster = stack.enter_context(cluster_of(1, 1))

        def join(path: Path) -> subprocess.Popen[bytes]:
            return stack.enter_context(driving(path, RAY_ADDRESS=cluster.address))

        drivers = [join(path) for path in paths[:2]]
        is_begun = lambda: any("pretrain 25%" in log.read_text() for log in logs[:2])  # noqa: E731
        wait_until(is_begun, drivers[0])
        with held_still(f"{MARK}={tmp_path}"):  # until the third one has come and found no room
            drivers.append(join(paths[2]))
            wait_until(lambda: "waiting for room" in logs[2].read_text(), drivers[2])
        for driver, log in zip(drivers, logs, strict=True):
            assert driver.wait(400) == 0, log.read_text()
    assert "a trial needs 2 workers with 1 CPUs each; 0 CPUs of 2 CPUs are free" in (
        logs[2].read_text()
    )
    first, second, third = (comparable(folder_of(path)) for path in paths)
    pd.testing.assert_frame_equal(first, second)
    assert set(third.trial) < set(first.trial)
    first = first[first.trial.isin(third.trial)].reset_index(drop=True)
    pd.testing.assert_frame_equal(first, third)


@pytest.mark.chaos(2)
def test_an_autoscaling_cluster_is_asked_for_nodes_and_slots_begin_as_they_come(
    tmp_path: Path,
) -> None:
    text = STUDY.replace("concurrent: 1", "autoscale: 2")
    path = write_study(tmp_path, text)
    log = path.with_suffix(".log")
    with (
        autoscaling_cluster(max_nodes=2) as address,
        driving(path, RAY_ADDRESS=address) as driver,
    ):
        assert driver.wait(400) == 0, log.read_text()
    printed = log.read_text()
    assert "asked of the autoscaler; 0 CPUs of 0 CPUs are free" in printed
    assert re.search(r"\] 2 trial\(s\) at once", printed), printed
    assert len(read_results(folder_of(path))) == 4


@contextmanager
def autoscaling_cluster(max_nodes: int) -> Iterator[str]:
    """Ray's autoscaler on processes of this machine: a head without CPUs, nodes of one."""
    ports = free_ports(4)
    scratch = tempfile.mkdtemp(prefix="ms-", dir="/tmp")
    address = f"127.0.0.1:{ports[0]}"
    node_types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "one": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": max_nodes},
    }
    config = {
        "cluster_name": "fake",
        "max_workers": max_nodes,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": node_types,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 5,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{f"{when}_commands": [] for when in ("initialization", "setup")},
        **{f"{who}_setup_commands": [] for who in ("head", "worker")},
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }
    (Path(scratch) / "config.json").write_text(json.dumps(config))
    options = (
        "--num-cpus=0",
        f"--autoscaling-config={scratch}/config.json",
        f"--system-config={json.dumps(SOON)}",
        f"--temp-dir={scratch}/ray",
    )
    variables = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    try:
        with started_head(Path(scratch) / "log", ports, *options, **variables):
            yield address
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def workers_on(node: object) -> list[int]:
    raylet = raylet_of(node)
    return [pid for pid in processes("ray::RayTrainWorker") if parent(pid) == raylet]
