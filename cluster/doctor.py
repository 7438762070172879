"""Is this machine, or this cluster, sound and safe for studies? Facts first, then verdicts on them.

A cluster is looked at from inside, by a small job with one task on every node. To add a question,
add its fact to `look` and a function of facts to VERDICTS.
"""

from __future__ import annotations

import base64
import glob
import ipaddress
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import socket
import stat
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

MARK = "maskstudy-doctor "  # begins the line of a job's log that holds the facts
NODE_SECONDS = 90  # that a node gets to answer
JOB_SECONDS = 240
SCARCE, TOO_SCARCE = 20e9, 2e9  # bytes that are free

# (package, first version without it, advisory, what it allows)
ADVISORIES = [
    ("ray", "2.8.1", "CVE-2023-6019, -6020, -6021", "commands and files by way of the dashboard"),
    ("ray", "2.43", "CVE-2025-1979", "passwords in logs"),
    ("ray", "2.52", "CVE-2025-62593", "code from a web page that a user of the cluster visits"),
    ("ray", "2.54", "CVE-2026-27482", "deletion of jobs from such a page"),
    ("ray", "2.55", "CVE-2026-41486", "code from a Parquet file that Ray Data reads"),
    ("pyarrow", "14.0.1", "CVE-2023-47248", "code from an Arrow or Parquet file"),
    ("torch", "2.6", "CVE-2025-32434", "code from a checkpoint"),
]
SAME_EVERYWHERE = ("python", "ray", "torch", "pyarrow", "maskstudy")


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Verdict(NamedTuple):
    """The answer to one question."""

    question: str
    level: Level
    found: str
    way_out: str = ""


Facts = dict[str, Any]


def cluster_verdicts(address: str, storage: str | None) -> list[Verdict]:
    """Judge the cluster behind a dashboard. ClusterError: it cannot be looked at."""
    facts = cluster_facts(address, storage)
    judges = VERDICTS if _answering(facts) else [nodes_answer]
    return [verdict for judge in judges for verdict in judge(facts)]


def machine_verdicts(storage: Path | str, cache: Path) -> list[Verdict]:
    """Judge this machine, on which no cluster need run; `storage` may be a URI."""
    here = look(None, None)
    facts: Facts = {"nodes": [here], "open": None}
    return [
        *advisories(facts),
        *token_files(facts),
        _torch_runs(here),
        *(_can_keep(storage) if isinstance(storage, str) else _can_hold("storage", storage)),
        *_can_hold("cache", cache),
    ]


def cluster_facts(address: str, storage: str | None) -> Facts:
    """What a job on the cluster found, and whether its dashboard answers without a token.

    The job is this file's text and nothing else, so that it runs where uploading packages fails:
    what this file imports of ours, it imports where the job does not come.
    """
    from cluster import jobs
    from cluster.errors import ClusterError

    text = base64.b64encode(zlib.compress(Path(__file__).read_bytes())).decode()
    code = f"import base64, zlib; exec(zlib.decompress(base64.b64decode('{text}')))"
    entrypoint = f"python -c {shlex.quote(code)}"
    variables = {"MASKSTUDY_DOCTOR_STORAGE": storage} if storage else {}
    log = jobs.call(address, entrypoint, variables=variables, timeout=JOB_SECONDS)
    lines = [line for line in log.splitlines() if line.startswith(MARK)]
    if not lines:
        raise ClusterError(f"{address}: the job that looks at the nodes found nothing:\n{log}")
    facts: Facts = json.loads(lines[-1].removeprefix(MARK))
    return {**facts, "open": answers_without_token(address)}


def answers_without_token(address: str) -> bool:
    """Whether whoever reaches the dashboard may run code."""
    from cluster.errors import ClusterError

    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=20):
            return True
    except urllib.error.HTTPError:
        return False
    except OSError as error:
        raise ClusterError(f"{address}: {error}") from error


def look(folder: str | None, token: str | None) -> Facts:
    """Facts of the node that this runs on; it finds `token` in `folder` and leaves its own."""
    return {
        "name": socket.gethostname(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in SAME_EVERYWHERE[1:]},
        },
        "devices": len([path for path in glob.glob("/dev/nvidia*") if path[11:].isdigit()]),
        "listening": listening(),
        "token_mode": _token_file_mode(),
        "storage": _exchange(folder, token) if folder and token else None,
    }


def look_at_all(storage: str | None) -> Facts:
    """Facts of every node of the cluster that this process can reach."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.init(address="auto", log_to_driver=False)
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    place, token = _leave_token(storage)
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    refs = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            place if token else None, token
        ): node
        for node in alive
    }
    done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=NODE_SECONDS)
    nodes = []
    for ref, node in refs.items():
        about = alive[node]
        facts: Facts = {"name": about["NodeManagerHostname"], "error": f"{NODE_SECONDS} s silent"}
        if ref in done:
            try:
                facts = ray.get(ref)
            except ray.exceptions.RayError as error:
                facts["error"] = str(error).strip().splitlines()[-1]
        ports = {key: about.get(key) for key in about if key.endswith("Port")}
        nodes.append({**facts, "ports": ports, "gpus": about["Resources"].get("GPU", 0)})
    seen = _collect_tokens(place) if token else []
    return {
        "nodes": nodes,
        "dashboard": context.dashboard_url,
        "gcs": ray.get_runtime_context().gcs_address,
        "storage": {"folder": storage, "left": token is not None, "seen": seen, "why": place},
    }


def listening() -> list[tuple[str, int]]:
    """(address, port) of every socket that waits for connections, where Linux tells."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                host, _, port = fields[1].partition(":")
                words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
                found.append((str(ipaddress.ip_address(b"".join(words))), int(port, 16)))
    return sorted(set(found))


def nodes_answer(facts: Facts) -> list[Verdict]:
    silent = [f"{node['name']}: {node['error']}" for node in facts["nodes"] if "error" in node]
    if silent:
        way_out = "see the nodes' logs in the dashboard; restart those nodes"
        return [Verdict("nodes", Level.PROBLEM, "; ".join(silent), way_out)]
    return [Verdict("nodes", Level.OK, f"{len(facts['nodes'])} answer")]


def advisories(facts: Facts) -> list[Verdict]:
    """Known holes of the versions that are there."""
    found = []
    for package in dict.fromkeys(name for name, *_ in ADVISORIES):
        versions = sorted({str(node["versions"][package]) for node in _answering(facts)})
        holes = [
            (fixed, f"{name} allows {what}")
            for of, fixed, name, what in ADVISORIES
            if of == package and any(_is_older(version, fixed) for version in versions)
        ]
        if holes:
            way_out = f"pip install '{package}>={holes[-1][0]}' on every node"
            told = "; ".join(text for _, text in holes)
            verdict = Verdict(
                f"{package} version", Level.PROBLEM, f"{_listed(versions)}: {told}", way_out
            )
        else:
            told = f"{_listed(versions)}: no advisory that is known here"
            verdict = Verdict(f"{package} version", Level.OK, told)
        found.append(verdict)
    return found


def same_versions(facts: Facts) -> list[Verdict]:
    """Nodes of unlike versions compute unlike numbers, or do not talk at all."""
    unlike = []
    for package in SAME_EVERYWHERE:
        by_version: dict[str, list[str]] = {}
        for node in _answering(facts):
            by_version.setdefault(str(node["versions"][package]), []).append(node["name"])
        if len(by_version) > 1:
            told = ", ".join(f"{version} on {_listed(at)}" for version, at in by_version.items())
            unlike.append(f"{package} {told}")
    if unlike:
        way_out = "install the same versions on every node, such as one container image"
        return [Verdict("equal versions", Level.PROBLEM, "; ".join(unlike), way_out)]
    return [Verdict("equal versions", Level.OK, _listed(SAME_EVERYWHERE))]


def exposure(facts: Facts) -> list[Verdict]:
    """Who may run code: token mode, and addresses that other machines reach."""
    is_open = bool(facts["open"])
    # Ray 2.60 binds GCS and raylets to all addresses, --node-ip-address=127.0.0.1 or not
    wall = "a firewall around the cluster's own network; the dashboard on 127.0.0.1, by SSH tunnel"
    token = "start every node with RAY_AUTH_MODE=token (ray get-auth-token --generate)"
    reachable = {
        "dashboard": _exposed(facts, [_port(facts["dashboard"])]),
        "GCS": _exposed(facts, [_port(facts["gcs"])]),
        "raylets": _exposed(facts, [], "NodeManagerPort", "ObjectManagerPort"),
    }
    code = [f"{name} at {_listed(at)}" for name, at in reachable.items() if at]
    found = []
    if not is_open:
        found.append(Verdict("token", Level.OK, "the dashboard answers nobody without it"))
    elif code:
        told = f"whoever reaches {_listed(code)} runs code as its user: no token is asked for"
        found.append(Verdict("token", Level.PROBLEM, told, token))
    else:
        told = "no token is asked for: every user of the head's machine runs code as its user"
        found.append(Verdict("token", Level.WARNING, told, token))
    if not code:
        found.append(Verdict("ports", Level.OK, "dashboard, GCS and raylets on loopback only"))
    else:
        # nodes must reach each other; one node alone need not be reached
        is_meant = len(facts["nodes"]) > 1 and not is_open and not reachable["dashboard"]
        way_out = "" if is_meant else wall
        level = Level.OK if is_meant else Level.WARNING
        found.append(Verdict("ports", level, f"other machines reach {_listed(code)}", way_out))
    metrics = _exposed(facts, [], "MetricsExportPort", "MetricsAgentPort")
    if metrics:
        told = f"readable without a token at {_listed(metrics)}"
        way_out = "a firewall that lets Prometheus alone through"
        found.append(Verdict("metrics", Level.WARNING, told, way_out))
    else:
        found.append(Verdict("metrics", Level.OK, "on loopback only, or not served"))
    return found


def token_files(facts: Facts) -> list[Verdict]:
    """A token that others can read is none."""
    modes = {node["name"]: node["token_mode"] for node in _answering(facts)}
    wide = [
        f"{name}: mode {mode:04o}" for name, mode in modes.items() if mode is not None and mode & 63
    ]
    if wide:
        way_out = "chmod 600 ~/.ray/auth_token there"
        # where no token is asked for it opens nothing, and Ray itself makes it that wide
        level = Level.PROBLEM if facts["open"] is False else Level.WARNING
        return [Verdict("token file", level, f"others may read it: {_listed(wide)}", way_out)]
    none = all(mode is None for mode in modes.values())
    return [Verdict("token file", Level.OK, "none" if none else "readable by its owner alone")]


def shared_storage(facts: Facts) -> list[Verdict]:
    """Every node must read what another one wrote."""
    storage, nodes = facts["storage"], facts["nodes"]
    way_out = "a folder that every node mounts at the same path, writable by Ray's user"
    if _is_uri(storage["folder"] or ""):
        way_out = "pip install 'maskstudy[cloud]' and credentials in the environment of every node"
    if storage["folder"] is None and len(nodes) > 1:
        ask = "name it: maskstudy doctor --address URL --storage DIR"
        return [Verdict("storage", Level.WARNING, "several nodes, and no storage named", ask)]
    if storage["folder"] is None:
        return [Verdict("storage", Level.OK, "one node; not looked at, as --storage names none")]
    if not storage["left"]:
        return [Verdict("storage", Level.PROBLEM, storage["why"], way_out)]
    wrong = [
        f"{node['name']}: {node['storage']['error'] or 'what it wrote is not seen by the head'}"
        for node in _answering(facts)
        if node["storage"]["error"] or node["storage"]["left"] not in storage["seen"]
    ]
    if wrong:
        return [Verdict("storage", Level.PROBLEM, "; ".join(wrong), way_out)]
    told = f"{storage['folder']}: every node reads what the others write"
    return [Verdict("storage", Level.OK, told)]


def graphics(facts: Facts) -> list[Verdict]:
    """Devices that are there, that Ray gives out, and that torch was built for."""
    nodes = _answering(facts)
    wrong = []
    for node in nodes:
        devices, given = node["devices"], node.get("gpus", 0)
        if devices != given:
            wrong.append(f"{node['name']}: {devices} GPUs, but Ray gives out {given:g}")
        if devices and "+cpu" in str(node["versions"]["torch"]):
            wrong.append(f"{node['name']}: torch {node['versions']['torch']} cannot use its GPUs")
    total = sum(node["devices"] for node in nodes)
    if wrong:
        way_out = "start the node with --num-gpus; install torch for CUDA there"
        return [Verdict("GPUs", Level.WARNING, "; ".join(wrong), way_out)]
    return [Verdict("GPUs", Level.OK, f"{total} on {len(nodes)} nodes")]


VERDICTS: list[Callable[[Facts], list[Verdict]]] = [
    nodes_answer,
    advisories,
    same_versions,
    exposure,
    token_files,
    shared_storage,
    graphics,
]


def _answering(facts: Facts) -> list[Facts]:
    return [node for node in facts["nodes"] if "error" not in node]


def _exposed(facts: Facts, ports: Sequence[int], *kinds: str) -> list[str]:
    """host:port of the sockets at these ports that are not bound to loopback."""
    found = []
    for node in _answering(facts):
        mine = {*ports, *(node["ports"].get(kind) for kind in kinds)}
        for host, port in node["listening"]:
            address = ipaddress.ip_address(host)
            address = getattr(address, "ipv4_mapped", None) or address
            if port in mine and not address.is_loopback:
                found.append(f"{node['name']} {host}:{port}")
    return found


def _port(address: str | None) -> int:
    return int(address.rpartition(":")[2]) if address else -1


def _is_older(version: str, fixed: str) -> bool:
    return _numbers(version) < _numbers(fixed)


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 55, 1) of 2.55.1+cpu; unknown versions are the newest."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else (10**6,)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _token_file_mode() -> int | None:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    try:
        return stat.S_IMODE(os.stat(os.path.expanduser(path)).st_mode)
    except OSError:
        return None


def _is_uri(storage: str) -> bool:
    return "://" in storage


def _objects(uri: str) -> Any:
    """The store at a URI, with what the environment says of it."""
    import obstore

    is_plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return obstore.store.from_url(
        uri,
        client_options={"connect_timeout": "5s", **({"allow_http": True} if is_plain else {})},
        retry_config={"max_retries": 2},
    )


def _failures() -> tuple[type[Exception], ...]:
    """What a folder throws, or a store, one that cannot be opened included."""
    try:
        from obstore.exceptions import BaseError
    except ImportError:
        return OSError, ValueError, ImportError
    return OSError, ValueError, NotImplementedError, BaseError


def _why(error: Exception) -> str:
    """An error of a file system or of a store, in a line."""
    if isinstance(error, ImportError):
        return "obstore is not installed"
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(told).splitlines()[0][:300]


def _leave_token(storage: str | None) -> tuple[str, str | None]:
    """A new place in the storage with a token in it; or why there is none."""
    if storage is None:
        return "", None
    place, token = f"{storage}/.doctor-{secrets.token_hex(4)}", secrets.token_hex(16)
    try:
        if _is_uri(storage):
            _objects(place).put("head", token.encode())
        else:
            Path(place).mkdir(parents=True)
            (Path(place) / "head").write_text(token)
    except _failures() as error:
        return f"{storage}: the head cannot write there: {_why(error)}", None
    return place, token


def _collect_tokens(place: str) -> list[str]:
    """What the nodes left, as the head sees it; the place goes away."""
    if _is_uri(place):
        objects = _objects(place)
        names = [found["path"] for page in objects.list() for found in page]
        read = [bytes(objects.get(name).bytes()).decode() for name in names if name != "head"]
        for name in names:
            objects.delete(name)
        return read
    read = [path.read_text() for path in Path(place).iterdir() if path.name != "head"]
    shutil.rmtree(place, ignore_errors=True)
    return read


def _exchange(place: str, token: str) -> Facts:
    left, storage = secrets.token_hex(16), place.rpartition("/")[0]
    try:
        if _is_uri(place):
            objects = _objects(place)
            found = bytes(objects.get("head").bytes()).decode()
            objects.put(f"node-{left[:8]}", left.encode())
        else:
            found = (Path(place) / "head").read_text()
            (Path(place) / f"node-{left[:8]}").write_text(left)
    except FileNotFoundError:
        return {"left": left, "error": f"{storage} is not the head's there"}
    except _failures() as error:
        return {"left": left, "error": f"{storage}: {_why(error)}"}
    return {"left": left, "error": "" if found == token else f"{storage} is another one there"}


def _can_keep(uri: str) -> list[Verdict]:
    """Write, refuse to overwrite, read and remove an object, as a ledger does."""
    name, problem = f".doctor-{secrets.token_hex(4)}", Level.PROBLEM
    try:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        objects = _objects(uri)
        objects.put(name, b"doctor", mode="create")
        try:
            objects.put(name, b"again", mode="create")
        except (AlreadyExistsError, PreconditionError):
            pass
        else:
            told = f"{uri}: overwrites what it is asked to keep, so two drivers could take a study"
            way_out = "a store with conditional writes (If-None-Match), or a folder"
            return [Verdict("storage", problem, told, way_out)]
        finally:
            objects.delete(name)
    except _failures() as error:
        way_out = "see the bucket, the credentials in the environment, and maskstudy[cloud]"
        return [Verdict("storage", problem, f"{uri}: {_why(error)}", way_out)]
    told = f"{uri}: objects can be written, kept from being overwritten, read and removed"
    return [Verdict("storage", Level.OK, told)]


def _can_hold(name: str, folder: Path) -> list[Verdict]:
    return [_can_write(name, folder), _room(name, folder)]


def _torch_runs(here: Facts) -> Verdict:
    try:
        import torch

        devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        for device in devices:
            ones = torch.ones(64, 64, device=device)
            assert float((ones @ ones).sum()) == 64.0**3
    except Exception as error:  # a broken installation fails in many ways
        way_out = "install torch anew, for this machine's driver: https://pytorch.org/get-started"
        return Verdict("torch", Level.PROBLEM, f"{type(error).__name__}: {error}", way_out)
    names = [torch.cuda.get_device_name(index) for index in range(len(devices) - 1)]
    told = f"torch {torch.__version__} computes on the CPU{''.join(f', {name}' for name in names)}"
    if here["devices"] > len(names):
        way_out = "install torch for CUDA, or a newer driver"
        return Verdict(
            "torch", Level.PROBLEM, f"{told}, not on {here['devices']} GPUs here", way_out
        )
    return Verdict("torch", Level.OK, told)


def _can_write(name: str, folder: Path) -> Verdict:
    """Make, sync, rename, lock and remove a file, as a ledger does."""
    import fcntl

    made = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    aside = made / f".doctor-{secrets.token_hex(4)}"
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.write(descriptor, b"doctor")
            os.fsync(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(aside, aside.with_suffix(".moved"))
        finally:
            os.close(descriptor)
            for path in (aside, aside.with_suffix(".moved")):
                path.unlink(missing_ok=True)
    except OSError as error:
        variable = {"storage": "--storage", "cache": "MASKSTUDY_CACHE"}[name]
        told = f"{made}: {error.strerror}"
        return Verdict(name, Level.PROBLEM, told, f"another folder: {variable}")
    told = f"{folder}: files can be written, synced, renamed and locked"
    return Verdict(name, Level.OK, told if made == folder else f"{told} (to be made in {made})")


def _room(name: str, folder: Path) -> Verdict:
    made = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    free = shutil.disk_usage(made).free
    level = Level.OK if free >= SCARCE else Level.WARNING if free >= TOO_SCARCE else Level.PROBLEM
    way_out = "" if level is Level.OK else f"free space at {made}, or take another folder"
    return Verdict(f"{name} room", level, f"{free / 1e9:.0f} GB free", way_out)


def _listed(values: Sequence[str]) -> str:
    return ", ".join(values)


if __name__ == "__main__":
    found = look_at_all(os.environ.get("MASKSTUDY_DOCTOR_STORAGE"))
    print(MARK + json.dumps(found))
    sys.exit(0)
