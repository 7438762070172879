"""What needs no cluster to be told of one: where it is not, and which code it gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster import jobs

ROOT = Path(__file__).parent.parent


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
