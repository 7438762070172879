"""A trial that begins where another one stands, so that what both train alike is trained once.

All randomness of training is a function of (seed, step), and a schedule of progress. So two trials
of one seed that differ in nothing before some step are the same trial until then, bit by bit: the
later one may begin with the earlier one's checkpoint, and comes to what it would have come to from
its own start. Where the checkpoint has gone it trains from there, to the same end.

Knows no torch: the driver calls it. What is handed on are links to the same bytes where the storage
has links, else copies.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from trainables import durable

STATE = "state.json"  # of a checkpoint


def inherit(parent: Path, child: Path, phase: str, progress: float) -> bool:
    """Give a trial that has no checkpoint its parent's at a rung; both are folders of checkpoints.

    False: there is none at that rung, or the child has one of its own.
    """
    if child.is_dir() and _checkpoints(child):
        return False
    found = [path for path in _checkpoints(parent) if _stands_at(path, phase, progress)]
    if not found:
        return False
    aside = child / f".{found[0].name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    durable.make_folder(aside)
    for file in found[0].iterdir():
        try:
            os.link(file, aside / file.name)
        except OSError:
            shutil.copyfile(file, aside / file.name)
    durable.publish_folder(aside, child / found[0].name)
    return True


def _checkpoints(folder: Path) -> list[Path]:
    """Those that were published, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _stands_at(checkpoint: Path, phase: str, progress: float) -> bool:
    """Whether it was saved at a rung, with the rows of which it is reported again."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        at = {row["progress"] for row in state["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    is_rung = state["step"] == state["rung_step"] > 0
    return bool(is_rung and state["phase"] == phase and at == {progress})
