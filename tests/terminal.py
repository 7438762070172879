"""The program as it is called in a terminal, within this process."""

from __future__ import annotations

from pathlib import Path

from study.__main__ import main


def call(*arguments: str | Path) -> int:
    """Exit code of `maskstudy ...`."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0
