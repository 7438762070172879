"""Files and folders that are there whole or not at all.

What is new is written aside, in the same folder, and renamed over the old: whoever reads finds the
one or the other, never half of it. A power cut might still leave the new name before an empty file,
so the content is synced before the rename; and it might undo the rename, so what is acknowledged is
published: its folder, which holds the name, is synced as well.

No other file of study, trainables and analysis syncs or renames (tests/whole/test_layers.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_LOG = logging.getLogger(__name__)


def write_new(path: Path, content: bytes) -> None:
    """Write and sync a file that must not be there yet; its name lasts once the folder is synced.

    The permissions are those that the process gives to any new file.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, path: Path) -> None:
    """Put what was synced aside in the place of `path`; it lasts when this returns."""
    os.replace(aside, path)
    sync(path.parent)


def publish_folder(aside: Path, path: Path) -> None:
    """The same for a folder of files that nobody has synced; only an empty one is replaced."""
    for file in aside.iterdir():
        sync(file)
    sync(aside)
    publish(aside, path)


@contextlib.contextmanager
def replacing(path: Path, *, synced: bool = True, only_writer: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to, which replaces it at the end, and goes after an error.

    A power cut leaves the old or the new, whole. `synced=False` spares the wait where it may leave
    a torn one, because that is noticed or is soon made anew.
    `only_writer`: nobody else writes this file, so what a killed process left aside is overwritten.
    """
    writer = "" if only_writer else f".{os.getpid()}"
    aside = path.with_name(f".{path.name}{writer}.partial")
    try:
        yield aside
        if synced:
            sync(aside)
        os.replace(aside, path)
    except BaseException:
        discard(aside)
        raise


def rename(path: Path, new: Path) -> Path:
    """Rename a file or folder in one step, for whoever looks; a power cut may undo it."""
    os.replace(path, new)
    return new


def make_folder(path: Path) -> None:
    """Make a folder that lasts, with those above it."""
    if not path.is_dir():
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file, if it can be removed, while another error is being told."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        _LOG.info("left behind: %s", path)
