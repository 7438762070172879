"""Run or resume a study on Ray. Only this file and its relay import ray.tune.

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
import sys
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

from cluster.connect import NotStarted, address, connect
from cluster.head import watch_head
from cluster.jobs import BEGAN
from cluster.metrics import Publisher
from cluster.placement import MOST
from study.conductor import Conductor
from study.fleet import Fleet
from study.ledger import Suggestion
from study.relay import relay
from study.requests import was_stopped
from study.resume import Finished, Wait
from study.telemetry import Telemetry
from trainables.desk import WITHDRAWN
from trainables.errors import RayStartError, StorageError, UserError
from trainables.slot import quiet_environment

POLL_SECONDS = 0.5  # of heartbeats and of the request to stop
PUBLISH_SECONDS = 5  # of metrics; Ray passes them on every 10 s
EXIT_LOST = 69  # the head is gone
FAREWELL_SECONDS = 20  # that idle workers get to go home


def drive(conductor: Conductor) -> None:
    """Run what is left of the study. KeyboardInterrupt: asked to stop; everything is kept."""
    if isinstance(conductor.next_step(), Finished):
        conductor.progress.say("nothing is left to do: every trial of the study has ended")
        return
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's own tables would fight with ours
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    place = address()
    if place is None:
        conductor.progress.say("starting Ray on this machine")
    else:
        conductor.progress.say(f"connecting to Ray at {place}")
    try:
        connection = connect(env_vars=quiet_environment(), say=conductor.progress.say)
    except NotStarted as error:
        raise RayStartError(f"Ray on this machine: {error}") from error
    except (RuntimeError, ConnectionError, ray.exceptions.AuthenticationError) as error:
        if place is None:
            raise UserError(f"Ray on this machine: {error}") from error
        raise UserError(
            f"Ray at {place}: {error}; expected a head that runs there and can be reached, and, "
            f"where it wants a token, RAY_AUTH_MODE=token with the token in ~/.ray/auth_token or "
            f"RAY_AUTH_TOKEN"
        ) from error
    # the dashboard shows a job's log, and cannot resume by itself
    how_to_resume = f"{BEGAN}maskstudy resume {conductor.ledger.folder.in_commands}"
    if connection.job_id and connection.dashboard:
        how_to_resume += f" --address {connection.dashboard}"
    conductor.progress.say(how_to_resume)
    folder = conductor.ledger.folder
    # Ray insists on storage that all nodes see, those to come too; nothing in it is read back
    is_shared = not connection.is_private and not folder.remote
    shared = folder.root.resolve() if is_shared else None
    for left in folder.root.glob(".ray-*"):  # by a driver that was killed
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=".ray-", dir=shared))
    fleet = Fleet(conductor, scratch, is_one_machine=connection.is_private)

    def give_up(seconds: float) -> None:
        conductor.progress.stop()
        conductor.progress.say(
            f"the head at {connection.head} has not answered for {seconds:.0f} s; what was "
            f"acknowledged is kept; {how_to_resume}"
        )
        sys.stdout.flush()
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(EXIT_LOST)  # calls of Ray that wait for the head cannot be interrupted

    watch = watch_head(connection.head, give_up)
    try:
        with _interruptible():
            _drive(conductor, fleet, scratch)
    except KeyboardInterrupt:
        conductor.progress.say(f"interrupted, nothing is lost; {how_to_resume}")
        raise
    finally:
        watch.set()
        fleet.leave(FAREWELL_SECONDS)
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _drive(conductor: Conductor, fleet: Fleet, scratch: Path) -> None:
    fleet.begin()
    errors: list[Exception] = []  # of ours, before Tune made text of them
    tuner = _tuner(conductor, fleet, errors, scratch)
    conductor.progress.start()
    try:
        with _watching(conductor, fleet):
            tuner.fit()
    except KeyboardInterrupt:
        conductor.ledger.refuse_if_fenced()
        lost = fleet.lost()
        if lost is not None:
            raise RuntimeError(f"the worker group {lost.name} is gone") from lost.error
        raise
    except Exception as error:
        raise (errors[0] if errors else error) from None
    finally:
        conductor.progress.stop()
    if errors:
        raise errors[0]
    conductor.progress.say_first_steps()
    fleet.close(FAREWELL_SECONDS)


def _tuner(
    conductor: Conductor, fleet: Fleet, errors: list[Exception], scratch: Path
) -> ray.tune.Tuner:
    # Tune wants a resource, and the slots have the CPUs; beside the driver, where no node is lost
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    place = ray.tune.PlacementGroupFactory([{"memory": 1 << 20}], bundle_label_selector=[here])
    return ray.tune.Tuner(
        ray.tune.with_resources(relay, place),
        tune_config=ray.tune.TuneConfig(
            search_alg=_Searcher(conductor, fleet, errors),
            scheduler=_Scheduler(conductor, fleet, errors),
            num_samples=-1,
            max_concurrent_trials=MOST,
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


class _Adapter:
    """What both adapters know. Tune pickles them at its start; their state is the ledger."""

    def __init__(self, conductor: Conductor, fleet: Fleet, errors: list[Exception]) -> None:
        super().__init__()
        self.conductor, self.fleet, self.errors = conductor, fleet, errors

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

    def __init__(self, conductor: Conductor, fleet: Fleet, errors: list[Exception]) -> None:
        super().__init__(conductor, fleet, errors)
        self._taken: dict[str, tuple[str, Suggestion]] = {}  # by Tune's id
        self._lost: dict[str, int] = {}  # trial -> worker groups it had lost when handed back

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        slot = self.fleet.take()
        with self.keeping_errors():
            if self.errors:
                raise self.errors[0]
            if slot is None:
                is_over = self.fleet.is_idle and isinstance(self.conductor.next_step(), Finished)
                return str(Searcher.FINISHED) if is_over else None
            step = self.conductor.next()
            if isinstance(step, Finished | Wait):
                self.fleet.free(slot, has_ended=False)
                return str(Searcher.FINISHED) if isinstance(step, Finished) else None
            job = {**self.conductor.job(step), "lost": self._lost.get(step.trial, 0)}
        self._taken[trial_id] = (slot, step)
        # the workers need not wait until Tune has started the relay, which places the same job
        self.fleet.place(slot, job)
        desk = self.fleet.desk_name(slot)
        return {"slot": slot, "desk": desk, "job": job, "number": step.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        slot, suggestion = self._taken.pop(trial_id)
        if error or result is None or "outcome" not in result:
            result = {"outcome": "lost", "error": "its relay in Ray Tune died"}
        is_warm = self.fleet.free(slot, has_ended=result["outcome"] != WITHDRAWN)
        # Tune would log a storage that fails and go on; it learns of it when it next asks
        with suppress(StorageError), self.keeping_errors():
            if result["outcome"] == WITHDRAWN:
                self._lost[suggestion.trial] = result["lost"]
                self.conductor.hand_back(suggestion)
                return
            waited = result.get("first_step_seconds")
            self.conductor.progress.first_step(waited, is_warm=is_warm)
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
            self.fleet.decide(trial.config["slot"], result["number"], stop)
        elif "stacks" in result:
            suggestion = self.conductor.suggestions[trial.config["number"]]
            attempt = f"{trial.config['job']['attempt']}.{result['group']}"
            with self.keeping_errors():
                self.conductor.hung(suggestion, attempt, result["worker"], result["stacks"])
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
def _watching(conductor: Conductor, fleet: Fleet) -> Iterator[None]:
    """Beside Tune's loop: show heartbeats, publish metrics, and heed `maskstudy stop`."""
    ended = threading.Event()
    telemetry = Telemetry(conductor, Publisher(conductor.spec.study).publish)
    ledger, folder = conductor.ledger, conductor.ledger.folder

    def watch() -> None:
        published = 0.0
        while not ended.wait(POLL_SECONDS):
            was_asked = was_stopped(folder)
            if was_asked:
                conductor.progress.say("asked to stop")
            if was_asked or ledger.is_fenced or fleet.lost() is not None:
                os.kill(os.getpid(), signal.SIGINT)  # Tune's loop has the main thread
                return
            fleet.tick()
            for trial, text in fleet.waiting():
                conductor.progress.waiting(trial, text)
            for vital in fleet.vitals():
                beat = vital["beat"]
                if beat:
                    conductor.progress.beat(
                        beat["trial"],
                        beat["phase"],
                        beat["progress"],
                        beat["images_per_second"],
                    )
            if time.monotonic() - published > PUBLISH_SECONDS:
                telemetry.tick(fleet.vitals())
                published = time.monotonic()

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)
        telemetry.tick(fleet.vitals())
