"""What needs no cluster to be told of one: where it is not, what it refuses, which code it gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster import jobs
from cluster.errors import ClusterError, Refused

ROOT = Path(__file__).parents[2]


class Stranger(BaseHTTPRequestHandler):
    """Some other server: its answers are found by their path."""

    ANSWERS: ClassVar = {
        "/page": (200, b"<html>"),
        "/other": (200, b'{"version": 1}'),
        "/closed": (401, b"the door's key is needed"),
    }

    def do_GET(self) -> None:
        status, found = self.answer()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(found)

    def answer(self) -> tuple[int, bytes]:
        return self.ANSWERS.get(self.path.removesuffix("/api/version"), (404, b""))

    def log_message(self, *_: Any) -> None:
        pass


class Dashboard(Stranger):
    """A Ray of two jobs: the log of one is there, the log of the other has gone with its node."""

    JOBS: ClassVar = [
        {
            "type": "SUBMISSION",
            "submission_id": f"{study}-1",
            "status": "SUCCEEDED",
            "entrypoint": "python -m study run mine.yaml",
            "metadata": {"study": study},
        }
        for study in ("kept", "lost")
    ]

    def answer(self) -> tuple[int, bytes]:
        found = {
            "/api/version": {"ray_version": "2.60.0"},
            "/api/jobs/": self.JOBS,
            "/api/jobs/kept-1/logs": {"logs": "4/4 trials"},
        }.get(self.path)
        return (500, b"no such log") if found is None else (200, json.dumps(found).encode())


@contextmanager
def answering(kind: type[Stranger]) -> Iterator[str]:
    """The address of a server of that kind."""
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_of_something_else_is_refused_with_what_is_expected() -> None:
    with pytest.raises(ClusterError, match=r"--address: given .*#/jobs'; expected the dashboard's"):
        jobs.known("http://127.0.0.1:8265/#/jobs")
    with answering(Stranger) as address:
        for path in ("", "/page", "/other"):
            with pytest.raises(ClusterError, match="what answers there is no Ray dashboard"):
                jobs.known(address + path)
        with pytest.raises(ClusterError, match=r"wants a token; .*the door's key is needed"):
            jobs.known(f"{address}/closed")


def test_what_the_cluster_refuses_is_told_and_what_our_own_code_throws_is_not() -> None:
    told: list[str] = []
    with answering(Dashboard) as address:
        jobs.logs(address, "kept", told.append)
        assert told == ["4/4 trials"]
        with pytest.raises(Refused, match=f"{address}: .*no such log"):
            jobs.logs(address, "lost", told.append)
        for defect in (TypeError("ours"), RuntimeError("ours"), BrokenPipeError("ours")):

            def write(_: str, defect: Exception = defect) -> None:
                raise defect

            with pytest.raises(type(defect), match="ours"):
                jobs.logs(address, "kept", write)


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
