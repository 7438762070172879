"""Connect to Ray: a cluster that is there (`RAY_ADDRESS`, set in a job too), or one started now."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from cluster.placement import Room

STARTS = 3  # of a private cluster, until it is given up
ADVISED_RAY = (2, 55)  # fixes CVE-2026-41486; older versions are refused


@dataclass(frozen=True)
class Connection:
    """What the driver is connected to."""

    head: str  # host:port
    dashboard: str | None
    is_private: bool  # started here, and never more than this machine
    job_id: str | None  # inside a submitted job


def connect(*, env_vars: dict[str, str]) -> Connection:
    """Initialise Ray: the cluster at `RAY_ADDRESS`, else a private one on this machine."""
    check_version(ray.__version__)
    address = os.environ.get("RAY_ADDRESS") or "local"
    os.environ.update(env_vars)  # Tune reads some of it here; a cluster that we start inherits it
    if address == "local":
        context = _start()
    else:
        context = ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": env_vars},
        )
    return Connection(
        head=ray.get_runtime_context().gcs_address,
        dashboard=f"http://{context.dashboard_url}" if context.dashboard_url else None,
        is_private=address == "local",
        job_id=submission_id(),
    )


def _start() -> Any:
    """A private cluster. Ray gives it 30 s to start, which a busy machine may not have."""
    for left in reversed(range(STARTS)):
        try:
            return ray.init(
                address="local",
                include_dashboard=False,
                # nobody else's business, and process groups look names up: this one needs no DNS
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray has no class for it
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise RuntimeError(
                    f"it did not start, {STARTS} times; this machine seems too busy. Run the same "
                    f"command again when it is less so"
                ) from error


@dataclass(frozen=True)
class Nodes:
    """The nodes that are alive and stay."""

    total: list[Room]
    free: list[Room]


def nodes() -> Nodes:
    """What every node has and what of it is free, as the head knows it, a moment ago."""
    leaving = draining()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    free = available_resources_per_node()
    return Nodes(
        [_room(node, node["Resources"]) for node in alive],
        [_room(node, free.get(node["NodeID"], {})) for node in alive],
    )


def draining() -> set[str]:
    """Ids of nodes that are told to go: a spot instance reclaimed, or `ray drain-node`."""
    return set(ray._private.state.state.get_draining_nodes())


def _room(node: dict[str, Any], resources: dict[str, float]) -> Room:
    return Room(node["NodeName"], resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def submission_id() -> str | None:
    """The id under which Ray's job server runs this process; None outside a submitted job."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    found = config.get("metadata", {}).get("job_submission_id")
    return str(found) if found else None


def check_version(version: str) -> None:
    """Refuse a Ray with known remote-code-execution advisories."""
    if tuple(int(part) for part in version.split(".")[:2]) < ADVISED_RAY:
        advised = ".".join(map(str, ADVISED_RAY))
        raise RuntimeError(
            f"Ray {version} has known security advisories; at least {advised} is needed: "
            f"pip install 'ray>={advised}'"
        )
