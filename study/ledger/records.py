"""What the ledger holds: trials as they were drawn, how they ended, what requests led to.

Records are frozen; each is kept as one JSON file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from trainables.errors import StorageError


class LedgerError(StorageError):
    """A file of the study is damaged (exit code 74)."""


class HeldError(StorageError):
    """Another driver holds the study (exit code 75)."""

    exit_code = 75


class FencedError(StorageError):
    """A newer driver has taken the study over; this one must end (exit code 75)."""

    exit_code = 75


class Outcome(StrEnum):
    COMPLETE = "complete"
    STOPPED = "stopped"  # by the stopping rule
    DIVERGED = "diverged"  # its loss was not finite
    OUT_OF_MEMORY = "out-of-memory"
    FAILED = "failed"


# ended for a reason that lies outside the trial's settings: a later attempt may end otherwise
RETRIABLE = {Outcome.OUT_OF_MEMORY, Outcome.FAILED}


@dataclass(frozen=True)
class Suggestion:
    """One trial as it was drawn."""

    number: int  # 0, 1, 2, ... without gaps
    trial: str
    arm: str
    seed: int
    origin: str  # control | control:random-init | control:frozen | search | confirm | verdict
    config: dict[str, Any]  # the whole TrialConfig
    params: dict[str, Any]  # Optuna parameter -> value
    labels: dict[str, Any]  # searched path -> what figures call its value
    # of a population: the parent (None: a founder), and the progress from which on it is not it
    born: dict[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    """How a trial ended."""

    trial: str
    outcome: Outcome
    seconds: float
    error: str | None
    progress: dict[str, float]  # phase -> share of its budget done
    # how often the infrastructure has failed it, this time included; 0: it ended by itself
    infrastructure_failures: int = 0


@dataclass(frozen=True)
class Stint:
    """How long a driver has run the study, as far as it has told; what a budget in hours counts."""

    epoch: int
    seconds: float
    workers: int  # that a trial is trained by
    held: dict[str, float]  # trial -> seconds in which it had its workers


@dataclass(frozen=True)
class Answer:
    """What became of one request; of a refused one only the reason counts."""

    number: int  # 0, 1, 2, ... without gaps
    request: str  # the name of its file: it is answered once, however often it is found
    kind: str  # extend | enqueue
    content: dict[str, Any]  # what is granted
    refused: str | None
