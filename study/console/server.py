"""Start the console: as a Serve application of a Ray cluster, or in this process without Ray.

On a cluster it takes no CPU, is listed in the dashboard's Serve tab, and goes on when the command
has ended. A cluster is reached as studies are: through `RAY_ADDRESS`, or by a job at its dashboard.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from study.console.app import Settings, build_app
from study.console.guard import LOOPBACK_NAMES, is_loopback, ray_token, refuse_exposed
from study.folder import Storage
from trainables.errors import UserError
from trainables.storage import store

NAME = "maskstudy-console"
TOKEN_DIGEST = "MASKSTUDY_CONSOLE_TOKEN_SHA256"  # for the job that a command submits
DEPLOY_SECONDS = 180.0
WILDCARDS = ("0.0.0.0", "::")


def start(
    storage: Storage,
    *,
    address: str | None,
    host: str,
    port: int,
    allow_changes: bool,
    allow_hosts: Iterable[str],
    say: Callable[[str], None],
) -> None:
    """Start it and say where it is; on a cluster this returns, else it serves until interrupted."""
    refuse_exposed(host, os.environ)
    storage = storage.absolute()
    known = ray_token(os.environ)
    token = known or secrets.token_urlsafe(24)
    digest = os.environ.get(TOKEN_DIGEST) or hashlib.sha256(token.encode()).hexdigest()
    is_on_cluster = bool(os.environ.get("RAY_ADDRESS"))  # set in a job, too
    if address is not None and not is_on_cluster:
        _submit(address, storage, host, port, allow_changes, allow_hosts, digest, say)
        _say_where(say, host, port, None if known else token)
        return
    if storage.remote:
        store(storage.remote).probe()
    elif not storage.folder.is_dir():
        raise UserError(f"--storage: {storage} is no folder; name the folder that holds studies")
    settings = Settings(
        storage=storage,
        token_sha256=digest,
        host_names=host_names(host, allow_hosts),
        address=address,
        allow_changes=allow_changes,
        takes_ray_token=known is not None,
    )
    if is_on_cluster:
        _deploy(settings, host, port)
        _say_where(say, host, port, None if known or TOKEN_DIGEST in os.environ else token)
    else:
        _serve_here(settings, host, port, None if known else token, say)


def host_names(host: str, more: Iterable[str]) -> tuple[str, ...]:
    """The names in Host headers that are this console's own."""
    names = {*LOOPBACK_NAMES, *more}
    if host in WILDCARDS:
        names |= {socket.gethostname(), socket.getfqdn()}
    else:
        names.add(host)
    return tuple(sorted(names))


def _serve_here(
    settings: Settings, host: str, port: int, token: str | None, say: Callable[[str], None]
) -> None:
    import uvicorn

    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(
            f"--port: {host}:{port} cannot be had ({error.strerror}); name another one, or 0 for "
            f"any that is free"
        ) from error
    with listening:
        _say_where(say, host, listening.getsockname()[1], token)
        say("serving until interrupted; studies resumed here run on this machine")
        config = uvicorn.Config(
            build_app(settings), log_level="warning", access_log=False, server_header=False
        )
        uvicorn.Server(config).run(sockets=[listening])


def _deploy(settings: Settings, host: str, port: int) -> None:
    """Put the application into the cluster's Serve, which outlives this process."""
    import ray
    from ray import serve

    context = ray.init(address=os.environ["RAY_ADDRESS"], namespace=NAME, log_to_driver=False)
    if settings.address is None and context.dashboard_url:
        settings = replace(settings, address=f"http://{context.dashboard_url}")
    _start_serve(host, port)
    deployment = serve.deployment(
        serve.ingress(lambda: build_app(settings))(),
        name=NAME,
        num_replicas=1,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0, "runtime_env": _runtime_env()},
    )
    serve.run(deployment.bind(), name=NAME, route_prefix="/")


def _start_serve(host: str, port: int) -> None:
    """Serve's proxy is started once in the life of a cluster; one that listens elsewhere stays."""
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.context import _get_global_client

    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        options = HTTPOptions(host=host, port=port)
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options)
        return
    there = running.http_config
    refuse_exposed(there.host, os.environ)
    if (there.host, there.port) != (host, port):
        raise UserError(
            f"this cluster's Ray Serve listens at {there.host}:{there.port} already, which it "
            f"cannot change; ask for that: --host {there.host} --port {there.port}"
        )


def _runtime_env() -> dict[str, Any]:
    """The packages of the job that deploys travel with the replica, and so does its search path."""
    import ray

    job = ray.get_runtime_context().runtime_env
    kept = {key: job[key] for key in ("working_dir", "py_modules") if job.get(key)}
    names = ("PYTHONPATH", "MASKSTUDY_STORAGE", "MASKSTUDY_CACHE")
    return {**kept, "env_vars": {name: os.environ[name] for name in names if name in os.environ}}


def _submit(
    address: str,
    storage: Storage,
    host: str,
    port: int,
    allow_changes: bool,
    allow_hosts: Iterable[str],
    digest: str,
    say: Callable[[str], None],
) -> None:
    """Have a job deploy the console, as nothing but the dashboard may be reachable from here."""
    from ray.job_submission import JobStatus

    from cluster.client import connected
    from cluster.jobs import code

    arguments = ["console", "--storage", str(storage), "--address", address, "--host", host]
    arguments += ["--port", str(port)]
    arguments += ["--allow-changes"] if allow_changes else []
    arguments += [part for name in allow_hosts for part in ("--allow-host", name)]
    say(f"deploying to the cluster at {address}")
    client = connected(address)
    job = client.submit(
        shlex.join(["python", "-m", "study", *arguments]),
        {**code(), "env_vars": {TOKEN_DIGEST: digest}},
        {"job_name": "deploy the study console"},
    )
    deadline = time.monotonic() + DEPLOY_SECONDS
    while not (status := client.status(job)).is_terminal():
        if time.monotonic() > deadline:
            raise UserError(
                f"job {job} has not deployed the console within {DEPLOY_SECONDS:g} s; its log: "
                f"ray job logs {job} --address {address}"
            )
        time.sleep(0.5)
    if status != JobStatus.SUCCEEDED:
        raise UserError(f"job {job} could not deploy it:\n{client.log(job)[-3000:]}")


def _say_where(say: Callable[[str], None], host: str, port: int, token: str | None) -> None:
    shown = "127.0.0.1" if host in WILDCARDS else f"[{host}]" if ":" in host else host
    say(f"study console: http://{shown}:{port}/" + (f"#token={token}" if token else ""))
    if token is None:
        say("it will ask for the cluster's token")
    if not is_loopback(host):
        say("others can reach it, and what they send is not encrypted: put TLS in front of it")
