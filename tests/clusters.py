"""Clusters of several nodes on this machine."""

from __future__ import annotations

from collections.abc import Iterator
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


def raylet_of(node: object) -> int:
    return int(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("PPid")).split()[1])
