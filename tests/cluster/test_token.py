"""A cluster that asks for a token: every command with it, and without.

pytest tests/cluster/test_token.py
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from study.folder import StudyFolder
from study.ledger import read_results
from tests.clusters import BIN, get, maskstudy, running_head, status_of
from tests.conftest import TINY_STUDY
from tests.machine import free_ports, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.chaos(2), pytest.mark.timeout(900)]

FACTS = """\
import json, sys
from cluster import doctor
print(json.dumps(doctor.cluster_facts(sys.argv[1], sys.argv[2])))
"""


def test_a_cluster_with_a_token_serves_who_has_it_and_tells_others_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, token = tmp_path / "home", secrets.token_hex(32)
    (home / ".ray").mkdir(parents=True)
    file = home / ".ray" / "auth_token"
    file.touch(0o600)
    file.write_text(token)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_STUDY.replace("trials: 4", "trials: 400"))  # it is stopped, twice
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(home))

    def is_ready(url: str) -> bool:
        try:
            return status_of(f"{url}/api/jobs/", token) == 200
        except OSError:
            return False

    with running_head(tmp_path, is_ready) as head:
        address, storage = head.dashboard, head.storage
        folder = StudyFolder(storage / "studies" / "tiny")
        to_it = ("--address", address)
        with monkeypatch.context() as stranger:
            stranger.setenv("HOME", str(tmp_path))
            stranger.setenv("RAY_AUTH_MODE", "disabled")
            for command in (
                ("submit", str(path), "--storage", str(storage)),
                ("status", "tiny"),
                ("logs", "tiny"),
                ("stop", "tiny"),
                ("resume", "tiny"),
                ("doctor", "--storage", str(storage)),
                ("console", "--storage", str(storage)),
            ):
                refused = maskstudy(*command, *to_it, check=False)
                assert refused.returncode == 2, (command, refused.stdout)
                assert "set RAY_AUTH_MODE=token" in refused.stderr, (command, refused.stderr)
                assert "Traceback" not in refused.stderr
            stranger.setenv("RAY_AUTH_MODE", "token")
            stranger.setenv("RAY_AUTH_TOKEN", "0" * 64)
            assert "wants a token" in maskstudy("status", *to_it, check=False).stderr

        told = subprocess.run(
            [sys.executable, "-c", FACTS, address, str(storage)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        gcs = json.loads(told.stdout)["gcs"]
        with monkeypatch.context() as stranger:
            stranger.setenv("RAY_ADDRESS", gcs)
            for mode, given in (("disabled", None), ("token", "0" * 64)):
                stranger.setenv("RAY_AUTH_MODE", mode)
                if given:
                    stranger.setenv("RAY_AUTH_TOKEN", given)
                refused = maskstudy("run", str(path), "--no-report", check=False)
                assert refused.returncode == 2, refused.stdout
                assert f"Ray at {gcs}" in refused.stderr
                assert "RAY_AUTH_MODE=token" in refused.stderr
                assert "Traceback" not in refused.stderr
        join = ["start", f"--address={gcs}", "--block", "--num-cpus=1", "--disable-usage-stats"]
        with (tmp_path / "node.log").open("w") as log:
            node = subprocess.Popen([str(BIN / "ray"), *join], stdout=log, stderr=log)
        try:
            wait_until(lambda: "Ray runtime started" in (tmp_path / "node.log").read_text(), 100)
            judged = maskstudy("doctor", *to_it, "--storage", str(storage), check=False).stdout
            assert "2 answer" in judged
            assert "the dashboard answers nobody without it" in judged
            assert "every node reads what the others write" in judged
            assert re.search(r"equal versions +│ ok", judged), judged
        finally:  # beside a job, a second node of one machine clears away the job's files
            node.terminate()
            node.wait(60)

        maskstudy("submit", str(path), *to_it, "--storage", str(storage))
        wait_until(lambda: folder.spec.exists() and len(read_results(folder)) >= 1, 300)
        assert "RUNNING" in maskstudy("status", "tiny", *to_it).stdout
        assert "stopped job tiny-1-" in maskstudy("stop", "tiny", *to_it).stdout
        kept = read_results(folder)
        maskstudy("resume", "tiny", *to_it)

        port = str(free_ports(1)[0])
        console = ("--storage", str(storage / "studies"), "--port", port)
        assert "will ask for the cluster's token" in maskstudy("console", *to_it, *console).stdout
        base = f"http://127.0.0.1:{port}/api/studies"
        assert status_of(base, None) == 401
        assert [study["name"] for study in get(base, token)["studies"]] == ["tiny"]
        wait_until(lambda: len(read_results(folder)) > len(kept), 300)
        assert "stopped job tiny-2-" in maskstudy("stop", "tiny", *to_it).stdout
        assert maskstudy("status", "tiny", *to_it).stdout.count("STOPPED") == 2
        assert all(read_results(folder)[trial] == result for trial, result in kept.items())
    assert token not in "".join(
        file.read_text(errors="replace") for file in storage.rglob("*") if file.is_file()
    ), "the token is in a file of the storage"
