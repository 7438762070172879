"""The data of a study, decoded and found to fit it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from study.commands.terminal import console
from study.costs import budget_problems
from study.fit import data_problems, data_size
from study.ledger import read_environment
from study.progress import Patience
from trainables.data import default_cache, open_dataset, prepare
from trainables.errors import UserError

if TYPE_CHECKING:
    from study.folder import StudyFolder
    from study.spec import StudySpec
    from trainables.data import Dataset


def dataset_of(spec: StudySpec) -> Dataset:
    """The data that a study file names. UserError: they do not fit the study."""
    return _opened(_decoded(spec), spec)


def dataset_of_begun(folder: StudyFolder, spec: StudySpec) -> Dataset:
    """The data of a study that is resumed by name, away from its file."""
    fingerprint: str = read_environment(folder)["data_fingerprint"]
    decoded = default_cache() / fingerprint
    if not decoded.is_dir():
        try:  # generated data, and images by absolute paths, need not the study file's folder
            decoded = _decoded(spec)
        except (UserError, OSError) as error:
            raise UserError(
                f"{folder.where}: the decoded data ({fingerprint[:12]}) are not in "
                f"{default_cache()}, and cannot be decoded from here; resume with the study file, "
                f"which says where the images are: maskstudy run STUDY.yaml"
            ) from error
    return _opened(decoded, spec)


def refuse_other_data(folder: StudyFolder, dataset: Dataset) -> None:
    """UserError: the study was begun on other data than these."""
    before = read_environment(folder)["data_fingerprint"]
    if before != dataset.fingerprint:
        raise UserError(
            f"{folder.root.name} was begun on other data (fingerprint {before[:12]}, now "
            f"{dataset.fingerprint[:12]}): results could not be compared; restore the images, or "
            f"give the study another name"
        )


def _decoded(spec: StudySpec) -> Path:
    """What takes longer than a moment is shown."""
    with Patience(console, "checking the data") as patience:
        return prepare(
            spec.data,
            spec.folder_of_yaml,
            default_cache(),
            lambda done, parts: patience.say(f"decoding: {done:,} of {parts:,} parts"),
            lambda done, files: patience.say(f"checking the data: {done:,} of {files:,} images"),
        )


def _opened(decoded: Path, spec: StudySpec) -> Dataset:
    dataset = open_dataset(decoded)
    size = data_size(dataset)
    problems = data_problems(spec, size) or budget_problems(spec, size)
    if problems:
        raise UserError("\n".join(problems))
    return dataset
