"""How workers leave a job. It travels between processes; each of them imports this file alone."""

from __future__ import annotations

from enum import StrEnum


class Ending(StrEnum):
    """The first five end the trial; after the others it goes on."""

    COMPLETE = "complete"
    STOPPED = "stopped"  # by the stopping rule, at a rung
    DIVERGED = "diverged"  # a number was not finite
    OUT_OF_MEMORY = "out-of-memory"
    FAILED = "failed"
    LOST = "lost"  # the infrastructure failed, not the trial
    LEAVING = "leaving"  # saved, as its workers have to go
    WITHDRAWN = "withdrawn"  # taken off the desk, as no workers are there for it
