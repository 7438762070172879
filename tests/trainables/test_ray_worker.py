"""Warm slots on a real Ray cluster.  pytest tests/trainables/test_ray_worker.py"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle

from cluster.connect import quiet_environment
from tests.machine import wait_until
from trainables.slot import Slot

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, about itself
]


HANG = 4.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.update(quiet_environment())
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


def sums_over_ranks(
    job: dict[str, Any],
    *,
    device: Any,
    rank: int,
    world_size: int,
    attempt: str,
    report: Any,
    heartbeat: Any,
    saved: Any,
    alive: Any,
    is_leaving: Any,
    tell: Any,
) -> str:
    """Stands for a trial: every rank adds its rank; rank 0 reports the sum and its process."""
    value = torch.tensor([float(rank + 1)])
    if rank in job.get("stops", []) and is_first_time(job, rank):
        # to this thread, which `kill` may let go on until another one has heeded the signal
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    if rank in job.get("loops", []) and is_first_time(job, rank):
        for_ever()
    if "dies" in job and rank == 0 and attempt.endswith(job["dies"]):
        os.kill(os.getpid(), signal.SIGKILL)
    if job.get("raises") and rank == world_size - 1:
        raise ValueError("a planted error")
    if world_size > 1:
        torch.distributed.all_reduce(value)
    if "cut_off" in job and rank == 0 and is_first_time(job, rank):
        raise ray.exceptions.ActorUnavailableError("planted", bytes(16))
    stop = False
    if rank == 0:
        row = {"sum": value.item(), "pid": os.getpid()}
        stop = report([row])
        saved(0.5)
    return "stopped" if stop else "complete"


def is_first_time(job: dict[str, Any], rank: int) -> bool:
    mark = Path(job["marks"]) / f"{job['serial']}-{rank}"
    if mark.exists():
        return False
    mark.write_text(str(os.getpid()))
    return True


def for_ever() -> None:
    while True:
        time.sleep(0.01)


def play(slot: Slot, stop: bool = False, **job: Any) -> list[dict[str, Any]]:
    """Place a job, answer every report, return all events."""
    job = {"trial": "t", "serial": f"{time.monotonic_ns()}", "attempt": "1", **job}
    ray.get(slot.desk.place.remote(job))
    events: list[dict[str, Any]] = []
    while not events or "outcome" not in events[-1]:
        events.append(ray.get(slot.desk.next_event.remote(len(events)), timeout=240))
        if "rows" in events[-1]:
            slot.desk.decide.remote(len(events) - 1, stop)
    return events


@pytest.fixture(scope="module")
def slot(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slot]:
    slot = Slot(
        "test-slot",
        sums_over_ranks,
        workers=2,
        cpus_per_worker=1,
        gpus_per_worker=0,
        storage=tmp_path_factory.mktemp("slot"),
        hang_seconds=HANG,
    )
    yield slot
    assert slot.close(30), "the workers did not go home"
    assert slot.error is None


def test_two_workers_train_together_and_stay_warm(slot: Slot) -> None:
    first = play(slot)
    second = play(slot)
    assert [event.get("outcome") for event in first] == [None, "complete"]
    assert first[0]["rows"][0]["sum"] == 3.0  # ranks add 1 and 2
    assert second[0]["rows"][0]["pid"] == first[0]["rows"][0]["pid"]


def test_a_report_waits_for_the_decision_and_the_trial_stops(slot: Slot) -> None:
    assert play(slot, stop=True)[-1]["outcome"] == "stopped"


def test_a_killed_worker_costs_one_attempt_and_its_peer_does_not_fail_the_trial(
    slot: Slot,
) -> None:
    events = play(slot, dies=".1")
    assert events[-1]["outcome"] == "complete"
    assert events[-2]["attempt"] == "1.2"
    assert not any("stacks" in event for event in events), "a dead worker is taken for a hung one"


@pytest.mark.chaos(1)
def test_a_worker_that_cannot_reach_the_driver_costs_one_attempt_and_not_the_trial(
    slot: Slot, tmp_path: Path
) -> None:
    events = play(slot, cut_off=True, marks=str(tmp_path))
    assert events[-1]["outcome"] == "complete"
    assert events[-2]["attempt"] == "1.2"


def test_an_error_on_one_rank_ends_the_trial_but_not_the_slot(slot: Slot) -> None:
    failed = play(slot, raises=True)
    assert failed[-1]["outcome"] == "failed"
    assert "a planted error" in failed[-1]["error"]
    assert play(slot)[-1]["outcome"] == "complete"


def test_workers_that_hang_say_where_and_the_job_goes_on_in_a_new_group(
    slot: Slot, tmp_path: Path
) -> None:
    began = time.monotonic()
    job = {"trial": "t", "serial": "hangs", "attempt": "1", "loops": [1], "marks": str(tmp_path)}
    ray.get(slot.desk.place.remote(job))
    ray.get(slot.desk.next_event.remote(1), timeout=60)
    assert time.monotonic() - began > HANG
    events = play(slot, **job)
    first, second = sorted(events[:2], key=lambda event: str(event["worker"]))
    assert (first["worker"], second["worker"]) == ("rank0", "rank1")
    assert "all_reduce" in first["stacks"]
    assert "for_ever" in second["stacks"]
    assert [event.get("attempt") for event in events[2:]] == ["1.2", None]
    assert events[-1]["outcome"] == "complete"


@pytest.mark.chaos(1)
def test_a_stopped_worker_is_killed_and_so_are_all_if_all_are_stopped(
    slot: Slot, tmp_path: Path
) -> None:
    one = play(slot, stops=[1], marks=str(tmp_path))
    assert [event.get("worker") for event in one] == ["rank0", None, None]
    both = play(slot, stops=[0, 1], marks=str(tmp_path))
    assert [event.get("worker") for event in both] == ["all", None, None]
    assert one[-1]["outcome"] == both[-1]["outcome"] == "complete"
    stopped = [Path("/proc", mark.read_text()) for mark in tmp_path.iterdir()]
    assert len(stopped) == 3
    are_gone = lambda: not any(process.exists() for process in stopped)  # noqa: E731
    wait_until(are_gone, 60, "a stopped worker was left behind")


def test_a_driver_that_ends_leaves_workers_that_have_not_gone_home(
    cluster: None, tmp_path: Path
) -> None:
    room = {"workers": 1, "cpus_per_worker": 500, "gpus_per_worker": 0}  # waited for in vain
    slot = Slot("left", sums_over_ranks, storage=tmp_path, **room)
    assert not slot.join(5)
    slot.leave()
    assert slot.join(5), "its thread would use Ray while Ray is shut down"
    assert slot.error is None
