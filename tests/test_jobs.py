"""The quickstart as a Ray job on a real head node, stopped midway and submitted again.

pytest tests/test_jobs.py
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import jobs
from study.folder import StudyFolder
from study.ledger import Outcome, read_results, read_rows, read_suggestions

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, about itself
]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A head node with a dashboard of its own: (address, storage of its jobs)."""
    home = tmp_path_factory.mktemp("home")
    storage = tmp_path_factory.mktemp("storage")
    gcs, dashboard, client, agent = free_ports(4)
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "MASKSTUDY_STORAGE": str(storage),
        "RAY_TMPDIR": "/tmp",
    }
    log = (home / "head.log").open("w")
    node = subprocess.Popen(
        [
            str(BIN / "ray"),
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            "--disable-usage-stats",
            "--node-ip-address=127.0.0.1",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",  # jobs go through it; others may have 52365
        ],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_jobs_api(address, node)
        yield address, storage
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        try:
            node.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        log.close()


def test_the_quickstart_is_stopped_midway_and_submitted_again(head: tuple[str, Path]) -> None:
    address, storage = head
    folder = StudyFolder(storage / "studies" / "quickstart")

    first = ray_job_submit(address)
    wait_until(lambda: folder.spec.exists() and len(read_results(folder)) >= 4, 400)
    rows_before = read_rows(folder)
    ray_job(address, "stop", first)
    ended_before = {trial: r for trial, r in read_results(folder).items()}
    assert len(ended_before) < 14, "the job was not stopped midway"

    second = ray_job_submit(address)
    wait_until(lambda: job_status(address, second) not in ("PENDING", "RUNNING"), 500)
    log = ray_job(address, "logs", second)
    assert job_status(address, second) == "SUCCEEDED", log
    assert "maskstudy resume quickstart" in log

    suggestions, results = read_suggestions(folder), read_results(folder)
    assert len(suggestions) == len(results) == 14
    assert len({s.arm for s in suggestions}) == 14
    assert {r.outcome for r in results.values()} <= {Outcome.COMPLETE, Outcome.STOPPED}
    for trial, result in ended_before.items():
        assert results[trial] == result, "a finished trial was run again"
    rows = read_rows(folder)
    assert not rows.duplicated(["trial", "phase", "step", "metric"]).any()
    assert len(rows.merge(rows_before, how="inner")) == len(rows_before)
    assert folder.report.exists()
    for suggestion in suggestions:
        if results[suggestion.trial].outcome is Outcome.COMPLETE:
            assert (folder.pictures(suggestion.trial) / "segmentation.png").exists()


def test_our_own_submit_and_resume_tell_the_dashboard_what_runs(
    head: tuple[str, Path], tiny_study: Path
) -> None:
    address, storage = head
    done = maskstudy("submit", str(tiny_study), "--address", address, "--storage", str(storage))
    assert "maskstudy resume tiny" in done.stdout
    twice = maskstudy("submit", str(tiny_study), "--address", address, check=False)
    assert twice.returncode == 2
    assert "is running already" in twice.stderr
    client = jobs.JobSubmissionClient(address)
    (job,) = jobs.jobs_of(client, "tiny")
    assert job.metadata is not None
    assert job.metadata["job_name"] == "study tiny"
    assert job.metadata["question"] == "Does it run?"
    wait_until(lambda: client.get_job_status(job.submission_id).is_terminal(), 200)
    assert client.get_job_status(job.submission_id) == jobs.JobStatus.SUCCEEDED

    maskstudy("resume", "tiny", "--address", address)
    again = jobs.jobs_of(client, "tiny")[-1]
    assert again.metadata is not None
    assert (again.metadata["attempt"], again.metadata["resumes"]) == ("2", job.submission_id)
    wait_until(lambda: client.get_job_status(again.submission_id).is_terminal(), 100)
    assert "nothing is left to do" in client.get_job_logs(again.submission_id)


def ray_job_submit(address: str) -> str:
    """`ray job submit --working-dir . -- python -m study run ...`, as a user would type it."""
    name = f"quickstart-{time.time_ns()}"
    ray_job(
        address,
        "submit",
        "--no-wait",
        f"--submission-id={name}",
        "--working-dir",
        ".",
        "--",
        "python",
        "-m",
        "study",
        "run",
        "study/examples/quickstart.yaml",
    )
    return name


def ray_job(address: str, command: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(BIN / "ray"), "job", command, "--address", address, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def job_status(address: str, job: str) -> str:
    return str(jobs.JobSubmissionClient(address).get_job_status(job).value)


def maskstudy(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "study", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def wait_for_jobs_api(address: str, node: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        assert node.poll() is None, "the head node has died"
        try:
            jobs.JobSubmissionClient(address).list_jobs()
        except (ConnectionError, RuntimeError):
            return False
        return True

    wait_until(answers, 120)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
