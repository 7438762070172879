"""Hosts with networks of their own, whose links are cut and which are lost for good.

Each host is a set of namespaces with an address of its own on a bridge, with its own processes,
/dev/shm and /etc/hosts; nothing of it is seen from outside.   pytest tests/cluster/test_hosts.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pandas as pd
import pytest

from study.folder import StudyFolder
from tests import witness
from tests.clusters import BIN
from tests.machine import processes, wait_until
from tests.studies import TWO_WORKERS, first_trials, folder_of, write_study

pytestmark = [pytest.mark.ray, pytest.mark.chaos(2), pytest.mark.timeout(900)]

ONE_TRIAL = TWO_WORKERS.replace(" hang_minutes: 0.2,", "").replace("trials: 7", "trials: 1")
ONE_TRIAL += "controls: []\n"
NETWORK = "10.213.7"
PORT = 7013
CUT_SECONDS = 20


class Host:
    """A holder process, pid 1 of its namespaces: when it is killed, all of the host is."""

    def __init__(self, number: int, scratch: Path) -> None:
        self.address = f"{NETWORK}.{number}"
        self.link = f"to{number}"
        self.started: list[subprocess.Popen[bytes]] = []
        self.scratch = scratch / str(number)
        self.scratch.mkdir()
        names = self.scratch / "hosts"
        names.write_text(f"127.0.0.1 localhost\n{self.address} host{number}\n")
        nobody = self.scratch / "resolv.conf"
        nobody.touch()  # looking a name up fails at once
        (self.scratch / "ray").mkdir()
        setup = (
            f"mount --bind {names} /etc/hosts; mount --bind {nobody} /etc/resolv.conf; "
            f"mkdir -p /tmp/ray; mount --bind {self.scratch}/ray /tmp/ray; "
            f"mount -t tmpfs none /dev/shm; hostname host{number}; ip link set lo up; "
            "echo ready; exec sleep 1000000"
        )
        flags = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc"]
        self.outer = subprocess.Popen(
            ["unshare", *flags, "--kill-child", "sh", "-ec", setup],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.outer.stdout is not None
        told = self.outer.stdout.readline()
        if told != "ready\n":
            self.lose()
            raise OSError(told.strip())
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children")
        self.pid = int(children.read_text())

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--all", "--wd", *words]

    def do(self, *words: str) -> None:
        subprocess.run(self.command(*words), check=True, capture_output=True, text=True)

    def start(self, log: Path, *words: str, **variables: str) -> subprocess.Popen[bytes]:
        with log.open("wb") as printed:
            process = subprocess.Popen(
                self.command(*words),
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
            )
        self.started.append(process)
        return process

    def start_ray(self, *options: str) -> subprocess.Popen[bytes]:
        return self.start(
            self.scratch.parent / f"ray-{self.link}.log",
            str(BIN / "ray"),
            "start",
            "--block",
            f"--node-ip-address={self.address}",
            "--disable-usage-stats",
            "--object-store-memory=100000000",
            *options,
        )

    def has_workers(self) -> bool:
        """Whether workers of a trial run on it."""
        mine = os.readlink(f"/proc/{self.pid}/ns/pid")
        for worker in processes("ray::RayTrainWorker"):
            with suppress(OSError):
                if os.readlink(f"/proc/{worker}/ns/pid") == mine:
                    return True
        return False

    def lose(self) -> None:
        """Kill all of it at once."""
        self.outer.kill()
        self.outer.wait()
        assert self.outer.stdout is not None
        self.outer.stdout.close()
        for process in self.started:
            process.wait(30)


@contextmanager
def hosts(count: int, scratch: Path) -> Iterator[list[Host]]:
    """A head with a bridge, and others that are plugged into it."""
    with ExitStack() as stack:
        found = []
        for number in range(1, count + 2):
            found.append(Host(number, scratch))
            stack.callback(found[-1].lose)
        head = found[0]
        head.do("ip", "link", "add", "bridge", "type", "bridge")
        head.do("ip", "addr", "add", f"{head.address}/24", "dev", "bridge")
        head.do("ip", "link", "set", "bridge", "up")
        for host in found[1:]:
            # the other end is moved by its process id, which only the outside knows
            enter = ["nsenter", "--target", str(head.pid), "--net"]
            pair = ["ip", "link", "add", host.link, "type", "veth", "peer", "name", "eth0"]
            subprocess.run([*enter, *pair, "netns", str(host.pid)], check=True)
            head.do("ip", "link", "set", host.link, "master", "bridge", "up")
            host.do("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
            host.do("ip", "link", "set", "eth0", "up")
        yield found


@pytest.fixture
def three_hosts(short_folder: Path) -> Iterator[list[Host]]:
    """A head without CPUs and three hosts with one each."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} here")
    with ExitStack() as stack:
        try:
            found = stack.enter_context(hosts(3, short_folder))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no namespaces can be made here: {getattr(error, 'stderr', '') or error}")
        head, *others = found
        head.start_ray("--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false")
        for host in others:
            host.start_ray(f"--address={head.address}:{PORT}", "--num-cpus=1")
        yield found


def test_a_cut_link_is_waited_for_and_a_lost_host_is_done_without(
    by_two_workers: StudyFolder, three_hosts: list[Host], tmp_path: Path
) -> None:
    path, log = write_study(tmp_path, ONE_TRIAL), tmp_path / "witness.log"
    head, *others = three_hosts
    wait_until(lambda: num_nodes(head) == 4, 240, "the hosts do not come together")
    driver = head.start(
        path.with_suffix(".log"),
        *(sys.executable, "-m", "tests.witness", str(log), "run", str(path), "--no-report"),
        RAY_ADDRESS=f"{head.address}:{PORT}",
    )

    def num_steps() -> int:
        assert driver.poll() is None, path.with_suffix(".log").read_text()
        return witness.read(log).steps.total()

    wait_until(lambda: num_steps() > 5, 240, "it does not begin")
    busy = [host for host in others if host.has_workers()]
    assert len(busy) == 2, "the two workers are not on two hosts"
    head.do("ip", "link", "set", busy[0].link, "down")
    time.sleep(CUT_SECONDS / 2)
    before = num_steps()
    time.sleep(CUT_SECONDS / 2)
    assert num_steps() == before, "it goes on without its other half"
    head.do("ip", "link", "set", busy[0].link, "up")
    wait_until(lambda: num_steps() > before, 240, "it does not go on when the link is back")

    interruptions = len(witness.read(log).jumps)  # none, or one if Ray gave the node up
    lost = next(host for host in others if host is not busy[0] and host.has_workers())
    lost.lose()
    assert driver.wait(300) == 0, path.with_suffix(".log").read_text()
    assert len(witness.read(log).jumps) > interruptions, "it did not go on elsewhere"
    pd.testing.assert_frame_equal(*first_trials(folder_of(path), by_two_workers, 1))


def num_nodes(head: Host) -> int:
    """That have joined, as the head sees it."""
    code = (
        "import ray._private.state as s; s.state._initialize_global_state"
        f"(s.GcsClientOptions.create('{head.address}:{PORT}', None, True, True)); "
        "print(sum(n['Alive'] for n in s.state.node_table()))"
    )
    done = subprocess.run(
        head.command(sys.executable, "-c", code), capture_output=True, text=True, timeout=120
    )
    return int(done.stdout or 0)
