"""Who drives a study: one driver at a time, by a lock on this machine and by epochs everywhere.

Whoever has the lock and the newest epoch is the driver. A newer epoch fences all older ones: they
may live on, but `check_fence` stops each of their writes before its rename, and `sweep` takes
away what they have written aside.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from datetime import UTC, datetime
from typing import Any

from study import mirror
from study.folder import StudyFolder
from study.ledger.files import last_number, read_sealed, sealed, write_error
from study.ledger.records import FencedError, HeldError, LedgerError
from trainables import durable
from trainables.errors import StorageError

GLANCE_SECONDS = 0.5  # that a lock may be busy before its holder counts as a driver

_LOG = logging.getLogger(__name__)


def is_held(folder: StudyFolder) -> bool:
    """Whether a driver holds the study now; of a store, one that fell silent is watched first."""
    if _is_locked(folder):
        return True
    newest = mirror.newest_epoch(folder) if folder.remote else 0
    return newest > 0 and not mirror.is_silent(folder, newest)


def refuse_if_held(folder: StudyFolder) -> None:
    """Raise the HeldError that a second driver would raise."""
    if is_held(folder):
        raise _held(folder)


def read_holder(folder: StudyFolder) -> dict[str, Any] | None:
    """The newest driver's host, pid, start time and what it told; None if nobody ever drove."""
    newest = _newest_epoch(folder)
    if newest == 0:
        return None
    try:
        return {"epoch": newest, **read_sealed(folder.epoch(newest))}
    except LedgerError:  # killed while it signed; only its name is lost, the epoch counts
        return {"epoch": newest}


def read_jobs(folder: StudyFolder) -> frozenset[str]:
    """Ids of the Ray jobs that have driven the study."""
    jobs = []
    for epoch in range(1, _newest_epoch(folder) + 1):
        with contextlib.suppress(LedgerError):  # it never signed
            jobs.append(read_sealed(folder.epoch(epoch)).get("job"))
    return frozenset(job for job in jobs if isinstance(job, str))


def take_lock(folder: StudyFolder) -> int:
    """Lock the study until the descriptor is closed, at the latest by the end of this process."""
    try:
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(folder.lock, error, 0) from error
    try:
        _lock_within(descriptor, GLANCE_SECONDS)
    except BlockingIOError:
        os.close(descriptor)
        raise _held(folder) from None
    except OSError as error:
        os.close(descriptor)
        raise StorageError(f"{folder.lock}: cannot be locked: {error.strerror}") from error
    return descriptor


def claim_epoch(folder: StudyFolder, holder: dict[str, Any]) -> int:
    """Create the next epoch's file; its name counts, its content is for people."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    signed = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, **holder}
    if folder.remote:
        taken = mirror.take_epoch(folder, lambda word: sealed({**signed, "word": word}))
        if taken is None:
            mirror.pull_epochs(folder)
            raise _held(folder)
        return taken
    content = sealed(signed)
    while True:
        epoch = _newest_epoch(folder) + 1
        path = folder.epoch(epoch)
        try:
            durable.write_new(path, content)
            durable.sync(folder.epochs)
            return epoch
        except FileExistsError:  # somebody else came first
            continue
        except OSError as error:
            raise write_error(path, error, len(content)) from error


def check_fence(folder: StudyFolder, epoch: int) -> None:
    """Raise a FencedError if a newer driver has taken the study from the one of this epoch."""
    if folder.remote:
        is_fenced = mirror.is_fenced(folder, epoch)
        newest = mirror.newest_epoch(folder) if is_fenced else epoch
    else:
        newest = _newest_epoch(folder)
    if newest != epoch:
        raise FencedError(
            f"{folder.where}: this driver has epoch {epoch}, but "
            f"{_describe_holder(folder, newest)} has taken the study over. "
            f"Nothing was written; end this driver"
        )


def name_aside(name: str, epoch: int) -> str:
    """Where a driver of that epoch writes aside: a stale one must not share it with the newer."""
    return f"{name}.{epoch:06d}.tmp"


def sweep(folder: StudyFolder) -> None:
    """Remove what earlier drivers left aside; the ledger's text says why this also fences."""
    for pattern in ("*", "suggestions/*", "answers/*", "stints/*", "trials/*/*", "trials/*/rows/*"):
        for leftover in folder.root.glob(f"{pattern}.[0-9][0-9][0-9][0-9][0-9][0-9].tmp"):
            _LOG.info("swept %s", leftover.relative_to(folder.root))
            try:
                leftover.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(leftover, error, 0) from error


def _is_locked(folder: StudyFolder) -> bool:
    """Whether a driver of this machine, or of a shared folder, holds the study."""
    if not folder.lock.exists():
        return False
    descriptor = os.open(folder.lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock_within(descriptor: int, seconds: float) -> None:
    """Lock exclusively; whoever asks `is_held` has the lock for a moment, a driver for longer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _held(folder: StudyFolder) -> HeldError:
    return HeldError(
        f"{folder.where}: held by {_describe_holder(folder, _newest_epoch(folder))}. "
        f"Wait for it, or stop it with `maskstudy stop {folder.in_commands}`"
    )


def _newest_epoch(folder: StudyFolder) -> int:
    """The first is 1; 0 if nobody ever drove."""
    return last_number(folder.epochs) or 0


def _describe_holder(folder: StudyFolder, epoch: int) -> str:
    try:
        holder = read_sealed(folder.epoch(epoch))
    except LedgerError:
        return f"a driver that has not signed (epoch {epoch})"
    told = ", ".join(f"{key} {value}" for key, value in holder.items() if value is not None)
    return f"epoch {epoch} ({told})"
