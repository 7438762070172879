"""Clusters on this machine, and what is done to them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from cluster.head import TIMEOUT
from tests.machine import free_ports, processes, wait_until

BIN = Path(sys.executable).parent
STORAGE = "MASKSTUDY_STORAGE"

SOON = {  # milliseconds until a silent node is given up
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
}
TRIES = 3  # Ray gives a node 30 s to start, which a busy machine may not have


@contextmanager
def cluster_of(*cpus: int) -> Iterator[Cluster]:
    """A head without CPUs, and nodes with so many."""
    head = {"num_cpus": 0, "_system_config": SOON, "include_dashboard": False}
    for left in reversed(range(TRIES)):
        cluster = Cluster()
        try:
            cluster.add_node(**head)
            for count in cpus:
                cluster.add_node(num_cpus=count)
            cluster.wait_for_nodes(timeout=60)
        except Exception as error:
            cluster.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise
        else:
            break
    try:
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def started_head(
    log: Path, ports: Sequence[int], *options: str, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start --head` with four ports of its own, which others on this machine do not have."""
    gcs, dashboard, client, agent = ports
    with log.open("w") as printed:
        node = subprocess.Popen(
            [
                str(BIN / "ray"),
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
                "--node-ip-address=127.0.0.1",
                f"--port={gcs}",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}",
                f"--dashboard-agent-listen-port={agent}",  # jobs go through it
                *options,
            ],
            env={**os.environ, **variables},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield node
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        try:
            node.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


class Head(NamedTuple):
    """A head node with a dashboard, for jobs."""

    dashboard: str
    gcs: str
    storage: Path  # of its jobs

    @property
    def mark(self) -> str:
        """What only its own processes have in their environment."""
        return f"{STORAGE}={self.storage}"


@contextmanager
def running_head(
    folder: Path, is_ready: Callable[[str], bool] | None = None, **variables: str
) -> Iterator[Head]:
    """A head with two CPUs; its home and the storage of its jobs lie in the folder.

    A job's driver joins the newest cluster of its temporary folder, so each head has its own.
    """
    home, storage = folder / "home", folder / "storage"
    home.mkdir(parents=True, exist_ok=True)
    storage.mkdir(exist_ok=True)
    ports = free_ports(4)
    scratch = tempfile.mkdtemp(prefix="ms-", dir="/tmp")  # short, for the names of sockets
    environment = {
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        STORAGE: str(storage),
        "RAY_TMPDIR": scratch,
        TIMEOUT: "5",  # seconds that drivers wait for this head when it is gone
        **variables,
    }
    options = ("--num-cpus=2", f"--temp-dir={scratch}")
    head = Head(f"http://127.0.0.1:{ports[1]}", f"127.0.0.1:{ports[0]}", storage)
    is_ready = is_ready or answers

    def is_up() -> bool:
        assert node.poll() is None, (home / "head.log").read_text()
        return is_ready(head.dashboard)

    try:
        with started_head(home / "head.log", ports, *options, **environment) as node:
            wait_until(is_up, 120, "the head does not answer")
            yield head
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def answers(dashboard: str) -> bool:
    try:
        JobSubmissionClient(dashboard).list_jobs()
    except (ConnectionError, RuntimeError):
        return False
    return True


@contextmanager
def held_still(mark: str) -> Iterator[None]:
    """The workers of a cluster or a study stand still meanwhile: no trial comes to its end.

    So a study is stopped midway however slow the machine is on which somebody stops it.
    """
    workers = processes("ray::RayTrainWorker", mark)
    assert workers, "nobody trains"
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)


def maskstudy(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "study", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def job_status(dashboard: str, job: str) -> str:
    return str(JobSubmissionClient(dashboard).get_job_status(job).value)


def get(url: str, token: str | None = None, body: Any = None, **headers: str) -> Any:
    sent = {"Authorization": f"Bearer {token}"} if token else {}
    if body is not None:
        sent |= {"Content-Type": "application/json", "X-Maskstudy": "1"}
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {**sent, **headers})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def post(url: str, token: str) -> Any:
    return get(url, token, {})


def status_of(url: str, token: str | None, **headers: str) -> int:
    try:
        get(url, token, **headers)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def raylet_of(node: object) -> int:
    return int(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("PPid")).split()[1])
