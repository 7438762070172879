"""Connect to Ray: a cluster that is there (`RAY_ADDRESS`, set in a job too), or one started now."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import services
from ray._private.state import available_resources_per_node
from ray.exceptions import AuthenticationError

from cluster.errors import ClusterError, NotStarted
from cluster.placement import Room

# a driver says it once nothing refuses its study; clients look for it in logs, old ones too
BEGAN = "to go on if interrupted: "
STARTS = 3  # of a private cluster, until it is given up
START_SECONDS = 300.0  # that the processes of one get, as long as they live
REMIND_SECONDS = 10.0  # between two words that it is still starting
# Ray gives its processes a minute or less to report, and ends those that a busy machine holds up;
# and it runs workers at niceness 15, which leaves them a thirtieth of a core that others want too
OF_A_BUSY_MACHINE = {
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": f"{START_SECONDS:.0f}",
    "RAY_agent_register_timeout_ms": f"{1000 * START_SECONDS:.0f}",
}
ADVISED_RAY = (2, 55)  # fixes CVE-2026-41486; older versions are refused


@dataclass(frozen=True)
class Connection:
    """What the driver is connected to."""

    head: str  # host:port
    dashboard: str | None
    is_private: bool  # started here, and never more than this machine
    job_id: str | None  # inside a submitted job


def address() -> str | None:
    """Of the cluster that the environment names; None: one is started here."""
    return os.environ.get("RAY_ADDRESS") or None


def connect(say: Callable[[str], None]) -> Connection:
    """Initialise Ray: the cluster at `RAY_ADDRESS`, else a private one on this machine.

    NotStarted: it could not be started here. ClusterError: that cluster cannot be joined.
    """
    check_version(ray.__version__)
    env_vars = quiet_environment()
    os.environ.update(env_vars)  # Tune reads some of it here; a cluster that we start inherits it
    place = address()
    context = _start(say) if place is None else _join(place, env_vars)
    return Connection(
        head=ray.get_runtime_context().gcs_address,
        dashboard=f"http://{context.dashboard_url}" if context.dashboard_url else None,
        is_private=place is None,
        job_id=submission_id(),
    )


def quiet_environment() -> dict[str, str]:
    """Environment variables that a job needs for fast polling and calm logs."""
    train = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        **train,
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Ray Train has it for its controllers
        # the driver looks for nodes that have to go: no need for a process of every slot that does
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "1",  # NCCL's shortest way between two GPUs
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }


def _join(place: str, env_vars: dict[str, str]) -> Any:
    """The cluster whose head is at that address."""
    try:
        return ray.init(
            address=place,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": env_vars},
        )
    except (RuntimeError, ConnectionError, AuthenticationError) as error:
        raise ClusterError(
            f"Ray at {place}: {error}; expected a head that runs there and can be reached, and, "
            f"where it wants a token, RAY_AUTH_MODE=token with the token in ~/.ray/auth_token or "
            f"RAY_AUTH_TOKEN"
        ) from error


def _start(say: Callable[[str], None]) -> Any:
    """A private cluster. One whose processes live is waited for; one that died is tried again."""
    for name, value in OF_A_BUSY_MACHINE.items():
        os.environ.setdefault(name, value)
    began = time.monotonic()
    for left in reversed(range(STARTS)):
        try:
            with _patiently(began, say):
                return ray.init(
                    address="local",
                    include_dashboard=False,
                    # nobody else's business, and process groups look names up: this needs no DNS
                    _node_ip_address="127.0.0.1",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except Exception as error:  # Ray has no class for it
            ray.shutdown()
            seconds = time.monotonic() - began
            if not left or seconds > START_SECONDS:
                raise NotStarted(
                    f"Ray on this machine: it did not start within {seconds:.0f} s ({error}); "
                    f"this machine seems too busy, or has no room for it. Run the same command "
                    f"again later"
                ) from error
            say(f"Ray did not start ({error}); trying again")
    raise AssertionError


@contextmanager
def _patiently(began: float, say: Callable[[str], None]) -> Iterator[None]:
    """While in here, Ray waits for a node that is starting as long as its raylet lives.

    Ray itself gives it 30 s, written into its code, and then ends what was about to come.
    """
    look, reminded = services.get_node, began

    def get_node(*place: Any) -> Any:
        nonlocal reminded
        while True:
            try:
                return look(*place)
            except RuntimeError:  # it has not registered yet
                now = time.monotonic()
                if now - began > START_SECONDS or not _raylet_lives():
                    raise
                if now - reminded > REMIND_SECONDS:
                    say(f"Ray is starting on this machine, which is busy ({now - began:.0f} s)")
                    reminded = now
                time.sleep(0.1)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = look


def _raylet_lives() -> bool:
    import psutil  # type: ignore[import-untyped]  # Ray's own copy, once Ray is imported

    children = psutil.Process().children()
    alive = [each for each in children if each.status() != psutil.STATUS_ZOMBIE]
    return any(each.name() == "raylet" for each in alive)


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
        raise ClusterError(
            f"Ray {version} has known security advisories; at least {advised} is needed: "
            f"pip install 'ray>={advised}'"
        )
