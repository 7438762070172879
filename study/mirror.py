"""A study in a store of objects: its mirror here, and who may write to it.

The store is the truth. A driver writes there first, and then into the mirror, so that the mirror
holds nothing that the store lacks. Whoever reads brings the mirror up to date before; where a
driver lives on this machine it is so already.

Stores have no locks. A driver takes the next epoch by creating its file, which only one can; while
it lives it renews that epoch's beat, and at its end it says that the epoch is over. Whoever wants
the study after one that has said nothing watches its beat, by a clock of its own, before it counts
as dead. A driver that was only asleep is fenced: it looks for a newer epoch before each write, and
once more after it, before the write counts. So whatever counts was there before the newer driver
began to read. What is written once is created under the condition that nothing is there, and the
rest replaces only what this driver has read or written itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from study.folder import StudyFolder
from trainables import durable
from trainables.errors import StorageError
from trainables.storage import Entry, Tag, each_at_once, store

BEAT_SECONDS = 3.0
SILENCE_SECONDS = 15.0  # after which a driver without a beat counts as dead

log = logging.getLogger(__name__)

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_LEDGER = re.compile(
    rf"study\.yaml|environment\.json|epochs/\d{{6,}}\.json|(suggestions|answers|stints)/\d{{6,}}\.json"
    rf"|requests/{_NAME}\.json|logs/{_NAME}/{_NAME}\.json"
    rf"|trials/{_NAME}/(config\.json|outcome\.json|error\.txt|rows/{_NAME}\.parquet)"
)
_SHOWN = re.compile(rf"trials/{_NAME}/(pictures/{_NAME}|encoder/encoder\.json)")
_EPOCH = re.compile(r"epochs/(\d{6,})\.json")

Mirrored = dict[str, Entry]


def pull(folder: StudyFolder, *, pictures: bool = False) -> None:
    """Bring the mirror up to date for reading; `pictures`: with them and what tells of encoders."""
    if not folder.remote:
        return
    with _pulling(folder) as is_driven:
        if not is_driven:
            _, there = _pull(folder)
        elif pictures:
            there = store(folder.remote).entries("trials")
        if pictures:
            _fetch(folder, there, _SHOWN)


def pull_as_driver(folder: StudyFolder) -> dict[str, Tag]:
    """The same for who holds the study; also the tags of what its ledger consists of."""
    with _locked(folder):
        held, _ = _pull(folder)
        return {name: entry.tag for name, entry in held.items()}


def pull_epochs(folder: StudyFolder) -> None:
    """Who has driven the study."""
    _fetch(folder, store(folder.remote).entries("epochs"), _LEDGER)


def pull_pictures(folder: StudyFolder) -> None:
    """Pictures and what tells of encoders, which other nodes may have made."""
    if folder.remote:
        _fetch(folder, store(folder.remote).entries("trials"), _SHOWN)


def pull_folder(folder: StudyFolder, place: Path) -> None:
    """All files of one folder of the study, such as an encoder."""
    if folder.remote:
        prefix = folder.name_of(place)
        _fetch(folder, store(folder.remote).entries(prefix), re.compile(rf"{prefix}/{_NAME}"))


def send(folder: StudyFolder, path: Path) -> str:
    """Keep in the store a file that was made here; where it lies then."""
    if folder.remote:
        store(folder.remote).upload(folder.name_of(path), path)
    return folder.location(path)


def remember(folder: StudyFolder, tags: dict[str, Tag]) -> None:
    """Keep which objects the mirror holds, so that they need not come again."""
    held = {
        name: Entry(path.stat().st_size, tag)
        for name, tag in tags.items()
        if (path := folder.root / name).is_file()
    }
    # not synced: a torn one counts as none
    with durable.replacing(folder.mirrored, synced=False) as aside:
        aside.write_text(json.dumps({"uri": folder.remote, "objects": held}))


def exists(folder: StudyFolder) -> bool:
    """Whether the study has been begun in the store; a StorageError if it cannot be told."""
    is_there = store(folder.remote).exists(folder.name_of(folder.spec))
    if not is_there:  # which a store also says that cannot be opened
        store(folder.storage.remote).probe()
    return is_there


def newest_epoch(folder: StudyFolder) -> int:
    names = store(folder.remote).entries("epochs")
    return max((int(found[1]) for name in names if (found := _EPOCH.fullmatch(name))), default=0)


def is_fenced(folder: StudyFolder, epoch: int) -> bool:
    """Whether a newer driver has taken the study: epochs have no gaps."""
    return store(folder.remote).exists(folder.name_of(folder.epoch(epoch + 1)))


def take_epoch(folder: StudyFolder, sign: Callable[[str], bytes]) -> int | None:
    """Take the study in the store; None: its driver lives, or somebody else came first.

    `sign` makes the epoch's file, given a word that no other driver has.
    """
    objects = store(folder.remote)
    newest = newest_epoch(folder)
    if newest and not is_silent(folder, newest):
        return None
    name = folder.name_of(folder.epoch(newest + 1))
    content = sign(secrets.token_hex(4))
    tag = objects.create(name, content)
    if tag is None:
        return None
    try:
        objects.claim(name, content)
    except FileExistsError:
        return newest + 1
    raise StorageError(
        f"{folder.remote}: this store overwrites what it is asked to keep (a PUT with "
        f"If-None-Match), so two drivers could take one study. Take a store that has conditional "
        f"writes, or a folder"
    )


def is_silent(folder: StudyFolder, epoch: int) -> bool:
    """Whether the driver of that epoch has given the study back, or shows no sign of life.

    Quick where this process has looked before: it remembers what it saw, and for how long.
    """
    objects, key = store(folder.remote), (folder.remote, epoch)
    over, beat = folder.name_of(folder.over(epoch)), folder.name_of(folder.beat(epoch))
    while not objects.exists(over):
        found, now = objects.read(beat), time.monotonic()
        before = _beats.get(key)
        if before is None or before.found != found:
            _beats[key] = _Beat(found, now, is_known=before is not None)
            # a change within this time was seen by us; an older one may be the last it made
            if before is not None and now - before.since < SILENCE_SECONDS:
                return False
            log.warning(
                "%s: looking for %g s whether its driver lives", folder.remote, SILENCE_SECONDS
            )
        elif now - before.since >= SILENCE_SECONDS:
            return True
        elif before.is_known:
            return False
        time.sleep(0.5)
    return True


class _Beat(NamedTuple):
    found: object
    since: float  # by the monotonic clock of this process
    is_known: bool  # that the driver lived then, as the beat before was another one


_beats: dict[tuple[str, int], _Beat] = {}


class Heart(threading.Thread):
    """The driver's sign of life, and its eye on what people ask in the store."""

    def __init__(self, folder: StudyFolder, epoch: int) -> None:
        super().__init__(name="heart", daemon=True)
        self.folder, self.epoch = folder, epoch
        self.is_fenced = False
        self._ended = threading.Event()

    def run(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            began = time.monotonic()
            try:
                self._beat(number)
            except StorageError as error:  # the next write tells it to who must know
                log.info("no beat: %s", error)
            self._ended.wait(max(0.0, began + BEAT_SECONDS - time.monotonic()))

    def _beat(self, number: int) -> None:
        objects, folder = store(self.folder.remote), self.folder
        objects.put(folder.name_of(folder.beat(self.epoch)), f"{number}\n".encode())
        self.is_fenced = self.is_fenced or is_fenced(folder, self.epoch)
        if objects.exists(folder.name_of(folder.stop_request)):
            folder.stop_request.touch()
        _fetch(folder, objects.entries("requests"), _LEDGER)

    def stop(self, *, gives_back: bool) -> None:
        """Beat no more; `gives_back`: the study is free for the next driver at once."""
        self._ended.set()
        if gives_back:
            self.join()
            folder = self.folder
            try:
                store(folder.remote).put(folder.name_of(folder.over(self.epoch)), b"")
            except StorageError as error:
                log.warning("the next driver has to wait %g s: %s", SILENCE_SECONDS, error)


def _pull(folder: StudyFolder) -> tuple[Mirrored, Mirrored]:
    """Make the mirror's ledger that of the store: what it consists of, and all that is there."""
    before = _mirrored(folder)
    # listed before the store is: what a request or a driver adds meanwhile is in both
    here = [name for name in _files(folder) if _LEDGER.fullmatch(name)]
    there = store(folder.remote).entries()
    held = _fetch(folder, there, _LEDGER, before)
    for name in here:
        if name not in held:
            (folder.root / name).unlink(missing_ok=True)
    if held != before:
        remember(folder, {name: entry.tag for name, entry in held.items()})
    return held, there


def _fetch(
    folder: StudyFolder,
    there: Mirrored,
    wanted: re.Pattern[str],
    before: Mirrored | None = None,
) -> Mirrored:
    """Get the objects that the mirror lacks; all that it holds then.

    `before`: which of them it held, after it was brought up to date the last time.
    """
    objects, root = store(folder.remote), str(folder.root)

    def is_here(name: str) -> bool:
        # of pictures and requests, which are written once, the size is enough
        is_known = before is None or before.get(name) == there[name]
        return is_known and _size(f"{root}/{name}") == there[name].size

    def get(name: str) -> tuple[str, Entry] | None:
        entry, path = there[name], folder.root / name
        try:
            if _size(path) == entry.size and _md5(path) == entry.tag.etag:
                return name, entry
            tag = objects.download(name, path, entry.size)
        except StorageError:
            if objects.exists(name):
                raise
            return None  # removed since it was listed
        except OSError as error:
            raise StorageError(
                f"{path}: the mirror of {folder.remote} cannot be written: {error.strerror}. Make "
                f"room there, or set MASKSTUDY_CACHE to another folder"
            ) from error
        return name, Entry(entry.size, tag)

    names = [name for name in there if wanted.fullmatch(name) and ".." not in name]
    held = {name: there[name] for name in names if is_here(name)}
    missing = [name for name in names if name not in held]
    return held | dict(found for found in each_at_once(missing, get) if found is not None)


def _mirrored(folder: StudyFolder) -> Mirrored:
    """What the mirror held after it was last brought up to date."""
    try:
        noted = json.loads(folder.mirrored.read_bytes())
        return {name: Entry(size, Tag(*tag)) for name, (size, tag) in noted["objects"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _files(folder: StudyFolder) -> Iterator[str]:
    """Names as the store has them."""
    root = str(folder.root)
    for place, _, files in os.walk(root):
        for file in files:
            yield f"{place}/{file}"[len(root) + 1 :]


def _size(path: str | Path) -> int | None:
    """Of a file; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _md5(path: Path) -> str:
    """What many stores have as the tag of what came in one piece."""
    return f'"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}"'


@contextlib.contextmanager
def _pulling(folder: StudyFolder) -> Iterator[bool]:
    """Keep others from pulling; whether a driver of this machine keeps the mirror up to date."""
    with _locked(folder):
        try:
            descriptor = os.open(folder.lock, os.O_RDONLY)
        except FileNotFoundError:
            yield False
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            is_driven = False
        except BlockingIOError:
            is_driven = True
        finally:
            os.close(descriptor)
        yield is_driven


@contextlib.contextmanager
def _locked(folder: StudyFolder) -> Iterator[None]:
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.pull_lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StorageError(
            f"{folder.root}: the mirror of {folder.remote} cannot be written: {error.strerror}. "
            f"Set MASKSTUDY_CACHE to another folder"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
