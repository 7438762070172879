"""Files that a data set names: regular ones, within its folder."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trainables.errors import UserError


def read(path: Path, inside: Path | None) -> bytes:
    """The bytes of a regular file, which must lie in the folder `inside`, links followed."""
    with opened(path, inside) as file:
        return file.read()


@contextmanager
def opened(path: Path, inside: Path | None) -> Iterator[BinaryIO]:
    """A regular file to read, which must lie in the folder `inside`, links followed."""
    try:
        real = path.resolve(strict=True)
        if inside is not None and not real.is_relative_to(inside.resolve()):
            raise UserError(
                f"leads out of the data folder {inside}; move it there, or set allow_outside: true"
            )
        if not stat.S_ISREG(real.stat().st_mode):
            raise UserError("is not a regular file")
        with real.open("rb") as file:
            yield file
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError("does not exist") from None
    except (OSError, ValueError, RuntimeError) as error:  # a circle of links: RuntimeError
        raise UserError(f"cannot be read: {error}") from error
