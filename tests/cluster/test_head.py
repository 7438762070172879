"""Looking for a head that may be gone.  pytest tests/cluster/test_head.py"""

from __future__ import annotations

import socket
import threading
import time

import pytest

import cluster.head
from cluster.head import TIMEOUT, watch_head


def test_a_head_that_is_gone_is_missed_once_and_one_that_answers_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TIMEOUT, "2")
    monkeypatch.setattr(cluster.head, "LOOK_SECONDS", 0.2)
    head = socket.create_server(("127.0.0.1", 0))
    lost: list[tuple[float, float]] = []
    missed, began = threading.Event(), time.monotonic()

    def on_loss(seconds: float) -> None:
        lost.append((seconds, time.monotonic() - began))
        missed.set()

    watch = watch_head(f"127.0.0.1:{head.getsockname()[1]}", on_loss)
    time.sleep(2.5)
    assert lost == []
    head.close()
    assert missed.wait(60)
    time.sleep(0.5)
    ((silent, since_it_began),) = lost
    watch.set()
    assert silent >= 1.4
    assert silent < since_it_began - 1, "it counts from the last answer"


def test_a_watch_that_was_ended_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, "0")
    missed = threading.Event()
    watch_head("127.0.0.1:1", lambda seconds: missed.set()).set()
    assert not missed.wait(1.5)
