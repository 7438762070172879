"""The ledger: what was suggested, what was measured, how it ended. Nothing acknowledged is lost.

One driver writes, anyone reads. A write is made aside in the same folder, fsynced, renamed over,
and its folder fsynced; only then does the method return. Rows are immutable Parquet parts
`<epoch>-<sequence>-<crc32>.parquet`: the epoch is the driver's, the sequence counts the parts of
that trial, so their order needs no clock and a gap is seen. The checksum in the name covers every
byte; page checksums leave the footer open, where 3 of 12,680 flipped bits gave a wrong table
without an error.

One driver at a time: `flock` refuses a second one at once. Where locks are lost (a deleted lock
file, some network file systems) epochs fence: a driver creates `epochs/<n>.json` exclusively, then
removes the files that older drivers have written aside. A writer looks for a newer epoch after its
own file stands aside, right before the rename. So either it sees the newer epoch, or the rename
comes before the newer driver reads anything, or the rename finds its file gone.

Of a study in a store of objects the folder is the mirror; study/mirror.py says what holds there.

Damage is a LedgerError that names the file, what is wrong with it, and what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from study import mirror
from study.folder import StudyFolder, is_trial_id
from trainables import durable
from trainables.errors import StorageError, UserError
from trainables.storage import Tag, store

log = logging.getLogger(__name__)

GLANCE_SECONDS = 0.5  # that a lock may be busy before its holder counts as a driver

_PART = re.compile(r"(\d{6,})-(\d{6,})-[0-9a-f]{8}\.parquet")

_RESTORE = "Bring it back from a copy"
_RESTORE_PART = (
    "Bring it back from a copy; without one, remove the trial's folder and run the study again: "
    "that trial then starts anew"
)
_RESTORE_OUTCOME = (
    "Bring it back from a copy, or remove it and run the study again: the trial then continues "
    "from its last checkpoint"
)
_RESTORE_SUGGESTION = "Bring it back from a copy: the config.json of its trial is one"
_RESTORE_ANSWER = (
    "Bring it back from a copy; without one, remove the folder of answers and ask for the "
    "extensions and arms anew: the trials themselves are not lost"
)


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
    origin: str  # control | control:random-init | control:frozen | search | confirm
    config: dict[str, Any]  # the whole TrialConfig
    params: dict[str, Any]  # Optuna parameter -> value
    labels: dict[str, Any]  # searched path -> what figures call its value


@dataclass(frozen=True)
class Result:
    """How a trial ended."""

    trial: str
    outcome: Outcome
    seconds: float
    error: str | None
    progress: dict[str, float]  # phase -> share of its budget done


@dataclass(frozen=True)
class Answer:
    """What became of one request; of a refused one only the reason counts."""

    number: int  # 0, 1, 2, ... without gaps
    request: str  # the name of its file: it is answered once, however often it is found
    kind: str  # extend | enqueue
    content: dict[str, Any]  # what is granted
    refused: str | None


# what a trial reports; `commit` adds the rest
REPORTED: dict[str, pa.DataType] = {
    "phase": pa.string(),
    "step": pa.int64(),
    "epoch": pa.float64(),
    "progress": pa.float64(),
    "metric": pa.string(),
    "value": pa.float64(),
    "goal": pa.string(),
    "unit": pa.string(),
    "seconds": pa.float64(),
}
COLUMNS: dict[str, pa.DataType] = {
    "study": pa.string(),
    "trial": pa.string(),
    "arm": pa.string(),
    "seed": pa.int64(),
    **REPORTED,
    "attempt": pa.string(),
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in COLUMNS.items()])
KEY = ["trial", "phase", "step", "metric"]


_Record = TypeVar("_Record", Suggestion, Result, Answer)


class Ledger:
    """The one writer of a study. `with Ledger.open(folder, {"job_id": ...}) as ledger: ...`"""

    def __init__(self, folder: StudyFolder, epoch: int, lock: int) -> None:
        self.folder = folder
        self.epoch = epoch
        self._lock = lock
        self._attempts = 0
        self._sequences: dict[str, int] = {}  # trial -> number of its parts
        self._suggested: list[str] = []  # trials by number
        self._broken: StorageError | None = None
        self._one_at_a_time = threading.RLock()
        self._heart = mirror.Heart(folder, epoch) if folder.remote else None
        self._tags: dict[str, Tag] = {}  # of the store's objects, as this driver knows them

    @classmethod
    def open(cls, folder: StudyFolder, holder: dict[str, Any]) -> Ledger:
        """Take the study, or raise HeldError naming who has it.

        `holder` is added to host, pid and start time in the epoch's file, for people to read.
        """
        for path in (folder.epochs, folder.suggestions, folder.trials):
            try:
                durable.make_folder(path)
            except OSError as error:
                raise _write_error(path, error, 0) from error
        lock, ledger = _take_lock(folder), None
        try:
            ledger = cls(folder, _claim_epoch(folder, holder), lock)
            if ledger._heart is not None:
                ledger._heart.start()
                ledger._tags = mirror.pull_as_driver(folder)
            _sweep(folder)
            ledger._restore_copies()
        except BaseException:
            if ledger is not None:
                ledger.close()
            else:
                os.close(lock)
            raise
        return ledger

    def close(self) -> None:
        """Give the study free for the next driver."""
        if self._lock >= 0:
            if self._heart is not None:
                self._heart.stop(gives_back=self._broken is None)
                mirror.remember(self.folder, self._tags)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_fenced(self) -> bool:
        """Whether a newer driver has been seen in the store."""
        return self._heart is not None and self._heart.is_fenced

    def refuse_if_fenced(self) -> None:
        """Raise the FencedError that the next write would raise."""
        if self.is_fenced:
            self._check_fence()

    def new_attempt(self) -> str:
        """A name for one launch of a trial, never given twice: `<epoch>-<count>`."""
        with self._one_at_a_time:
            self._attempts += 1
            return f"{self.epoch:06d}-{self._attempts:04d}"

    def freeze(self, spec_text: str, environment: dict[str, Any], *, extends: bool = False) -> None:
        """Keep the study file as it was written, once. Another text is refused.

        `extends`: the caller has seen that the new text only asks for more of the same.
        """
        frozen = read_spec(self.folder)
        if frozen == spec_text:
            return
        if frozen is not None and not extends:
            raise UserError(_changed_spec(self.folder, frozen, spec_text))
        known = [] if frozen is None else read_environment(self.folder)["study_sha256"]
        content = {**environment, "study_sha256": [*known, _sha256(spec_text.encode())]}
        self._put(self.folder.environment, sealed(content))
        self._put(self.folder.spec, spec_text.encode())

    def suggest(self, suggestion: Suggestion) -> None:
        """Write a trial down before it is launched."""
        with self._one_at_a_time:
            number = len(self._suggested)
            assert suggestion.number == number, f"number {number} is next, not {suggestion.number}"
            self._put(self.folder.suggestion(number), sealed(asdict(suggestion)), once=True)
            self._suggested.append(suggestion.trial)
            self._put_copy(suggestion)

    def commit(self, trial: Suggestion, rows: list[dict[str, Any]], attempt: str) -> None:
        """Keep rows; durable when this returns. Values may be NaN or infinite, never missing."""
        assert trial.trial in self._suggested, f"{trial.trial} was never suggested"
        if not rows:
            return
        common = {"trial": trial.trial, "arm": trial.arm, "seed": trial.seed, "attempt": attempt}
        content = _parquet_bytes(_table(rows, {**common, "study": self.folder.root.name}))
        with self._one_at_a_time:
            if trial.trial not in self._sequences:
                self._sequences[trial.trial] = len(_parts(self.folder, trial.trial))
            sequence = self._sequences[trial.trial] + 1
            name = f"{self.epoch:06d}-{sequence:06d}-{zlib.crc32(content):08x}.parquet"
            self._put(self.folder.rows(trial.trial) / name, content, once=True)
            self._sequences[trial.trial] = sequence

    def finish(self, result: Result) -> None:
        """Keep how a trial ended, once; only a failure may be followed by another outcome."""
        with self._one_at_a_time:
            assert result.trial in self._suggested, f"{result.trial} was never suggested"
            before = read_result(self.folder, result.trial)
            assert before is None or before.outcome in RETRIABLE, f"{result.trial} has ended"
            error = _without_absolute_paths(result.error, self.folder) if result.error else None
            if error is not None:
                self._put(self.folder.error(result.trial), error.encode())
            parts = [part.name for part in _parts(self.folder, result.trial)]
            content = {**asdict(result), "error": error, "parts": parts}
            self._put(self.folder.outcome(result.trial), sealed(content))
            if error is None:
                self._remove(self.folder.error(result.trial))  # an earlier attempt's

    def keep_stacks(self, trial: str, name: str, stacks: str) -> Path:
        """Keep where a worker of a trial hung; the file."""
        path = self.folder.stacks(trial) / f"{name}.txt"
        self._put(path, _without_absolute_paths(stacks, self.folder).encode())
        return path

    def answer(self, answer: Answer) -> None:
        """Keep what became of a request, before anything comes of it."""
        self._put(self.folder.answer(answer.number), sealed(asdict(answer)), once=True)

    def compact(self) -> None:
        """Write results.parquet and arms.parquet anew, for pandas; the readers need neither."""
        self._put(self.folder.results, _parquet_bytes(_published_rows(self.folder)))
        self._put(self.folder.arms, _parquet_bytes(_plain_table(read_arms(self.folder))))

    def _restore_copies(self) -> None:
        """Count the suggestions, and write the copies that a crash between two writes left out."""
        for suggestion in read_suggestions(self.folder):
            self._suggested.append(suggestion.trial)
            self._put_copy(suggestion)

    def _put_copy(self, suggestion: Suggestion) -> None:
        path = self.folder.trial_config(suggestion.trial)
        if not path.exists():
            self._put(path, sealed(asdict(suggestion)), once=True)

    def _put(self, path: Path, content: bytes, *, once: bool = False) -> None:
        """Make `content` the whole of `path`, durably, unless a newer driver has taken over.

        `once`: it is never written again. After a failure nothing is written any more: the kernel
        may count pages as clean after a failed fsync, so that trying again proves nothing.
        """
        assert self._lock >= 0, "the ledger is closed"
        with self._one_at_a_time:
            if self._broken is not None:
                where = self.folder.location(path)
                raise type(self._broken)(
                    f"{where}: not written, because an earlier write failed: {self._broken}"
                )
            if self.folder.remote:
                self._put_remote(path, content, once)
            # the epoch in the name: a stale writer must not share it with the newer one
            aside = path.with_name(f"{path.name}.{self.epoch:06d}.tmp")
            try:
                durable.make_folder(path.parent)
                durable.write_new(aside, content)
                if not self.folder.remote:
                    self._check_fence()
                durable.publish(aside, path)
            except OSError as error:
                self._broken = _write_error(path, error, len(content))
                durable.discard(aside)
                try:
                    self._check_fence()  # a newer driver may have swept the file away
                except FencedError as fenced:
                    self._broken = fenced
                raise self._broken from error

    def _put_remote(self, path: Path, content: bytes, once: bool) -> None:
        """Make `content` the whole of the store's object; it counts only if nobody took over."""
        objects, name = store(self.folder.remote), self.folder.name_of(path)
        try:
            self._check_fence()
            before = None if once else self._tags.get(name)
            tag = objects.replace(name, content, before)
            self._check_fence()
            if tag is None:
                raise StorageError(
                    f"{self.folder.location(path)}: an earlier driver of this study has written it "
                    f"since this one began, which was asleep until then. Run the same command "
                    f"again: it continues from what is there"
                )
        except StorageError as error:
            self._broken = error
            raise
        self._tags[name] = tag

    def _remove(self, path: Path) -> None:
        name = self.folder.name_of(path)
        if name in self._tags:
            store(self.folder.remote).remove([name])
            del self._tags[name]
        durable.discard(path)

    def _check_fence(self) -> None:
        if self.folder.remote:
            is_fenced = mirror.is_fenced(self.folder, self.epoch)
            newest = mirror.newest_epoch(self.folder) if is_fenced else self.epoch
        else:
            newest = _newest_epoch(self.folder)
        if newest != self.epoch:
            raise FencedError(
                f"{self.folder.where}: this driver has epoch {self.epoch}, but "
                f"{_describe_holder(self.folder, newest)} has taken the study over. "
                f"Nothing was written; end this driver"
            )


def read_suggestions(folder: StudyFolder) -> list[Suggestion]:
    """All suggestions by number."""
    return [read_suggestion(folder, number) for number in range(count_suggestions(folder))]


def count_suggestions(folder: StudyFolder) -> int:
    return _count(folder.suggestions)


def read_suggestion(folder: StudyFolder, number: int) -> Suggestion:
    path = folder.suggestion(number)
    suggestion = _typed(Suggestion, _read_json(path, _RESTORE_SUGGESTION), path)
    if suggestion.number != number or not is_trial_id(suggestion.trial):
        what = f"holds number {suggestion.number} of trial {suggestion.trial!r}"
        raise LedgerError(f"{path}: {what}. {_RESTORE_SUGGESTION}")
    return suggestion


def read_answers(folder: StudyFolder) -> list[Answer]:
    """What was granted and refused, in the order of the decisions."""
    answers = []
    for number in range(_count(folder.answers)):
        path = folder.answer(number)
        answer = _typed(Answer, _read_json(path, _RESTORE_ANSWER), path)
        if answer.number != number:
            raise LedgerError(f"{path}: holds number {answer.number}. {_RESTORE_ANSWER}")
        answers.append(answer)
    return answers


def read_results(folder: StudyFolder) -> dict[str, Result]:
    """How each trial ended, by trial; trials that have not ended are absent."""
    results = {}
    for suggestion in read_suggestions(folder):
        result = read_result(folder, suggestion.trial)
        if result is not None:
            results[result.trial] = result
    return results


def read_rows(folder: StudyFolder, *trials: str) -> pd.DataFrame:
    """Rows of these trials in their order, or of all by number; a trial's by commit.

    (trial, phase, step, metric) is unique: of rows measured again after a crash, the first
    committed one counts.
    """
    rows: pd.DataFrame = _published_rows(folder, *trials).to_pandas()
    return rows


def read_arms(folder: StudyFolder) -> pd.DataFrame:
    """One line per arm: arm, origin, its settings by dotted path, and `search:<path>` labels."""
    arms: dict[str, dict[str, Any]] = {}
    for suggestion in read_suggestions(folder):
        if suggestion.arm not in arms:
            labels = _flat(suggestion.labels, "search:")
            named = {"arm": suggestion.arm, "origin": suggestion.origin}
            arms[suggestion.arm] = {**named, **_flat(suggestion.config), **labels}
    columns = dict.fromkeys(["arm", "origin", *(key for arm in arms.values() for key in arm)])
    lines = [[arm.get(column) for column in columns] for arm in arms.values()]
    return pd.DataFrame(lines, columns=pd.Index(columns))


def read_spec(folder: StudyFolder) -> str | None:
    """The frozen text of the study file; None before it was frozen."""
    if not folder.spec.exists():
        return None
    content = _read_bytes(folder.spec, _RESTORE)
    if _sha256(content) not in read_environment(folder).get("study_sha256", []):
        raise LedgerError(
            f"{folder.spec}: changed after it was frozen (its SHA-256 is not in "
            f"{folder.environment.name}). Bring it back from a copy, or start a study of another "
            f"name from the changed file"
        )
    return content.decode()


def read_environment(folder: StudyFolder) -> dict[str, Any]:
    """What the study was started with."""
    return _read_json(folder.environment)


def read_holder(folder: StudyFolder) -> dict[str, Any] | None:
    """The newest driver's host, pid, start time and what it told; None if nobody ever drove."""
    newest = _newest_epoch(folder)
    if newest == 0:
        return None
    try:
        return {"epoch": newest, **_read_json(folder.epoch(newest))}
    except LedgerError:  # killed while it signed; only its name is lost, the epoch counts
        return {"epoch": newest}


def read_jobs(folder: StudyFolder) -> frozenset[str]:
    """Ids of the Ray jobs that have driven the study."""
    jobs = []
    for epoch in range(1, _newest_epoch(folder) + 1):
        with contextlib.suppress(LedgerError):  # it never signed
            jobs.append(_read_json(folder.epoch(epoch)).get("job"))
    return frozenset(job for job in jobs if isinstance(job, str))


def sealed(content: dict[str, Any]) -> bytes:
    """Indented JSON for people, with the SHA-256 of its content in the last field."""
    assert "sha256" not in content
    sealed = {**content, "sha256": _sha256(_canonical(content))}
    return (json.dumps(sealed, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def unsealed(raw: bytes) -> dict[str, Any]:
    """What `sealed` was given; a ValueError says why the bytes are not that."""
    try:
        content: dict[str, Any] = json.loads(raw)
        stated = content.pop("sha256")
        is_intact = stated == _sha256(_canonical(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{len(raw)} bytes, not JSON of the ledger's: {error!r}") from error
    if not is_intact:
        raise ValueError(f"{len(raw)} bytes that do not fit their SHA-256")
    return content


def refuse_if_held(folder: StudyFolder) -> None:
    """Raise the HeldError that a second driver would raise."""
    if is_held(folder):
        raise _held(folder)


def put_beside(folder: StudyFolder, path: Path, content: bytes) -> None:
    """Make a new file in a study that somebody else may be driving: whole and durable, or not."""
    if folder.remote:
        store(folder.remote).create(folder.name_of(path), content)
    aside = path.with_name(f"{path.name}.tmp")
    try:
        durable.make_folder(path.parent)
        durable.write_new(aside, content)
        durable.publish(aside, path)
    except OSError as error:
        durable.discard(aside)
        raise _write_error(path, error, len(content)) from error


def is_held(folder: StudyFolder) -> bool:
    """Whether a driver holds the study now; of a store, one that fell silent is watched first."""
    if _is_locked(folder):
        return True
    newest = mirror.newest_epoch(folder) if folder.remote else 0
    return newest > 0 and not mirror.is_silent(folder, newest)


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


def damage(folder: StudyFolder) -> list[LedgerError]:
    """Everything that is damaged, for `doctor`; empty when the whole study can be read."""
    found = []
    for read_one in (read_spec, read_answers):
        try:
            read_one(folder)
        except LedgerError as error:
            found.append(error)
    try:
        trials = _trials_with_rows(folder)
    except LedgerError as error:
        return [*found, error]
    for trial in trials:
        for read in (read_result, read_rows):
            try:
                read(folder, trial)
            except LedgerError as error:
                if str(error) not in map(str, found):  # rows rest on the outcome
                    found.append(error)
    return found


def _take_lock(folder: StudyFolder) -> int:
    """Lock the study until the descriptor is closed, at the latest by the end of this process."""
    try:
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _write_error(folder.lock, error, 0) from error
    try:
        _lock_within(descriptor, GLANCE_SECONDS)
    except BlockingIOError:
        os.close(descriptor)
        raise _held(folder) from None
    except OSError as error:
        os.close(descriptor)
        raise StorageError(f"{folder.lock}: cannot be locked: {error.strerror}") from error
    return descriptor


def _held(folder: StudyFolder) -> HeldError:
    return HeldError(
        f"{folder.where}: held by {_describe_holder(folder, _newest_epoch(folder))}. "
        f"Wait for it, or stop it with `maskstudy stop {folder.in_commands}`"
    )


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


def _claim_epoch(folder: StudyFolder, holder: dict[str, Any]) -> int:
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
            raise _write_error(path, error, len(content)) from error


def _newest_epoch(folder: StudyFolder) -> int:
    names = _listed(folder.epochs)
    return max((int(name[:-5]) for name in names if re.fullmatch(r"\d{6,}\.json", name)), default=0)


def _describe_holder(folder: StudyFolder, epoch: int) -> str:
    try:
        holder = _read_json(folder.epoch(epoch))
    except LedgerError:
        return f"a driver that has not signed (epoch {epoch})"
    told = ", ".join(f"{key} {value}" for key, value in holder.items() if value is not None)
    return f"epoch {epoch} ({told})"


def _sweep(folder: StudyFolder) -> None:
    """Remove what earlier drivers left aside; see the module's text for why this also fences."""
    for pattern in ("*", "suggestions/*", "answers/*", "trials/*/*", "trials/*/rows/*"):
        for leftover in folder.root.glob(f"{pattern}.[0-9][0-9][0-9][0-9][0-9][0-9].tmp"):
            log.info("swept %s", leftover.relative_to(folder.root))
            try:
                leftover.unlink(missing_ok=True)
            except OSError as error:
                raise _write_error(leftover, error, 0) from error


def _count(place: Path) -> int:
    """Files 000000.json, 000001.json, ... up to the last: a listing may leave out earlier ones."""
    names = [name for name in _listed(place) if re.fullmatch(r"\d{6,}\.json", name)]
    return max((int(name[:-5]) + 1 for name in names), default=0)


def _trials_with_rows(folder: StudyFolder) -> list[str]:
    """All suggested trials by number; rows that no suggestion names are damage."""
    parts = sorted(folder.trials.glob("*/rows/*.parquet"))  # listed first, as written last
    trials = list(dict.fromkeys(suggestion.trial for suggestion in read_suggestions(folder)))
    known = set(trials)
    for path in parts:
        trial = path.parent.parent.name
        if trial not in known:
            raise LedgerError(
                f"{path}: rows of trial {trial}, which no suggestion names. Bring the suggestion "
                f"back: {trial}/config.json is a copy of it, its number is the name"
            )
    return trials


def _parts(folder: StudyFolder, trial: str) -> list[Path]:
    """The parts of a trial in the order of their commits, after a look for missing ones."""
    place = folder.rows(trial)
    outcome = _read_outcome(folder, trial)  # read first, as it is written last
    names = _part_names(place)
    if _gap(names):
        names = _part_names(place)  # a listing made while the driver writes may leave one out
    missing = sorted(set(outcome["parts"] if outcome else []) - set(names))
    damaged = _gap(names) or (f"{missing[0]} is missing" if missing else None)
    if damaged:
        raise LedgerError(f"{place}: {damaged}. {_RESTORE_PART}")
    return [place / name for name in names]


def _part_names(place: Path) -> list[str]:
    names = [name for name in _listed(place) if name.endswith(".parquet")]
    for name in names:
        if not _PART.fullmatch(name):
            raise LedgerError(f"{place / name}: not a name the ledger gives. Move it elsewhere")
    names.sort(key=_place_of_part)
    # where a driver that was asleep wrote to a store after it had lost the study, the newer counts
    newest = {sequence: epoch for epoch, sequence in map(_place_of_part, names)}
    return [name for name in names if _place_of_part(name)[0] == newest[_place_of_part(name)[1]]]


def _place_of_part(name: str) -> tuple[int, int]:
    """Epoch and sequence."""
    match = _PART.fullmatch(name)
    assert match
    return int(match[1]), int(match[2])


def _gap(names: list[str]) -> str | None:
    """Why the parts are not 1, 2, 3, ... in the order of their epochs; None if they are."""
    for expected, name in enumerate(names, start=1):
        if _place_of_part(name)[1] != expected:
            return f"part {expected} of {len(names)} or more is missing, {name} stands in its place"
    return None


def _published_rows(folder: StudyFolder, *trials: str) -> pa.Table:
    parts = [part for name in trials or _trials_with_rows(folder) for part in _parts(folder, name)]
    with ThreadPoolExecutor() as pool:
        tables = list(pool.map(_read_part, parts))
    rows = pa.concat_tables([SCHEMA.empty_table(), *tables])
    rows = rows.filter(pa.array(~rows.select(KEY).to_pandas().duplicated()))
    # the folder may have been renamed since
    study = pa.repeat(pa.scalar(folder.root.name), len(rows))
    return rows.set_column(0, SCHEMA.field("study"), study)


def _read_part(path: Path) -> pa.Table:
    content = _read_bytes(path, _RESTORE_PART)
    if f"{zlib.crc32(content):08x}" != path.stem[-8:]:
        what = f"{len(content)} bytes that do not fit the checksum in the name"
        raise LedgerError(f"{path}: {what}. {_RESTORE_PART}")
    # Arrow's own schema may name extension types, which run code of theirs while the file is opened
    # (CVE-2026-41486), so look before Arrow does; the ledger writes no such schema.
    if b"ARROW:" in content[-8 - int.from_bytes(content[-8:-4], "little") :]:
        raise LedgerError(f"{path}: holds an Arrow schema, so no ledger wrote it. {_RESTORE_PART}")
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        what = f"{len(content)} bytes, not readable as Parquet: {error}"
        raise LedgerError(f"{path}: {what}. {_RESTORE_PART}") from error
    if not table.schema.equals(SCHEMA):
        what = f"its columns are not the ledger's: {', '.join(table.column_names)}"
        raise LedgerError(f"{path}: {what}. {_RESTORE_PART}")
    trials = table["trial"].unique().to_pylist()
    if trials != [path.parent.parent.name]:
        raise LedgerError(f"{path}: holds rows of {', '.join(trials)}. {_RESTORE_PART}")
    return table


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True, store_schema=False)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _table(rows: list[dict[str, Any]], common: dict[str, Any]) -> pa.Table:
    for row in rows:
        if row.keys() != REPORTED.keys():
            raise ValueError(f"a row has {sorted(REPORTED)}, got {sorted(row)}")
    try:
        table = pa.Table.from_pylist([{**row, **common} for row in rows], schema=SCHEMA)
        table.validate(full=True)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"a row does not fit {REPORTED}: {error}") from error
    for name in table.column_names:
        if table[name].null_count:
            raise ValueError(f"a row of {common['trial']} has no {name!r}")
    return table


def _plain_table(frame: pd.DataFrame) -> pa.Table:
    """Columns of one kind as they are; mixed ones (a label beside a number) as text."""
    columns = {}
    for name in frame.columns:
        values = [None if pd.isna(value) else value for value in frame[name]]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(values, None if kinds else pa.string())
    return pa.table(columns)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"patch": 8}} -> {"model.patch": 8}; lists become JSON text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def read_result(folder: StudyFolder, trial: str) -> Result | None:
    """How a trial ended; None while it has not."""
    content = _read_outcome(folder, trial)
    if content is None:
        return None
    del content["parts"]
    return _typed(Result, content, folder.outcome(trial))


def _read_outcome(folder: StudyFolder, trial: str) -> dict[str, Any] | None:
    """A result and the names of the parts that were there; None while the trial has not ended."""
    path = folder.outcome(trial)
    if not path.exists():
        return None
    content = _read_json(path, _RESTORE_OUTCOME)
    if content.get("trial") != trial:
        what = f"holds the outcome of trial {content.get('trial')!r}"
        raise LedgerError(f"{path}: {what}. {_RESTORE_OUTCOME}")
    try:
        return {**content, "outcome": Outcome(content["outcome"]), "parts": content["parts"]}
    except (KeyError, ValueError) as error:
        raise LedgerError(f"{path}: not an outcome: {error!r}. {_RESTORE_OUTCOME}") from error


def _typed(kind: type[_Record], content: dict[str, Any], path: Path) -> _Record:
    expected = {field.name for field in fields(kind)}
    if content.keys() != expected:
        raise LedgerError(
            f"{path}: has the fields {sorted(content)}, expected {sorted(expected)}. It was "
            f"written by another version of maskstudy, or by hand"
        )
    return kind(**content)


def _read_json(path: Path, way_out: str = _RESTORE) -> dict[str, Any]:
    raw = _read_bytes(path, way_out)
    try:
        return unsealed(raw)
    except ValueError as error:
        raise LedgerError(f"{path}: {error}. {way_out}") from error


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_bytes(path: Path, way_out: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise LedgerError(f"{path}: missing. {way_out}") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error


def _listed(place: Path) -> list[str]:
    try:
        return os.listdir(place)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{place}: cannot be listed: {error.strerror}") from error


def _write_error(path: Path, error: OSError, num_bytes: int) -> StorageError:
    return StorageError(
        f"{path}: {num_bytes} bytes not safely written: {error.strerror or error}. What was "
        f"acknowledged before is intact; mend the storage and run the study again, it continues"
    )


def _changed_spec(folder: StudyFolder, frozen: str, asked: str) -> str:
    lines = difflib.unified_diff(
        frozen.splitlines(), asked.splitlines(), "frozen", "asked for", lineterm="", n=1
    )
    return (
        f"{folder.spec}: this study was started from another text:\n" + "\n".join(lines) + "\n"
        "Give the changed study another name, or ask for what was frozen"
    )


def _without_absolute_paths(text: str, folder: StudyFolder) -> str:
    """Shorten this machine's paths in a traceback: they mean nothing elsewhere, and name users."""
    text = re.sub(r'File "/[^"\n]*?((?:/[^/"\n]+){1,2})"', r'File "...\1"', text)
    roots = {str(folder.root.absolute()): "<study>", os.path.expanduser("~"): "~"}
    for root, name in roots.items():
        if len(root) > 1:
            text = text.replace(root, name)
    return text
