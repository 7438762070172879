"""What a study holds, for anyone who asks: no lock is taken, and nothing is changed.

A reader sees whatever was acknowledged before it began; of what is written meanwhile, all of a file
or nothing. Damage is a LedgerError that says how to mend it.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa

from study.folder import StudyFolder, is_trial_id
from study.ledger.files import RESTORE, last_number, names_in, read_bytes, read_sealed, sha256
from study.ledger.parts import KEY, RESTORE_PART, SCHEMA, gap, part_names, read_part
from study.ledger.records import Answer, LedgerError, Outcome, Result, Stint, Suggestion
from study.reader import MAX_BYTES
from trainables.settings import flatten

_RESTORE_OUTCOME = (
    "Bring it back from a copy, or remove it and run the study again: the trial then continues "
    "from its last checkpoint"
)
_RESTORE_SUGGESTION = "Bring it back from a copy: the config.json of its trial is one"
_RESTORE_ANSWER = (
    "Bring it back from a copy; without one, remove the folder of answers and ask for the "
    "extensions and arms anew: the trials themselves are not lost"
)

_RESTORE_STINT = (
    "Bring it back from a copy; without one, remove it: the hours of that driver then count nothing"
)

_Record = TypeVar("_Record", Suggestion, Result, Answer, Stint)


def read_suggestions(folder: StudyFolder) -> list[Suggestion]:
    """All suggestions by number."""
    return [read_suggestion(folder, number) for number in range(count_suggestions(folder))]


def count_suggestions(folder: StudyFolder) -> int:
    return _count(folder.suggestions)


def read_suggestion(folder: StudyFolder, number: int) -> Suggestion:
    path = folder.suggestion(number)
    content = {"born": None} | read_sealed(path, _RESTORE_SUGGESTION)  # most have none
    suggestion = _typed(Suggestion, content, path)
    if suggestion.number != number or not is_trial_id(suggestion.trial):
        what = f"holds number {suggestion.number} of trial {suggestion.trial!r}"
        raise LedgerError(f"{path}: {what}. {_RESTORE_SUGGESTION}")
    return suggestion


def read_answers(folder: StudyFolder) -> list[Answer]:
    """What was granted and refused, in the order of the decisions."""
    answers = []
    for number in range(_count(folder.answers)):
        path = folder.answer(number)
        answer = _typed(Answer, read_sealed(path, _RESTORE_ANSWER), path)
        if answer.number != number:
            raise LedgerError(f"{path}: holds number {answer.number}. {_RESTORE_ANSWER}")
        answers.append(answer)
    return answers


def read_stints(folder: StudyFolder) -> list[Stint]:
    """How long each driver has run the study, in their order; those that kept no time are left out.

    Only where hours are a budget is time kept.
    """
    names = sorted(name for name in names_in(folder.stints) if re.fullmatch(r"\d{6,}\.json", name))
    paths = [folder.stints / name for name in names]
    return [_typed(Stint, read_sealed(path, _RESTORE_STINT), path) for path in paths]


def read_results(folder: StudyFolder) -> dict[str, Result]:
    """How each trial ended, by trial; trials that have not ended are absent."""
    results = {}
    for suggestion in read_suggestions(folder):
        result = read_result(folder, suggestion.trial)
        if result is not None:
            results[result.trial] = result
    return results


def read_result(folder: StudyFolder, trial: str) -> Result | None:
    """How a trial ended; None while it has not."""
    content = _read_outcome(folder, trial)
    if content is None:
        return None
    del content["parts"]
    if "infrastructure_failures" not in content:
        content["infrastructure_failures"] = _failures_told(content["error"])
    return _typed(Result, content, folder.outcome(trial))


def read_rows(folder: StudyFolder, *trials: str) -> pd.DataFrame:
    """Rows of these trials in their order, or of all by number; a trial's by commit.

    (trial, phase, step, metric) is unique: of rows measured again after a crash, the first
    committed one counts.
    """
    rows: pd.DataFrame = published_rows(folder, *trials).to_pandas()
    return rows


def published_rows(folder: StudyFolder, *trials: str) -> pa.Table:
    """What `read_rows` gives, as Arrow has it."""
    asked = list(trials) or _trials_with_rows(folder)
    paths = [path for trial in asked for path in parts_of(folder, trial)]
    with ThreadPoolExecutor() as pool:
        tables = list(pool.map(read_part, paths))
    rows = pa.concat_tables([SCHEMA.empty_table(), *tables])
    rows = rows.filter(pa.array(~rows.select(KEY).to_pandas().duplicated()))
    # the folder may have been renamed since
    study = pa.repeat(pa.scalar(folder.root.name), len(rows))
    return rows.set_column(0, SCHEMA.field("study"), study)


def parts_of(folder: StudyFolder, trial: str) -> list[Path]:
    """The parts of a trial in the order of their commits, after a look for missing ones."""
    place = folder.rows(trial)
    outcome = _read_outcome(folder, trial)  # read first, as it is written last
    names = part_names(place)
    if gap(names):
        names = part_names(place)  # a listing made while the driver writes may leave one out
    missing = sorted(set(outcome["parts"] if outcome else []) - set(names))
    damaged = gap(names) or (f"{missing[0]} is missing" if missing else None)
    if damaged:
        raise LedgerError(f"{place}: {damaged}. {RESTORE_PART}")
    return [place / name for name in names]


def read_arms(folder: StudyFolder) -> pd.DataFrame:
    """One line per arm: arm, origin, its settings by dotted path, and `search:<path>` labels."""
    arms: dict[str, dict[str, Any]] = {}
    for suggestion in read_suggestions(folder):
        if suggestion.arm not in arms:
            labels = _cells(suggestion.labels, "search:")
            named = {"arm": suggestion.arm, "origin": suggestion.origin}
            arms[suggestion.arm] = {**named, **_cells(suggestion.config), **labels}
    columns = dict.fromkeys(["arm", "origin", *(key for arm in arms.values() for key in arm)])
    lines = [[arm.get(column) for column in columns] for arm in arms.values()]
    return pd.DataFrame(lines, columns=pd.Index(columns))


def read_spec(folder: StudyFolder) -> str | None:
    """The frozen text of the study file; None before it was frozen."""
    if not folder.spec.exists():
        return None
    size = folder.spec.stat().st_size
    if size > MAX_BYTES:
        raise LedgerError(
            f"{folder.spec}: {size} bytes; a study file has at most {MAX_BYTES} bytes. {RESTORE}"
        )
    content = read_bytes(folder.spec)
    if sha256(content) not in read_environment(folder).get("study_sha256", []):
        raise LedgerError(
            f"{folder.spec}: changed after it was frozen (its SHA-256 is not in "
            f"{folder.environment.name}). Bring it back from a copy, or start a study of another "
            f"name from the changed file"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise LedgerError(f"{folder.spec}: not text in UTF-8. {RESTORE}") from error


def read_environment(folder: StudyFolder) -> dict[str, Any]:
    """What the study was started with."""
    return read_sealed(folder.environment)


def damage(folder: StudyFolder) -> list[LedgerError]:
    """Everything that is damaged, for `doctor`; empty when the whole study can be read."""
    found = []
    for read_one in (read_spec, read_answers, read_stints):
        try:
            read_one(folder)
        except LedgerError as error:
            found.append(error)
    try:
        trials = _trials_with_rows(folder)
    except LedgerError as error:
        return [*found, error]
    for trial in trials:
        for read in (read_result, read_rows):
            try:
                read(folder, trial)
            except LedgerError as error:
                if str(error) not in map(str, found):  # rows rest on the outcome
                    found.append(error)
    return found


def _count(place: Path) -> int:
    """Of files numbered from 0 on."""
    last = last_number(place)
    return 0 if last is None else last + 1


def _trials_with_rows(folder: StudyFolder) -> list[str]:
    """All suggested trials by number; rows that no suggestion names are damage."""
    paths = sorted(folder.trials.glob("*/rows/*.parquet"))  # listed first, as written last
    trials = list(dict.fromkeys(suggestion.trial for suggestion in read_suggestions(folder)))
    known = set(trials)
    for path in paths:
        trial = path.parent.parent.name
        if trial not in known:
            raise LedgerError(
                f"{path}: rows of trial {trial}, which no suggestion names. Bring the suggestion "
                f"back: {trial}/config.json is a copy of it, its number is the name"
            )
    return trials


def _read_outcome(folder: StudyFolder, trial: str) -> dict[str, Any] | None:
    """A result and the names of the parts that were there; None while the trial has not ended."""
    path = folder.outcome(trial)
    if not path.exists():
        return None
    content = read_sealed(path, _RESTORE_OUTCOME)
    if content.get("trial") != trial:
        what = f"holds the outcome of trial {content.get('trial')!r}"
        raise LedgerError(f"{path}: {what}. {_RESTORE_OUTCOME}")
    try:
        return {**content, "outcome": Outcome(content["outcome"]), "parts": content["parts"]}
    except (KeyError, ValueError) as error:
        raise LedgerError(f"{path}: not an outcome: {error!r}. {_RESTORE_OUTCOME}") from error


def _failures_told(error: str | None) -> int:
    """By version 0.1.0, which counted the infrastructure's failures in the text of the error."""
    told = re.match(r"infrastructure \(failure (\d+) of ", error or "")
    return int(told[1]) if told else 0


def _typed(kind: type[_Record], content: dict[str, Any], path: Path) -> _Record:
    expected = {field.name for field in fields(kind)}
    if content.keys() != expected:
        raise LedgerError(
            f"{path}: has the fields {sorted(content)}, expected {sorted(expected)}. It was "
            f"written by another version of maskstudy, or by hand"
        )
    return kind(**content)


def _cells(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted path as a table may hold them: lists as JSON text, no empty mappings."""
    return {
        path: json.dumps(value) if isinstance(value, list | tuple) else value
        for path, value in flatten(settings, prefix).items()
        if value != {}
    }
