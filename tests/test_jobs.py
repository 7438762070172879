"""The quickstart as a Ray job on a real head node, stopped midway and submitted again.

pytest tests/test_jobs.py
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import jobs
from cluster.head import TIMEOUT
from study.folder import StudyFolder
from study.ledger import Ledger, Outcome, is_held, read_results, read_rows, read_suggestions
from tests.clusters import started_head
from tests.machine import free_ports, wait_until

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
    storage = tmp_path_factory.mktemp("storage")
    with running_head(tmp_path_factory.mktemp("home"), storage) as address:
        yield address, storage


@contextmanager
def running_head(
    home: Path, storage: Path, is_ready: Callable[[str], bool] | None = None
) -> Iterator[str]:
    """A job's driver joins the newest cluster of its temporary folder, so each head has its own."""
    ports = free_ports(4)
    scratch = tempfile.mkdtemp(prefix="ms-", dir="/tmp")  # short, for the names of sockets
    variables = {
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "MASKSTUDY_STORAGE": str(storage),
        "RAY_TMPDIR": scratch,
        TIMEOUT: "5",  # seconds that drivers wait for this head when it is gone
    }
    options = ("--num-cpus=2", f"--temp-dir={scratch}")
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        with started_head(home / "head.log", ports, *options, **variables) as node:
            wait_for_jobs_api(address, node, is_ready or answers)
            yield address
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
    assert f"{jobs.BEGAN}maskstudy resume quickstart" in log

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
    # long enough to be still running when it is asked for twice more
    tiny_study.write_text(tiny_study.read_text().replace("trials: 4", "trials: 8"))
    done = maskstudy("submit", str(tiny_study), "--address", address, "--storage", str(storage))
    assert "maskstudy resume tiny" in done.stdout
    twice = maskstudy("submit", str(tiny_study), "--address", address, check=False)
    assert twice.returncode == 75
    assert "is running already" in twice.stderr
    assert maskstudy("resume", "tiny", "--address", address, check=False).returncode == 75
    client = jobs.JobSubmissionClient(address)
    (job,) = jobs.jobs_of(client, "tiny")
    assert job.metadata is not None
    assert job.metadata["job_name"] == "study tiny"
    assert job.metadata["question"] == "Does it run?"
    assert job.metadata["storage"] == str(storage / "studies")
    followed = maskstudy("logs", "tiny", "--address", address, "--follow").stdout
    assert "8/8 trials" in followed
    wait_until(lambda: client.get_job_status(job.submission_id).is_terminal(), 60)
    assert client.get_job_status(job.submission_id) == jobs.JobStatus.SUCCEEDED
    assert maskstudy("logs", "tiny", "--address", address).stdout == followed

    finished = maskstudy("submit", str(tiny_study), "--address", address, "--storage", str(storage))
    assert "tiny is finished: nothing is left to do" in finished.stdout
    assert len(jobs.jobs_of(client, "tiny")) == 1, "a finished study was submitted"
    maskstudy("extend", "tiny", "--trials", "1", "--storage", str(storage / "studies"))

    maskstudy("resume", "tiny", "--address", address, "--storage", str(storage / "studies"))
    again = jobs.jobs_of(client, "tiny")[-1]
    assert again.metadata is not None
    assert (again.metadata["attempt"], again.metadata["resumes"]) == ("2", job.submission_id)
    wait_until(lambda: client.get_job_status(again.submission_id).is_terminal(), 200)
    assert "9/9 trials" in client.get_job_logs(again.submission_id)
    table = maskstudy("status", "tiny", "--address", address).stdout
    assert table.count("SUCCEEDED") == 2


def test_a_job_submitted_by_hand_is_found_by_the_name_of_its_study(
    head: tuple[str, Path], tiny_study: Path
) -> None:
    address, storage = head
    text = tiny_study.read_text().replace("study: tiny", "study: by-hand")
    tiny_study.write_text(text.replace("trials: 4", "trials: 400"))  # it is stopped, twice
    folder = StudyFolder(storage / "studies" / "by-hand")
    job = ray_job_submit(address, tiny_study.parent, tiny_study.name)
    wait_until(lambda: folder.spec.exists(), 120)
    held = maskstudy(
        "submit", str(tiny_study), "--address", address, "--storage", str(storage), check=False
    )
    assert held.returncode == 75
    assert job in held.stderr
    assert job in maskstudy("status", "--address", address).stdout
    assert f"stopped job {job}" in maskstudy("stop", "by-hand", "--address", address).stdout
    assert job_status(address, job) == "STOPPED"
    kept = read_results(folder)
    assert job not in maskstudy("resume", "by-hand", "--address", address).stdout
    wait_until(lambda: len(read_results(folder)) > len(kept), 200)
    assert job not in maskstudy("stop", "by-hand", "--address", address).stdout
    assert maskstudy("status", "by-hand", "--address", address).stdout.count("STOPPED") == 2
    assert all(read_results(folder)[trial] == result for trial, result in kept.items())


def test_a_job_of_a_study_that_somebody_holds_says_so_and_ends_with_75(
    head: tuple[str, Path], tiny_study: Path
) -> None:
    address, storage = head
    tiny_study.write_text(tiny_study.read_text().replace("study: tiny", "study: held"))
    with Ledger.open(StudyFolder(storage / "studies" / "held"), {"who": "another driver"}):
        job = ray_job_submit(address, tiny_study.parent, tiny_study.name)
        wait_until(lambda: job_status(address, job) == "FAILED", 120)
    message = jobs.JobSubmissionClient(address).get_job_info(job).message
    assert "exit code 75" in str(message), message
    assert "who another driver" in maskstudy("logs", "held", "--address", address).stdout


def test_a_job_that_was_refused_meanwhile_is_not_the_last_word_on_a_study(
    head: tuple[str, Path],
) -> None:
    address, _ = head
    client = jobs.JobSubmissionClient(address)
    driver = submit_code(client, "word", "import time; print('1/4', flush=True); time.sleep(900)")
    wait_until(lambda: "1/4" in client.get_job_logs(driver), 60)
    refused = submit_code(client, "word", "raise SystemExit('held by epoch 1')")
    wait_until(lambda: client.get_job_status(refused).is_terminal(), 60)
    for _ in ("while it runs", "and when it has ended"):
        told: list[str] = []
        jobs.logs(address, "word", told.append)
        assert "1/4" in told[0]
        newest = [one.job for one in jobs.standings(address) if one.study == "word"]
        assert newest == [driver]
        assert [one.job for one in jobs.known(address) if one.study == "word"] == [refused, driver]
        client.stop_job(driver)
        wait_until(lambda: client.get_job_status(driver).is_terminal(), 60)


def test_the_job_that_drove_a_study_is_submitted_again_not_one_that_was_refused(
    head: tuple[str, Path],
) -> None:
    address, _ = head
    client = jobs.JobSubmissionClient(address)

    def ended(study: str, code: str) -> str:
        job = submit_code(client, study, code)
        wait_until(lambda: client.get_job_status(job).is_terminal(), 60)
        return job

    def entrypoint(job: str) -> str:
        return str(client.get_job_info(job).entrypoint)

    drove = ended("twice", f"print({jobs.BEGAN!r})")
    ended("twice", "raise SystemExit('twice was begun with other settings')")
    again, _ = jobs.resubmit(address, "twice")
    assert entrypoint(again) == entrypoint(drove)
    assert (client.get_job_info(again).metadata or {})["resumes"] == drove
    only = ended("never", "raise SystemExit('no such data')")
    again, _ = jobs.resubmit(address, "never")
    assert entrypoint(again) == entrypoint(only)


def submit_code(client: jobs.JobSubmissionClient, study: str, code: str) -> str:
    """A job of a study that does no more than this."""
    entrypoint = shlex.join([sys.executable, "-c", code])
    return str(client.submit_job(entrypoint=entrypoint, metadata={"study": study}))


def test_a_head_that_was_killed_has_forgotten_its_jobs_and_the_storage_has_not(
    tmp_path: Path, tiny_study: Path
) -> None:
    storage, home = tmp_path / "storage", tmp_path / "home"
    home.mkdir()
    folder = StudyFolder(storage / "studies" / "tiny")
    with running_head(home, storage) as address:
        maskstudy("submit", str(tiny_study), "--address", address, "--storage", str(storage))
        wait_until(lambda: folder.spec.exists() and len(read_results(folder)) >= 1, 200)
    # its driver looks for the head for a while before it gives up; until then it holds the study
    wait_until(lambda: not is_held(folder), 15)
    kept = read_results(folder)
    assert len(kept) < 4
    with running_head(home, storage) as address:
        lost = maskstudy("resume", "tiny", "--address", address, check=False)
        assert lost.returncode == 2
        assert f"maskstudy resume tiny --address {address} --storage" in lost.stderr
        studies = str(storage / "studies")
        maskstudy("resume", "tiny", "--address", address, "--storage", studies)
        client = jobs.JobSubmissionClient(address)
        (job,) = jobs.jobs_of(client, "tiny")
        assert job.metadata is not None
        assert job.metadata["question"] == "Does it run?"
        wait_until(lambda: client.get_job_status(job.submission_id).is_terminal(), 200)
        log = client.get_job_logs(job.submission_id)
        assert job_status(address, job.submission_id) == "SUCCEEDED", log
    results = read_results(folder)
    assert len(results) == 4
    assert all(results[trial] == result for trial, result in kept.items())


def ray_job_submit(
    address: str, folder: Path = ROOT, study: str = "study/examples/quickstart.yaml"
) -> str:
    """`ray job submit --working-dir . -- python -m study run ...`, as a user would type it."""
    name = f"by-hand-{time.time_ns()}"
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
        study,
        folder=folder,
    )
    return name


def ray_job(address: str, command: str, *arguments: str, folder: Path = ROOT) -> str:
    done = subprocess.run(
        [str(BIN / "ray"), "job", command, "--address", address, *arguments],
        cwd=folder,
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
        [sys.executable, "-m", "study", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def wait_for_jobs_api(
    address: str, node: subprocess.Popen[bytes], is_ready: Callable[[str], bool]
) -> None:
    def is_up() -> bool:
        assert node.poll() is None, "the head node has died"
        return is_ready(address)

    wait_until(is_up, 120)


def answers(address: str) -> bool:
    try:
        jobs.JobSubmissionClient(address).list_jobs()
    except (ConnectionError, RuntimeError):
        return False
    return True
