"""A worker that hangs says where, and ends itself, so that its group can be started anew.

How long a job may go on without progress is decided in one place for all its workers, since they
wait for each other; here every worker asks for what is left of it, and obeys. Python's own
`faulthandler` stands behind, a thread in C: it also ends a process whose interpreter is blocked.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

GRACE_SECONDS = 4.0  # from when a job hangs until whoever has not ended itself is ended
LONGEST_WAIT = 10.0  # seconds between two questions


@contextmanager
def watched(
    ask: Callable[[float], float], tell: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Watch what this process does; yields what to call at every sign of progress, from any thread.

    `ask` gets the seconds since the last sign and answers how many more the job may go on without
    any. When none are left, `tell` gets the stacks of all threads, and the process ends.
    """
    seen = time.monotonic()
    ended = threading.Event()

    def alive() -> None:
        nonlocal seen
        seen = time.monotonic()

    def watch() -> None:
        wait = 0.0
        while not ended.wait(wait):
            wait = 1.0  # while nobody answers
            with suppress(Exception):
                left = ask(time.monotonic() - seen)
                if left <= 0:
                    try:
                        tell(stacks())
                    finally:
                        os._exit(1)
                faulthandler.dump_traceback_later(left + GRACE_SECONDS, exit=True, file=2)
                wait = min(left, max(left / 4, 0.1), LONGEST_WAIT)

    thread = threading.Thread(target=watch, name="watch of the job", daemon=True)
    thread.start()
    try:
        yield alive
    finally:
        ended.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def stacks() -> str:
    """Where every thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines = "".join(traceback.format_stack(frame))
            parts.append(f"thread {names.get(ident, ident)}:\n{lines}")
    return "\n".join(parts)
