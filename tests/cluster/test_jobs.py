"""Studies as Ray jobs on a real head node.  pytest tests/cluster/test_jobs.py"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster import jobs
from cluster.client import connected
from study.folder import StudyFolder
from study.ledger import Ledger, Outcome, is_held, read_results, read_rows, read_suggestions
from tests.clusters import BIN, Head, held_still, job_status, maskstudy, running_head
from tests.conftest import TINY_STUDY
from tests.machine import wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, about itself
]


def test_a_job_submitted_by_hand_is_found_stopped_resumed_and_submitted_again(
    head: Head, tmp_path: Path
) -> None:
    trials, text = 6, TINY_STUDY.replace("study: tiny", "study: by-hand")
    text = text.replace("trials: 4", f"trials: {trials}")
    text = text.replace("{name: none}", "{name: halving, metric: segment/miou}")
    (tmp_path / "mine.yaml").write_text(text)
    folder = StudyFolder(head.storage / "studies" / "by-hand")
    to_it = ("--address", head.dashboard)

    first = ray_job_submit(head, tmp_path)
    wait_until(lambda: folder.spec.exists() and len(read_results(folder)) >= 1, 300)
    with held_still(head.mark):
        again = ("submit", str(tmp_path / "mine.yaml"), *to_it, "--storage", str(head.storage))
        refused = maskstudy(*again, check=False)
        assert refused.returncode == 75
        assert first in refused.stderr
        assert first in maskstudy("status", *to_it).stdout
        assert f"stopped job {first}" in maskstudy("stop", "by-hand", *to_it).stdout
    assert job_status(head.dashboard, first) == "STOPPED"
    rows, kept = read_rows(folder), read_results(folder)
    assert len(kept) < trials, "it was not stopped midway"

    assert first not in maskstudy("resume", "by-hand", *to_it).stdout
    wait_until(lambda: len(read_results(folder)) > len(kept), 300)
    with held_still(head.mark):
        (second,) = by_status(head, "by-hand", "RUNNING")
        ray_job(head, "stop", second)
    assert by_status(head, "by-hand", "STOPPED") == {first, second}
    kept_later = read_results(folder)
    assert len(kept_later) < trials, "it was not stopped midway for a second time"

    third = ray_job_submit(head, tmp_path)
    wait_until(lambda: job_status(head.dashboard, third) not in ("PENDING", "RUNNING"), 300)
    log = ray_job(head, "logs", third)
    assert job_status(head.dashboard, third) == "SUCCEEDED", log
    assert f"{jobs.BEGAN}maskstudy resume by-hand" in log
    assert folder.report.exists()

    suggestions, results = read_suggestions(folder), read_results(folder)
    assert len(suggestions) == len(results) == trials
    assert len({s.arm for s in suggestions}) == trials
    assert {r.outcome for r in results.values()} <= {Outcome.COMPLETE, Outcome.STOPPED}
    assert kept.items() <= kept_later.items() <= results.items(), "a finished trial was run again"
    found = read_rows(folder)
    assert not found.duplicated(["trial", "phase", "step", "metric"]).any()
    assert len(found.merge(rows, how="inner")) == len(rows)
    for suggestion in suggestions:
        if results[suggestion.trial].outcome is Outcome.COMPLETE:
            assert (folder.pictures(suggestion.trial) / "segmentation.png").exists()


def test_our_own_submit_and_resume_tell_the_dashboard_what_runs(
    head: Head, tiny_study: Path
) -> None:
    text = tiny_study.read_text().replace("study: tiny", "study: own")
    tiny_study.write_text(text.replace("trials: 4", "trials: 3"))
    folder = StudyFolder(head.storage / "studies" / "own")
    to_it, storage = ("--address", head.dashboard), ("--storage", str(head.storage))
    done = maskstudy("submit", str(tiny_study), *to_it, *storage)
    assert "maskstudy resume own" in done.stdout
    client = JobSubmissionClient(head.dashboard)
    wait_until(lambda: folder.spec.exists() and len(read_results(folder)) >= 1, 300)
    with held_still(head.mark):
        twice = maskstudy("submit", str(tiny_study), *to_it, check=False)
        assert twice.returncode == 75
        assert "is running already" in twice.stderr
        assert maskstudy("resume", "own", *to_it, check=False).returncode == 75
        (job,) = jobs.jobs_of(connected(head.dashboard), "own")
    assert job.metadata is not None
    assert job.metadata["job_name"] == "study own"
    assert job.metadata["question"] == "Does it run?"
    assert job.metadata["storage"] == str(head.storage / "studies")
    followed = maskstudy("logs", "own", *to_it, "--follow").stdout
    assert "3/3 trials" in followed
    wait_until(lambda: client.get_job_status(job.submission_id).is_terminal(), 60)
    assert client.get_job_status(job.submission_id) == JobStatus.SUCCEEDED
    assert maskstudy("logs", "own", *to_it).stdout == followed

    finished = maskstudy("submit", str(tiny_study), *to_it, *storage)
    assert "own is finished: nothing is left to do" in finished.stdout
    assert len(jobs.jobs_of(connected(head.dashboard), "own")) == 1, (
        "a finished study was submitted"
    )
    studies = ("--storage", str(head.storage / "studies"))
    maskstudy("extend", "own", "--trials", "1", *studies)

    maskstudy("resume", "own", *to_it, *studies)
    again = jobs.jobs_of(connected(head.dashboard), "own")[-1]
    assert again.metadata is not None
    assert (again.metadata["attempt"], again.metadata["resumes"]) == ("2", job.submission_id)
    wait_until(lambda: client.get_job_status(again.submission_id).is_terminal(), 200)
    assert "4/4 trials" in client.get_job_logs(again.submission_id)
    assert maskstudy("status", "own", *to_it).stdout.count("SUCCEEDED") == 2


def test_a_job_of_a_study_that_somebody_holds_says_so_and_ends_with_75(
    head: Head, tiny_study: Path
) -> None:
    tiny_study.write_text(tiny_study.read_text().replace("study: tiny", "study: held"))
    with Ledger.open(StudyFolder(head.storage / "studies" / "held"), {"who": "another driver"}):
        job = ray_job_submit(head, tiny_study.parent, tiny_study.name)
        wait_until(lambda: job_status(head.dashboard, job) == "FAILED", 120)
    message = JobSubmissionClient(head.dashboard).get_job_info(job).message
    assert "exit code 75" in str(message), message
    assert "who another driver" in maskstudy("logs", "held", "--address", head.dashboard).stdout


def test_a_job_that_was_refused_meanwhile_is_not_the_last_word_on_a_study(
    head: Head,
) -> None:
    address = head.dashboard
    client = JobSubmissionClient(address)
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
    head: Head,
) -> None:
    address = head.dashboard
    client = JobSubmissionClient(address)

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


def submit_code(client: JobSubmissionClient, study: str, code: str) -> str:
    """A job of a study that does no more than this."""
    entrypoint = shlex.join([sys.executable, "-c", code])
    return str(client.submit_job(entrypoint=entrypoint, metadata={"study": study}))


@pytest.mark.chaos(1)
def test_a_head_that_was_killed_has_forgotten_its_jobs_and_the_storage_has_not(
    tmp_path: Path, tiny_study: Path
) -> None:
    with ExitStack() as until_the_head_is_gone, running_head(tmp_path) as head:
        folder = StudyFolder(head.storage / "studies" / "tiny")
        submit = ("submit", str(tiny_study), "--address", head.dashboard)
        maskstudy(*submit, "--storage", str(head.storage))
        wait_until(lambda: folder.spec.exists() and len(read_results(folder)) >= 1, 200)
        until_the_head_is_gone.enter_context(held_still(head.mark))
    # its driver looks for the head for a while before it gives up; until then it holds the study
    wait_until(lambda: not is_held(folder), 60)
    kept = read_results(folder)
    assert len(kept) < 4
    with running_head(tmp_path) as head:
        to_it = ("--address", head.dashboard)
        lost = maskstudy("resume", "tiny", *to_it, check=False)
        assert lost.returncode == 2
        assert f"maskstudy resume tiny --address {head.dashboard} --storage" in lost.stderr
        maskstudy("resume", "tiny", *to_it, "--storage", str(head.storage / "studies"))
        client = JobSubmissionClient(head.dashboard)
        (job,) = jobs.jobs_of(connected(head.dashboard), "tiny")
        assert job.metadata is not None
        assert job.metadata["question"] == "Does it run?"
        wait_until(lambda: client.get_job_status(job.submission_id).is_terminal(), 200)
        log = client.get_job_logs(job.submission_id)
        assert job_status(head.dashboard, job.submission_id) == "SUCCEEDED", log
    results = read_results(folder)
    assert len(results) == 4
    assert kept.items() <= results.items()


def ray_job_submit(head: Head, folder: Path, study: str = "mine.yaml") -> str:
    """`ray job submit --working-dir . -- python -m study run ...`, as a user would type it."""
    name = f"by-hand-{time.time_ns()}"
    options = ("--no-wait", f"--submission-id={name}", "--working-dir", ".")
    ray_job(head, "submit", *options, "--", "python", "-m", "study", "run", study, folder=folder)
    return name


def ray_job(head: Head, command: str, *arguments: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        [str(BIN / "ray"), "job", command, "--address", head.dashboard, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_status(head: Head, study: str, status: str) -> set[str]:
    """The jobs of a study that stand so."""
    return {
        each.job
        for each in jobs.known(head.dashboard)
        if (each.study, each.status) == (study, status)
    }
