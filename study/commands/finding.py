"""The study that a command means, and where it lies."""

from __future__ import annotations

import os
from pathlib import Path

from study import mirror
from study.folder import Storage, StudyFolder, is_trial_id
from study.loading import load_spec
from study.overview import studies
from trainables.errors import UserError
from trainables.storage import is_uri, join


def storage_of(given: str | None) -> Storage:
    """Where studies lie: as `--storage` says, else $MASKSTUDY_STORAGE, else here."""
    return Storage.of(given or os.environ.get("MASKSTUDY_STORAGE") or "studies")


def find_study(name: str, storage: str | None) -> StudyFolder:
    """The study folder of a name, a path or URI to the folder, or a study file."""
    place = storage_of(storage)
    given = [StudyFolder(Path(name))]
    if is_uri(name):
        parent, _, last = join(name).rpartition("/")
        given = [Storage.of(parent).study(last)]
    elif Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        given = [load_spec(Path(name)).study_folder()]
    if is_trial_id(name):
        given.append(place.study(name))
    for folder in given:
        if (found := seen_here(folder)) is not None:
            return found
    refuse_if_below(name, place)
    known = ", ".join(folder.root.name for folder in studies(place)) or "none"
    raise UserError(
        f"{name}: no such study in {place}; studies there: {known}. Name the study's folder, its "
        f"YAML file, or its storage with --storage"
    )


def refuse_if_below(name: str, place: Storage) -> None:
    """What `submit` calls the storage is one folder above what every other command does."""
    below = place.within("studies")
    if is_trial_id(name) and seen_here(below.study(name)) is not None:
        raise UserError(f"{name}: not in {place}, but in {below}; expected --storage {below}")


def seen_here(folder: StudyFolder) -> StudyFolder | None:
    """The study's folder, if this machine sees its storage and it has been begun."""
    return folder if begun(folder).spec.is_file() else None


def begun(folder: StudyFolder) -> StudyFolder:
    """The folder, brought here from its store if it has been begun there."""
    if folder.remote and mirror.exists(folder):
        mirror.pull(folder)
    return folder
