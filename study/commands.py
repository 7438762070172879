"""What the commands do. Each is a function of plain arguments; `__main__` only parses them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from study import mirror, requests
from study.environment import environment
from study.folder import Storage, StudyFolder, is_trial_id
from study.ledger import (
    Ledger,
    damage,
    is_held,
    read_environment,
    read_jobs,
    read_rows,
    read_spec,
    read_suggestions,
    refuse_if_held,
)
from study.overview import arms_table, is_finished, question_of, studies, studies_table
from study.reader import read_yaml
from trainables.errors import UserError
from trainables.storage import is_uri, join

console = Console(highlight=False, soft_wrap=True)
_COLOURS = {"ok": "", "warning": "yellow", "problem": "red"}  # the words say it too


def check(path: Path) -> None:
    """Validate, prepare the data, print the plan."""
    from study.spec import load_spec
    from trainables.data import open_dataset

    spec = load_spec(path)
    console.print(f"{path}: its settings are sound; now its data", markup=False)
    folder = _begun(spec.study_folder())
    dataset = open_dataset(_prepare(spec))
    _refuse_unfit_data(spec, dataset)
    console.print(f"{path}: sound", markup=False)
    _print_pairs("data", dataset.describe())

    import torch

    from study.plan import plan
    from trainables.speed import flops_per_second

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = max(1, int(spec.resources.cpus_per_worker))
    speed = flops_per_second(spec.trial, dataset, device, threads=threads)
    asked = requests.grown(spec, requests.expected(folder, spec))
    _print_pairs("plan", plan(asked, dataset, flops_per_second=speed).describe())
    if asked.budget.trials > spec.budget.trials:
        more = asked.budget.trials - spec.budget.trials
        console.print(f"  (with {more} trials that were asked for since the study was begun)")
    console.print(f"  (at {speed:.2e} FLOP/s, measured here on one worker of the control arm)")


def try_(path: Path, num_images: int) -> None:
    """One trial in this process: the study's own, for one epoch of a few images of each split."""
    import torch

    from study.spec import load_spec
    from trainables.context import Context
    from trainables.data import open_dataset
    from trainables.trial import run_trial

    spec = load_spec(path)
    dataset = open_dataset(_prepare(spec))
    _refuse_unfit_data(spec, dataset)
    dataset = replace(dataset, splits=_first_of_each(dataset.splits, num_images))
    config = spec.trial.model_copy(
        update={
            "pretrain": spec.trial.pretrain.model_copy(update={"epochs": 1}),
            "segment": spec.trial.segment.model_copy(update={"epochs": 1}),
        }
    )

    def report(rows: list[dict[str, Any]]) -> bool:
        for row in rows:
            name = f"{row['phase']}/{row['metric']}"
            console.print(f"  {name:<38} {row['value']:>10.5g} {row['unit']}", markup=False)
        return False

    with tempfile.TemporaryDirectory(prefix="maskstudy-try-") as folder:
        context = Context(
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            folder=Path(folder),
            attempt="try",
            rungs=(1.0,),
            report=report,
            heartbeat=lambda *_: None,
        )
        console.print(
            f"one epoch of each phase on {num_images} images, in this process; its numbers are "
            f"worth nothing"
        )
        outcome = run_trial(config, spec.seed, dataset, spec.probe, context)
    console.print(f"{outcome}: the study's trial runs", markup=False)


def masks(
    path: Path,
    output: Path,
    *,
    images: int,
    steps: int,
    every: bool,
    write_page: Callable[[Path, Path], Path],
) -> None:
    """Draw what each masking of a study hides, in this process, and write the page about it."""
    import torch

    from study.atlas import draw_atlas
    from study.spec import load_spec
    from trainables.data import open_dataset

    spec = load_spec(path)
    dataset = open_dataset(_prepare(spec))
    _refuse_unfit_data(spec, dataset)
    with tempfile.TemporaryDirectory(prefix="maskstudy-masks-") as folder:
        draw_atlas(
            spec,
            dataset,
            Path(folder),
            images=images,
            steps=steps,
            every=every,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            say=lambda line: console.print(line, markup=False),
        )
        page = write_page(Path(folder), output)
    console.print(f"masks: {page}", markup=False)


def _first_of_each(splits: Any, count: int) -> Any:
    """The splits with no more than `count` images in each; the others are in none."""
    kept = splits.copy()
    for split in set(splits):
        kept[(splits == split).nonzero()[0][count:]] = ""
    return kept


def bench(path: Path | None, names: str, seconds: float, threads: int | None) -> None:
    """What each masking strategy costs: a table of step times relative to random masking."""
    import torch
    from pydantic import TypeAdapter

    from study.mistakes import listed, near
    from study.spec import load_spec
    from trainables.config import TrialConfig
    from trainables.data import DataConfig, default_cache, open_dataset, prepare
    from trainables.edges import in_words
    from trainables.masking import MASKING
    from trainables.speed import REFERENCE, step_times

    chosen = list(MASKING) if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in MASKING:
            known = list(MASKING)
            raise UserError(
                f"--strategies: given {name!r}; expected all, or some of {listed(known)}"
                f"{near(name, known)}"
            )
    if path is None:
        config, workers = TrialConfig(), 1
        cells = {"source": "smears", "size": 64, "images": config.pretrain.batch, "val": 1}
        data = TypeAdapter(DataConfig).validate_python(cells)
        dataset = open_dataset(prepare(data, Path(), default_cache()))
        threads = threads or torch.get_num_threads()
    else:
        spec = load_spec(path)
        config, workers = spec.trial, spec.resources.workers
        dataset = open_dataset(_prepare(spec))
        _refuse_unfit_data(spec, dataset)
        threads = threads or max(1, int(spec.resources.cpus_per_worker))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"timing {len(chosen)} strategies"):
        found = step_times(
            config, chosen, dataset, device, workers=workers, threads=threads, seconds=seconds
        )

    size = "x".join(map(str, dataset.size))
    model, batch = config.model, config.pretrain.batch // workers
    table = Table(
        title=f"a training step: {model.size}/{in_words(model.patch)}, {batch} images of {size}"
    )
    table.add_column("strategy")
    for column in ("ms per step", f"ratio to {REFERENCE}", "lowest .. highest", "images/s"):
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(
            each.strategy,
            f"{each.milliseconds:.1f}",
            f"{each.ratio:.2f}",
            f"{each.lowest:.2f} .. {each.highest:.2f}",
            f"{each.images_per_second:,.0f}",
        )
    console.print(table)
    is_gpu = device.type == "cuda"
    hardware = environment()["hardware"]
    chip = torch.cuda.get_device_name(device) if is_gpu else f"CPU ({hardware['cpu']})"
    console.print(f"{chip}, {threads} threads, torch {torch.__version__}", markup=False)


def run(path: Path, *, build_report: Callable[[Path], Path] | None) -> int:
    """Run or resume the study of a file; the exit code."""
    from study.spec import load_spec

    return _run(load_spec(path), None, build_report)


def resume(
    name: str,
    address: str | None,
    storage: str | None,
    *,
    build_report: Callable[[Path], Path] | None,
) -> int:
    """Go on by name: as a new job at `address`, or here from the study folder alone."""
    if address:
        _resume_as_job(name, address, storage)
        return 0
    from study.spec import spec_of

    folder = find_study(name, storage)
    return _run(spec_of(folder), folder, build_report)


def _resume_as_job(name: str, address: str, storage: str | None) -> None:
    from cluster import jobs

    folder = _seen_here(_storage(storage).study(name))
    if folder is None and storage is not None:
        _refuse_if_below(name, Storage.of(storage))
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
    console.print(f"resumed as job {job}\n{link}", markup=False)


def _home(name: str, storage: Storage | None) -> Any:
    """What tells the study's jobs from those of another storage; None if no storage was named."""
    from cluster.jobs import Home

    if storage is None:
        return None
    folder = _seen_here(storage.study(name))
    return Home(str(storage.absolute()), read_jobs(folder) if folder is not None else frozenset())


def _seen_here(folder: StudyFolder) -> StudyFolder | None:
    """The study's folder, if this machine sees the cluster's storage and it has been begun."""
    return folder if _begun(folder).spec.is_file() else None


def _begun(folder: StudyFolder) -> StudyFolder:
    """The folder, brought here from its store if it has been begun there."""
    if folder.remote and mirror.exists(folder):
        mirror.pull(folder)
    return folder


def _needs_a_driver(folder: StudyFolder, address: str, spec: Any = None) -> bool:
    """False, and says so, if nothing is left to do; HeldError while somebody drives the study.

    `spec`: a study file that is submitted; where it asks for more, a driver has to take that up.
    """
    from study.spec import changes

    refuse_if_held(folder)
    if (spec is not None and changes(folder, spec)) or not is_finished(folder):
        return True
    console.print(
        f"{folder.root.name} is finished: nothing is left to do. For more of it: maskstudy extend "
        f"{folder.in_commands} --trials N, then maskstudy resume {folder.in_commands} "
        f"--address {address}",
        markup=False,
    )
    return False


def _run(spec: Any, folder: StudyFolder | None, build_report: Callable[[Path], Path] | None) -> int:
    from study.loggers import check_packages

    check_packages(spec.log)
    is_by_name = folder is not None
    folder = folder or spec.study_folder()
    if spec.storage_note and not is_by_name:
        console.print(spec.storage_note, markup=False)
    # the first line of a job's log: it tells which study a job runs that has no metadata
    console.print(f"study {spec.study}: {folder.where}", markup=False)

    from cluster.connect import submission_id
    from study.conductor import Conductor, DataView
    from study.driver import drive
    from study.loggers import Journal
    from trainables.data import open_dataset

    holder = {"job": submission_id()}
    with Ledger.open(folder, holder) as ledger:
        requests.forget_stop(folder)
        decoded = _prepared_before(folder, spec) if is_by_name else _prepare(spec)
        dataset = open_dataset(decoded)
        _refuse_unfit_data(spec, dataset)
        _freeze(ledger, spec, dataset)
        is_labelled = len(dataset.rows("train")) > 0
        view = DataView(spec.folder_of_yaml, dataset.fingerprint, is_labelled)
        conductor = Conductor(spec, ledger, view)
        backlog = [(each, conductor.results.get(each.trial)) for each in conductor.suggestions]
        say = conductor.progress.say
        journal = Journal(spec.study, folder, spec.log, backlog, say)
        conductor.on_durable = journal.notice
        try:
            drive(conductor)
        finally:
            journal.close()
            ledger.compact()
        conductor.progress.say(f"study folder: {folder.where}")
        if build_report is not None:
            mirror.pull_pictures(folder)
            conductor.progress.say(f"report: {mirror.send(folder, build_report(folder.root))}")
        if conductor.num_failed:
            conductor.progress.say(
                f"{conductor.num_failed} trial(s) failed; see error.txt in their folders under "
                f"{folder.location(folder.trials)}"
            )
        return 1 if conductor.num_failed else 0


def submit(path: Path, address: str, storage: str | None) -> None:
    """Submit as a Ray job."""
    from cluster import jobs
    from study.spec import load_spec

    spec = load_spec(path)
    own = Storage.of(spec.storage)
    studies = Storage.of(storage).within(spec.storage) if storage is not None else None
    if own.remote:
        studies = own
    folder = _seen_here(studies.study(spec.study)) if studies is not None else None
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
    console.print(
        f"submitted as job {job}\n{link}\n"
        f"to follow it: maskstudy logs {spec.study} --address {address} --follow\n"
        f"to stop it:   maskstudy stop {spec.study} --address {address}\n"
        f"to resume it: maskstudy resume {spec.study} --address {address}",
        markup=False,
    )


def stop(name: str, address: str | None, storage: str | None) -> None:
    """Ask the driver to stop, wherever it runs."""
    if address:
        from cluster import jobs

        job = jobs.stop(address, name, home=_home(name, Storage.of(storage) if storage else None))
        text = f"stopped job {job}" if job else f"no job of study {name!r} is running"
        console.print(text, markup=False)
        return
    folder = find_study(name, storage)
    if not is_held(folder):
        console.print(f"{folder.root.name} is not running", markup=False)
        return
    console.print(requests.stop(folder), markup=False)


def extend(name: str, trials: int, storage: str | None) -> None:
    """Ask for more searched trials of a study, whether it runs or not."""
    console.print(requests.extend(find_study(name, storage), trials), markup=False)


def enqueue(name: str, given: list[str], file: Path | None, storage: str | None) -> None:
    """Ask for one arm of a study, whether it runs or not."""
    folder = find_study(name, storage)
    if file is not None:
        if given:
            raise UserError(f"given both --file and {given[0]!r}; expected one of them")
        settings, document = requests.settings_of(file)
        told = requests.enqueue(folder, settings, where=str(file), document=document)
    else:
        told = requests.enqueue(folder, _settings(given))
    console.print(told, markup=False)


def _settings(given: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for path, value in map(_setting, given):
        if path in settings:
            raise UserError(f"{path}: given twice; expected one value")
        settings[path] = value
    return settings


def _setting(given: str) -> tuple[str, Any]:
    """`path=value` of a command line; the value is written as in a study file."""
    path, separator, value = given.partition("=")
    if not separator or not path:
        raise UserError(f"given {given!r}; expected path=value, such as model.patch=8")
    return path, read_yaml(f"value: {value}", given)[0]["value"]


def logs(name: str, address: str, follow: bool) -> None:
    """Print the log of a study's newest job."""
    from cluster import jobs

    def write(text: str) -> None:
        print(text, end="", flush=True)

    jobs.logs(address, name, write, follow=follow)


def jobs_table(address: str, name: str | None) -> Table:
    """What a cluster tells of its studies, or of all jobs of one."""
    from cluster import jobs

    table = Table(title=f"{name or 'studies'} at {address}")
    for column in ("study", "job", "status", "attempt", "started", "last line of its log"):
        table.add_column(column)
    standings = jobs.standings(address, name)
    if name is not None and not standings:
        raise UserError(f"{address} knows no job of study {name!r}")
    for one in standings:
        shown = (one.study, one.job, one.status, one.attempt, one.started, one.last_line)
        table.add_row(*map(escape, shown))
    return table


def status(name: str | None, address: str | None, storage: str | None, follow: bool) -> None:
    """A table of all studies of the storage or the cluster, or of one study's arms or jobs."""
    if address:
        console.print(jobs_table(address, name))
        return
    if name is None:
        console.print(studies_table(_storage(storage)))
        return
    folder = find_study(name, storage)
    if not follow:
        console.print(arms_table(folder))
        return
    with Live(arms_table(folder), console=console, refresh_per_second=1) as live:
        while is_held(folder):
            time.sleep(2)
            mirror.pull(folder)
            live.update(arms_table(folder))


def export(name: str, output: Path, arm: str | None, storage: str | None) -> None:
    """Copy the pretrained encoder of an arm's best trial into a new folder."""
    from study.best import NoEncoder, best_encoder
    from study.conductor import measure
    from study.spec import spec_of

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
    console.print(f"arm {best.arm}, trial {best.trial}: {output}", markup=False)
    described = json.loads((output / "encoder.json").read_text())
    console.print(described["usage"], markup=False)


def doctor(address: str | None, storage: str | None) -> int:
    """A table of verdicts on a cluster or on this machine; 1 if there is a problem."""
    from cluster.doctor import Level, Verdict, cluster_verdicts, machine_verdicts
    from trainables.data import default_cache

    place = _storage(storage)
    if address:
        given = str(place.absolute()) if storage is not None else None
        verdicts = cluster_verdicts(address, given)
    else:
        verdicts = machine_verdicts(place.remote or place.folder, default_cache())
        is_there = all(verdict.level is not Level.PROBLEM for verdict in verdicts)
        for folder in studies(place) if is_there or not place.remote else []:
            for error in damage(folder):
                name = f"study {folder.root.name}"
                verdicts.append(Verdict(name, Level.PROBLEM, str(error), "as it says"))
    table = Table(title=f"{address or 'this machine'}", show_lines=True)
    for column in ("question", "verdict", "found", "way out"):
        table.add_column(column)
    for verdict in verdicts:
        table.add_row(*map(escape, verdict), style=_COLOURS[verdict.level])
    console.print(table)
    return int(any(verdict.level is Level.PROBLEM for verdict in verdicts))


def start_console(
    storage: str | None,
    address: str | None,
    host: str,
    port: int,
    allow_changes: bool,
    allow_hosts: list[str],
) -> None:
    """Show the studies of a storage in the browser."""
    from study.console.server import start

    start(
        _storage(storage),
        address=address,
        host=host,
        port=port,
        allow_changes=allow_changes,
        allow_hosts=allow_hosts,
        say=lambda line: print(line, flush=True),
    )


def find_study(name: str, storage: str | None) -> StudyFolder:
    """The study folder of a name, a path or URI to the folder, or a study file."""
    place = _storage(storage)
    given = [StudyFolder(Path(name))]
    if is_uri(name):
        parent, _, last = join(name).rpartition("/")
        given = [Storage.of(parent).study(last)]
    elif Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        from study.spec import load_spec

        given = [load_spec(Path(name)).study_folder()]
    if is_trial_id(name):
        given.append(place.study(name))
    for folder in given:
        if _begun(folder).spec.is_file():
            return folder
    _refuse_if_below(name, place)
    known = ", ".join(folder.root.name for folder in studies(place)) or "none"
    raise UserError(
        f"{name}: no such study in {place}; studies there: {known}. Name the study's folder, its "
        f"YAML file, or its storage with --storage"
    )


def _refuse_if_below(name: str, place: Storage) -> None:
    """What `submit` calls the storage is one folder above what every other command does."""
    below = place.within("studies")
    if is_trial_id(name) and _seen_here(below.study(name)) is not None:
        raise UserError(f"{name}: not in {place}, but in {below}; expected --storage {below}")


def _prepare(spec: Any) -> Path:
    """The decoded data; what takes longer than a moment is shown."""
    from study.progress import Patience
    from trainables.data import default_cache, prepare

    with Patience(console, "looking at the data") as patience:
        folder: Path = prepare(
            spec.data,
            spec.folder_of_yaml,
            default_cache(),
            lambda done, parts: patience.say(f"decoding: {done:,} of {parts:,} files"),
        )
    return folder


def _refuse_unfit_data(spec: Any, dataset: Any) -> None:
    from study.fit import data_problems, data_size

    problems = data_problems(spec, data_size(dataset))
    if problems:
        raise UserError("\n".join(problems))


def _prepared_before(folder: StudyFolder, spec: Any) -> Path:
    """The decoded data of a study that is resumed by name, away from its file."""
    from trainables.data import default_cache

    fingerprint: str = read_environment(folder)["data_fingerprint"]
    decoded: Path = default_cache() / fingerprint
    if decoded.is_dir():
        return decoded
    try:  # generated data, and images by absolute paths, need not the study file's folder
        return _prepare(spec)
    except (UserError, OSError) as error:
        raise UserError(
            f"{folder.where}: the decoded data ({fingerprint[:12]}) are not in {default_cache()}, "
            f"and cannot be decoded from here; resume with the study file, which says where the "
            f"images are: maskstudy run STUDY.yaml"
        ) from error


def _freeze(ledger: Ledger, spec: Any, dataset: Any) -> None:
    """Keep the study file; a changed one goes on only if the change is harmless."""
    from study.spec import changes

    frozen = read_spec(ledger.folder)
    changes(ledger.folder, spec)
    code = Path(__file__).resolve().parent.parent
    facts = {
        **environment(code),
        "data_fingerprint": dataset.fingerprint,
        "data": dataset.describe(),
    }
    ledger.freeze(spec.text, facts, extends=frozen is not None)
    before = read_environment(ledger.folder)["data_fingerprint"]
    if before != dataset.fingerprint:
        raise UserError(
            f"{ledger.folder.root.name} was begun on other data (fingerprint {before[:12]}, now "
            f"{dataset.fingerprint[:12]}): results could not be compared; restore the images, or "
            f"give the study another name"
        )


def _storage(storage: str | None) -> Storage:
    return Storage.of(storage or os.environ.get("MASKSTUDY_STORAGE") or "studies")


def _print_pairs(title: str, pairs: dict[str, Any]) -> None:
    console.print(f"\n{title}", style="bold")
    for key, value in pairs.items():
        console.print(f"  {key:<22} {value}", markup=False)
