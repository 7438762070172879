"""What is told and chosen of a study's jobs, by a Jobs API that is only played.

pytest tests/test_jobs_known.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from cluster import jobs

ADDRESS = "http://127.0.0.1:8265"
ROOT = Path(__file__).parent.parent


class Played:
    """A Jobs API that knows some jobs, each with its log, and keeps what is submitted."""

    def __init__(self, *known: tuple[JobDetails, str]) -> None:
        self.known = known
        self.submitted: list[dict[str, Any]] = []

    def list_jobs(self) -> list[JobDetails]:
        return [each for each, _ in self.known]

    def get_job_logs(self, job: str) -> str:
        return next(log for each, log in self.known if each.submission_id == job)

    def submit_job(self, **given: Any) -> str:
        self.submitted.append(given)
        return str(given["submission_id"])


def job(name: str, status: JobStatus, start: int, end: int | None, entrypoint: str) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION,
        submission_id=name,
        status=status,
        start_time=start,
        end_time=end,
        entrypoint=entrypoint,
        metadata={"study": "tiny"},
    )


Play = Callable[..., Played]
RUN = "python -m study run tiny.yaml"


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    def play(*known: tuple[JobDetails, str]) -> Played:
        played = Played(*known)
        monkeypatch.setattr(jobs, "JobSubmissionClient", lambda address: played)
        return played

    return play


@pytest.mark.parametrize("is_over", [False, True])
def test_a_job_that_was_refused_meanwhile_is_not_the_last_word_on_a_study(
    play: Play, is_over: bool
) -> None:
    driver = (
        job("driver", JobStatus.SUCCEEDED, 1, 9, RUN)
        if is_over
        else job("driver", JobStatus.RUNNING, 1, None, RUN)
    )
    refused = job("refused", JobStatus.FAILED, 2, 3, RUN)
    play((driver, "4/4 trials"), (refused, "held by epoch 1"))
    assert [one.job for one in jobs.standings(ADDRESS)] == ["driver"]
    assert [one.job for one in jobs.known(ADDRESS)] == ["refused", "driver"]
    told: list[str] = []
    jobs.logs(ADDRESS, "tiny", told.append)
    assert told == ["4/4 trials"]


def test_the_job_that_drove_a_study_is_submitted_again_not_one_that_was_refused(play: Play) -> None:
    began = "[    0 s] to go on if interrupted: maskstudy resume tiny --storage /studies"
    drove = (job("drove", JobStatus.STOPPED, 1, 2, RUN), began)
    changed = job("changed", JobStatus.FAILED, 3, 4, "python -m study run changed.yaml")
    refused = (changed, "maskstudy: tiny was begun with other settings")
    played = play(drove, refused)
    jobs.resubmit(ADDRESS, "tiny")
    assert played.submitted[0]["entrypoint"] == RUN
    played = play(refused)
    jobs.resubmit(ADDRESS, "tiny")
    assert played.submitted[0]["entrypoint"] == changed.entrypoint, "there is no other"


class Stranger(BaseHTTPRequestHandler):
    """Some other server: its answers are found by their path."""

    ANSWERS: ClassVar = {
        "/page": (200, b"<html>"),
        "/other": (200, b'{"version": 1}'),
        "/closed": (401, b"the door's key is needed"),
    }

    def do_GET(self) -> None:
        status, found = self.ANSWERS.get(self.path.removesuffix("/api/version"), (404, b""))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(found)

    def log_message(self, *_: Any) -> None:
        pass


def test_an_address_of_something_else_is_refused_with_what_is_expected() -> None:
    with pytest.raises(RuntimeError, match=r"--address: given .*#/jobs'; expected the dashboard's"):
        jobs.known("http://127.0.0.1:8265/#/jobs")
    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for path in ("", "/page", "/other"):
            with pytest.raises(RuntimeError, match="what answers there is no Ray dashboard"):
                jobs.known(address + path)
        with pytest.raises(RuntimeError, match=r"wants a token; .*the door's key is needed"):
            jobs.known(f"{address}/closed")
        server.shutdown()


def test_our_packages_are_found_where_ray_unpacks_each_into_a_folder_of_its_own(
    tmp_path: Path,
) -> None:
    packages = ("study", "trainables", "analysis", "cluster")
    for package in packages:
        shutil.copytree(ROOT / package, tmp_path / f"of-{package}" / package)
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json; from cluster import jobs; print(json.dumps(jobs.code()))",
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(tmp_path / f"of-{name}") for name in packages),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout)["py_modules"] == [
        str(tmp_path / f"of-{package}" / package) for package in packages
    ]
