"""The one writer of a study, and what others may put beside it.

What a method of `Ledger` was given is kept when it returns, whatever happens then. After a failed
write, or once a newer driver has taken over, it writes nothing more.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from study import mirror
from study.environment import DEFAULTS
from study.folder import StudyFolder
from study.ledger.files import sealed, sha256, write_error
from study.ledger.holding import check_fence, claim_epoch, name_aside, sweep, take_lock
from study.ledger.parts import parquet_bytes, part_name, plain_table, table_of
from study.ledger.reading import (
    parts_of,
    published_rows,
    read_arms,
    read_environment,
    read_result,
    read_spec,
    read_suggestions,
)
from study.ledger.records import RETRIABLE, Answer, FencedError, Result, Stint, Suggestion
from trainables import durable
from trainables.errors import StorageError, UserError
from trainables.storage import Tag, store


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
                raise write_error(path, error, 0) from error
        lock, ledger = take_lock(folder), None
        try:
            ledger = cls(folder, claim_epoch(folder, holder), lock)
            if ledger._heart is not None:
                ledger._heart.start()
                ledger._tags = mirror.pull_as_driver(folder)
            sweep(folder)
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
        begun = {"defaults": DEFAULTS} if frozen is None else read_environment(self.folder)
        content = {
            **environment,
            "defaults": begun.get("defaults"),  # those it was begun with, none by release 0.1
            "study_sha256": [*begun.get("study_sha256", []), sha256(spec_text.encode())],
        }
        self._put(self.folder.environment, sealed(content))
        self._put(self.folder.spec, spec_text.encode())

    def suggest(self, suggestion: Suggestion) -> None:
        """Write a trial down before it is launched."""
        with self._one_at_a_time:
            number = len(self._suggested)
            assert suggestion.number == number, f"number {number} is next, not {suggestion.number}"
            self._put(self.folder.suggestion(number), _sealed(suggestion), once=True)
            self._suggested.append(suggestion.trial)
            self._put_copy(suggestion)

    def commit(self, trial: Suggestion, rows: list[dict[str, Any]], attempt: str) -> None:
        """Keep rows; durable when this returns. Values may be NaN or infinite, never missing."""
        assert trial.trial in self._suggested, f"{trial.trial} was never suggested"
        if not rows:
            return
        common = {"trial": trial.trial, "arm": trial.arm, "seed": trial.seed, "attempt": attempt}
        content = parquet_bytes(table_of(rows, {**common, "study": self.folder.root.name}))
        with self._one_at_a_time:
            if trial.trial not in self._sequences:
                self._sequences[trial.trial] = len(parts_of(self.folder, trial.trial))
            sequence = self._sequences[trial.trial] + 1
            name = part_name(self.epoch, sequence, content)
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
            names = [part.name for part in parts_of(self.folder, result.trial)]
            content = {**asdict(result), "error": error, "parts": names}
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

    def keep_time(self, stint: Stint) -> None:
        """Keep how long this driver has run the study until now."""
        assert stint.epoch == self.epoch
        self._put(self.folder.stint(stint.epoch), sealed(asdict(stint)))

    def compact(self) -> None:
        """Write results.parquet and arms.parquet anew, for pandas; the readers need neither."""
        self._put(self.folder.results, parquet_bytes(published_rows(self.folder)))
        self._put(self.folder.arms, parquet_bytes(plain_table(read_arms(self.folder))))

    def _restore_copies(self) -> None:
        """Count the suggestions, and write the copies that a crash between two writes left out."""
        for suggestion in read_suggestions(self.folder):
            self._suggested.append(suggestion.trial)
            self._put_copy(suggestion)

    def _put_copy(self, suggestion: Suggestion) -> None:
        path = self.folder.trial_config(suggestion.trial)
        if not path.exists():
            self._put(path, _sealed(suggestion), once=True)

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
            aside = path.with_name(name_aside(path.name, self.epoch))
            try:
                durable.make_folder(path.parent)
                durable.write_new(aside, content)
                if not self.folder.remote:
                    self._check_fence()
                durable.publish(aside, path)
            except OSError as error:
                self._broken = write_error(path, error, len(content))
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
        check_fence(self.folder, self.epoch)


def _sealed(suggestion: Suggestion) -> bytes:
    """As earlier releases wrote it, unless it belongs to a population."""
    content = asdict(suggestion)
    if suggestion.born is None:
        del content["born"]
    return sealed(content)


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
        raise write_error(path, error, len(content)) from error


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
