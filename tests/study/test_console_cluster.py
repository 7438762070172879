"""The study console as a Serve application of a real head node.

pytest tests/study/test_console_cluster.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from study.folder import StudyFolder
from study.ledger import Outcome, is_held, read_results, read_rows
from tests.clusters import (
    Head,
    get,
    held_still,
    job_status,
    maskstudy,
    post,
    running_head,
    status_of,
)
from tests.machine import free_ports, wait_until
from tests.synthetic import write_study

pytestmark = [
    pytest.mark.ray,
    pytest.mark.chaos(2),
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, about itself
]


def test_the_console_is_listed_by_the_dashboard_and_stops_and_resumes_a_study(
    tmp_path: Path, tiny_study: Path
) -> None:
    with running_head(tmp_path / "head") as head:
        the_console_stops_and_resumes(head, tiny_study)


def the_console_stops_and_resumes(head: Head, tiny_study: Path) -> None:
    address, storage = head.dashboard, head.storage
    studies = storage / "studies"
    write_study(studies / "platelets", trials=4)
    port = free_ports(1)[0]
    where = ("--address", address, "--storage", str(studies), "--port", str(port))
    started = maskstudy("console", *where, "--allow-changes")
    found = re.search(r"study console: http://127\.0\.0\.1:(\d+)/#token=(\S+)", started.stdout)
    assert found and int(found[1]) == port
    token = found[2]

    listed = get(f"{address}/api/serve/applications/")["applications"]["maskstudy-console"]
    assert (listed["status"], listed["route_prefix"]) == ("RUNNING", "/")
    replica = listed["deployments"]["maskstudy-console"]["deployment_config"]
    assert replica["ray_actor_options"]["num_cpus"] == 0
    assert token not in json.dumps(listed), "the dashboard must not show the token"

    base = f"http://127.0.0.1:{port}"
    assert [s["name"] for s in get(f"{base}/api/studies", token)["studies"]] == ["platelets"]
    assert status_of(f"{base}/api/studies", None) == 401
    assert status_of(f"{base}/api/studies", token, Host="evil.example") == 400
    assert status_of(f"{base}/api/studies", token, Host=f"localhost:{port}") == 200

    maskstudy("submit", str(tiny_study), "--address", address, "--storage", str(storage))
    folder = StudyFolder(studies / "tiny")

    def told() -> dict[str, Any]:
        answer: dict[str, Any] = get(f"{base}/api/studies/tiny", token)
        return answer

    wait_until(lambda: folder.spec.is_file() and len(read_results(folder)) >= 1, 300)
    with held_still(head.mark):
        other = JobSubmissionClient(address).submit_job(
            entrypoint="sleep 600", metadata={"study": "tiny", "storage": "/another/storage"}
        )
        wait_until(lambda: job_status(address, other) == "RUNNING", 60)
        wait_until(lambda: told()["state"] == "running" and told()["job"] is not None, 60)
        assert told()["job"]["link"].startswith(f"{address}/#/jobs/tiny-1-")
        which = maskstudy("stop", "tiny", "--address", address, check=False)
        assert which.returncode == 2 and other in which.stderr
        assert "has been stopped" in post(f"{base}/api/studies/tiny/stop", token)["said"]
        assert job_status(address, other) == "RUNNING", "a namesake's job was stopped"
    wait_until(lambda: not is_held(folder), 60)
    before = read_rows(folder)
    ended = read_results(folder)
    assert len(ended) < 4, "it was not stopped midway"
    wait_until(lambda: told()["state"] == "interrupted", 120)

    # the namesake's job neither keeps the study from going on nor counts as one of its own
    assert "goes on as job tiny-2-" in post(f"{base}/api/studies/tiny/resume", token)["said"]
    wait_until(lambda: told()["state"] == "finished", 400)
    results = read_results(folder)
    assert {result.outcome for result in results.values()} == {Outcome.COMPLETE}
    assert {trial: results[trial] for trial in ended} == ended, "a trial was run again"
    rows = read_rows(folder)
    assert not rows.duplicated(["trial", "phase", "step", "metric"]).any()
    assert len(rows.merge(before, how="inner")) == len(before)
    assert "nothing" not in get(f"{base}/api/studies/tiny/log", token)["source"]
    maskstudy("stop", "tiny", "--address", address, "--storage", "/another/storage")
    assert job_status(address, other) == "STOPPED"
