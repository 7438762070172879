"""Files that show whether they are what was written: JSON with the SHA-256 of its content.

What is missing or does not fit is a LedgerError that names the file and the way out; a storage
that fails is a StorageError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from study.ledger.records import LedgerError
from trainables.errors import StorageError
from trainables.settings import digest

RESTORE = "Bring it back from a copy"


def sealed(content: dict[str, Any]) -> bytes:
    """Indented JSON for people, with the SHA-256 of its content in the last field."""
    assert "sha256" not in content
    sealed = {**content, "sha256": digest(content)}
    return (json.dumps(sealed, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def unsealed(raw: bytes) -> dict[str, Any]:
    """What `sealed` was given; a ValueError says why the bytes are not that."""
    try:
        content: dict[str, Any] = json.loads(raw)
        stated = content.pop("sha256")
        is_intact = stated == digest(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{len(raw)} bytes, not JSON of the ledger's: {error!r}") from error
    if not is_intact:
        raise ValueError(f"{len(raw)} bytes that do not fit their SHA-256")
    return content


def read_sealed(path: Path, way_out: str = RESTORE) -> dict[str, Any]:
    raw = read_bytes(path, way_out)
    try:
        return unsealed(raw)
    except ValueError as error:
        raise LedgerError(f"{path}: {error}. {way_out}") from error


def read_bytes(path: Path, way_out: str = RESTORE) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise LedgerError(f"{path}: missing. {way_out}") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error


def names_in(place: Path) -> list[str]:
    """The names in a folder, in no order; none if it is not there yet."""
    try:
        return os.listdir(place)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{place}: cannot be listed: {error.strerror}") from error


def last_number(place: Path) -> int | None:
    """The last of 000000.json, 000001.json, ...: a listing may leave out earlier ones."""
    numbered = [name for name in names_in(place) if re.fullmatch(r"\d{6,}\.json", name)]
    return max((int(name.removesuffix(".json")) for name in numbered), default=None)


def write_error(path: Path, error: OSError, num_bytes: int) -> StorageError:
    """What is told when so many bytes could not be made to last."""
    return StorageError(
        f"{path}: {num_bytes} bytes not safely written: {error.strerror or error}. What was "
        f"acknowledged before is intact; mend the storage and run the study again, it continues"
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
