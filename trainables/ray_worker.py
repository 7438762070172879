"""Slots: worker groups that stay warm. The only file that imports ray.train.

Starting a Ray Train worker group costs seconds; a trial on a laptop lasts not much longer. So a
slot is one long-lived `TorchTrainer` run. Its workers ask a *desk* (an actor that costs no CPU) for
the next job, train it together, hand in the rows, and ask again: process group, imports, device
context and data stay warm.

    driver --place--> desk --take--> workers          (a job: plain JSON)
    driver <-events-- desk <-report- rank 0            (rows at a rung, the outcome)
    driver --decide-> desk --------> rank 0            (go on, or stop here)

Stopping is cooperative: rank 0 waits at a rung for the decision, and nobody kills a live worker
group. When a worker dies, Ray Train starts the group anew; the new workers find the unfinished job
on the desk and go on from its last checkpoint. A group that makes no progress for too long ends
itself and says where it hung (`watch`); one that is too far gone for that is ended by its desk.
When a node is to be taken away, the driver tells the desk, the group saves after the next step that
it asks for, and goes on elsewhere.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainables.context import LEAVING
from trainables.errors import StorageError
from trainables.watch import GRACE_SECONDS, watched

Job = dict[str, Any]
Event = dict[str, Any]
MAX_GROUP_STARTS = 3  # worker groups that one job may lose before it is given up
HANG_SECONDS = 1800.0
PEERS_SECONDS = 2.0  # that a worker which hangs waits for the others to say where they do
A_DAY = 86_400  # of waiting in a collective: whether a group hangs is judged by its desk
MAX_DEPARTURES = 100  # of worker groups from nodes that were told to go, in one job
MAX_LOOKS = 1000  # answers that are kept for ranks that ask later
LEAVE_SECONDS = 0.5  # that a thread which waits for workers may take to leave them
LOOK_SECONDS = 1.0  # about so often workers ask whether their node has to go
WITHDRAWN = "withdrawn"  # the outcome of a job that was taken off the desk: its trial goes on


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
        self.workers: list[Any] = []  # actors of the present group
        self.guard: asyncio.Task[None] | None = None
        self.beat_: dict[str, Any] = {}
        self.vitals_ = {"entered": 0, "peak_flops": 0.0}
        self.vitals_ |= {"checkpoints": 0, "checkpoint_seconds": 0.0}
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
        self.beat_ = beat

    async def saved(self, seconds: float) -> None:
        """Rank 0 has written a checkpoint."""
        self.vitals_["checkpoints"] += 1
        self.vitals_["checkpoint_seconds"] += seconds

    async def vitals(self) -> dict[str, Any]:
        """The newest beat, where the group is, and what the slot has done in its life.

        `entered` counts workers. No `nodes`: the group has not come yet, or is gone.
        """
        place = {"nodes": sorted(self.nodes), "ticket": self.num_condemned}
        return {**self.vitals_, "beat": self.beat_, **place}

    async def enter(
        self, peak_flops: float = 0.0, node: str = "", worker: Any = None, size: int = 1
    ) -> int:
        """A worker of a group of that size has come; what it gets is its ticket for `take`."""
        self.vitals_["entered"] += 1
        self.workers = [*self.workers, worker][-size:]
        self.vitals_["peak_flops"] = max(self.vitals_["peak_flops"], peak_flops)
        self.nodes.add(node)
        return self.num_condemned

    async def lost(self) -> None:
        """The worker group is gone, says Ray Train; the next one enters anew."""
        async with self.changed:
            self.num_condemned += 1
            self.nodes.clear()
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
                self._add({"outcome": WITHDRAWN, "lost": self._num_lost()})

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
                self._add({"outcome": "lost", "error": lost})

    async def report(self, serial: str, rows: list[dict[str, Any]], attempt: str) -> bool:
        """Hand in rows; returns, once they are durable, whether the trial is to stop here."""
        async with self.changed:
            if not self._is_running(serial):
                return True
            self.decision = asyncio.get_running_loop().create_future()
            self._add({"rows": rows, "attempt": attempt})
        return await self.decision

    async def finish(
        self, serial: str, outcome: str, error: str | None, first_step_seconds: float | None = None
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
        workers = self.workers
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


def work(settings: dict[str, Any]) -> None:
    """What every worker of a slot does: take a job, train it, hand it in, until sent home."""
    desk, run_job = settings["desk"], settings["run_job"]
    context = get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(settings["threads"])
    measure_peak = settings["measure_peak"]
    peak = measure_peak(device) if measure_peak and rank == 0 else 0.0
    node, actor = ray.get_runtime_context().get_node_id(), ray.get_runtime_context().current_actor
    ticket = ray.get(desk.enter.remote(peak, node, actor, world_size))
    finished = None
    while True:
        job = ray.get(desk.take.remote(rank, ticket, finished))
        if job is None:
            return
        serial = finished = job["serial"]
        try:
            outcome, first_step = _train(run_job, job, desk, ticket, device, rank, world_size)
        except Exception as error:  # whatever a trial throws is that trial's outcome
            # its desk cannot be reached: the network between them is cut
            is_cut_off = isinstance(error, ray.exceptions.RayActorError)
            if not is_cut_off and not _is_lost_peer(error, world_size):
                ray.get(desk.finish.remote(serial, *_as_outcome(error)))
            if world_size > 1 or is_cut_off:
                # the other ranks hang in a collective: only a new group gets them out of it
                ray.get(desk.condemn.remote(ticket))
                raise
        else:
            if outcome == LEAVING:
                ray.get(desk.left.remote(ticket))
                raise RuntimeError("this worker group leaves its node")
            if rank == 0:
                ray.get(desk.finish.remote(serial, outcome, None, first_step))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _train(
    run_job: Callable[..., str],
    job: Job,
    desk: Any,
    ticket: int,
    device: torch.device,
    rank: int,
    world_size: int,
) -> tuple[str, float | None]:
    """(outcome, seconds from the decision for this job to its first step's end, by wall clocks)."""
    attempt, serial = f"{job['attempt']}.{job['group']}", job["serial"]
    first_step: list[float] = []

    def ask(silent: float) -> float:
        return float(ray.get(desk.patience.remote(serial, silent), timeout=30))

    def tell(stacks: str) -> None:
        where = f"rank {rank} of {world_size} on {socket.gethostname()}, process {os.getpid()}\n\n"
        told = desk.hang.remote(serial, f"rank{rank}", where + stacks)
        ray.get(told, timeout=GRACE_SECONDS)

    def report(rows: list[dict[str, Any]]) -> bool:
        answer = bool(ray.get(desk.report.remote(serial, rows, attempt)))
        alive()
        return answer

    def heartbeat(phase: str, progress: float, images_per_second: float) -> None:
        alive()
        if not first_step:
            first_step.append(time.time() - job.get("decided", time.time()))
        beat = {"phase": phase, "progress": progress, "images_per_second": images_per_second}
        desk.beat.remote({"trial": job["trial"], "time": time.time(), **beat})

    def saved(seconds: float) -> None:
        alive()
        desk.saved.remote(seconds)

    next_look: dict[str, int] = {}  # by phase

    def is_leaving(phase: str, step: int) -> bool:
        if step < next_look.get(phase, 0):
            return False
        leaves, next_look[phase] = ray.get(desk.look.remote(ticket, serial, phase, step))
        return bool(leaves)

    with watched(ask, tell) as alive:
        outcome = run_job(
            job,
            device=device,
            rank=rank,
            world_size=world_size,
            attempt=attempt,
            report=report,
            heartbeat=heartbeat,
            saved=saved,
            alive=alive,
            is_leaving=is_leaving,
        )
    return outcome, first_step[0] if first_step else None


def _as_outcome(error: Exception) -> tuple[str, str]:
    """Outcome and text of an error of the trial."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out-of-memory", str(error) or "the worker ran out of memory"
    if isinstance(error, StorageError):
        return "lost", str(error)  # no fault of the trial's: it may go on when the storage does
    return "failed", "".join(traceback.format_exception(error))


def _is_lost_peer(error: Exception, world_size: int) -> bool:
    """Whether a rank failed only because another one has died: the trial goes on in a new group.

    Gloo's errors are plain RuntimeErrors that name its source file.
    """
    if world_size == 1:
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


class _Left(Exception):
    """The driver ends while its workers are there."""


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's, without its cleaner of placement groups, and with a way out of `fit`.

    The cleaner is a process that outlives a killed driver, for ever where the cluster has no
    dashboard; our groups end with the driver's job. Ray's own `fit` waits in C++ until the workers
    are gone. A thread that still waits there when `ray.shutdown` frees what it uses may end the
    whole process, by an abort or with exit code 1, whatever its exit code was to be.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.left = threading.Event()  # set: `fit` raises _Left soon, and the workers end with Ray

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if "PlacementGroupCleaner" not in type(each).__name__]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        options = {
            "num_cpus": 0,
            "scheduling_strategy": _beside_the_driver(),
            "runtime_env": {"env_vars": get_env_vars_to_propagate()},
        }
        controller = ray.remote(**options)(TrainController).remote(**settings)
        run = controller.run.remote()
        while not ray.wait([run], timeout=LEAVE_SECONDS)[0]:
            if self.left.is_set():
                raise _Left
        ray.get(run)
        return ray.get(controller.get_result.remote())


def _beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """For actors that would be lost with their node anywhere else, and the slot with them."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class _Obituary(UserCallback):  # type: ignore[misc]
    """Runs where Ray Train controls a worker group, and tells the desk when that is gone."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        with suppress(ray.exceptions.RayError):  # a desk that is gone tells that the driver is
            ray.get(self.desk.lost.remote(), timeout=30)


class Slot:
    """One warm worker group, seen from the driver."""

    def __init__(
        self,
        name: str,
        run_job: Callable[..., str],
        *,
        workers: int,
        cpus_per_worker: float,
        gpus_per_worker: float,
        storage: Path,
        measure_peak: Callable[[torch.device], float] | None = None,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        self.name = name
        self.desk_name = f"{name}-desk"
        self.desk = (
            ray.remote(num_cpus=0, max_concurrency=1000)(Desk)
            .options(name=self.desk_name, scheduling_strategy=_beside_the_driver())
            .remote(hang_seconds)
        )
        self.error: BaseException | None = None
        # fractions of one GPU are shared between trials, and NCCL refuses two ranks on one GPU
        backend = "nccl" if gpus_per_worker >= 1 else "gloo"
        resources = {"CPU": cpus_per_worker}
        if gpus_per_worker:
            resources["GPU"] = gpus_per_worker
        self._trainer = Trainer(
            work,
            train_loop_config={
                "desk": self.desk,
                "run_job": run_job,
                "measure_peak": measure_peak,
                "threads": max(1, int(cpus_per_worker)),
            },
            torch_config=TorchConfig(backend=backend, timeout_s=A_DAY),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            # the desk bounds what one job may cost; a slot itself is kept alive
            run_config=RunConfig(
                name=name,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[_Obituary(self.desk)],
            ),
        )
        self._thread = threading.Thread(target=self._fit, name=name, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except _Left:
            pass
        except BaseException as error:  # reported by the driver's loop, which owns the exit code
            self.error = error

    def close(self, timeout: float = 0) -> bool:
        """Send the workers home and wait; True when they went in time."""
        self.desk.close.remote()
        return self.join(timeout)

    def leave(self) -> None:
        """Wait for the workers no longer: Ray is about to be shut down."""
        self._trainer.left.set()

    def join(self, timeout: float) -> bool:
        """Wait for the thread that waits for the workers; True when it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()


def quiet_environment() -> dict[str, str]:
    """Environment variables that a job needs for fast polling and calm logs."""
    return {
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Ray Train has it for its controllers
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": os.environ.get(
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"
        ),
        # the driver looks for nodes that have to go: no need for a process of every slot that does
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
