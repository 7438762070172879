"""Where everything of a study lies. The only module that knows file names.

Everything can be read by a person or by pandas, and no file holds an absolute path, so that a study
folder can be moved, copied and renamed.

    study.yaml  environment.json       what was asked, and with which software and hardware
    suggestions/000000.json            one per trial, in the order they were drawn; never changed
    trials/<id>/config.json            a copy of its suggestion
    trials/<id>/rows/                  immutable Parquet parts <epoch>-<sequence>-<crc32>.parquet
    trials/<id>/outcome.json           how it ended; error.txt beside it if it failed
    trials/<id>/stacks/                where its workers were whenever they made no progress
    trials/<id>/{checkpoints,pictures,encoder}/
    pretrained/<key>/                  what trials that pretrain alike share; may be deleted
    results.parquet  arms.parquet      all rows and all arms; may be deleted and come back
    requests/<time>-<kind>-<hex>.json  what people ask of the study and no driver has read yet
    answers/000000.json                what became of each request; never changed
    stints/000001.json                 how long each driver has run it, and held which trial
    logs/<logger>/<id>.json            what TensorBoard and others have been given
    epochs/000001.json  lock           one epoch per driver; the lock of the living one
    console.log                        what the last driver said that the console started

A study in a store of objects has the same names there, below its URI; the folder is the mirror.
`lock` and what begins with a dot are in the mirror alone, and these are in the store alone:

    epochs/000001.beat                 renewed by the living driver of that epoch
    epochs/000001.over                 that driver has given the study back
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from trainables import storage

_STUDY = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_TRIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def is_study_name(text: str) -> bool:
    return bool(_STUDY.fullmatch(text))


def is_trial_id(text: str) -> bool:
    return bool(_TRIAL.fullmatch(text))


@dataclass(frozen=True)
class Storage:
    """Where studies lie: a folder, or a place in a store of objects and its mirror."""

    folder: Path
    remote: str = ""  # the store's URI

    @classmethod
    def of(cls, given: str) -> Storage:
        """What a user names: a folder or a URI."""
        if not storage.is_uri(given):
            return cls(Path(given).expanduser())
        given = storage.join(given)
        return cls(storage.mirror_of(given), given)

    def study(self, name: str) -> StudyFolder:
        return StudyFolder(self.folder / name, self.remote and storage.join(self.remote, name))

    def within(self, *parts: str) -> Storage:
        """A place below this one."""
        return Storage(
            self.folder.joinpath(*parts), self.remote and storage.join(self.remote, *parts)
        )

    def absolute(self) -> Storage:
        return Storage(self.folder.absolute(), self.remote)

    def __str__(self) -> str:
        return self.remote or str(self.folder)


@dataclass(frozen=True)
class StudyFolder:
    """The paths of one study; touches no file."""

    root: Path
    remote: str = ""  # the URI that the folder mirrors; nothing: the folder is all there is

    @property
    def where(self) -> str:
        """What people call the place."""
        return self.remote or str(self.root)

    @property
    def storage(self) -> Storage:
        """What this study lies in."""
        return Storage(self.root.absolute().parent, self.remote.rpartition("/")[0])

    @property
    def in_commands(self) -> str:
        """How a command names this study, wherever it is typed."""
        return f"{self.root.name} --storage {shlex.quote(str(self.storage))}"

    def name_of(self, path: Path) -> str:
        """What the store calls a path of the mirror."""
        return path.relative_to(self.root).as_posix()

    def location(self, path: Path) -> str:
        """What people call a path."""
        return f"{self.remote}/{self.name_of(path)}" if self.remote else str(path)

    @property
    def spec(self) -> Path:
        return self.root / "study.yaml"

    @property
    def pretrained(self) -> Path:
        return self.root / "pretrained"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def suggestions(self) -> Path:
        return self.root / "suggestions"

    def suggestion(self, number: int) -> Path:
        return self.suggestions / f"{number:06d}.json"

    @property
    def trials(self) -> Path:
        return self.root / "trials"

    def trial(self, trial: str) -> Path:
        """The folder of a trial; an id that could lead out of the study is refused."""
        if not is_trial_id(trial):
            raise ValueError(f"a trial id is letters, digits, '-' and '_', got {trial!r}")
        return self.trials / trial

    def trial_config(self, trial: str) -> Path:
        return self.trial(trial) / "config.json"

    def rows(self, trial: str) -> Path:
        return self.trial(trial) / "rows"

    def checkpoints(self, trial: str) -> Path:
        return self.trial(trial) / "checkpoints"

    def pictures(self, trial: str) -> Path:
        return self.trial(trial) / "pictures"

    def encoder(self, trial: str) -> Path:
        return self.trial(trial) / "encoder"

    def stacks(self, trial: str) -> Path:
        return self.trial(trial) / "stacks"

    def outcome(self, trial: str) -> Path:
        return self.trial(trial) / "outcome.json"

    def error(self, trial: str) -> Path:
        return self.trial(trial) / "error.txt"

    @property
    def results(self) -> Path:
        return self.root / "results.parquet"

    @property
    def arms(self) -> Path:
        return self.root / "arms.parquet"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def logged(self, logger: str, trial: str) -> Path:
        """How much of a trial that logger has been given."""
        return self.root / "logs" / logger / self.trial(trial).with_suffix(".json").name

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def epochs(self) -> Path:
        return self.root / "epochs"

    def epoch(self, number: int) -> Path:
        return self.epochs / f"{number:06d}.json"

    def beat(self, number: int) -> Path:
        return self.epochs / f"{number:06d}.beat"

    def over(self, number: int) -> Path:
        return self.epochs / f"{number:06d}.over"

    @property
    def mirrored(self) -> Path:
        """What of the store the mirror holds."""
        return self.root / ".mirrored.json"

    @property
    def pull_lock(self) -> Path:
        """Held while the mirror is being brought up to date."""
        return self.root / ".pull.lock"

    @property
    def requests(self) -> Path:
        return self.root / "requests"

    @property
    def answers(self) -> Path:
        return self.root / "answers"

    def answer(self, number: int) -> Path:
        return self.answers / f"{number:06d}.json"

    @property
    def stints(self) -> Path:
        return self.root / "stints"

    def stint(self, epoch: int) -> Path:
        return self.stints / f"{epoch:06d}.json"

    @property
    def stop_request(self) -> Path:
        """Exists while somebody has asked the driver to stop."""
        return self.root / "stop"

    @property
    def console_log(self) -> Path:
        return self.root / "console.log"
