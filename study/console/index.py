"""What the console knows of the studies of a storage, read from their ledgers bit by bit.

What has once been read of a trial that has ended is not read again, so a look at a study of
thousands of trials takes as long as what is new since the last one. Reading goes on in a thread of
its own, and only while somebody looks; whoever asks gets what is known by then.

Nothing outside the storage is read: a study, or anything of it, that is a link leading out of the
study's folder is refused.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.tables import Measure, StudyTables, arm_label, assemble, objectives_of, spec_of
from study import mirror
from study.folder import Storage, StudyFolder, is_study_name
from study.gain import OF_GAIN, gains
from study.ledger import (
    COLUMNS,
    RETRIABLE,
    Result,
    Suggestion,
    count_suggestions,
    is_held,
    read_environment,
    read_holder,
    read_result,
    read_rows,
    read_suggestion,
)
from study.measured import measure
from trainables.errors import StorageError, UserError
from trainables.fillings import Gain
from trainables.metrics import SPEED, place_of
from trainables.storage import store

FRESH_SECONDS = 1.0  # for which a look counts as new
FAR_FRESH_SECONDS = 5.0  # the same of a store of objects
PATIENCE_SECONDS = 0.4  # that a request waits for a look
MOST_STUDIES = 1000
READ_AT_ONCE = 100  # trials; reading one by one takes several times as long

_Look = tuple[tuple[int, int], tuple[str, ...]]  # of a trial: its outcome's stamp, its parts


class NotFound(Exception):
    """No such study, trial or picture; says what was asked for."""


@dataclass(frozen=True)
class Reached:
    """How far a trial has come: its last rung and the newest values of the objectives."""

    phase: str | None = None
    progress: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    images_per_second: float | None = None
    gain: Gain | None = None  # of its encoder, once it has pretrained to the end


@dataclass(frozen=True)
class Snapshot:
    """A study as it was found at one moment; `revision` grows with whatever is new."""

    folder: StudyFolder
    revision: int
    spec: dict[str, Any]
    spec_text: str
    environment: dict[str, Any]
    suggestions: list[Suggestion]
    labels: dict[str, str]  # trial -> its arm in words
    results: dict[str, Result]
    reached: dict[str, Reached]
    rows: list[pd.DataFrame]  # of the objectives only
    num_trials: int  # suggested; more than `suggestions` while those are being read
    num_read: int  # trials whose rows have been read
    is_held: bool
    holder: dict[str, Any] | None
    asked: tuple[str, ...]  # names of requests and of answers to them
    changed: float  # when the newest thing was written, seconds since 1970
    problem: str | None  # what cannot be read, in words

    @property
    def name(self) -> str:
        return self.folder.root.name

    @property
    def is_read(self) -> bool:
        return self.num_read == self.num_trials

    @property
    def objectives(self) -> list[Measure]:
        """What the study file asks for."""
        return objectives_of(self.spec)

    def tables(self) -> StudyTables:
        """For the report's figures; they have the objectives' rows only."""
        rows = pd.concat(self.rows) if self.rows else pd.DataFrame(columns=list(COLUMNS))
        known = {suggestion.trial for suggestion in self.suggestions}
        return assemble(
            self.folder,
            self.spec,
            self.spec_text,
            self.environment,
            self.suggestions,
            {trial: result for trial, result in self.results.items() if trial in known},
            rows,
        )


class Index:
    """The studies of one storage."""

    def __init__(self, storage: Storage) -> None:
        self.storage = Storage(storage.folder.resolve(), storage.remote)
        self._listed: tuple[float, list[str]] = (-math.inf, [])  # when, and what a store had
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()

    def names(self) -> tuple[list[str], int]:
        """The studies, and how many other folders hold something that cannot be shown."""
        found: list[str] = []
        strange = 0
        if self.storage.remote:
            return self._names_in_store(), 0
        try:
            entries = sorted(os.scandir(self.storage.folder), key=lambda entry: entry.name)
        except OSError as error:
            raise StorageError(f"{self.storage}: cannot be listed: {error.strerror}") from error
        for entry in entries:
            if not StudyFolder(Path(entry.path)).spec.is_file():
                continue
            if is_study_name(entry.name) and not entry.is_symlink():
                found.append(entry.name)
            else:
                strange += 1
        return found[:MOST_STUDIES], strange + len(found[MOST_STUDIES:])

    def folder(self, name: str) -> StudyFolder:
        """The folder of a study of the storage; raises NotFound."""
        folder = self.storage.study(name) if is_study_name(name) else None
        if folder is None or folder.root.is_symlink():
            raise NotFound("no such study in this storage")
        if folder.remote and not folder.spec.is_file() and mirror.exists(folder):
            mirror.pull(folder)
        if not folder.spec.is_file():
            raise NotFound("no such study in this storage")
        return folder

    def _names_in_store(self) -> list[str]:
        """Studies of the store, as they were a moment ago."""
        when, names = self._listed
        if time.monotonic() - when > FAR_FRESH_SECONDS:
            known = set(names)
            there = [name for name in store(self.storage.remote).folders() if is_study_name(name)]
            names = [
                name for name in there if name in known or mirror.exists(self.storage.study(name))
            ]
            self._listed = (time.monotonic(), names[:MOST_STUDIES])
        return self._listed[1]

    def look(self, name: str) -> Snapshot:
        return self.look_at([name])[0]

    def look_at(self, names: Iterable[str]) -> list[Snapshot]:
        """What is known of studies, after a short while for reading what is new."""
        watched = []
        for name in names:
            folder = self.folder(name)
            with self._lock:
                watched.append(self._watched.setdefault(name, _Watched(folder)))
        for each in watched:
            each.read()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for each in watched:
            each.wait(max(0.0, deadline - time.monotonic()))
        return [each.snapshot() for each in watched]


class _Watched:
    """One study: what is known of it, and the thread that reads what is new."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        self._starting = threading.Lock()
        self._known = threading.RLock()
        self._thread: threading.Thread | None = None
        self._ended = 0.0
        self._forget()

    def _forget(self) -> None:
        self._spec: dict[str, Any] = {}
        self._spec_text = ""
        self._spec_stamp: tuple[int, int] = (0, 0)
        self._environment: dict[str, Any] = {}
        self._suggestions: list[Suggestion] = []
        self._labels: dict[str, str] = {}
        self._results: dict[str, Result] = {}
        self._reached: dict[str, Reached] = {}
        self._rows: dict[str, pd.DataFrame] = {}
        self._stamps: dict[str, _Look] = {}
        self._settled: set[str] = set()  # trials of which nothing new can come
        self._num_trials = 0
        self._is_held = False
        self._holder: dict[str, Any] | None = None
        self._asked: tuple[str, ...] = ()
        self._changed = 0.0
        self._problem: str | None = None
        self._revision = 0

    def read(self) -> None:
        """Begin to read what is new, unless that is under way or was done just now."""
        with self._starting:
            if self._thread is not None and self._thread.is_alive():
                return
            fresh = FAR_FRESH_SECONDS if self.folder.remote else FRESH_SECONDS
            if time.monotonic() - self._ended < fresh:
                return
            thread = threading.Thread(
                target=self._read, name=f"read {self.folder.root.name}", daemon=True
            )
            thread.start()
            self._thread = thread  # only now: others wait for it, and none can before it runs

    def wait(self, seconds: float) -> None:
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def snapshot(self) -> Snapshot:
        with self._known:
            return Snapshot(
                folder=self.folder,
                revision=self._revision,
                spec=self._spec,
                spec_text=self._spec_text,
                environment=self._environment,
                suggestions=list(self._suggestions),
                labels=self._labels,
                results=dict(self._results),
                reached=dict(self._reached),
                rows=list(self._rows.values()),
                num_trials=self._num_trials,
                num_read=len(self._reached),
                is_held=self._is_held,
                holder=self._holder,
                asked=self._asked,
                changed=self._changed,
                problem=self._problem,
            )

    def _read(self) -> None:
        problem = None
        try:
            mirror.pull(self.folder, pictures=True)
            self._read_study()
            self._read_trials()
        except (StorageError, UserError) as error:
            problem = without_root(str(error), self.folder)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        with self._known:
            if problem != self._problem:
                self._problem = problem
                self._revision += 1
        self._ended = time.monotonic()

    def _read_study(self) -> None:
        folder = self.folder
        for path in (folder.spec, folder.environment, folder.suggestions, folder.trials):
            _refuse_links(folder, path)
        for path in (folder.epochs, folder.lock):
            _refuse_links(folder, path)
        held, holder = is_held(folder), read_holder(folder)
        count = count_suggestions(folder)
        asked = (*_listing(folder.requests), *_listing(folder.answers))
        stamp = _stamp(folder.spec)
        if count < len(self._suggestions):  # another study under the same name
            with self._known:
                revision = self._revision
                self._forget()
                self._revision = revision + 1
        if stamp != self._spec_stamp:
            spec, text = spec_of(folder)
            environment = read_environment(folder)
            with self._known:
                self._spec, self._spec_text, self._environment = spec, text, environment
                self._spec_stamp = stamp
                self._revision += 1
        with self._known:
            before = (self._is_held, self._holder, self._num_trials, self._asked)
            if (held, holder, count, asked) != before:
                self._is_held, self._holder, self._num_trials = held, holder, count
                self._asked = asked
                self._revision += 1
            newest = max(map(_written, (folder.spec, folder.suggestions, folder.epochs)))
            self._changed = max(self._changed, newest)

    def _read_trials(self) -> None:
        for number in range(len(self._suggestions), self._num_trials):
            _refuse_links(self.folder, self.folder.suggestion(number))
            suggestion = read_suggestion(self.folder, number)
            result = self._result(suggestion.trial)
            label = arm_label(suggestion)
            with self._known:
                self._suggestions.append(suggestion)
                self._labels[suggestion.trial] = label
                if result is not None:
                    self._results[suggestion.trial] = result
                self._revision += 1
        # those that are not over first: they are what people wait for
        left = [s.trial for s in self._suggestions if s.trial not in self._settled]
        left.sort(key=lambda trial: trial in self._results)
        for start in range(0, len(left), READ_AT_ONCE):
            self._read_some(left[start : start + READ_AT_ONCE])

    def _read_some(self, trials: list[str]) -> None:
        """Read those of the trials whose files look other than at the last look."""
        folder = self.folder
        stamps = {trial: self._look_of(trial) for trial in trials}
        new = [trial for trial in trials if stamps[trial] != self._stamps.get(trial)]
        if not new:
            return
        results = {trial: self._result(trial) for trial in new}
        for trial in new:
            names = stamps[trial][1]
            for path in (folder.rows(trial), *(folder.rows(trial) / name for name in names)):
                _refuse_links(folder, path)
        rows = read_rows(folder, *new)
        metrics = [objective.key for objective in objectives_of(self._spec)]
        reached = _reached(rows, metrics)
        is_shown = (rows["phase"] + "/" + rows["metric"]).isin(metrics)
        shown = dict(list(rows[is_shown].groupby("trial", sort=False)))
        with self._known:
            for trial in new:
                result = results[trial]
                if result is not None:
                    self._results[trial] = result
                self._reached[trial] = reached.get(trial, Reached())
                self._rows[trial] = shown.get(trial, rows[:0])
                self._stamps[trial] = stamps[trial]
                files = (folder.outcome(trial), folder.rows(trial))
                self._changed = max(self._changed, *map(_written, files))
                if result is not None and result.outcome not in RETRIABLE:
                    self._settled.add(trial)
            self._revision += 1

    def _look_of(self, trial: str) -> _Look:
        return _stamp(self.folder.outcome(trial)), _listing(self.folder.rows(trial))

    def _result(self, trial: str) -> Result | None:
        _refuse_links(self.folder, self.folder.trial(trial))
        _refuse_links(self.folder, self.folder.outcome(trial))
        return read_result(self.folder, trial)


def refuse_links_out(folder: StudyFolder, path: Path) -> None:
    """Raise NotFound for a path that leads out of the study."""
    try:
        _refuse_links(folder, path)
    except StorageError:
        raise NotFound("it is a link that leads elsewhere") from None


def _reached(rows: pd.DataFrame, metrics: list[str]) -> dict[str, Reached]:
    """By trial; trials without rows are absent."""
    ordered = rows.assign(place=rows["phase"].map(place_of)).sort_values(
        ["place", "progress"], kind="stable"
    )
    newest: dict[str, dict[str, float]] = {}
    last: dict[str, tuple[str, float]] = {}
    columns = [ordered[name] for name in ("trial", "phase", "metric", "progress", "value")]
    for trial, phase, metric, progress, value in zip(*columns, strict=True):
        newest.setdefault(trial, {})[f"{phase}/{metric}"] = value
        last[trial] = (phase, progress)
    learnt = gains(measure(rows[rows["metric"].isin(OF_GAIN)]))
    return {
        trial: Reached(
            phase,
            progress,
            {metric: newest[trial][metric] for metric in metrics if metric in newest[trial]},
            newest[trial].get(f"{phase}/{SPEED}"),
            learnt.get(trial),
        )
        for trial, (phase, progress) in last.items()
    }


def _refuse_links(folder: StudyFolder, path: Path) -> None:
    if path.is_symlink():
        place = path.relative_to(folder.root)
        raise StorageError(
            f"{folder.root.name}/{place}: a link; the console follows none, as they may lead out "
            f"of the storage. Put a copy in its place"
        )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


def _written(path: Path) -> float:
    return _stamp(path)[0] / 1e9


def _listing(path: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(path)))
    except FileNotFoundError:
        return ()


def without_root(text: str, folder: StudyFolder) -> str:
    """Paths as the console's readers know them: from the study's name on."""
    return text.replace(f"{folder.root.parent}{os.sep}", "")
