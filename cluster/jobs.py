"""Studies as Ray jobs, over the Jobs API: submit, find, stop, and submit again to resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

PACKAGES = ("study", "trainables", "analysis", "cluster")
EXCLUDES = ["studies/", ".venv/", ".git/", "__pycache__/", "*.egg-info/"]
ALIVE = (JobStatus.PENDING, JobStatus.RUNNING)


def submit(
    address: str, yaml: Path, *, study: str, question: str, storage: str | None
) -> tuple[str, str]:
    """Submit a study file; returns (submission id, link to the job in the dashboard).

    The file's folder and our own packages travel with the job, so the nodes need only the
    dependencies. Raises RuntimeError while a job of this study is alive.
    """
    client = JobSubmissionClient(address)
    earlier = jobs_of(client, study)
    _refuse_if_alive(earlier, study)
    code = Path(__file__).resolve().parent.parent
    runtime_env: dict[str, Any] = {
        "working_dir": str(yaml.resolve().parent),
        "py_modules": [str(code / package) for package in PACKAGES],
        "excludes": EXCLUDES,
    }
    if storage:
        runtime_env["env_vars"] = {"MASKSTUDY_STORAGE": storage}
    metadata = {
        "job_name": f"study {study}",
        "study": study,
        "question": question,
        "resume": f"maskstudy resume {study} --address {address}",
    }
    entrypoint = f"python -m study run {yaml.name}"
    return _submit(client, address, entrypoint, runtime_env, metadata, earlier)


def resubmit(address: str, study: str) -> tuple[str, str]:
    """Submit the study's last job again: the ledger makes that a resume."""
    client = JobSubmissionClient(address)
    earlier = jobs_of(client, study)
    if not earlier:
        raise RuntimeError(
            f"{address} knows no job of study {study!r} (a head node forgets its jobs when it "
            f"restarts); submit its file again: maskstudy submit STUDY.yaml --address {address}"
        )
    _refuse_if_alive(earlier, study)
    last = earlier[-1]
    return _submit(
        client, address, last.entrypoint, last.runtime_env or {}, last.metadata or {}, earlier
    )


def stop(address: str, study: str, *, timeout: float = 60) -> str | None:
    """Stop the study's running job and wait until it has ended; its id, None if none ran."""
    client = JobSubmissionClient(address)
    for job in jobs_of(client, study):
        if job.status in ALIVE and job.submission_id:
            client.stop_job(job.submission_id)
            deadline = time.monotonic() + timeout
            while client.get_job_status(job.submission_id) in ALIVE:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"job {job.submission_id} still runs after {timeout:g} s")
                time.sleep(0.5)
            return str(job.submission_id)
    return None


def jobs_of(client: JobSubmissionClient, study: str) -> list[JobDetails]:
    """The study's jobs that this cluster remembers, oldest first."""
    found = [job for job in client.list_jobs() if (job.metadata or {}).get("study") == study]
    return sorted(found, key=lambda job: job.start_time or 0)


def _refuse_if_alive(jobs: list[JobDetails], study: str) -> None:
    for job in jobs:
        if job.status in ALIVE:
            raise RuntimeError(f"study {study!r} is running already, as job {job.submission_id}")


def _submit(
    client: JobSubmissionClient,
    address: str,
    entrypoint: str,
    runtime_env: dict[str, Any],
    metadata: dict[str, str],
    earlier: list[JobDetails],
) -> tuple[str, str]:
    attempt = len(earlier) + 1
    resumes = {"resumes": earlier[-1].submission_id or ""} if earlier else {}
    submission_id = client.submit_job(
        entrypoint=entrypoint,
        runtime_env=runtime_env,
        metadata={**metadata, "attempt": str(attempt), **resumes},
        submission_id=f"{metadata['study']}-{attempt}-{int(time.time())}",
    )
    return submission_id, f"{address.rstrip('/')}/#/jobs/{submission_id}"
