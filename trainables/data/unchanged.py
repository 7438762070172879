"""Data that were prepared before, known again by their files' sizes and times.

To read thousands of files again, only to find what they were before, takes longer than anybody
wants to wait. A file of the same device, number, size and times (of its content, and of its inode,
which nobody can set back) holds the same bytes; one so young that it might change within the
resolution of those times is read.
"""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainables import durable
from trainables.data import store
from trainables.settings import digest

FOLDER = "seen"  # of the cache
YOUNG_SECONDS = 10.0  # by which clocks of file servers and their caches may be behind
PACKAGE = Path(__file__).parent.parent  # its code decides how files are read


def stamp(files: Iterable[Path]) -> str | None:
    """SHA-256 of where these files are, or are not, and of their state; None: one is too young."""
    newest, lines = 0, []
    for path in (*files, *PACKAGE.glob("*.py"), *PACKAGE.glob("data/*.py")):
        try:
            now = path.stat()
        except FileNotFoundError:
            lines.append(f"{path} is missing")
            continue
        except OSError:
            return None  # whoever reads it will tell
        if stat.S_ISDIR(now.st_mode):
            return None
        newest = max(newest, now.st_mtime_ns, now.st_ctime_ns)
        state = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        lines.append(f"{path} {state}")
    is_young = newest > (time.time() - YOUNG_SECONDS) * 1e9
    return None if is_young else digest(lines)


def recall(cache: Path, given: Any, state: str) -> Path | None:
    """The folder that was prepared from what is given (JSON) when its files were in this state."""
    try:
        seen = json.loads(_note(cache, given).read_text())
        folder = cache / seen["fingerprint"]
        return folder if seen["state"] == state and store.damage(folder) is None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(cache: Path, given: Any, state: str, folder: Path) -> None:
    """Keep what `recall` needs; where that cannot be written, files are read again next time."""
    seen = {"state": state, "fingerprint": folder.name}
    try:
        _note(cache, given).parent.mkdir(exist_ok=True)
        with durable.replacing(_note(cache, given), synced=False) as aside:
            aside.write_text(json.dumps(seen))
    except OSError:
        return


def _note(cache: Path, given: Any) -> Path:
    return cache / FOLDER / f"{digest(given)}.json"
