"""Warm slots on a real Ray cluster.  pytest tests/test_ray_worker.py"""

from __future__ import annotations

import asyncio
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
from trainables.desk import MAX_GROUP_STARTS, WITHDRAWN, Desk
from trainables.errors import StorageError
from trainables.ray_worker import _as_outcome
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
    assert HANG < time.monotonic() - began < HANG + 5
    events = play(slot, **job)
    first, second = sorted(events[:2], key=lambda event: str(event["worker"]))
    assert (first["worker"], second["worker"]) == ("rank0", "rank1")
    assert "all_reduce" in first["stacks"]
    assert "for_ever" in second["stacks"]
    assert [event.get("attempt") for event in events[2:]] == ["1.2", None]
    assert events[-1]["outcome"] == "complete"


def test_a_stopped_worker_is_killed_and_so_are_all_if_all_are_stopped(
    slot: Slot, tmp_path: Path
) -> None:
    one = play(slot, stops=[1], marks=str(tmp_path))
    assert [event.get("worker") for event in one] == ["rank0", None, None]
    both = play(slot, stops=[0, 1], marks=str(tmp_path))
    assert [event.get("worker") for event in both] == ["all", None, None]
    assert one[-1]["outcome"] == both[-1]["outcome"] == "complete"
    deadline = time.monotonic() + 20
    stopped = [Path("/proc", mark.read_text()) for mark in tmp_path.iterdir()]
    assert len(stopped) == 3
    while any(process.exists() for process in stopped):
        assert time.monotonic() < deadline, "a stopped worker was left behind"
        time.sleep(0.2)


def test_a_driver_that_ends_leaves_workers_that_have_not_gone_home(
    cluster: None, tmp_path: Path
) -> None:
    room = {"workers": 1, "cpus_per_worker": 500, "gpus_per_worker": 0}  # waited for in vain
    slot = Slot("left", sums_over_ranks, storage=tmp_path, **room)
    assert not slot.join(5)
    slot.leave()
    assert slot.join(5), "its thread would use Ray while Ray is shut down"
    assert slot.error is None


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


def test_a_job_hangs_when_no_worker_makes_progress_but_not_while_the_driver_decides() -> None:
    async def story() -> None:
        desk = Desk(hang_seconds=0.5)
        await desk.place({"serial": "1", "trial": "t"})
        await desk.take(0, await desk.enter(), None)
        reporting = asyncio.create_task(desk.report("1", [{"value": 1.0}], "a"))
        await desk.next_event(0)
        await asyncio.sleep(0.7)
        assert await desk.patience("1", 0.7) == pytest.approx(0.5, abs=0.1)
        await desk.decide(0, False)
        assert not await reporting
        await asyncio.sleep(0.7)
        assert await desk.patience("1", 0.7) < 0
        assert await desk.patience("1", 0.1) > 0, "its peer has just done something"
        assert await desk.patience("1", 0.7) > 0
        assert await desk.patience("0", 9.0) == 0.5, "that was another job"

    asyncio.run(asyncio.wait_for(story(), 5))


def test_ranks_that_ask_one_after_another_leave_after_the_same_step() -> None:
    async def story() -> None:
        desk = Desk()
        ticket = await desk.enter(node="a")
        assert await desk.look(ticket, "1", "pretrain", 1) == (False, 2)
        await desk.leave(ticket)
        assert await desk.look(ticket, "1", "pretrain", 1) == (False, 2), "the other had gone on"
        for _ in range(2):
            assert (await desk.look(ticket, "1", "pretrain", 2))[0]
            await desk.left(ticket)
        await desk.lost()
        assert (await desk.vitals())["nodes"] == []
        newer = await desk.enter(node="b")
        assert newer > ticket
        assert not (await desk.look(newer, "1", "pretrain", 3))[0]
        assert (await desk.look(ticket, "1", "pretrain", 3))[0], "its group was given up"

    asyncio.run(asyncio.wait_for(story(), 5))


def test_workers_ask_about_once_a_second_however_long_their_steps_are() -> None:
    async def story() -> list[int]:
        desk, step, asked = Desk(), 1, []
        for _ in range(12):
            asked.append(step)
            now = time.monotonic()
            desk.looked = (*desk.looked[:4], now - 0.01 * (step - desk.looked[3]))  # 10 ms a step
            _, step = await desk.look(0, "1", "pretrain", step)
        return asked

    asked = asyncio.run(asyncio.wait_for(story(), 5))
    assert asked[:4] == [1, 2, 4, 8]
    assert asked[-1] - asked[-2] == pytest.approx(100, abs=2)


def test_departures_are_not_held_against_a_job_and_its_losses_go_with_it() -> None:
    async def story() -> None:
        desk = Desk()
        await desk.place({"serial": "1", "trial": "t", "lost": MAX_GROUP_STARTS - 1})
        for _ in range(5):
            ticket = await desk.enter(node="n")
            assert await desk.take(0, ticket, None) is not None
            await desk.leave(ticket)
            with pytest.raises(RuntimeError, match="is being replaced"):
                await desk.take(1, ticket, "0")  # idle workers go as well
            await desk.left(ticket)
            await desk.lost()
        await desk.withdraw("2")
        assert await desk.take(0, await desk.enter(node="n"), None) is not None
        await desk.withdraw("1")  # its workers are there
        assert desk.events == []
        await desk.lost()
        await desk.withdraw("1")
        event = await desk.next_event(0)
        assert event == {"outcome": WITHDRAWN, "lost": MAX_GROUP_STARTS}

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
