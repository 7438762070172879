"""Clusters of several nodes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ray.cluster_utils import Cluster

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
                str(Path(sys.executable).parent / "ray"),
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


def raylet_of(node: object) -> int:
    return int(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("PPid")).split()[1])
