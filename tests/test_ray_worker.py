"""Warm slots on a real Ray cluster.  pytest tests/test_ray_worker.py"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle

from trainables.ray_worker import MAX_GROUP_STARTS, Slot, quiet_environment

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, about itself
]


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
    job: dict[str, Any], *, device: Any, rank: int, world_size: int, attempt: str, report: Any,
    heartbeat: Any,
) -> str:
    """Stands for a trial: every rank adds its rank; rank 0 reports the sum and its process."""
    value = torch.tensor([float(rank + 1)])
    if world_size > 1:
        torch.distributed.all_reduce(value)
    if "dies" in job and rank == 0 and attempt.endswith(job["dies"]):
        os.kill(os.getpid(), signal.SIGKILL)
    if job.get("always_dies") and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.get("raises") and rank == world_size - 1:
        raise ValueError("a planted error")
    if job.get("out_of_memory"):
        raise torch.OutOfMemoryError("planted")
    stop = False
    if rank == 0:
        row = {"sum": value.item(), "pid": os.getpid()}
        stop = report([row])
    return "stopped" if stop else "complete"


def play(slot: Slot, stop: bool = False, **job: Any) -> list[dict[str, Any]]:
    """Place a job, answer every report, return all events."""
    serial = f"{time.monotonic_ns()}"
    ray.get(slot.desk.place.remote({"trial": "t", "serial": serial, "attempt": "1", **job}))
    events: list[dict[str, Any]] = []
    while not events or "outcome" not in events[-1]:
        events.append(ray.get(slot.desk.next_event.remote(len(events)), timeout=90))
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


def test_a_killed_worker_costs_one_attempt(slot: Slot) -> None:
    events = play(slot, dies=".1")
    assert events[-1]["outcome"] == "complete"
    assert events[-2]["attempt"] == "1.2"


def test_an_error_on_one_rank_ends_the_trial_but_not_the_slot(slot: Slot) -> None:
    failed = play(slot, raises=True)
    assert failed[-1]["outcome"] == "failed"
    assert "a planted error" in failed[-1]["error"]
    assert play(slot)[-1]["outcome"] == "complete"


def test_running_out_of_memory_is_an_outcome_of_its_own(slot: Slot) -> None:
    assert play(slot, out_of_memory=True)[-1]["outcome"] == "out-of-memory"
    assert play(slot)[-1]["outcome"] == "complete"


def test_a_job_that_always_kills_its_workers_is_given_up(cluster: None, tmp_path: Path) -> None:
    slot = Slot(
        "doomed-slot",
        sums_over_ranks,
        workers=1,
        cpus_per_worker=1,
        gpus_per_worker=0,
        storage=tmp_path,
    )
    events = play(slot, always_dies=True)
    assert events[-1]["outcome"] == "lost"
    assert f"{MAX_GROUP_STARTS} worker groups" in events[-1]["error"]
    assert play(slot)[-1]["outcome"] == "complete"
    assert slot.close(30)
