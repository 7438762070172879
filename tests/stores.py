"""Real stores of objects on this machine: Ceph's gateway, which speaks S3, and Azurite, for Azure.

They come from Debian (ceph-mon, ceph-osd, radosgw) and npm (azurite); tests of a store are skipped
where its programs are not installed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from tests.machine import free_ports, short_folder, wait_until

CEPH = """\
[global]
fsid = {fsid}
mon_host = {monitor}
# as small and as fast as a cluster can be: one monitor, one disk in memory, no copies
osd_objectstore = memstore
osd_pool_default_size = 1
mon_allow_pool_size_one = true
osd_pool_default_pg_num = 1
osd_crush_chooseleaf_type = 0
mon_max_pg_per_osd = 1000
paxos_propose_interval = 0.05
# nobody else is on it
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
public_network = 127.0.0.0/8
# all of it in one folder
run_dir = {folder}
crash_dir = {folder}
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/gateway
keyring = {folder}/keyring
admin_socket = {folder}/$name.asok
pid_file = {folder}/$name.pid
log_file = {folder}/$name.log
"""
KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
# the account that every Azurite has
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@dataclass
class Bucket:
    """A server with one bucket; what it holds outlives `stop`."""

    kind: str
    port: int
    command: list[str]
    environment: dict[str, str]
    secret_variable: str
    folder: Path
    create_request: Callable[[int, str], urllib.request.Request]
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"{self.kind}://bucket/studies"

    @property
    def absent(self) -> str:
        return f"{self.kind}://absent/studies"

    def start(self) -> None:
        self.process = started(self.command, self.folder / "server.log")
        wait_until(lambda: listens(self.port), 60, "the store does not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    def make_bucket(self) -> None:
        with urllib.request.urlopen(self.create_request(self.port, "bucket"), timeout=30) as answer:
            assert answer.status in (200, 201)


@contextmanager
def running(bucket: Bucket) -> Iterator[None]:
    try:
        bucket.start()
        yield
    finally:
        bucket.stop()


@contextmanager
def ceph() -> Iterator[Bucket]:
    """A cluster of one monitor, one disk and a gateway."""
    needed("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
    with short_folder() as folder, ExitStack() as stack:
        port, first, second = free_ports(3)
        monitor = f"[v2:127.0.0.1:{first}/0,v1:127.0.0.1:{second}/0]"
        fsid, disk = str(uuid.uuid4()), str(uuid.uuid4())
        conf, maps = folder / "ceph.conf", folder / "monmap"
        conf.write_text(CEPH.format(fsid=fsid, monitor=monitor, folder=folder))
        for name in ("mon", "osd", "gateway"):
            (folder / name).mkdir()
        (folder / "keyring").touch()

        def call(*command: str) -> None:
            subprocess.run([*command, "-c", str(conf)], check=True, capture_output=True, timeout=60)

        def begin(*command: str) -> None:
            process = started([*command, "-f", "-c", str(conf)], folder / "cluster.log")
            stack.callback(process.wait)
            stack.callback(process.kill)

        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, str(maps))
        call("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(maps))
        begin("ceph-mon", "-i", "a")
        call("ceph", "osd", "new", disk)
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        begin("ceph-osd", "-i", "0")
        user = ["--uid=tests", "--display-name=tests"]
        keys = [f"--access-key={KEY}", f"--secret={SECRET}"]
        call("radosgw-admin", "user", "create", *user, *keys)
        front = f"--rgw-frontends=beast endpoint=127.0.0.1:{port}"
        bucket = Bucket(
            kind="s3",
            port=port,
            command=["radosgw", "-f", "-n", "client.gateway", "-c", str(conf), front],
            environment={
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
            },
            secret_variable="AWS_SECRET_ACCESS_KEY",
            folder=folder,
            create_request=create_bucket_request,
        )
        with running(bucket):
            yield bucket


@contextmanager
def azurite() -> Iterator[Bucket]:
    """What Microsoft gives out to develop against."""
    needed("azurite-blob")
    with short_folder() as folder:
        (port,) = free_ports(1)
        bucket = Bucket(
            kind="az",
            port=port,
            command=[
                "azurite-blob",
                f"--location={folder}",
                f"--blobPort={port}",
                "--skipApiVersionCheck",
                "--disableTelemetry",
                "--silent",
            ],
            environment={
                "AZURE_STORAGE_USE_EMULATOR": "true",
                "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
                "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY,
            },
            secret_variable="AZURE_STORAGE_ACCOUNT_KEY",
            folder=folder,
            create_request=create_container_request,
        )
        with running(bucket):
            yield bucket


def create_bucket_request(port: int, name: str) -> urllib.request.Request:
    import obstore

    parent = obstore.store.S3Store(
        name,
        endpoint=f"http://127.0.0.1:{port}",
        access_key_id=KEY,
        secret_access_key=SECRET,
        client_options={"allow_http": True},
    )
    return urllib.request.Request(
        obstore.sign(parent, "PUT", "", timedelta(seconds=60)), method="PUT"
    )


def create_container_request(port: int, name: str) -> urllib.request.Request:
    """Signed as "Authorize with Shared Key" of Azure's REST API says."""
    headers = {
        "x-ms-date": format_datetime(datetime.now(UTC), usegmt=True),
        "x-ms-version": "2021-12-02",
    }
    signed = "\n".join(
        ["PUT", *[""] * 11]
        + [f"{header}:{value}" for header, value in headers.items()]
        + [f"/{ACCOUNT}/{ACCOUNT}/{name}", "restype:container"]
    )
    digest = hmac.digest(base64.b64decode(ACCOUNT_KEY), signed.encode(), hashlib.sha256)
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"http://127.0.0.1:{port}/{ACCOUNT}/{name}?restype=container"
    return urllib.request.Request(url, method="PUT", headers=headers)


def needed(*programs: str) -> None:
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("a") as printed:
        return subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
