"""Where studies stand, read from their folders: what `maskstudy status` shows."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from study import mirror
from study.folder import Storage, StudyFolder, is_trial_id
from study.gain import OF_GAIN, best_gain, decibels, gains, in_words, warning
from study.ledger import (
    Outcome,
    is_held,
    read_results,
    read_rows,
    read_suggestions,
)
from study.loading import spec_of
from study.measured import measure
from study.progress import arm_text
from study.state import State, outlook_of, state_of
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
        try:
            found, results = outlook_of(folder), read_results(folder)
            trials = f"{len(read_suggestions(folder))} of {found.total}"
            state = state_of(folder, found)
        except (UserError, StorageError) as error:  # the others are to be seen all the same
            words = [State.RUNNING] if is_held(folder) else []
            table.add_row(folder.root.name, ", ".join([*words, "damaged"]))
            problems.append(escape(str(error)))
            continue
        counts = [sum(r.outcome is outcome for r in results.values()) for outcome in Outcome]
        table.add_row(folder.root.name, state, trials, *(str(count or "") for count in counts))
    table.caption = "\n".join(problems) or None
    return table


def arms_table(folder: StudyFolder) -> Table:
    spec, found = spec_of(folder), outlook_of(folder)
    rows, results, drawn = read_rows(folder), read_results(folder), read_suggestions(folder)
    state = state_of(folder, found)
    table = Table(
        caption_justify="left",
        title=f"{spec.study} ({state}, {len(drawn)} of {found.total} trials begun)",
    )
    metrics = [objective.metric for objective in spec.objectives]
    found_gains = gains(measure(rows[rows.metric.isin(OF_GAIN)]))
    heads = metrics + ["probe gain"] * bool(found_gains)
    for column in ("trial", "arm", "seed", "settings", "outcome", "reached", *heads):
        table.add_column(column)
    for suggestion in drawn:
        mine = rows[rows.trial == suggestion.trial]
        newest = mine.sort_values(["phase", "progress"]).groupby(mine.phase + "/" + mine.metric)
        values = newest.value.last()
        result = results.get(suggestion.trial)
        last = mine.iloc[-1] if len(mine) else None
        gain = found_gains.get(suggestion.trial)
        table.add_row(
            suggestion.trial[:6],
            suggestion.arm,
            str(suggestion.seed),
            arm_text(suggestion),
            result.outcome.value if result else "unfinished",
            f"{last.phase} {last.progress:.0%}" if last is not None else "",
            *(f"{values[metric]:.4g}" if metric in values else "" for metric in metrics),
            *([decibels(gain) if gain else ""] if found_gains else []),
        )
    leader = best_gain(found_gains)
    if leader is not None:
        said = [f"probe gain of the best encoder: {in_words(leader[1])}", warning(leader[1])]
        table.caption = escape("\n".join(filter(None, said)))
    return table


def question_of(folder: StudyFolder) -> str:
    return spec_of(folder).question or ""
