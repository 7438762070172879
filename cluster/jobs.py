"""Studies as Ray jobs, over the Jobs API: submit, find, follow, stop, and submit again to resume.

Every function takes the address of the dashboard first, and raises ClusterError with a text for
people. Ray cannot change what a job was submitted with, so how far a study has come stands in the
last line of its log. A head node that restarts forgets its jobs; the study's storage does not.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ray.job_submission import JobDetails, JobStatus

from cluster.client import Client, connected
from cluster.connect import BEGAN
from cluster.errors import Alive, ClusterError, Refused, Unknown

PACKAGES = ("study", "trainables", "analysis", "cluster")
EXCLUDES = ["studies/", ".venv/", ".git/", "__pycache__/", "*.egg-info/"]
ALIVE = (JobStatus.PENDING, JobStatus.RUNNING)

# `ray job submit ... -- python -m study run x.yaml` tells Ray no name; the log begins with it
_BY_HAND = re.compile(r"(-m study|maskstudy) (run|resume)\b")
_FIRST_LINE = re.compile(r"^study ([a-z0-9][a-z0-9_-]{0,63}): ", re.MULTILINE)
_CONTROL = re.compile(r"[^\n\t -~\u00a0-\U0010ffff]")  # a log may not steer the terminal


class Home(NamedTuple):
    """Tells the jobs of a study from those of a study of that name in another storage."""

    storage: str  # the folder of studies, as the cluster sees it
    drivers: frozenset[str]  # jobs that have driven it, by its own account

    def has(self, job: str, storage: str) -> bool:
        """Whether a job, submitted with such a storage, is or was one of the study's.

        Where a job's storage is not known (""), it is once it drives the study.
        """
        if job in self.drivers or not storage:
            return job in self.drivers
        return os.path.realpath(storage) == os.path.realpath(self.storage)


class Known(NamedTuple):
    """A job of a study, for programs."""

    study: str
    job: str
    status: str
    link: str
    storage: str  # "" where it was submitted by hand


class Standing(NamedTuple):
    """A job of a study, for people."""

    study: str
    job: str
    status: str
    attempt: str
    started: str
    last_line: str  # of its log: how far it has come, or how to go on
    link: str


def submit(
    address: str,
    yaml: Path,
    *,
    study: str,
    question: str,
    storage: str | None,
    studies: str | None = None,
    home: Home | None = None,
) -> tuple[str, str]:
    """Submit a study file; returns (submission id, link to the job in the dashboard).

    The file's folder and our own packages travel with the job, so the nodes need only the
    dependencies. `storage` becomes its MASKSTUDY_STORAGE; `studies`, where its folder of studies is
    known, is told to whoever resumes. Alive: a job of this study is.
    """
    client = connected(address)
    earlier = jobs_of(client, study, home)
    _refuse_if_alive(earlier, study)
    runtime_env = {**code(), "working_dir": str(yaml.resolve().parent)}
    if storage:
        runtime_env["env_vars"] = {"MASKSTUDY_STORAGE": storage}
    metadata = _metadata(address, study, question, studies)
    entrypoint = f"python -m study run {shlex.quote(yaml.name)}"
    last = earlier[-1] if earlier else None
    return _submit(client, entrypoint, runtime_env, metadata, earlier, last)


def resubmit(
    address: str,
    study: str,
    *,
    storage: str | None = None,
    question: str = "",
    home: Home | None = None,
) -> tuple[str, str]:
    """Submit the last job that drove the study again: the ledger makes that a resume.

    Where the head has forgotten it, or has cleared its files away, the folder of studies `storage`,
    as the cluster sees it, holds what is needed: the frozen study file, and everything that was
    done. Unknown: neither is there.
    """
    client = connected(address)
    earlier = jobs_of(client, study, home)
    _refuse_if_alive(earlier, study)
    last = _last_driver(client, earlier)
    if last is not None and _has_its_files(client, last):
        metadata = {**_metadata(address, study, question, storage), **(last.metadata or {})}
        runtime_env = last.runtime_env or {}
        return _submit(client, last.entrypoint, runtime_env, metadata, earlier, last)
    if storage is None:
        what = "no job" if last is None else f"job {last.submission_id} without its files"
        raise Unknown(
            f"{address} knows {what} of study {study!r} (a head node forgets when it restarts, "
            f"and clears away what is old); resume it from its storage: "
            f"maskstudy resume {study} --address {address} --storage DIR, the folder that the "
            f"study's folder lies in"
        )
    entrypoint = f"python -m study resume {study} --storage {shlex.quote(storage)}"
    metadata = _metadata(address, study, question, storage)
    return _submit(client, entrypoint, code(), metadata, earlier, last)


def stop(address: str, study: str, *, home: Home | None = None, timeout: float = 60) -> str | None:
    """Stop the study's running job and wait until it has ended; its id, None if none ran."""
    client = connected(address)
    alive = [job for job in jobs_of(client, study, home) if job.status in ALIVE]
    if len(alive) > 1:
        named = " and ".join(str(job.submission_id) for job in alive)
        raise ClusterError(
            f"{len(alive)} studies called {study!r} run at {address}: jobs {named}; say which "
            f"with --storage, the folder that the study's folder lies in"
        )
    for job in alive:
        client.stop(job.submission_id)
        deadline = time.monotonic() + timeout
        while client.status(job.submission_id) in ALIVE:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {job.submission_id} still runs after {timeout:g} s; see its log: "
                    f"maskstudy logs {study} --address {address}"
                )
            time.sleep(0.5)
        return str(job.submission_id)
    return None


def call(address: str, entrypoint: str, *, variables: dict[str, str], timeout: float) -> str:
    """Run a command as a job, give back its log, and forget the job."""
    client = connected(address)
    job = client.submit(entrypoint, {"env_vars": variables})
    deadline = time.monotonic() + timeout
    while not client.status(job).is_terminal():
        if time.monotonic() > deadline:
            client.stop(job)
            raise ClusterError(f"job {job} had not ended after {timeout:g} s")
        time.sleep(0.5)
    told = client.log(job)
    if client.status(job) is not JobStatus.SUCCEEDED:
        raise ClusterError(f"job {job} failed:\n{_plain(told)}")
    client.delete(job)
    return told


def logs(
    address: str,
    study: str,
    write: Callable[[str], None],
    *,
    home: Home | None = None,
    follow: bool = False,
) -> None:
    """Write the log of the study's newest job; with `follow`, until the job ends."""
    client = connected(address)
    mine = jobs_of(client, study, home)
    if not mine:
        raise Unknown(
            f"{address} knows no job of study {study!r}; those it knows: "
            f"{', '.join(sorted({name for name, _ in _known(client)})) or 'none'}"
        )
    newest = str(mine[-1].submission_id)
    if follow:
        client.follow(newest, lambda text: write(_plain(text)))
    else:
        write(_plain(client.log(newest)))


def standings(address: str, study: str | None = None) -> list[Standing]:
    """All jobs of a study, or the newest job of every study; the newest last."""
    client = connected(address)
    newest = {name: job for name, job in _known(client)}
    chosen = (
        list(newest.items()) if study is None else [(study, job) for job in jobs_of(client, study)]
    )
    return [_standing(client, name, job) for name, job in chosen]


def known(address: str) -> list[Known]:
    """All jobs of studies, the newest last, without a look at what they have said."""
    client = connected(address)
    return [
        Known(
            name,
            str(job.submission_id),
            str(job.status.value),
            _link(address, str(job.submission_id)),
            (job.metadata or {}).get("storage", ""),
        )
        for name, job in _known(client)
    ]


def jobs_of(client: Client, study: str, home: Home | None = None) -> list[JobDetails]:
    """The study's jobs that this cluster remembers; the last to end, or alive, at the end."""
    mine = [job for name, job in _known(client) if name == study]
    if home is None:
        return mine
    return [
        job
        for job in mine
        if home.has(str(job.submission_id), (job.metadata or {}).get("storage", ""))
    ]


def _known(client: Client) -> list[tuple[str, JobDetails]]:
    """Every job of a study with the study's name, by their ends; those that are alive come last.

    So a job that was refused while another one drove the study is not the newest word about it.
    """
    found = []
    for job in sorted(client.jobs(), key=_order):
        if job.submission_id:  # others are drivers that nobody submitted
            name = (job.metadata or {}).get("study")
            if name is None and _BY_HAND.search(job.entrypoint):
                told = _FIRST_LINE.search(client.log(job.submission_id))
                name = told[1] if told else None
            if name is not None:
                found.append((name, job))
    return found


def _order(job: JobDetails) -> tuple[float, float]:
    is_alive = job.status in ALIVE
    return (math.inf if is_alive else job.end_time or 0, job.start_time or 0)


def _refuse_if_alive(jobs: list[JobDetails], study: str) -> None:
    for job in jobs:
        if job.status in ALIVE:
            raise Alive(f"study {study!r} is running already, as job {job.submission_id}")


def _last_driver(client: Client, jobs: list[JobDetails]) -> JobDetails | None:
    """The last of a study's jobs that drove it; where none did, the last of all.

    Others were refused, such as one with a changed study file, and would be refused again.
    """
    for job in reversed(jobs):
        try:
            is_driver = BEGAN in client.log(job.submission_id)
        except Refused:  # the node with its log has gone: nothing speaks against it
            is_driver = True
        if is_driver:
            return job
    return jobs[-1] if jobs else None


def _has_its_files(client: Client, job: JobDetails) -> bool:
    """Whether the packages of a job still lie on the cluster; asking keeps them for a while."""
    env = job.runtime_env or {}
    uris = [env.get("working_dir") or "", *env.get("py_modules", [])]
    return all(client.has_package(uri) for uri in uris if uri.startswith("gcs://"))


def code() -> dict[str, Any]:
    """Our own packages; inside a job Ray has put each of them into a folder of its own."""
    found = map(importlib.util.find_spec, PACKAGES)
    packages = [str(Path(spec.origin).parent) for spec in found if spec and spec.origin]
    return {"py_modules": packages, "excludes": EXCLUDES}


def _metadata(address: str, study: str, question: str, storage: str | None) -> dict[str, str]:
    place = f" --storage {shlex.quote(storage)}" if storage else ""
    return {
        "job_name": f"study {study}",
        "study": study,
        "question": question,
        "resume": f"maskstudy resume {study} --address {address}{place}",
        "storage": storage or "as the study file and MASKSTUDY_STORAGE of the cluster say",
    }


def _submit(
    client: Client,
    entrypoint: str,
    runtime_env: dict[str, Any],
    metadata: dict[str, str],
    earlier: list[JobDetails],
    last: JobDetails | None,
) -> tuple[str, str]:
    attempt = len(earlier) + 1
    resumes = {"resumes": last.submission_id or ""} if last else {}
    submission_id = client.submit(
        entrypoint,
        runtime_env,
        {**metadata, "attempt": str(attempt), **resumes},
        submission_id=f"{metadata['study']}-{attempt}-{time.time_ns() // 1_000_000}",
    )
    return submission_id, _link(client.address, submission_id)


def _standing(client: Client, study: str, job: JobDetails) -> Standing:
    lines = _plain(client.log(job.submission_id)).strip().splitlines()
    began = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC)
    return Standing(
        study=study,
        job=str(job.submission_id),
        status=str(job.status.value),
        attempt=(job.metadata or {}).get("attempt", ""),
        started=began.strftime("%Y-%m-%d %H:%M UTC") if job.start_time else "",
        last_line=lines[-1] if lines else (job.message or ""),
        link=_link(client.address, str(job.submission_id)),
    )


def _link(address: str, job: str) -> str:
    return f"{address.rstrip('/')}/#/jobs/{job}"


def _plain(text: str) -> str:
    return _CONTROL.sub("", text)
