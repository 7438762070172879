"""`export`: a pretrained encoder, out of a study."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from study import mirror
from study.best import NoEncoder, best_encoder
from study.commands.finding import find_study
from study.commands.terminal import say
from study.conductor import measure
from study.ledger import read_rows, read_suggestions
from study.spec import spec_of
from trainables.errors import UserError


def copy_encoder(name: str, output: Path, arm: str | None, storage: str | None) -> None:
    """Copy the pretrained encoder of an arm's best trial into a new folder."""
    folder = find_study(name, storage)
    spec, suggestions = spec_of(folder), read_suggestions(folder)
    measured = measure(read_rows(folder))
    mirror.pull_pictures(folder)
    with_encoder = {s.trial for s in suggestions if folder.encoder(s.trial).is_dir()}
    best = best_encoder(spec, suggestions, measured, with_encoder, arm)
    if isinstance(best, NoEncoder):
        known = ", ".join(best.arms) or "none yet"
        what = f"no encoder of arm {arm!r}" if arm else "no encoder of an arm with all its seeds"
        raise UserError(f"{name}: {what}; arms with one: {known}")
    if output.exists():
        raise UserError(f"{output}: exists already; name a new folder with --output")
    encoder = folder.encoder(best.trial)
    mirror.pull_folder(folder, encoder)
    shutil.copytree(encoder, output)
    say(f"arm {best.arm}, trial {best.trial}: {output}")
    say(json.loads((output / "encoder.json").read_text())["usage"])
