"""Verdicts on hand-made clusters, on this machine, and on a real head.

pytest tests/cluster/test_doctor.py
"""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from cluster import doctor
from cluster.doctor import VERDICTS, Level, Verdict
from tests.clusters import Head
from tests.study.test_requests import begin

VERSIONS = {
    "python": "3.12.1",
    "ray": "2.60.0",
    "torch": "2.13.0+cu130",
    "pyarrow": "26.0.1",
    "maskstudy": "0.1.0",
}


def node(name: str, host: str = "10.0.0.1") -> dict[str, Any]:
    return {
        "name": name,
        "versions": dict(VERSIONS),
        "devices": 1,
        "gpus": 1.0,
        "listening": [("127.0.0.1", 8265), ("10.0.0.1", 6379), (host, 7001), ("127.0.0.1", 7002)],
        "ports": {"NodeManagerPort": 7001, "MetricsExportPort": 7002},
        "token_mode": 0o600,
        "storage": {"left": f"of {name}", "error": ""},
    }


def sound() -> dict[str, Any]:
    """Two nodes with a token, on a network of their own."""
    return {
        "nodes": [node("a"), node("b", "10.0.0.2")],
        "dashboard": "127.0.0.1:8265",
        "gcs": "10.0.0.1:6379",
        "open": False,
        "storage": {"folder": "/s", "left": True, "seen": ["of a", "of b"], "why": ""},
    }


def judged(facts: dict[str, Any]) -> dict[str, Verdict]:
    return {verdict.question: verdict for judge in VERDICTS for verdict in judge(facts)}


def at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        *around, last = path.split(".")
        place: Any = facts
        for part in around:
            place = place[int(part) if isinstance(place, list) else part]
        place[int(last) if isinstance(place, list) else last] = value

    return change


ONE_NODE = at("nodes", [node("a")])
ILLS: dict[str, tuple[list[Callable[[dict[str, Any]], None]], str, Level, str]] = {
    "no token on a network": ([at("open", True)], "token", Level.PROBLEM, "a 10.0.0.1:6379"),
    "a dashboard on all addresses": (
        [at("nodes.0.listening.0", ("0.0.0.0", 8265)), at("open", True)],
        "token",
        Level.PROBLEM,
        "dashboard at a 0.0.0.0:8265",
    ),
    "a dashboard on all addresses of IPv6, with a token": (
        [at("nodes.0.listening.0", ("::", 8265))],
        "ports",
        Level.WARNING,
        "dashboard at a :::8265",
    ),
    "one node that need not be reached": ([ONE_NODE], "ports", Level.WARNING, "reach GCS at a"),
    "metrics for all": (
        [at("nodes.1.listening.3", ("0.0.0.0", 7002))],
        "metrics",
        Level.WARNING,
        "b 0.0.0.0:7002",
    ),
    "a token that others read": (
        [at("nodes.1.token_mode", 0o644)],
        "token file",
        Level.PROBLEM,
        "b: mode 0644",
    ),
    "an old Ray": (
        [at("nodes.0.versions.ray", "2.54.1"), at("nodes.1.versions.ray", "2.54.1")],
        "ray version",
        Level.PROBLEM,
        "CVE-2026-41486",
    ),
    "an old torch on one node": (
        [at("nodes.1.versions.torch", "2.5.1+cu121")],
        "torch version",
        Level.PROBLEM,
        "CVE-2025-32434",
    ),
    "unlike versions": (
        [at("nodes.1.versions.torch", "2.12.0+cu130")],
        "equal versions",
        Level.PROBLEM,
        "torch 2.13.0+cu130 on a, 2.12.0+cu130 on b",
    ),
    "a node with another folder": (
        [at("nodes.1.storage.error", "/s is not the head's folder there")],
        "storage",
        Level.PROBLEM,
        "b: /s is not the head's folder there",
    ),
    "a node whose writing nobody sees": (
        [at("storage.seen", ["of a"])],
        "storage",
        Level.PROBLEM,
        "b: what it wrote is not seen",
    ),
    "a storage the head cannot write": (
        [at("storage.left", False), at("storage.why", "/s: Read-only file system")],
        "storage",
        Level.PROBLEM,
        "Read-only",
    ),
    "several nodes and no storage": (
        [at("storage.folder", None)],
        "storage",
        Level.WARNING,
        "no storage named",
    ),
    "a GPU that Ray does not know": ([at("nodes.0.gpus", 0)], "GPUs", Level.WARNING, "a: 1 GPUs"),
    "a torch without CUDA": (
        [at(f"nodes.{number}.versions.torch", "2.13.0+cpu") for number in (0, 1)],
        "GPUs",
        Level.WARNING,
        "cannot use its GPUs",
    ),
    "a silent node": (
        [at("nodes.1", {"name": "b", "error": "90 s silent"})],
        "nodes",
        Level.PROBLEM,
        "b: 90 s silent",
    ),
}


def test_of_a_cluster_that_does_not_answer_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = sound() | {"nodes": [{"name": "a", "error": "90 s silent"}]}
    monkeypatch.setattr(doctor, "cluster_facts", lambda *_: facts)
    (verdict,) = doctor.cluster_verdicts("http://a:8265", None)
    assert verdict.level is Level.PROBLEM


def test_a_sound_cluster_has_no_problem() -> None:
    assert {verdict.level for verdict in judged(sound()).values()} == {Level.OK}


@pytest.mark.parametrize("ill", ILLS)
def test_every_ill_is_found_and_has_a_way_out(ill: str) -> None:
    changes, question, level, told = ILLS[ill]
    facts = copy.deepcopy(sound())
    for change in changes:
        change(facts)
    verdict = judged(facts)[question]
    assert verdict.level is level
    assert told in verdict.found
    assert verdict.way_out


def test_without_a_token_on_loopback_there_is_a_warning_only() -> None:
    facts = sound() | {"open": True, "gcs": "127.0.0.1:6379"}
    facts["nodes"] = [node("a", "127.0.0.1")]
    facts["nodes"][0]["listening"][1] = ("127.0.0.1", 6379)
    found = judged(facts)
    assert (found["token"].level, found["ports"].level) == (Level.WARNING, Level.OK)


def test_the_newest_release_with_a_hole_decides_what_is_asked_for() -> None:
    facts = sound()
    for one in facts["nodes"]:
        one["versions"]["ray"] = "2.9.0"
    verdict = judged(facts)["ray version"]
    assert "ray>=2.55" in verdict.way_out
    assert "CVE-2023" not in verdict.found


@pytest.mark.parametrize(("family", "host"), [(2, "127.0.0.1"), (2, "0.0.0.0"), (10, "::1")])
def test_a_socket_that_listens_is_seen_with_its_address(family: int, host: str) -> None:
    with socket.socket(socket.AddressFamily(family)) as one:
        one.bind((host, 0))
        port = one.getsockname()[1]
        assert (host, port) not in doctor.listening()
        one.listen()
        assert (host, port) in doctor.listening()


@pytest.mark.parametrize("failure", [OSError("no way there"), TypeError("ours")])
def test_a_storage_that_fails_is_judged_and_a_defect_is_not(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objects(_: str) -> None:
        raise failure

    monkeypatch.setattr(doctor, "_objects", objects)
    told = [
        lambda: doctor._leave_token("s3://bucket")[0],
        lambda: doctor._exchange("s3://bucket/place", "token")["error"],
        lambda: doctor._can_keep("s3://bucket")[0].found,
    ]
    for tell in told:
        if isinstance(failure, OSError):
            assert "no way there" in tell()
        else:
            with pytest.raises(TypeError, match="ours"):
                tell()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "study", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def test_this_machine_is_judged_without_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    done = run("--storage", tmp_path / "studies")
    assert done.returncode == 0, done.stdout
    for word in ("torch", "computes", "storage", "cache", "free", "ray version"):
        assert word in done.stdout
    assert not list(tmp_path.rglob(".doctor-*"))


def test_a_damaged_study_and_a_storage_that_is_a_file_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = begin(tmp_path / "studies")
    folder.spec.write_text(folder.spec.read_text() + "\n# edited\n")
    done = run("--storage", tmp_path / "studies")
    assert done.returncode == 1
    assert "study tiny" in done.stdout
    (tmp_path / "file").touch()
    done = run("--storage", tmp_path / "file")
    assert done.returncode == 1
    assert "Not a directory" in done.stdout


def test_an_address_where_no_dashboard_is_gets_a_clear_answer() -> None:
    for given, told in (
        ("http://127.0.0.1:9", "no Ray dashboard answers there"),
        ("127.0.0.1:8265", "expected the dashboard's, such as http://"),
    ):
        done = run("--address", given)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_real_head_is_looked_at_and_nothing_of_it_stays(head: Head, tmp_path: Path) -> None:
    address, storage = head.dashboard, tmp_path / "storage"
    storage.mkdir()
    client = JobSubmissionClient(address)
    before = {job.submission_id for job in client.list_jobs()}
    facts = doctor.cluster_facts(address, str(storage))
    (here,) = facts["nodes"]
    assert facts["open"] is True
    assert "error" not in here
    assert here["storage"]["left"] in facts["storage"]["seen"]
    port = int(facts["dashboard"].rpartition(":")[2])
    assert ["127.0.0.1", port] in here["listening"]
    assert json.dumps(facts)
    found = judged(facts)
    assert found["token"].level is not Level.OK
    assert found["storage"].level is Level.OK
    assert found["equal versions"].level is Level.OK
    assert list(storage.iterdir()) == []
    assert {job.submission_id for job in client.list_jobs()} == before
    done = run("--address", address, "--storage", storage)
    assert done.returncode == 1, done.stdout  # there is no token, and GCS is on all addresses
    assert "1 answer" in done.stdout
    assert "whoever reaches GCS" in done.stdout
    again = run("--address", address, "--storage", storage)
    assert again.stdout == done.stdout
