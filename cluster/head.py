"""Look whether the head of a cluster is still there, apart from Ray.

Ray's own clients wait in C++ for a head that is gone, up to RAY_gcs_rpc_server_reconnect_timeout_s
of *this* process's environment (60 unless set), and then end the process with a line of their log.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"
LOOK_SECONDS = 1.0
SHARE = 0.7  # of the time that Ray gives it: what is to be said is said before Ray ends us


def watch_head(address: str, on_loss: Callable[[float], None]) -> threading.Event:
    """Call `on_loss` with the seconds of silence, once, when the head at host:port is lost.

    The event that is returned, when set, ends the watch.
    """
    host, _, port = address.rpartition(":")
    patience = SHARE * float(os.environ.get(TIMEOUT, "60"))
    ended = threading.Event()

    def watch() -> None:
        seen = time.monotonic()
        while not ended.wait(LOOK_SECONDS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                seen = time.monotonic()
            except OSError:
                silent = time.monotonic() - seen
                if silent > patience:
                    on_loss(silent)
                    return

    threading.Thread(target=watch, name="watch of the head", daemon=True).start()
    return ended
