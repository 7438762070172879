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
on the desk and go on from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from trainables.errors import StorageError

Job = dict[str, Any]
Event = dict[str, Any]
MAX_GROUP_STARTS = 3  # worker groups that one job may lose before it is given up


class Desk:
    """Where the driver and one worker group meet. An asyncio actor; it dies with the driver."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.open = True
        self.events: list[Event] = []
        self.decision: asyncio.Future[bool] | None = None
        self.changed = asyncio.Condition()
        self.group_starts = 0
        self.num_condemned = 0  # worker groups that are not to get another job
        self.beat_: dict[str, Any] = {}
        self.vitals_ = {"entered": 0, "peak_flops": 0.0}
        self.vitals_ |= {"checkpoints": 0, "checkpoint_seconds": 0.0}

    async def place(self, job: Job) -> None:
        """Lay down the next job; the same job again (same serial) changes nothing."""
        async with self.changed:
            if self.job is not None and self.job["serial"] == job["serial"]:
                return
            if self.decision is not None and not self.decision.done():
                self.decision.set_result(True)  # of a job whose relay died: nobody will answer
            self.job, self.events, self.group_starts, self.beat_ = job, [], 0, {}
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
        """The newest beat, and what the slot has done in its life: `entered` counts workers."""
        return {**self.vitals_, "beat": self.beat_}

    async def enter(self, peak_flops: float = 0.0) -> int:
        """A worker has come; what it gets is its ticket for `take`."""
        self.vitals_["entered"] += 1
        self.vitals_["peak_flops"] = max(self.vitals_["peak_flops"], peak_flops)
        return self.num_condemned

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
                    lambda: not self.open or ticket < self.num_condemned or self._has_job(finished)
                )
                if ticket < self.num_condemned:
                    raise RuntimeError("this worker group is being replaced")
                if not self.open or self.job is None:
                    return None
                if rank == 0:
                    self.group_starts += 1
                if self.group_starts <= MAX_GROUP_STARTS:
                    return {**self.job, "group": self.group_starts}
                lost = f"{MAX_GROUP_STARTS} worker groups died in it"
                self.num_condemned += 1  # another rank may have taken the job before this one
                self._add({"outcome": "lost", "error": lost})

    async def report(self, serial: str, rows: list[dict[str, Any]], attempt: str) -> bool:
        """Hand in rows; returns, once they are durable, whether the trial is to stop here."""
        async with self.changed:
            if self.job is None or self.job["serial"] != serial or self._is_over():
                return True
            self.decision = asyncio.get_running_loop().create_future()
            self._add({"rows": rows, "attempt": attempt})
        return await self.decision

    async def finish(
        self, serial: str, outcome: str, error: str | None, first_step_seconds: float | None = None
    ) -> None:
        """Hand in how the job ended, and how long after the decision its first step was done."""
        async with self.changed:
            if self.job is not None and self.job["serial"] == serial and not self._is_over():
                end = {"outcome": outcome, "error": error}
                self._add({**end, "first_step_seconds": first_step_seconds})

    def _has_job(self, finished: str | None) -> bool:
        return self.job is not None and self.job["serial"] != finished and not self._is_over()

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self.changed.notify_all()

    def _is_over(self) -> bool:
        return bool(self.events) and "outcome" in self.events[-1]


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
    ticket = ray.get(desk.enter.remote(peak))
    finished = None
    while True:
        job = ray.get(desk.take.remote(rank, ticket, finished))
        if job is None:
            return
        serial = finished = job["serial"]
        try:
            outcome, first_step = _train(run_job, job, desk, device, rank, world_size)
        except Exception as error:  # whatever a trial throws is that trial's outcome
            if not _is_lost_peer(error, world_size):
                ray.get(desk.finish.remote(serial, *_as_outcome(error)))
            if world_size > 1:
                # the other ranks hang in a collective: only a new group gets them out of it
                ray.get(desk.condemn.remote(ticket))
                raise
        else:
            if rank == 0:
                ray.get(desk.finish.remote(serial, outcome, None, first_step))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _train(
    run_job: Callable[..., str],
    job: Job,
    desk: Any,
    device: torch.device,
    rank: int,
    world_size: int,
) -> tuple[str, float | None]:
    """(outcome, seconds from the decision for this job to its first step's end, by wall clocks)."""
    attempt = f"{job['attempt']}.{job['group']}"
    first_step: list[float] = []

    def report(rows: list[dict[str, Any]]) -> bool:
        return bool(ray.get(desk.report.remote(job["serial"], rows, attempt)))

    def heartbeat(phase: str, progress: float, images_per_second: float) -> None:
        if not first_step:
            first_step.append(time.time() - job.get("decided", time.time()))
        beat = {"phase": phase, "progress": progress, "images_per_second": images_per_second}
        desk.beat.remote({"trial": job["trial"], "time": time.time(), **beat})

    def saved(seconds: float) -> None:
        desk.saved.remote(seconds)

    outcome = run_job(
        job,
        device=device,
        rank=rank,
        world_size=world_size,
        attempt=attempt,
        report=report,
        heartbeat=heartbeat,
        saved=saved,
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
    ) -> None:
        self.name = name
        self.desk = ray.remote(num_cpus=0, max_concurrency=1000)(Desk).remote()
        self.error: BaseException | None = None
        # fractions of one GPU are shared between trials, and NCCL refuses two ranks on one GPU
        backend = "nccl" if gpus_per_worker >= 1 else "gloo"
        resources = {"CPU": cpus_per_worker}
        if gpus_per_worker:
            resources["GPU"] = gpus_per_worker
        self._trainer = TorchTrainer(
            work,
            train_loop_config={
                "desk": self.desk,
                "run_job": run_job,
                "measure_peak": measure_peak,
                "threads": max(1, int(cpus_per_worker)),
            },
            torch_config=TorchConfig(backend=backend),
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
            ),
        )
        self._thread = threading.Thread(target=self._fit, name=name, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # reported by the driver's loop, which owns the exit code
            self.error = error

    def close(self, timeout: float) -> bool:
        """Send the workers home and wait; True when they went in time."""
        self.desk.close.remote()
        self._thread.join(timeout)
        return not self._thread.is_alive()


def quiet_environment() -> dict[str, str]:
    """Environment variables that a job needs for fast polling and calm logs."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": os.environ.get(
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"
        ),
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
