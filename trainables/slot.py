"""Slots: worker groups that stay warm, seen from the driver. The only file that imports ray.train.

Starting a Ray Train worker group costs seconds; a trial on a laptop lasts not much longer. So a
slot is one long-lived run of a Ray Train trainer. Its workers ask a *desk* for the next job, train
it together, hand in the rows, and ask again: process group, imports, device context and data stay
warm (desk.py, ray_worker.py).

When a worker dies, Ray Train starts the group anew; the new workers find the unfinished job on the
desk and go on from its last checkpoint. When a node is to be taken away, the driver tells the desk,
the group saves after the next step that it asks for, and goes on elsewhere.

Ray Train's controller, a process of its own, imports this file too: nothing that trains is imported
here but by `work`, in the workers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback, get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainables.desk import HANG_SECONDS, Desk
from trainables.endings import Ending

if TYPE_CHECKING:
    import torch

LEAVE_SECONDS = 0.5  # that a thread which waits for workers may take to leave them
# Of Ray Train's callbacks those that start processes which a slot has no use for: one cleans up
# placement groups after a killed driver, and outlives it for ever where the cluster has no
# dashboard, though ours end with the driver's job; the other hands out Ray Data's data sets
UNUSED = ("PlacementGroupCleanerCallback", "DatasetsCallback")


def work(settings: dict[str, Any]) -> None:
    """What Ray Train runs in every worker of a slot, until it is sent home."""
    desk, context = settings["desk"], get_context()
    desk.tell.remote("its workers are importing torch")
    # what jobs need is here before the first of them is watched for its progress
    from trainables import ray_worker, trial  # noqa: F401

    ray_worker.work(
        desk,
        settings["run_job"],
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=_device() if settings["gpus"] else None,
        share=settings["gpus"],
        threads=settings["threads"],
        # fractions of one GPU are shared between trials, and NCCL refuses two ranks on one GPU
        backend="nccl" if settings["gpus"] >= 1 else "gloo",
        agree=broadcast_from_rank_zero,
        measure_peak=settings["measure_peak"],
    )


def _device() -> torch.device:
    """The GPU that Ray has given this worker."""
    from ray.train.torch import get_device

    device: torch.device = get_device()
    return device


class _Left(Exception):
    """The driver ends while its workers are there."""


class _Places(FixedScalingPolicy):  # type: ignore[misc]
    """Ray Train's for a fixed number of workers, without its process that asks autoscalers.

    Whoever starts slots asks for room, before there is one.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's, without the processes that a slot has no use for, and with a way out of `fit`.

    Ray's own `fit` waits in C++ until the workers are gone. A thread that still waits there when
    `ray.shutdown` frees what it uses may end the whole process, by an abort or with exit code 1,
    whatever its exit code was to be.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.left = threading.Event()  # set: `fit` raises _Left soon, and the workers end with Ray

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if type(each).__name__ not in UNUSED]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        # with the environment of all that the driver starts: Ray has such processes in stock
        options = {"num_cpus": 0, "scheduling_strategy": _beside_the_driver()}
        settings["scaling_policy"] = _Places(self.scaling_config)
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
        run_job: Callable[..., Ending],
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
                "gpus": gpus_per_worker,
            },
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
