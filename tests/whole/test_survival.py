"""A study that is hit again and again, wherever it can be hit.  pytest tests/whole/test_survival.py

Workers, controllers, drivers, nodes and the head are killed, and a worker is stopped, at random
moments. Whoever can go on goes on; a driver that has ended is started again, as a person would.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.head import TIMEOUT
from study.driver import EXIT_LOST
from study.folder import StudyFolder
from study.ledger import Outcome, read_results, read_rows, read_suggestions
from tests import witness
from tests.clusters import cluster_of, parent, raylet_of
from tests.machine import processes, wait_until
from tests.studies import MARK, STUDY, TWO_WORKERS, comparable, folder_of, write_study

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore"),  # Ray's own, about processes that the test ends
]

SEED = 20
FAULTS = ["worker"] * 3 + ["driver"] * 2 + ["stop"] + ["controller"] * 2 + ["node", "head"]
EXITS = {"driver": -signal.SIGKILL, "controller": 1, "head": EXIT_LOST}
OURS = ("RayTrainWorker", "TrainController", "Desk", "ImplicitFunc")
RUNGS = (0, 45, 90)  # steps of pretraining that a checkpoint of a trial certainly holds


class Scene:
    """A cluster, a driver on it, and what may happen to them."""

    def __init__(self, path: Path, *, workers: int, steps: int, seconds: float) -> None:
        self.path, self.log, self.workers = path, path.with_name("witness.log"), workers
        self.steps, self.seconds = steps, seconds  # at least, and at most then, before a fault
        self.runs = 0
        self.cluster: Cluster
        self.driver: subprocess.Popen[bytes]

    def drive(self) -> None:
        """Run the study, or go on with it."""
        self.runs += 1
        command = [sys.executable, "-m", "tests.witness", str(self.log), "run", str(self.path)]
        with self.path.with_name(f"run-{self.runs}.log").open("wb") as printed:
            self.driver = subprocess.Popen(
                [*command, "--no-report"],
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": self.cluster.address, TIMEOUT: "5"},
            )

    def printed(self) -> str:
        return self.path.with_name(f"run-{self.runs}.log").read_text()

    def processes(self, title: str) -> list[int]:
        """Of this cluster, by how their titles begin."""
        return processes(title, f"{MARK}={self.path}")

    def hit(self, fault: str, chance: random.Random) -> bool:
        """Let it happen; whether the driver survives it. False, too, if it has ended by itself."""
        workers = self.processes("ray::RayTrainWorker")
        if fault == "worker":
            os.kill(chance.choice(workers), signal.SIGKILL)
        elif fault == "stop":
            os.kill(chance.choice(workers), signal.SIGSTOP)
        elif fault == "driver":
            self.driver.kill()
        elif fault == "controller":
            os.kill(chance.choice(self.processes("ray::TrainController")), signal.SIGKILL)
        elif fault == "node":
            by_raylet = {raylet_of(node): node for node in self.cluster.worker_nodes}
            busy = sorted({parent(pid) for pid in workers} & by_raylet.keys())
            self.cluster.remove_node(by_raylet[chance.choice(busy)], allow_graceful=False)
            self.cluster.add_node(num_cpus=1)
        else:
            self.cluster.head_node.kill_gcs_server()
        return fault in ("worker", "stop", "node")


def drive_and_hit(scene: Scene, left: list[str], chance: random.Random) -> bool:
    """Run the study, and after some progress each time let the next of `left` happen.

    True when none is left and the study runs; False when its head is gone.
    """
    scene.drive()
    while left:
        expected = witness.read(scene.log).steps.total() + scene.steps

        def has_progressed(expected: int = expected) -> bool:
            assert scene.driver.poll() is None, scene.printed()
            return witness.read(scene.log).steps.total() >= expected

        wait_until(has_progressed, what="nothing goes on")
        time.sleep(chance.uniform(0, scene.seconds))
        if len(scene.processes("ray::RayTrainWorker")) < scene.workers:
            continue
        fault = left.pop()
        began = time.monotonic()
        if not scene.hit(fault, chance):
            code = scene.driver.wait(60)
            assert code == EXITS[fault], scene.printed()
            if fault != "head":
                scene.drive()
        print(f"{fault}: {time.monotonic() - began:.1f} s")
        if fault == "head":
            return False
    return True


def test_a_killed_worker_and_a_lost_head_cost_what_no_checkpoint_held_and_nothing_else(
    by_one_worker: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path, STUDY)
    monkeypatch.setenv(MARK, str(path))  # by which its processes are known
    scene = Scene(path, workers=1, steps=50, seconds=0)  # the first checkpoint is at step 45
    survive(scene, ["worker", "head"], random.Random(SEED), nodes=1)
    assert_sound(folder_of(path), by_one_worker, witness.read(scene.log))


@pytest.mark.chaos(3)
def test_whatever_is_killed_nothing_is_lost_nothing_is_done_twice(
    by_two_workers: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path, TWO_WORKERS)
    monkeypatch.setenv(MARK, str(path))  # by which its processes are known
    scene, chance = Scene(path, workers=2, steps=1, seconds=2), random.Random(SEED)
    faults = chance.sample(FAULTS, len(FAULTS))[::-1]
    print(f"seed {SEED}: {faults}")
    survive(scene, faults, chance, nodes=3)
    assert_sound(folder_of(path), by_two_workers, witness.read(scene.log))


def survive(scene: Scene, faults: list[str], chance: random.Random, nodes: int) -> None:
    """Run the study to its end through all faults, on another cluster when the head is lost."""
    left = faults[::-1]
    has_head = False
    while not has_head:
        with cluster_of(*[1] * nodes) as scene.cluster:
            try:
                has_head = drive_and_hit(scene, left, chance)
                if has_head:
                    assert scene.driver.wait(300) == 0, scene.printed()
                    nothing_is_left_over(scene)
            finally:
                scene.driver.kill()
                scene.driver.wait()


def nothing_is_left_over(scene: Scene) -> None:
    """No actor, no placement group and no process of the study, soon after its end."""
    ray.init(address=scene.cluster.address, log_to_driver=False)
    try:
        deadline = time.monotonic() + 60
        while left := left_over(scene):
            assert time.monotonic() < deadline, left
            time.sleep(1)
    finally:
        ray.shutdown()


def left_over(scene: Scene) -> list[str]:
    actors = [
        each
        for each in ray._private.state.actors().values()
        if each["Name"] != "AutoscalingCoordinator"  # Ray's own, one for each cluster
    ]
    groups = ray.util.placement_group_table().values()
    processes = [pid for title in OURS for pid in scene.processes(f"ray::{title}")]
    return [
        *(each["ActorClassName"] for each in actors if each["State"] != "DEAD"),
        *(each["placement_group_id"] for each in groups if each["state"] != "REMOVED"),
        *(Path(f"/proc/{pid}/cmdline").read_text() for pid in processes),
    ]


def assert_sound(folder: StudyFolder, undisturbed: StudyFolder, told: witness.Testimony) -> None:
    """What was acknowledged is there once, as it was; all is as if nothing had happened."""
    pd.testing.assert_frame_equal(comparable(folder), comparable(undisturbed))
    assert {result.outcome for result in read_results(folder).values()} == {Outcome.COMPLETE}
    assert [s.trial for s in read_suggestions(folder)] == [
        s.trial for s in read_suggestions(undisturbed)
    ]
    rows = read_rows(folder)
    keys = ["trial", "phase", "step", "metric"]
    assert not rows.duplicated(keys).any()
    kept = {tuple(key): value for *key, value in rows[[*keys, "value"]].itertuples(index=False)}
    assert told.rows.keys() <= kept.keys()
    assert all(kept[key] in values for key, values in told.rows.items())
    for _, last, again in told.jumps:  # what a checkpoint held is not done again
        assert again >= max(rung for rung in RUNGS if rung <= last)
    repeated = told.steps.total() - len(told.steps)
    print(f"{len(told.steps)} steps, {repeated} done again after {len(told.jumps)} interruptions")
