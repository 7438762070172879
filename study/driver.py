"""Run or resume a study on Ray, from the connection to its end: signals, heartbeats, exit codes."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from cluster.connect import BEGAN, Connection, address, connect
from cluster.head import watch_head
from cluster.metrics import Publisher
from study.conductor import Conductor
from study.requests import was_stopped
from study.steps import Finished
from study.telemetry import Telemetry
from trainables.errors import StorageError

if TYPE_CHECKING:
    from study.fleet import Fleet

POLL_SECONDS = 0.5  # of heartbeats and of the request to stop
KEEP_SECONDS = 30  # of time that a driver which is killed may have spent unseen
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
    # meanwhile another thread imports what comes next, as both take seconds; it is not this one
    # that does, since Ray's processes end with the thread that has started them
    with ThreadPoolExecutor(1, "imports") as beside:
        importing = beside.submit(importlib.import_module, "study.tune")
        connection = _connect(conductor)
        importing.result()
    from study.fleet import Fleet

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


def _connect(conductor: Conductor) -> Connection:
    place, say = address(), conductor.progress.say
    say("starting Ray on this machine" if place is None else f"connecting to Ray at {place}")
    return connect(say)


def _drive(conductor: Conductor, fleet: Fleet, scratch: Path) -> None:
    from study.tune import tuner

    fleet.begin()
    errors: list[Exception] = []  # of ours, before Tune made text of them
    study = tuner(conductor, fleet, errors, scratch)
    conductor.progress.start()
    try:
        with _watching(conductor, fleet):
            study.fit()
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
            with suppress(StorageError):  # whoever writes next is told
                conductor.keep_time(KEEP_SECONDS)
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
        with suppress(StorageError):
            conductor.keep_time()
        telemetry.tick(fleet.vitals())
