"""Where studies stand, read from their folders: what `maskstudy status` shows."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from study import mirror
from study.conductor import measure
from study.folder import Storage, StudyFolder, is_trial_id
from study.ledger import (
    Outcome,
    is_held,
    read_environment,
    read_results,
    read_rows,
    read_suggestions,
)
from study.progress import arm_text
from study.requests import expected, grown, queue
from study.resume import AskSampler, Finished, Step, next_step, num_planned
from study.samplers import Brain
from study.spec import StudySpec, spec_of
from trainables.errors import StorageError, UserError
from trainables.storage import store


def studies(storage: Storage) -> list[StudyFolder]:
    """All studies of a storage; those of a store are brought here first."""
    if storage.remote:
        names = [name for name in store(storage.remote).folders() if is_trial_id(name)]
        found = [storage.study(name) for name in names if mirror.exists(storage.study(name))]
        for folder in found:
            mirror.pull(folder)
        return found
    paths = sorted(storage.folder.iterdir()) if storage.folder.is_dir() else []
    return [StudyFolder(path) for path in paths if StudyFolder(path).spec.is_file()]


def studies_table(storage: Storage) -> Table:
    table = Table(title=f"studies in {storage}", caption_justify="left")
    for column in ("study", "state", "trials", *(outcome.value for outcome in Outcome)):
        table.add_column(column)
    problems = []
    for folder in studies(storage):
        state = "running" if is_held(folder) else "at rest"
        try:
            results = read_results(folder)
            trials = f"{len(read_suggestions(folder))} of {num_planned(_asked(folder))}"
        except (UserError, StorageError) as error:  # the others are to be seen all the same
            table.add_row(folder.root.name, f"{state}, damaged")
            problems.append(escape(str(error)))
            continue
        counts = [sum(r.outcome is outcome for r in results.values()) for outcome in Outcome]
        table.add_row(folder.root.name, state, trials, *(str(count or "") for count in counts))
    table.caption = "\n".join(problems) or None
    return table


def arms_table(folder: StudyFolder) -> Table:
    spec = _asked(folder)
    rows, results = read_rows(folder), read_results(folder)
    state = "running" if is_held(folder) else "at rest"
    drawn = read_suggestions(folder)
    table = Table(title=f"{spec.study} ({state}, {len(drawn)} of {num_planned(spec)} trials begun)")
    metrics = [objective.metric for objective in spec.objectives]
    for column in ("trial", "arm", "seed", "settings", "outcome", "reached", *metrics):
        table.add_column(column)
    for suggestion in drawn:
        mine = rows[rows.trial == suggestion.trial]
        newest = mine.sort_values(["phase", "progress"]).groupby(mine.phase + "/" + mine.metric)
        values = newest.value.last()
        result = results.get(suggestion.trial)
        last = mine.iloc[-1] if len(mine) else None
        table.add_row(
            suggestion.trial[:6],
            suggestion.arm,
            str(suggestion.seed),
            arm_text(suggestion),
            result.outcome.value if result else "unfinished",
            f"{last.phase} {last.progress:.0%}" if last is not None else "",
            *(f"{values[metric]:.4g}" if metric in values else "" for metric in metrics),
        )
    return table


def is_finished(folder: StudyFolder) -> bool:
    """Whether a driver would find nothing to do."""
    spec = spec_of(folder)
    answers = expected(folder, spec)
    spec = grown(spec, answers)
    suggestions, results = read_suggestions(folder), read_results(folder)
    measured = measure(read_rows(folder))
    images = read_environment(folder).get("data", {}).get("images", {})

    def following(is_exhausted: bool) -> Step:
        return next_step(
            spec,
            suggestions,
            results,
            set(),
            measured,
            enqueued=queue(answers),
            is_labelled=images.get("train", 0) > 0,
            is_exhausted=is_exhausted,
        )

    step = following(is_exhausted=False)
    if isinstance(step, AskSampler):
        brain = Brain(spec)
        brain.replay(suggestions, results, measured)
        step = following(is_exhausted=brain.ask(step.number) is None)
    return isinstance(step, Finished)


def question_of(folder: StudyFolder) -> str:
    return spec_of(folder).question or ""


def _asked(folder: StudyFolder) -> StudySpec:
    """The study with what people have asked for since it was begun, answered yet or not."""
    spec = spec_of(folder)
    return grown(spec, expected(folder, spec))
