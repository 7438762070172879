"""Free ports, short paths, other processes, and patience."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# above those that Ray gives its workers, below those that the system gives to whoever asks for any
PORTS = range(20_000, 32_000)
reservations: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Each is handed out once, here and in all other processes of tests, as long as they live."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().choice(PORTS)
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0maskstudy-tests-{port}")
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            reservation.close()
        else:
            reservations.append(reservation)
            ports.append(port)
    return ports


def processes(title: str, variable: str = "") -> list[int]:
    """By how their titles begin and, where given, by a NAME=value of their environment."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            environment = (process / "environ").read_bytes().split(b"\0") if variable else []
            is_meant = not variable or variable.encode() in environment
            if is_meant and (process / "cmdline").read_text().startswith(title):
                found.append(int(process.name))
    return sorted(found)


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a short path: sockets lie in it, and their names may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="ms-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def wait_until(
    condition: Callable[[], bool], seconds: float = 120, what: str = "it took too long"
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
