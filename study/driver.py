"""Run or resume a study on Ray. The only file that imports ray.tune.

Ray Tune executes: it asks for trials through a `Searcher` and passes results to a `TrialScheduler`.
Both are thin adapters of the `Conductor`, who decides, with the ledger as the only state. A Tune
trial is a relay: it lays a job on the desk of a warm slot and passes on what comes back. Nothing of
Tune's own state is ever read back.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from cluster.connect import Connection, connect
from cluster.metrics import Publisher
from cluster.placement import num_slots
from study.conductor import Conductor
from study.ledger import Suggestion
from study.requests import was_stopped
from study.resume import Finished, Wait
from study.telemetry import Telemetry
from trainables.errors import StorageError, UserError
from trainables.job import run_job
from trainables.ray_worker import Slot, quiet_environment
from trainables.speed import peak_flops

POLL_SECONDS = 0.5  # of heartbeats and of the request to stop
PUBLISH_SECONDS = 5  # of metrics; Ray passes them on every 10 s
FAREWELL_SECONDS = 20  # that idle workers get to go home


def drive(conductor: Conductor) -> None:
    """Run what is left of the study. KeyboardInterrupt: asked to stop; everything is kept."""
    if isinstance(conductor.next_step(), Finished):
        conductor.progress.say("nothing is left to do: every trial of the study has ended")
        return
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's own tables would fight with ours
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        connection = connect(env_vars=quiet_environment())
    except (RuntimeError, ConnectionError) as error:
        address = os.environ.get("RAY_ADDRESS", "a cluster of this machine's own")
        raise UserError(f"Ray at {address}: {error}") from error
    # the dashboard shows a job's log, and cannot resume by itself
    where = f"--storage {conductor.ledger.folder.storage}"
    if connection.job_id and connection.dashboard:
        where = f"--address {connection.dashboard} {where}"
    how_to_resume = f"to go on if interrupted: maskstudy resume {conductor.spec.study} {where}"
    conductor.progress.say(how_to_resume)
    # Ray insists on storage that all nodes see; nothing in it is read back
    folder = conductor.ledger.folder
    is_shared = connection.nodes > 1 and not folder.remote
    shared = folder.root.resolve() if is_shared else None
    scratch = Path(tempfile.mkdtemp(prefix=".ray-", dir=shared))
    try:
        with _interruptible():
            _drive(conductor, connection, scratch)
    except KeyboardInterrupt:
        conductor.progress.say(f"interrupted, nothing is lost; {how_to_resume}")
        raise
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _drive(conductor: Conductor, connection: Connection, scratch: Path) -> None:
    slots = _start_slots(conductor, connection, scratch)
    errors: list[Exception] = []  # of ours, before Tune made text of them
    tuner = _tuner(conductor, slots, errors, scratch)
    conductor.progress.start()
    try:
        with _watching(conductor, slots):
            tuner.fit()
    except KeyboardInterrupt:
        conductor.ledger.refuse_if_fenced()
        for slot in slots:
            if slot.error is not None:
                raise RuntimeError(f"the worker group {slot.name} is gone") from slot.error
        raise
    except Exception as error:
        raise (errors[0] if errors else error) from None
    finally:
        conductor.progress.stop()
    if errors:
        raise errors[0]
    conductor.progress.say_first_steps()
    for slot in slots:
        slot.close(FAREWELL_SECONDS)


def _start_slots(conductor: Conductor, connection: Connection, scratch: Path) -> list[Slot]:
    """As many warm worker groups as fit; they come up while Tune does."""
    resources, progress = conductor.spec.resources, conductor.progress
    each: dict[str, Any] = {
        "workers": resources.workers,
        "cpus_per_worker": resources.cpus_per_worker,
        "gpus_per_worker": resources.gpus_per_worker,
    }
    measure_peak = None if resources.peak_flops else peak_flops
    try:
        fit = num_slots(
            cpus=connection.cpus, gpus=connection.gpus, asked=resources.concurrent, **each
        )
    except ValueError as error:
        raise UserError(f"resources: {error}") from error
    count = min(fit, max(1, progress.total - progress.num_done))
    progress.slots = count
    progress.say(
        f"{count} trial(s) at once on {connection.cpus:g} CPUs, {connection.gpus:g} GPUs; "
        f"starting {count} x {resources.workers} workers"
    )
    prefix = f"{conductor.spec.study}-{conductor.ledger.epoch}-slot"
    return [
        Slot(f"{prefix}-{index}", run_job, storage=scratch, measure_peak=measure_peak, **each)
        for index in range(count)
    ]


def _tuner(
    conductor: Conductor, slots: list[Slot], errors: list[Exception], scratch: Path
) -> ray.tune.Tuner:
    relay = ray.tune.with_resources(
        ray.tune.with_parameters(_relay, desks=[slot.desk for slot in slots]),
        {"memory": 1 << 20},  # Tune wants a resource; the slots have the CPUs
    )
    return ray.tune.Tuner(
        relay,
        tune_config=ray.tune.TuneConfig(
            search_alg=_Searcher(conductor, slots, errors),
            scheduler=_Scheduler(conductor, slots, errors),
            num_samples=-1,
            max_concurrent_trials=len(slots),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=3),  # a relay picks up its thread
        ),
    )


def _relay(config: dict[str, Any], desks: list[Any]) -> None:
    """The Tune trial: lay the job on the slot's desk, pass on every event.

    Started again after a failure it passes on all events once more; the ledger keeps each once.
    """
    desk = desks[config["slot"]]
    ray.get(desk.place.remote(config["job"]))
    number = 0
    while True:
        event = ray.get(desk.next_event.remote(number))
        ray.tune.report({**event, "number": number})
        if "outcome" in event:
            return
        number += 1


class _Adapter:
    """What both adapters know. Tune pickles them at its start; their state is the ledger."""

    def __init__(self, conductor: Conductor, slots: list[Slot], errors: list[Exception]) -> None:
        super().__init__()
        self.conductor, self.slots, self.errors = conductor, slots, errors

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """Keep an error as it was: Tune raises a text in its place."""
        try:
            yield
        except Exception as error:
            self.errors.append(error)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_Adapter, Searcher):  # type: ignore[misc]
    """Tune asks for trials here, and says when one has ended."""

    def __init__(self, conductor: Conductor, slots: list[Slot], errors: list[Exception]) -> None:
        super().__init__(conductor, slots, errors)
        self._free = list(reversed(range(len(slots))))
        self._taken: dict[str, tuple[int, Suggestion]] = {}  # by Tune's id
        self._warm: set[int] = set()  # slots that have ended a trial

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        with self.keeping_errors():
            if self.errors:
                raise self.errors[0]
            step = self.conductor.next()
        if isinstance(step, Finished):
            return str(Searcher.FINISHED)
        if isinstance(step, Wait):
            return None
        slot = self._free.pop()
        self._taken[trial_id] = (slot, step)
        job = self.conductor.job(step)
        # the workers need not wait until Tune has started the relay, which places the same job
        self.slots[slot].desk.place.remote(job)
        return {"slot": slot, "job": job, "number": step.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        slot, suggestion = self._taken.pop(trial_id)
        self._free.append(slot)
        if error or result is None or "outcome" not in result:
            result = {"outcome": "lost", "error": "its relay in Ray Tune died"}
        # Tune would log a storage that fails and go on; it learns of it when it next asks
        with suppress(StorageError), self.keeping_errors():
            waited = result.get("first_step_seconds")
            self.conductor.progress.first_step(waited, is_warm=slot in self._warm)
            self._warm.add(slot)
            self.conductor.done(suggestion, result["outcome"], result.get("error"))

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a study is resumed from its ledger, not from Tune's state")


class _Scheduler(_Adapter, FIFOScheduler):  # type: ignore[misc]
    """Tune passes rows here. Stopping is a request to the workers; Tune itself stops nothing."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "rows" in result:
            suggestion = self.conductor.suggestions[trial.config["number"]]
            with self.keeping_errors():
                stop = self.conductor.rows(suggestion, result["rows"], result["attempt"])
            desk = self.slots[trial.config["slot"]].desk
            desk.decide.remote(result["number"], stop)
        return str(self.CONTINUE)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM (`ray job stop`, a cluster's time limit) end the run as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watching(conductor: Conductor, slots: list[Slot]) -> Iterator[None]:
    """Beside Tune's loop: show heartbeats, publish metrics, and heed `maskstudy stop`."""
    ended = threading.Event()
    telemetry = Telemetry(conductor, Publisher(conductor.spec.study).publish)
    vitals: dict[str, dict[str, Any]] = {}  # by slot
    ledger, folder = conductor.ledger, conductor.ledger.folder

    def watch() -> None:
        published = 0.0
        while not ended.wait(POLL_SECONDS):
            was_asked = was_stopped(folder)
            if was_asked:
                conductor.progress.say("asked to stop")
            if was_asked or ledger.is_fenced or any(slot.error is not None for slot in slots):
                os.kill(os.getpid(), signal.SIGINT)  # Tune's loop has the main thread
                return
            for slot in slots:
                # a desk answers as long as the driver lives; at its end nobody looks any more
                with suppress(ray.exceptions.RayError):
                    vitals[slot.name] = ray.get(slot.desk.vitals.remote(), timeout=5)
                    beat = vitals[slot.name]["beat"]
                    if beat:
                        conductor.progress.beat(
                            beat["trial"],
                            beat["phase"],
                            beat["progress"],
                            beat["images_per_second"],
                        )
            if time.monotonic() - published > PUBLISH_SECONDS:
                telemetry.tick(list(vitals.values()))
                published = time.monotonic()

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)
        telemetry.tick(list(vitals.values()))
