"""The four things that the console can do to a study: resume, stop, extend, enqueue.

To add one, write the function and add it to ACTIONS. Each returns what was done in a sentence, and
raises UserError, StorageError or ClusterError with what to tell instead. Nothing else of the Jobs
API is offered; `cluster.jobs` imports Ray, so it is imported once a cluster is asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError
from study import requests
from study.folder import Storage, StudyFolder
from study.ledger import is_held, read_holder, read_jobs
from study.spec import UNITS
from trainables.errors import StorageError, UserError

if TYPE_CHECKING:
    from cluster.jobs import Home, Known

CODE = Path(__file__).resolve().parent.parent.parent
BIRTH_SECONDS = 30.0  # that a driver gets to take the study; it may still come later
FAILURE_SECONDS = 2.0  # within which a driver that has taken it says that it cannot go on
JOBS_SECONDS = 3.0  # for which a list of jobs counts as new
LOG_LINES = 400


@dataclass
class Drivers:
    """Where studies are resumed: as jobs of the cluster at `address`, else on this machine."""

    address: str | None
    storage: Storage
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _jobs: list[Known] = field(default_factory=list)
    _jobs_read: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _submitting: threading.Lock = field(default_factory=threading.Lock)

    def job(self, folder: StudyFolder) -> dict[str, str] | None:
        """id, status, link of the study's last job; None where no cluster knows one."""
        if self.address is None:
            return None
        with self._lock:
            if time.monotonic() - self._jobs_read > JOBS_SECONDS:
                self._jobs_read = time.monotonic()
                threading.Thread(target=self._read_jobs, daemon=True).start()
        name, home = folder.root.name, self.home(folder)
        mine = [job for job in self._jobs if job.study == name and home.has(job.job, job.storage)]
        if not mine:
            return None
        return {"id": mine[-1].job, "status": mine[-1].status, "link": mine[-1].link}

    def home(self, folder: StudyFolder) -> Home:
        """What tells this study's jobs from those of one of that name elsewhere."""
        from cluster.jobs import Home

        return Home(str(self.storage), read_jobs(folder))

    def _read_jobs(self) -> None:
        from cluster import jobs

        assert self.address is not None
        # while the head is away, what it said last stands
        with suppress(ClusterError):
            self._jobs = jobs.known(self.address)

    def log(self, study: StudyFolder) -> tuple[str, str]:
        """Where the last driver's words come from, and the last of them."""
        job = self.job(study)
        if job is not None and self.address is not None:
            from cluster import jobs

            words: list[str] = []
            try:
                jobs.logs(self.address, study.root.name, words.append, home=self.home(study))
            except ClusterError as error:
                return f"job {job['id']}", f"its log cannot be read: {error}"
            return f"job {job['id']}", _last_lines("".join(words))
        if study.console_log.is_file() and not study.console_log.is_symlink():
            with study.console_log.open("rb") as file:
                file.seek(max(0, study.console_log.stat().st_size - 200_000))
                return study.console_log.name, _last_lines(file.read().decode(errors="replace"))
        return "", ""


def resume(drivers: Drivers, folder: StudyFolder, asked: dict[str, Any]) -> str:
    """Submit the study's job again; without a cluster, start a driver on this machine."""
    _expect(asked)
    name = folder.root.name
    if is_held(folder):
        raise UserError(f"{name} is running already")
    if drivers.address is None:
        return _resume_here(drivers, folder)
    from cluster import jobs

    storage, home = str(drivers.storage), drivers.home(folder)
    with drivers._submitting:  # of two people at once, the second is told of the first one's job
        # the storage says what to do where the head has forgotten its jobs
        job, _ = jobs.resubmit(drivers.address, name, storage=storage, home=home)
    drivers._jobs_read = 0.0
    return f"{name} goes on as job {job}"


def stop(drivers: Drivers, folder: StudyFolder, asked: dict[str, Any]) -> str:
    """Stop the study's job, or ask its driver, wherever that runs."""
    _expect(asked)
    name = folder.root.name
    is_by_hand = is_held(folder) and (read_holder(folder) or {}).get("job") is None
    if drivers.address is not None and not is_by_hand:
        from cluster import jobs

        job = jobs.stop(drivers.address, name, home=drivers.home(folder))
        drivers._jobs_read = 0.0
        if job is not None:
            return f"{name} has been stopped (job {job}); nothing is lost"
    if not is_held(folder):
        raise UserError(f"{name} is not running")
    requests.stop(folder)
    return f"{name} has been asked to stop; its trials keep what they have"


def extend(drivers: Drivers, folder: StudyFolder, asked: dict[str, Any]) -> str:
    """Grow the budget, by some searched trials or more of another unit that it has."""
    unit = next(iter(asked), "trials")
    _expect(asked, unit if unit in UNITS else "trials")
    amount = asked[unit]
    wanted, kinds = ("a whole number", int) if unit == "trials" else ("a number", int | float)
    if not isinstance(amount, kinds) or isinstance(amount, bool):
        raise UserError(f"{unit}: given {str(amount)[:40]!r}; expected {wanted}")
    return requests.extend(folder, amount, unit)


def enqueue(drivers: Drivers, folder: StudyFolder, asked: dict[str, Any]) -> str:
    """Have an arm tried before the sampler's next one."""
    _expect(asked, "settings")
    settings = asked["settings"]
    if not isinstance(settings, dict) or not settings:
        raise UserError("settings: expected at least one dotted path with its value")
    return requests.enqueue(folder, settings)


def _resume_here(drivers: Drivers, folder: StudyFolder) -> str:
    """A driver of its own session: it goes on when the console ends."""
    name, storage = folder.root.name, str(folder.storage)
    with drivers._lock:
        before = drivers._processes.get(name)
        if before is not None and before.poll() is None:
            raise UserError(f"{name} is being resumed already")
        path = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{CODE}{os.pathsep}{path}" if path else str(CODE),
        }
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with os.fdopen(os.open(folder.console_log, flags, 0o666), "wb") as log:
                driver = subprocess.Popen(
                    [sys.executable, "-m", "study", "resume", name, "--storage", storage],
                    cwd=folder.root.parent,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise StorageError(f"{name}: no driver could be started: {error.strerror}") from error
        drivers._processes[name] = driver
    taken = None
    deadline = time.monotonic() + BIRTH_SECONDS
    while time.monotonic() < (deadline if taken is None else taken + FAILURE_SECONDS):
        if driver.poll() is not None:
            if driver.returncode == 0:
                return f"{name} has nothing left to do"
            said = _last_lines(folder.console_log.read_text(errors="replace"))[-1000:]
            raise UserError(f"{name} could not go on: {said}")
        if taken is None and is_held(folder):
            taken = time.monotonic()
        time.sleep(0.1)
    verb = "starts" if taken is None else "goes on"
    return f"{name} {verb} on this machine (process {driver.pid})"


def _expect(asked: dict[str, Any], *keys: str) -> None:
    if set(asked) != set(keys):
        words = " and ".join(keys) or "nothing"
        raise UserError(f"given {sorted(map(str, asked))[:5]}; expected {words}")


def _last_lines(words: str) -> str:
    return "\n".join(words.splitlines()[-LOG_LINES:])


ACTIONS: dict[str, Callable[[Drivers, StudyFolder, dict[str, Any]], str]] = {
    "resume": resume,
    "stop": stop,
    "extend": extend,
    "enqueue": enqueue,
}
