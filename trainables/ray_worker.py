"""What the workers of a slot do: take a job from the desk, train it together, hand it in.

Everything stays warm from job to job: process group, imports, device context, data. A group that
makes no progress for too long ends itself and says where it hung (watch.py).
"""

from __future__ import annotations

import gc
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainables.allocator import keep_freed_memory
from trainables.desk import Job
from trainables.endings import Ending
from trainables.errors import StorageError
from trainables.watch import GRACE_SECONDS, watched

MEETING = timedelta(minutes=5)  # that the ranks of a group get to find each other
# what libraries say that have no error of their own for it
OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA out of memory")
# of waiting in a collective: whether a group hangs is judged by its desk
A_DAY = timedelta(days=1)


def work(
    desk: Any,
    run_job: Callable[..., Ending],
    *,
    rank: int,
    world_size: int,
    device: torch.device | None,
    share: float,
    threads: int,
    backend: str,
    agree: Callable[[Any], Any],
    measure_peak: Callable[[torch.device], float] | None,
) -> None:
    """Take job after job until sent home. `agree` gives every rank what rank 0 gives it.

    `share` of the device is for this worker: no more of its memory is taken.
    """
    torch.set_num_threads(threads)
    if device is None:
        device = torch.device("cpu")
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
        if share < 1:
            torch.cuda.set_per_process_memory_fraction(share, device)
    if world_size > 1:
        _meet(rank, world_size, backend, agree)
    peak = measure_peak(device) if measure_peak and rank == 0 else 0.0
    node = ray.get_runtime_context().get_node_id()
    actor = ray.cloudpickle.dumps(ray.get_runtime_context().current_actor)
    ticket = ray.get(desk.enter.remote(peak, node, actor, world_size))
    finished = None
    while True:
        job = ray.get(desk.take.remote(rank, ticket, finished))
        if job is None:
            if world_size > 1:
                torch.distributed.destroy_process_group()
            return
        serial = finished = job["serial"]
        try:
            outcome, first_step = _train(run_job, job, desk, ticket, device, rank, world_size)
        except Exception as error:  # whatever a trial throws is that trial's outcome
            # its desk cannot be reached: the network between them is cut
            is_cut_off = isinstance(error, ray.exceptions.RayActorError)
            is_spent = device.type == "cuda" and not _answers(lambda: torch.ones(1).to(device))
            if not is_cut_off and not _is_lost_peer(error, world_size):
                ending, text = _as_outcome(error)
                if is_spent:  # perhaps by the trial, perhaps not: a new process tells
                    ending, text = Ending.LOST, f"{device} answers no more after:\n{text}"
                ray.get(desk.finish.remote(serial, ending, text))
            if world_size > 1 or is_cut_off or is_spent:
                # the other ranks hang in a collective, or every next job would fail on this device:
                # only a new group gets them out of it
                ray.get(desk.condemn.remote(ticket))
                raise
        else:
            if outcome is Ending.LEAVING:
                ray.get(desk.left.remote(ticket))
                raise RuntimeError("this worker group leaves its node")
            if rank == 0:
                ray.get(desk.finish.remote(serial, outcome, None, first_step))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _meet(rank: int, world_size: int, backend: str, agree: Callable[[Any], Any]) -> None:
    """Make one process group of all ranks, through a store of rank 0's."""
    host = ray.util.get_node_ip_address()
    store = None
    if rank == 0:
        store = TCPStore(
            host, 0, world_size, is_master=True, timeout=MEETING, wait_for_workers=False
        )
    host, port = agree((host, store.port) if store else None)
    if store is None:
        store = TCPStore(host, port, world_size, timeout=MEETING)
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=A_DAY
    )


def _train(
    run_job: Callable[..., Ending],
    job: Job,
    desk: Any,
    ticket: int,
    device: torch.device,
    rank: int,
    world_size: int,
) -> tuple[Ending, float | None]:
    """(outcome, seconds from the decision for this job to its first step's end, by wall clocks)."""
    attempt, serial = f"{job['attempt']}.{job['group']}", job["serial"]
    first_step: list[float] = []

    def ask(silent: float) -> float:
        return float(ray.get(desk.patience.remote(serial, silent), timeout=30))

    def tell_where(stacks: str) -> None:
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

    def tell(text: str) -> None:
        desk.tell.remote(text)

    def saved(seconds: float) -> None:
        alive()
        desk.saved.remote(seconds)

    next_look: dict[str, int] = {}  # by phase

    def is_leaving(phase: str, step: int) -> bool:
        if step < next_look.get(phase, 0):
            return False
        leaves, next_look[phase] = ray.get(desk.look.remote(ticket, serial, phase, step))
        return bool(leaves)

    with watched(ask, tell_where) as alive:
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
            tell=tell,
        )
    return outcome, first_step[0] if first_step else None


def _as_outcome(error: Exception) -> tuple[Ending, str]:
    """Outcome and text of an error of the trial."""
    is_memory = any(words in str(error) for words in OUT_OF_MEMORY)
    if is_memory or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Ending.OUT_OF_MEMORY, str(error) or "the worker ran out of memory"
    if isinstance(error, StorageError):
        return Ending.LOST, str(
            error
        )  # no fault of the trial's: it may go on when the storage does
    return Ending.FAILED, "".join(traceback.format_exception(error))


def _answers(use: Callable[[], object]) -> bool:
    """Whether a device still works. Illegal access, a failed assertion or a memory error ends that.

    Such an error of CUDA is told at every later use, until the process ends.
    """
    try:
        use()
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
    return True


def _is_lost_peer(error: Exception, world_size: int) -> bool:
    """Whether a rank failed only because another one has died: the trial goes on in a new group.

    Gloo's errors are plain RuntimeErrors that name its source file.
    """
    if world_size == 1:
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
