"""Where studies stand, read from their folders: what `maskstudy status` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

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


def standings(storage: Storage) -> list[dict[str, Any]]:
    """Where each study of a storage stands, as JSON has it; a damaged one has a `problem`."""
    found = []
    for folder in studies(storage):
        one: dict[str, Any] = {"study": folder.root.name}
        try:
            ahead, results = outlook_of(folder), read_results(folder)
            one |= {
                "state": state_of(folder, ahead),
                "begun": len(read_suggestions(folder)),
                "total": ahead.total,
                "spent": ahead.spent,
                "outcomes": dict(Counter(result.outcome.value for result in results.values())),
            }
        except (UserError, StorageError) as error:  # the others are to be seen all the same
            words = [State.RUNNING] if is_held(folder) else []
            one |= {"state": ", ".join([*words, "damaged"]), "problem": str(error)}
        found.append(one)
    return found


def studies_table(storage: Storage) -> Table:
    """`standings` for people."""
    table = Table(title=f"studies in {storage}", caption_justify="left")
    for column in ("study", "state", "trials", *(outcome.value for outcome in Outcome)):
        table.add_column(column)
    found = standings(storage)
    for one in found:
        trials = _begun_in_words(one) if "total" in one else ""
        counts = [one.get("outcomes", {}).get(outcome.value, "") for outcome in Outcome]
        table.add_row(one["study"], one["state"], trials, *map(str, counts))
    table.caption = "\n".join(escape(one["problem"]) for one in found if "problem" in one) or None
    return table


def standing(folder: StudyFolder) -> dict[str, Any]:
    """Where a study and its trials stand, as JSON has it."""
    spec, ahead = spec_of(folder), outlook_of(folder)
    rows, results, drawn = read_rows(folder), read_results(folder), read_suggestions(folder)
    found_gains = gains(measure(rows[rows.metric.isin(OF_GAIN)]))
    leader = best_gain(found_gains)
    trials = []
    for suggestion in drawn:
        mine = rows[rows.trial == suggestion.trial]
        newest = mine.sort_values(["phase", "progress"]).groupby(mine.phase + "/" + mine.metric)
        values = newest.value.last()
        result = results.get(suggestion.trial)
        last = mine.iloc[-1] if len(mine) else None
        gain = found_gains.get(suggestion.trial)
        trials.append(
            {
                "trial": suggestion.trial,
                "arm": suggestion.arm,
                "seed": suggestion.seed,
                "settings": arm_text(suggestion),
                "outcome": result.outcome.value if result else "unfinished",
                "phase": last.phase if last is not None else None,
                "progress": float(last.progress) if last is not None else None,
                "objectives": {
                    one.metric: float(values[one.metric])
                    for one in spec.objectives
                    if one.metric in values
                },
                "probe_gain": gain.decibels if gain else None,
            }
        )
    return {
        "study": spec.study,
        "state": state_of(folder, ahead),
        "begun": len(drawn),
        "total": ahead.total,
        "spent": ahead.spent,
        "best_probe_gain": in_words(leader[1]) if leader is not None else None,
        "warning": warning(leader[1]) if leader is not None else None,
        "trials": trials,
    }


def arms_table(folder: StudyFolder) -> Table:
    """`standing` for people."""
    one = standing(folder)
    table = Table(
        caption_justify="left",
        title=f"{one['study']} ({one['state']}, {_begun_in_words(one, ' trials begun')})",
    )
    metrics = [objective.metric for objective in spec_of(folder).objectives]
    has_gains = one["best_probe_gain"] is not None
    heads = metrics + ["probe gain"] * has_gains
    for column in ("trial", "arm", "seed", "settings", "outcome", "reached", *heads):
        table.add_column(column)
    for trial in one["trials"]:
        values, gain = trial["objectives"], trial["probe_gain"]
        table.add_row(
            trial["trial"][:6],
            trial["arm"],
            str(trial["seed"]),
            trial["settings"],
            trial["outcome"],
            f"{trial['phase']} {trial['progress']:.0%}" if trial["phase"] else "",
            *(f"{values[metric]:.4g}" if metric in values else "" for metric in metrics),
            *([decibels(gain) if gain is not None else ""] if has_gains else []),
        )
    if has_gains:
        said = [f"probe gain of the best encoder: {one['best_probe_gain']}", one["warning"]]
        table.caption = escape("\n".join(filter(None, said)))
    return table


def _begun_in_words(one: Mapping[str, Any], what: str = "") -> str:
    """Of how many trials, or which part of the budget is spent."""
    of_all = f" of {one['total']}" if one["total"] is not None else ""
    return f"{one['begun']}{of_all}{what}" + (f", {one['spent']}" if one["spent"] else "")


def question_of(folder: StudyFolder) -> str:
    return spec_of(folder).question or ""
