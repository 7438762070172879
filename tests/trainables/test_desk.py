"""Where a driver and a worker group meet, without Ray: its rules.

pytest tests/trainables/test_desk.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from trainables import desk as desks
from trainables.desk import MAX_GROUP_STARTS, Desk
from trainables.endings import Ending
from trainables.errors import StorageError
from trainables.ray_worker import _answers, _as_outcome


@dataclass
class Clock:
    """Goes when it is told to."""

    seconds: float = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(desks, "time", clock)
    return clock


def told(story: Coroutine[Any, Any, Any]) -> Any:
    """To its end; one that waits for what never comes fails."""
    return asyncio.run(asyncio.wait_for(story, 60))


def test_running_out_of_memory_is_an_outcome_of_its_own() -> None:
    assert _as_outcome(torch.OutOfMemoryError("planted")) == ("out-of-memory", "planted")
    assert _as_outcome(MemoryError())[0] == "out-of-memory"
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert _as_outcome(RuntimeError(cublas)) == ("out-of-memory", cublas)
    assert _as_outcome(ValueError("planted"))[0] == "failed"
    assert _as_outcome(StorageError("planted")) == ("lost", "planted")


@pytest.mark.parametrize(
    ("error", "answers"),
    [
        (None, True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_device_that_fails_at_every_use_is_spent(error: Exception | None, answers: bool) -> None:
    def use() -> None:
        if error is not None:
            raise error

    assert _answers(use) == answers


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

    told(story())


def test_what_workers_do_before_they_train_is_told_until_it_is_over_or_they_are_gone() -> None:
    async def story() -> None:
        desk = Desk()
        for over in (desk.enter(), desk.lost(), desk.beat({"trial": "t"})):
            await desk.tell("its workers are importing torch")
            assert (await desk.vitals())["told"] == "its workers are importing torch"
            await over
            assert (await desk.vitals())["told"] == ""

    told(story())


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

    told(story())


def test_a_job_hangs_when_no_worker_makes_progress_but_not_while_the_driver_decides(
    clock: Clock,
) -> None:
    async def story() -> None:
        desk = Desk(hang_seconds=60)
        await desk.place({"serial": "1", "trial": "t"})
        await desk.take(0, await desk.enter(), None)
        reporting = asyncio.create_task(desk.report("1", [{"value": 1.0}], "a"))
        await desk.next_event(0)
        clock.seconds += 70
        assert await desk.patience("1", 70) == 60
        await desk.decide(0, False)
        assert not await reporting
        clock.seconds += 70
        assert await desk.patience("1", 70) == -10
        assert await desk.patience("1", 15) == 45, "its peer has just done something"
        assert await desk.patience("1", 70) == 45
        assert await desk.patience("0", 900) == 60, "that was another job"

    told(story())


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

    told(story())


def test_workers_ask_about_once_a_second_however_long_their_steps_are(clock: Clock) -> None:
    async def story() -> list[int]:
        desk, step, asked = Desk(), 1, []
        for _ in range(12):
            asked.append(step)
            _, step = await desk.look(0, "1", "pretrain", step)
            clock.seconds += 0.01 * (step - asked[-1])  # 10 ms a step
        return asked

    asked = told(story())
    assert asked[:4] == [1, 2, 4, 8]
    assert asked[-1] - asked[-2] == pytest.approx(100, abs=1)


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
        assert event == {"outcome": Ending.WITHDRAWN, "lost": MAX_GROUP_STARTS}

    told(story())


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

    told(story())
