"""The desk of a slot: where the driver and one worker group meet. An actor that costs no CPU.

    driver --place--> desk --take--> workers          (a job: plain JSON)
    driver <-events-- desk <-report- rank 0            (rows at a rung, the outcome)
    driver --decide-> desk --------> rank 0            (go on, or stop here)

Stopping is cooperative: rank 0 waits at a rung for the decision, and nobody kills a live worker
group. A group that is too far gone to end itself when it hangs is ended from here. The process of a
desk imports this file, and nothing that trains.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from typing import Any

import ray

from trainables.endings import Ending
from trainables.watch import GRACE_SECONDS

Job = dict[str, Any]
Event = dict[str, Any]
MAX_GROUP_STARTS = 3  # worker groups that one job may lose before it is given up
HANG_SECONDS = 1800.0
PEERS_SECONDS = 2.0  # that a worker which hangs waits for the others to say where they do
MAX_DEPARTURES = 100  # of worker groups from nodes that were told to go, in one job
MAX_LOOKS = 1000  # answers that are kept for ranks that ask later
LOOK_SECONDS = 1.0  # about so often workers ask whether their node has to go


class Desk:
    """Where the driver and one worker group meet. An asyncio actor; it dies with the driver."""

    def __init__(self, hang_seconds: float = HANG_SECONDS) -> None:
        self.hang_seconds = hang_seconds
        self.job: Job | None = None
        self.open = True
        self.events: list[Event] = []
        self.decision: asyncio.Future[bool] | None = None
        self.changed = asyncio.Condition()
        self.group_starts = 0
        self.num_condemned = 0  # worker groups that are not to get another job
        self.num_hung = 0  # of the groups that took the present job
        self.num_told = 0  # workers of the present group that have said where they hang
        self.progressed = 0.0  # by this process's monotonic clock
        # actors of the present group, pickled: to know one takes all that Ray Train imports
        self.workers: list[bytes] = []
        self.guard: asyncio.Task[None] | None = None
        self.beat_: dict[str, Any] = {}
        self.vitals_ = {"entered": 0, "peak_flops": 0.0}
        self.vitals_ |= {"checkpoints": 0, "checkpoint_seconds": 0.0}
        self.told = ""  # what the workers do before the first step, for people
        self.nodes: set[str] = set()  # of the present worker group; none: there is no group
        self.departures = 0  # of groups in the present job, before their nodes went
        self.leaving = -1  # the newest ticket whose worker group has to leave
        # the newest MAX_LOOKS answers by ticket, serial, phase and step: what all ranks know alike
        self.looks: dict[tuple[int, str, str, int], tuple[bool, int]] = {}
        self.looked = (-1, "", "", 0, 0.0)  # the key of the newest, and when

    async def place(self, job: Job) -> None:
        """Lay down the next job; the same job again (same serial) changes nothing."""
        async with self.changed:
            if self.job is not None and self.job["serial"] == job["serial"]:
                return
            if self.decision is not None and not self.decision.done():
                self.decision.set_result(True)  # of a job whose relay died: nobody will answer
            self.job, self.events, self.beat_ = job, [], {}
            self.group_starts = self.departures = self.num_hung = 0
            self.changed.notify_all()

    async def next_event(self, after: int) -> Event:
        """Event number `after` of the present job, as soon as there is one."""
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.events) > after)
            return self.events[after]

    async def decide(self, event: int, stop: bool) -> None:
        """Answer the rows of event number `event`."""
        is_newest = event == len(self.events) - 1
        if is_newest and self.decision is not None and not self.decision.done():
            self.decision.set_result(stop)

    async def close(self) -> None:
        """Send the workers home after the present job."""
        async with self.changed:
            self.open = False
            self.changed.notify_all()

    async def beat(self, beat: dict[str, Any]) -> None:
        """Rank 0's sign of life, for the progress display."""
        self.beat_, self.told = beat, ""

    async def tell(self, text: str) -> None:
        """A worker says what it does before it trains."""
        self.told = text

    async def saved(self, seconds: float) -> None:
        """Rank 0 has written a checkpoint."""
        self.vitals_["checkpoints"] += 1
        self.vitals_["checkpoint_seconds"] += seconds

    async def vitals(self) -> dict[str, Any]:
        """The newest beat, where the group is, and what the slot has done in its life.

        `entered` counts workers. No `nodes`: the group has not come yet, or is gone.
        """
        place = {"nodes": sorted(self.nodes), "ticket": self.num_condemned}
        return {**self.vitals_, "beat": self.beat_, "told": self.told, **place}

    async def enter(
        self, peak_flops: float = 0.0, node: str = "", worker: bytes = b"", size: int = 1
    ) -> int:
        """A worker (its actor, pickled) of a group of that size has come; gets its ticket."""
        self.vitals_["entered"] += 1
        self.workers = [*self.workers, worker][-size:]
        self.vitals_["peak_flops"] = max(self.vitals_["peak_flops"], peak_flops)
        self.nodes.add(node)
        self.told = ""
        return self.num_condemned

    async def lost(self) -> None:
        """The worker group is gone, says Ray Train; the next one enters anew."""
        async with self.changed:
            self.num_condemned += 1
            self.nodes.clear()
            self.told = ""
            self.changed.notify_all()

    async def leave(self, ticket: int) -> None:
        """Have a worker group save and go, as a node of it is to be taken away."""
        async with self.changed:
            self.leaving = max(self.leaving, ticket)
            self.changed.notify_all()

    async def look(self, ticket: int, serial: str, phase: str, step: int) -> tuple[bool, int]:
        """Whether a group's ranks leave after this step, and after which one to ask again.

        Who asks first decides for all, so that no rank waits for one that has left. The steps
        between are at most doubled, as first ones are slow.
        """
        *run, _ = key = ticket, serial, phase, step
        if key not in self.looks:
            *before, last, when = self.looked
            now = time.monotonic()
            steps = step - last if before == run else 0
            at_speed = int(steps / max(now - when, 1e-3) * LOOK_SECONDS)
            self.looks[key] = self._is_done_for(ticket), step + max(1, min(2 * steps, at_speed))
            self.looked = *key, now
            if len(self.looks) > MAX_LOOKS:
                del self.looks[next(iter(self.looks))]
        return self.looks[key]

    async def left(self, ticket: int) -> None:
        """A worker of a group has saved and goes: that is not held against the job."""
        async with self.changed:
            if ticket >= self.num_condemned:
                self.num_condemned = ticket + 1
                self.departures += 1

    async def withdraw(self, serial: str) -> None:
        """Take a job off the desk that no workers are there for, so that another slot has it."""
        async with self.changed:
            is_mine = self.job is not None and self.job["serial"] == serial
            if is_mine and not self.nodes and not self._is_over():
                self._add({"outcome": Ending.WITHDRAWN, "lost": self._num_lost()})

    async def condemn(self, ticket: int) -> None:
        """An error has put the ranks of this worker group out of step: it gets no other job."""
        async with self.changed:
            self.num_condemned = max(self.num_condemned, ticket + 1)
            self.changed.notify_all()

    async def take(self, rank: int, ticket: int, finished: str | None) -> Job | None:
        """The next job for a worker that has finished job `finished`; None: go home."""
        async with self.changed:
            while True:
                await self.changed.wait_for(
                    lambda: not self.open or self._is_done_for(ticket) or self._has_job(finished)
                )
                if self._is_done_for(ticket):
                    raise RuntimeError("this worker group is being replaced")
                if not self.open or self.job is None:
                    return None
                if rank == 0:
                    self.group_starts, self.num_told = self.group_starts + 1, 0
                if self._num_lost() <= MAX_GROUP_STARTS:
                    self._watch_over(self.job["serial"])
                    return {**self.job, "group": self.group_starts}
                lost = f"{MAX_GROUP_STARTS} worker groups died in it"
                if self.num_hung:
                    lost += f", {self.num_hung} of them hung"
                self.num_condemned += 1  # another rank may have taken the job before this one
                self._add({"outcome": Ending.LOST, "error": lost})

    async def report(self, serial: str, rows: list[dict[str, Any]], attempt: str) -> bool:
        """Hand in rows; returns, once they are durable, whether the trial is to stop here."""
        async with self.changed:
            if not self._is_running(serial):
                return True
            self.decision = asyncio.get_running_loop().create_future()
            self._add({"rows": rows, "attempt": attempt})
        return await self.decision

    async def finish(
        self,
        serial: str,
        outcome: Ending,
        error: str | None,
        first_step_seconds: float | None = None,
    ) -> None:
        """Hand in how the job ended, and how long after the decision its first step was done."""
        async with self.changed:
            if self._is_running(serial):
                end = {"outcome": outcome, "error": error}
                self._add({**end, "first_step_seconds": first_step_seconds})

    async def patience(self, serial: str, silent: float) -> float:
        """Seconds the job may still go on without progress; `silent`: a worker's since its last."""
        if not self._is_running(serial):
            return self.hang_seconds
        now = time.monotonic()
        is_our_turn = self.decision is not None and not self.decision.done()
        self.progressed = max(self.progressed, now if is_our_turn else now - silent)
        return self.progressed + self.hang_seconds - now

    async def hang(self, serial: str, worker: str, stacks: str) -> None:
        """A worker of a group that hangs says where; returns when all have, or soon."""
        async with self.changed:
            if not self._is_running(serial):
                return
            self.num_hung += self.num_told == 0
            self.num_told += 1
            self._add({"stacks": stacks, "worker": worker, "group": self.group_starts})
            with suppress(TimeoutError):
                async with asyncio.timeout(PEERS_SECONDS):
                    await self.changed.wait_for(lambda: self.num_told >= len(self.workers))

    def _watch_over(self, serial: str) -> None:
        """From now on, workers that hang and do not end themselves are ended from here."""
        self.progressed = time.monotonic()
        if self.guard is not None:
            self.guard.cancel()
        self.guard = asyncio.create_task(self._guard(serial))

    async def _guard(self, serial: str) -> None:
        while (left := await self.patience(serial, math.inf) + GRACE_SECONDS) > 0:
            await asyncio.sleep(left)
            if not self._is_running(serial):
                return
        workers = [ray.cloudpickle.loads(worker) for worker in self.workers]
        if await _has_died(workers):
            return  # nothing hangs: Ray Train is about to replace the group
        if not self.num_told:
            await self.hang(serial, "all", "no worker answers; see their logs on the nodes")
        for worker in workers:
            ray.kill(worker)

    def _is_running(self, serial: str) -> bool:
        return self.job is not None and self.job["serial"] == serial and not self._is_over()

    def _num_lost(self) -> int:
        """Worker groups that have begun the job, on this desk and before on others."""
        assert self.job is not None
        excused = min(self.departures, MAX_DEPARTURES)
        return self.group_starts - excused + int(self.job.get("lost", 0))

    def _is_done_for(self, ticket: int) -> bool:
        return ticket < self.num_condemned or ticket <= self.leaving

    def _has_job(self, finished: str | None) -> bool:
        return self.job is not None and self.job["serial"] != finished and not self._is_over()

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self.changed.notify_all()

    def _is_over(self) -> bool:
        return bool(self.events) and "outcome" in self.events[-1]


async def _has_died(workers: list[Any]) -> bool:
    """Whether one of these actors is dead; one that does not answer is not."""
    for worker in workers:
        with suppress(TimeoutError):
            try:
                async with asyncio.timeout(PEERS_SECONDS):
                    await worker.__ray_ready__.remote()
            except ray.exceptions.RayActorError:
                return True
    return False
