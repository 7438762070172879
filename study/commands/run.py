"""`run` and `resume`: a study, driven from this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from study import mirror, requests
from study.commands.data import dataset_of, dataset_of_begun, refuse_other_data
from study.commands.finding import find_study
from study.commands.terminal import say
from study.conductor import Conductor, DataView
from study.environment import environment
from study.fit import data_size
from study.gain import in_words, warning
from study.ledger import Ledger, read_spec
from study.loading import changes, load_spec, spec_of
from study.loggers import Journal, check_packages

if TYPE_CHECKING:
    from study.folder import StudyFolder
    from study.spec import StudySpec
    from trainables.data import Dataset

CODE = Path(__file__).resolve().parent.parent.parent
BuildReport = Callable[[Path], Path]  # of a study's folder; where the report is


def run_study(path: Path, *, build_report: BuildReport | None) -> int:
    """Run or resume the study of a file; the exit code."""
    spec = load_spec(path)
    check_packages(spec.log)
    if spec.storage_note:
        say(spec.storage_note)
    return _drive(spec, spec.study_folder(), lambda: dataset_of(spec), build_report)


def resume_study(name: str, storage: str | None, *, build_report: BuildReport | None) -> int:
    """Go on by name, from the study folder alone; the exit code."""
    folder = find_study(name, storage)
    spec = spec_of(folder)
    check_packages(spec.log)
    return _drive(spec, folder, lambda: dataset_of_begun(folder, spec), build_report)


def _drive(
    spec: StudySpec,
    folder: StudyFolder,
    prepare: Callable[[], Dataset],
    build_report: BuildReport | None,
) -> int:
    # the first line of a job's log: it tells which study a job runs that has no metadata
    say(f"study {spec.study}: {folder.where}")

    # these import Ray, which takes seconds: the line above is not to wait for it
    from cluster.connect import submission_id
    from study.driver import drive

    with Ledger.open(folder, {"job": submission_id()}) as ledger:
        requests.forget_stop(folder)
        dataset = prepare()
        freeze(ledger, spec, dataset)
        is_labelled = len(dataset.rows("train")) > 0
        size = data_size(dataset)
        view = DataView(spec.folder_of_yaml, dataset.fingerprint, is_labelled, size)
        conductor = Conductor(spec, ledger, view)
        backlog = [(each, conductor.results.get(each.trial)) for each in conductor.suggestions]
        journal = Journal(spec.study, folder, spec.log, backlog, conductor.progress.say)
        conductor.on_durable = journal.notice
        try:
            drive(conductor)
        finally:
            journal.close()
            ledger.compact()
        return conclude(conductor, folder, build_report)


def conclude(conductor: Conductor, folder: StudyFolder, build_report: BuildReport | None) -> int:
    """Say what there is now; the exit code."""
    tell = conductor.progress.say
    gain = conductor.best_gain
    if gain is not None:
        tell(f"probe gain of the best encoder: {in_words(gain)}")
    problem = warning(gain)
    if problem is not None:
        tell(f"warning: {problem}")
    tell(f"study folder: {folder.where}")
    if build_report is not None:
        mirror.pull_pictures(folder)
        tell(f"report: {mirror.send(folder, build_report(folder.root))}")
    if conductor.num_failed:
        tell(
            f"{conductor.num_failed} trial(s) failed; see error.txt in their folders under "
            f"{folder.location(folder.trials)}"
        )
    return 1 if conductor.num_failed or conductor.gave_up else 0


def freeze(ledger: Ledger, spec: StudySpec, dataset: Dataset) -> None:
    """Keep the study file; a changed one goes on only if the change is harmless."""
    is_begun = read_spec(ledger.folder) is not None
    changes(ledger.folder, spec)
    facts = {
        **environment(CODE),
        "data_fingerprint": dataset.fingerprint,
        "data": dataset.describe(),
    }
    ledger.freeze(spec.text, facts, extends=is_begun)
    refuse_other_data(ledger.folder, dataset)
