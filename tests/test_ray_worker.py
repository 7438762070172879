"""Warm slots on a real Ray cluster.  pytest tests/test_ray_worker.py"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle

from trainables.errors import StorageError
from trainables.ray_worker import MAX_GROUP_STARTS, Desk, Slot, _as_outcome, quiet_environment

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
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
    job: dict[str, Any],
    *,
    device: Any,
    rank: int,
    world_size: int,
    attempt: str,
    report: Any,
    heartbeat: Any,
    saved: Any,
) -> str:
    """Stands for a trial: every rank adds its rank; rank 0 reports the sum and its process."""
    value = torch.tensor([float(rank + 1)])
    if "dies" in job and rank == 0 and attempt.endswith(job["dies"]):
        os.kill(os.getpid(), signal.SIGKILL)
    if world_size > 1:
        torch.distributed.all_reduce(value)
    if job.get("raises") and rank == world_size - 1:
        raise ValueError("a planted error")
    stop = False
    if rank == 0:
        row = {"sum": value.item(), "pid": os.getpid()}
        stop = report([row])
        saved(0.5)
    return "stopped" if stop else "complete"


def play(slot: Slot, stop: bool = False, **job: Any) -> list[dict[str, Any]]:
    """Place a job, answer every report, return all events."""
    serial = f"{time.monotonic_ns()}"
    ray.get(slot.desk.place.remote({"trial": "t", "serial": serial, "attempt": "1", **job}))
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


def test_an_error_on_one_rank_ends_the_trial_but_not_the_slot(slot: Slot) -> None:
    failed = play(slot, raises=True)
    assert failed[-1]["outcome"] == "failed"
    assert "a planted error" in failed[-1]["error"]
    assert play(slot)[-1]["outcome"] == "complete"


def test_running_out_of_memory_is_an_outcome_of_its_own() -> None:
    assert _as_outcome(torch.OutOfMemoryError("planted")) == ("out-of-memory", "planted")
    assert _as_outcome(MemoryError())[0] == "out-of-memory"
    assert _as_outcome(ValueError("planted"))[0] == "failed"
    assert _as_outcome(StorageError("planted")) == ("lost", "planted")


def test_a_job_that_always_kills_its_workers_is_given_up_and_the_next_one_is_taken() -> None:
    async def story() -> None:
        desk = Desk()
        await desk.place({"serial": "1", "trial": "doomed"})
        for group in range(1, MAX_GROUP_STARTS + 1):  # each group takes it and dies
            job = await desk.take(0, await desk.enter(), None)
            assert job is not None
            assert job["group"] == group
        ticket = await desk.enter()
        assert await desk.take(1, ticket, None) is not None  # rank 1 was first, and begins it
        with pytest.raises(RuntimeError, match="is being replaced"):
            await desk.take(0, ticket, None)
        event = await desk.next_event(0)
        assert event["outcome"] == "lost"
        assert f"{MAX_GROUP_STARTS} worker groups" in event["error"]
        await desk.place({"serial": "2", "trial": "sound"})
        job = await desk.take(0, await desk.enter(), None)
        assert job is not None
        assert (job["trial"], job["group"]) == ("sound", 1)

    asyncio.run(asyncio.wait_for(story(), 5))


def test_a_worker_that_waits_for_a_decision_nobody_makes_is_freed_by_the_next_job() -> None:
    async def story() -> None:
        desk = Desk()
        await desk.place({"serial": "1", "trial": "its relay dies"})
        await desk.take(0, await desk.enter(), None)
        reporting = asyncio.create_task(desk.report("1", [{"value": 1.0}], "a"))
        await desk.next_event(0)
        await desk.place({"serial": "2", "trial": "next"})
        assert await reporting, "it was told to go on with a job that is over"
        job = await desk.take(0, await desk.enter(), "1")
        assert job is not None
        assert job["trial"] == "next"

    asyncio.run(asyncio.wait_for(story(), 5))


def test_a_relay_that_starts_again_hears_all_events_once_more() -> None:
    async def story() -> None:
        desk = Desk()
        job = {"serial": "1", "trial": "t"}
        await desk.place(job)
        await desk.take(0, await desk.enter(), None)
        reporting = asyncio.create_task(desk.report("1", [{"value": 1.0}], "a"))
        first = await desk.next_event(0)
        await desk.place(job)  # the relay died here, and lays its job down again
        assert await desk.next_event(0) == first
        await desk.decide(0, True)
        assert await reporting

    asyncio.run(asyncio.wait_for(story(), 5))
