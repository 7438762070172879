"""Commands with `--address`: studies as Ray jobs, submitted, resumed, stopped and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from cluster import jobs
from study.commands.finding import refuse_if_below, seen_here, storage_of
from study.commands.terminal import say, say_json, show
from study.folder import Storage
from study.ledger import read_jobs, refuse_if_held
from study.loading import changes, load_spec
from study.overview import question_of
from study.state import outlook_of
from trainables.errors import UserError

if TYPE_CHECKING:
    from study.folder import StudyFolder
    from study.spec import StudySpec


def submit_study(path: Path, address: str, storage: str | None) -> None:
    """Submit as a Ray job."""
    spec = load_spec(path)
    _refuse_data_left_behind(spec)
    own = Storage.of(spec.storage)
    studies = Storage.of(storage).within(spec.storage) if storage is not None else None
    if own.remote:
        studies = own
    folder = seen_here(studies.study(spec.study)) if studies is not None else None
    if folder is not None and not _needs_a_driver(folder, address, spec):
        return
    job, link = jobs.submit(
        address,
        path,
        study=spec.study,
        question=spec.question or "",
        home=_home(spec.study, studies),
        storage=storage,
        studies=str(studies) if studies is not None else None,
    )
    say(
        f"submitted as job {job}\n{link}\n"
        f"to follow it: maskstudy logs {spec.study} --address {address} --follow\n"
        f"to stop it:   maskstudy stop {spec.study} --address {address}\n"
        f"to resume it: maskstudy resume {spec.study} --address {address}"
    )


def _refuse_data_left_behind(spec: StudySpec) -> None:
    """The study file's folder travels to the cluster; what lies elsewhere by its name does not."""
    root = spec.folder_of_yaml.resolve()
    for option in ("folder", "manifest"):
        given = spec.data.options().get(option)
        if given is None or Path(given).is_absolute():
            continue
        if not (root / given).resolve().is_relative_to(root):
            raise UserError(
                f"data.{option}: {given} leads out of {root}, which is all that is submitted; "
                f"expected a place below it, or an absolute path that the cluster's nodes see"
            )


def resume_job(name: str, address: str, storage: str | None) -> None:
    """Go on by name, as a new job."""
    folder = seen_here(storage_of(storage).study(name))
    if folder is None and storage is not None:
        refuse_if_below(name, Storage.of(storage))
    if folder is not None and not _needs_a_driver(folder, address):
        return
    # a storage that is only seen from the cluster is as good, if it is named
    place = Storage.of(storage) if storage else folder.storage if folder is not None else None
    job, link = jobs.resubmit(
        address,
        name,
        home=_home(name, Storage.of(storage) if storage else None),
        storage=str(place.absolute()) if place is not None else None,
        question=question_of(folder) if folder is not None else "",
    )
    say(f"resumed as job {job}\n{link}")


def stop_job(name: str, address: str, storage: str | None) -> None:
    """Stop the job that runs the study."""
    home = _home(name, Storage.of(storage) if storage else None)
    job = jobs.stop(address, name, home=home)
    say(f"stopped job {job}" if job else f"no job of study {name!r} is running")


def print_log(name: str, address: str, *, follow: bool) -> None:
    """Print the log of a study's newest job."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    jobs.logs(address, name, write, follow=follow)


def show_jobs(name: str | None, address: str, *, as_json: bool) -> None:
    """A table of a cluster's studies, or of all jobs of one; or JSON of the same."""
    table = Table(title=f"{name or 'studies'} at {address}")
    for column in ("study", "job", "status", "attempt", "started", "last line of its log"):
        table.add_column(column)
    standings = jobs.standings(address, name)
    if name is not None and not standings:
        raise UserError(f"{address} knows no job of study {name!r}")
    if as_json:
        say_json([one._asdict() for one in standings])
        return
    for one in standings:
        shown = (one.study, one.job, one.status, one.attempt, one.started, one.last_line)
        table.add_row(*map(escape, shown))
    show(table)


def _home(name: str, storage: Storage | None) -> jobs.Home | None:
    """What tells the study's jobs from those of another storage; None if no storage was named."""
    if storage is None:
        return None
    folder = seen_here(storage.study(name))
    drivers = read_jobs(folder) if folder is not None else frozenset()
    return jobs.Home(str(storage.absolute()), drivers)


def _needs_a_driver(folder: StudyFolder, address: str, spec: StudySpec | None = None) -> bool:
    """False, and says so, if nothing is left to do; HeldError while somebody drives the study.

    `spec`: a study file that is submitted; where it asks for more, a driver has to take that up.
    """
    refuse_if_held(folder)
    if (spec is not None and changes(folder, spec)) or not outlook_of(folder).is_finished:
        return True
    say(
        f"{folder.root.name} is finished: nothing is left to do. To add trials: maskstudy extend "
        f"{folder.in_commands} --trials N, then maskstudy resume {folder.in_commands} "
        f"--address {address}"
    )
    return False
