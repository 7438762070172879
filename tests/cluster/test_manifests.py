"""The recipes for clusters are sound.  pytest tests/cluster/test_manifests.py

MASKSTUDY_KUBERAY_CRDS may name the folder `ray-operator/config/crd/bases` of a checkout of KubeRay:
its manifests are then held to KubeRay's own schemas too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import socket
import stat
import string
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.machine import free_ports, wait_until

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "cluster" / "manifests"
KUBERAY = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}
CRDS = os.environ.get("MASKSTUDY_KUBERAY_CRDS")
GIVEN = {
    "RAY_VERSION": "2.60.0",
    "IMAGE": "registry.example.org/maskstudy:0.1.0",
    "CLAIM": "shared",
    "STUDY": "cells",
    "STUDY_FILE": "/shared/cells.yaml",
    "MASKSTUDY": "maskstudy==0.1.0",
}


def recipe(name: str) -> dict[str, Any]:
    """A manifest with its variables filled in, as envsubst does."""
    text = string.Template((MANIFESTS / name).read_text()).safe_substitute(GIVEN)
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    cluster: dict[str, Any] = spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec
    return cluster


def test_the_launcher_file_fits_rays_schema_and_a_typo_does_not() -> None:
    launcher = recipe("launcher.yaml")
    schema = json.loads((resources.files("ray.autoscaler") / "ray-schema.json").read_text())
    jsonschema.validate(launcher, schema)
    prepared = prepare_config(copy.deepcopy(launcher))  # as `ray up` does
    validate_config(prepared)
    (node,) = prepared["available_node_types"].values()
    assert node["min_workers"] == len(launcher["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "head_node_typ": "a typo"}, schema)


def test_the_launcher_starts_every_node_with_a_token_and_the_dashboard_on_loopback() -> None:
    launcher = recipe("launcher.yaml")
    head, worker = (launcher[f"{role}_start_ray_commands"][-1] for role in ("head", "worker"))
    for command in (head, worker):
        assert command.startswith("RAY_AUTH_MODE=token ")
    assert "--dashboard-host=127.0.0.1" in head
    assert "~/.ray/auth_token" in launcher["file_mounts"]


@pytest.mark.parametrize("name", KUBERAY)
def test_a_kuberay_manifest_is_sound_in_itself(name: str) -> None:
    manifest = recipe(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", KUBERAY[name])
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["rayVersion"] == GIVEN["RAY_VERSION"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == GIVEN["IMAGE"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == volumes
        assert {"name": "MASKSTUDY_STORAGE", "value": mounted["shared"]} in container["env"]
        assert mounted["shm"] == "/dev/shm"


def test_the_job_has_the_cluster_of_the_cluster_that_stays() -> None:
    assert cluster_of(recipe("rayjob.yaml")) == cluster_of(recipe("raycluster.yaml"))


def test_the_job_runs_a_command_that_goes_on_where_it_stopped() -> None:
    spec = recipe("rayjob.yaml")["spec"]
    assert spec["entrypoint"] == f"python -m study run {GIVEN['STUDY_FILE']}"
    assert spec["backoffLimit"] > 0
    assert spec["metadata"] == {"study": "cells", "job_name": "study cells"}


@pytest.mark.skipif(CRDS is None, reason="MASKSTUDY_KUBERAY_CRDS is not set")
@pytest.mark.parametrize("name", KUBERAY)
def test_a_kuberay_manifest_fits_kuberays_schema_and_a_typo_does_not(name: str) -> None:
    assert CRDS is not None
    kind = KUBERAY[name]
    crd = yaml.load((Path(CRDS) / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    (schema,) = [
        strict(version["schema"]["openAPIV3Schema"])
        for version in crd["spec"]["versions"]
        if version["name"] == "v1"
    ]
    manifest = recipe(name)
    jsonschema.validate(manifest, schema)
    head = cluster_of(manifest)["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["volumeMount"] = "a typo"
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.validate(manifest, schema)


def strict(node: Any) -> Any:
    """A CRD's schema as one of JSON Schema that takes no unknown field."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: strict(value) for key, value in node.items() if key != "metadata"}
    if isinstance(node.get("metadata"), dict):  # a property of that name
        found["metadata"] = {} if node["metadata"] == {"type": "object"} else found.get("metadata")
        found["metadata"] = found["metadata"] or strict(node["metadata"])
    is_open = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if isinstance(node.get("properties"), dict) and "type" in node and not is_open:
        found["additionalProperties"] = False
    return found


@pytest.mark.parametrize("name", ["slurm.sh", "one-machine.sh"])
def test_a_script_is_bash_and_may_be_run(name: str) -> None:
    subprocess.run(["bash", "-n", str(MANIFESTS / name)], check=True)
    assert os.access(MANIFESTS / name, os.X_OK)


class Slurm:
    """Stands for a SLURM of two nodes: `srun` runs its command here, and all is written down."""

    def __init__(self, folder: Path, driver: str) -> None:
        self.folder = folder
        commands = folder / "bin"
        commands.mkdir()
        log = f'echo "$(basename "$0") $*" >> {folder}/calls\n'
        stubs = {
            "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; fi',
            "srun": 'while [ "${1#-}" != "$1" ]; do if [ "$1" = -w ]; then shift; fi; shift; done\n'
            'exec "$@"',
            "hostname": "echo 10.0.0.1 fe80::1",
            "ray": "exec sleep 60",
            "maskstudy": driver,
            "timeout": "cat > /dev/null",  # waiting for nodes that are not there
        }
        for name, body in stubs.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{log}{body}\n")
            (commands / name).chmod(0o755)
        environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "HOME": str(folder),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_CPUS_PER_TASK": "16",
            "SLURM_GPUS_ON_NODE": "4",
        }
        self.process = subprocess.Popen(
            [str(MANIFESTS / "slurm.sh"), "my.yaml"], env=environment, start_new_session=True
        )

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def end(self) -> None:
        """Steps that still run end with their job."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def test_on_slurm_ray_starts_once_on_each_node_and_the_code_is_the_studys(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "exit 1")
    try:
        assert slurm.process.wait(60) == 1
        wait_until(lambda: sum(c.startswith("ray ") for c in slurm.calls()) == 2, 30)
    finally:
        slurm.end()
    calls = slurm.calls()
    head, worker = sorted(
        (c for c in calls if c.startswith("ray ")), key=lambda c: "--head" not in c
    )
    port = 20000 + 4711
    assert f"--node-ip-address=10.0.0.1 --port={port} --dashboard-host=127.0.0.1" in head
    assert f"--address=10.0.0.1:{port}" in worker
    for call in (head, worker):
        assert "--num-cpus=16 --num-gpus=4" in call
    places = {
        "--head" in c: re.findall(r"-w (\w+)", c)
        for c in calls
        if c.startswith("srun") and "ray start" in c
    }
    assert places == {True: ["n1"], False: ["n2"]}
    assert not [c for c in calls if c.startswith("scontrol requeue")]
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_on_slurm_the_end_of_the_time_interrupts_the_study_and_queues_it_again(
    tmp_path: Path,
) -> None:
    waits = f"trap 'sleep 1; exit 130' TERM; touch {tmp_path}/runs; while true; do sleep 0.1; done"
    slurm = Slurm(tmp_path, waits)
    try:
        wait_until((tmp_path / "runs").exists, 60)
        wait_until(lambda: catches(slurm.process.pid, signal.SIGTERM), 60)
        slurm.process.send_signal(signal.SIGTERM)
        assert slurm.process.wait(60) == 130
    finally:
        slurm.end()
    assert "scontrol requeue 4711" in slurm.calls()


def catches(pid: int, number: int) -> bool:
    """Whether a process has said what it does at a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    assert caught
    return bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.fixture
def one_machine(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A head as the recipe starts it, with ports of its own: (dashboard, token file)."""
    gcs, dashboard, client, agent = free_ports(4)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GPUS": "2",
        "CPUS": "1",
        "PORT": str(gcs),
        "DASHBOARD_PORT": str(dashboard),
    }
    others = [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    with (tmp_path / "log").open("w") as log:
        head = subprocess.Popen(
            [str(MANIFESTS / "one-machine.sh"), *others],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # a shell that runs the tests in its background has them, and this one, ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield f"http://127.0.0.1:{dashboard}", tmp_path / ".ray" / "auth_token"
        # what comes while Ray is still starting, it may take for the end of one of its own commands
        wait_until(lambda: "block forever" in (tmp_path / "log").read_text(), 60)
    finally:
        head.send_signal(signal.SIGINT)  # Ctrl-C
        try:
            head.wait(60)
        finally:
            if head.poll() is None:
                os.killpg(head.pid, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_one_machine_answers_holders_of_the_token_on_loopback_and_nobody_else(
    one_machine: tuple[str, Path],
) -> None:
    dashboard, token_file = one_machine
    wait_until(lambda: status_of(f"{dashboard}/api/version", "") is not None, 200)
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    token = token_file.read_text()
    wait_until(lambda: status_of(f"{dashboard}/api/version", token) == 200, 100)
    assert status_of(f"{dashboard}/api/version", "") == 401
    assert status_of(f"{dashboard}/api/version", "0" * 64) in (401, 403)
    for address in other_addresses():
        with pytest.raises(OSError):
            socket.create_connection((address, int(dashboard.rpartition(":")[2])), timeout=2)


def status_of(url: str, token: str) -> int | None:
    """The HTTP status; None when nobody answers."""
    request = urllib.request.Request(url)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def other_addresses() -> set[str]:
    """Of this machine, besides loopback."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    except socket.gaierror:
        return set()
    return {address for address in found if not address.startswith(("127.", "::1"))}


def test_the_page_about_clusters_explains_every_recipe_and_links_to_what_exists() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    for path in sorted(MANIFESTS.iterdir()):
        assert f"](../cluster/manifests/{path.name})" in page
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert not [link for link in links if "://" not in link and not (ROOT / "docs" / link).exists()]


@pytest.mark.parametrize("path", sorted(MANIFESTS.iterdir()), ids=lambda path: path.name)
def test_no_recipe_names_a_version_that_moves_or_opens_a_dashboard(path: Path) -> None:
    text = path.read_text()
    assert ":latest" not in text
    assert "0.0.0.0" not in text
