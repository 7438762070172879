"""A private cluster on a machine that is too busy for it.  pytest tests/cluster/test_connect.py"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import connect

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, about itself
]
TOO_SLOW = "The current node timed out during startup. This could happen because ..."


@pytest.mark.parametrize("failures", [1, connect.STARTS])
def test_a_start_that_took_too_long_is_tried_again(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, begun = ray.init, 0
    said: list[str] = []

    def init(**options: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun <= failures:
            raise Exception(TOO_SLOW)
        return begin(**options)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    try:
        if failures < connect.STARTS:
            connection = connect.connect(said.append)
            assert connection.is_private and ray.is_initialized()
        else:
            with pytest.raises(connect.NotStarted, match="Run the same command again"):
                connect.connect(said.append)
        assert begun == min(failures + 1, connect.STARTS)
        assert len(said) == begun - 1 and all(TOO_SLOW in line for line in said)
    finally:
        ray.shutdown()


@pytest.mark.parametrize("address", [None, ""])
def test_a_ray_that_cannot_start_here_is_no_fault_of_the_file(
    address: str | None, tiny_study: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / ("long" * 30))}  # for a socket
    environment.pop("RAY_ADDRESS", None)
    if address is not None:
        environment["RAY_ADDRESS"] = address
    command = [sys.executable, "-m", "study", "run", str(tiny_study)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 71, done.stderr
    assert "maskstudy: Ray on this machine: it did not start" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.chaos(1)
@pytest.mark.timeout(200)
def test_a_machine_too_busy_for_rays_own_patience_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray gives a node 30 s to start; this one's raylet stands still for longer."""
    import psutil  # type: ignore[import-untyped]

    stood_still: list[float] = []

    def hold_up() -> None:
        while not (raylets := [c for c in psutil.Process().children() if c.name() == "raylet"]):
            time.sleep(0.01)
        raylets[0].send_signal(signal.SIGSTOP)
        time.sleep(40)
        raylets[0].send_signal(signal.SIGCONT)
        stood_still.append(40)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said: list[str] = []
    busy = threading.Thread(target=hold_up)
    busy.start()
    try:
        assert connect.connect(said.append).is_private
        assert stood_still, "the raylet was ready before it was held up"
        assert ray.get(ray.remote(lambda: "at work").remote(), timeout=60) == "at work"
        assert any("busy" in line for line in said)
    finally:
        busy.join()
        ray.shutdown()
