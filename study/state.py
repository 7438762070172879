"""Where a study stands: what is left of it, and the word for that, wherever it is told.

Decided as the driver decides, from what the ledger holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from study.costs import Costs, size_by_environment
from study.folder import StudyFolder
from study.ledger import (
    Answer,
    Result,
    Stint,
    Suggestion,
    is_held,
    read_environment,
    read_results,
    read_rows,
    read_stints,
    read_suggestions,
)
from study.loading import spec_of
from study.measured import Measured, measure
from study.optuna_study import OptunaStudy
from study.owed import is_unfinished
from study.requests import expected, grown, queue
from study.resume import account_of, next_step, num_counted, num_planned, shares_pretraining
from study.spec import StudySpec
from study.spending import Means, in_words
from study.steps import AskSampler, Finished, Step


class State(StrEnum):
    WAITING = "waiting"  # no trial has begun
    RUNNING = "running"  # a driver holds it
    HELD = "held"  # by a driver that may be dead
    INTERRUPTED = "interrupted"  # no driver holds it, and trials are left
    FINISHED = "finished"  # nothing is left
    AT_REST = "at rest"  # no driver holds it; whether trials are left is not known yet


class Outlook(NamedTuple):
    """What is to come of a study."""

    total: int | None  # trials that it will have; None: its budget is not in trials alone
    is_finished: bool | None  # None: not known yet
    spent: str = ""  # which part of such a budget, in words


def outlook(
    asked: StudySpec,
    answers: Sequence[Answer],
    suggestions: Sequence[Suggestion],
    results: Mapping[str, Result],
    measured: Callable[[], Measured],
    environment: Mapping[str, Any],
    stints: Sequence[Stint] = (),
    *,
    is_remote: bool = False,
) -> Outlook:
    """What is left of a study that no driver holds, or whose driver is not asked.

    `asked`: the study file. `measured` is called only where it decides, as a study's rows take
    longest to read.
    """
    spec = grown(asked, answers)
    spent, means = "", None
    total = num_planned(spec, is_labelled=is_labelled(environment))
    if spec.budget.is_measured:
        costs, shares = Costs(size_by_environment(environment)), shares_pretraining(spec)
        means = Means(stints, costs, spec.resources.workers, shares and not is_remote)
        account = account_of(suggestions, results, set(), measured(), means)
        spent = in_words(spec.budget, account.spent, num_counted(suggestions))
    begun = {suggestion.trial for suggestion in suggestions}
    if not begun or any(is_unfinished(results.get(trial)) for trial in begun):
        return Outlook(total, False, spent)
    known = measured()

    def following(is_exhausted: bool) -> Step:
        return next_step(
            spec,
            suggestions,
            results,
            set(),
            known,
            enqueued=queue(answers),
            is_labelled=is_labelled(environment),
            is_exhausted=is_exhausted,
            means=means,
        )

    step = following(is_exhausted=False)
    if isinstance(step, AskSampler):
        optuna_study = OptunaStudy(spec)
        optuna_study.replay(suggestions, results, known)
        if optuna_study.ask(step.number, step.fits) is None:
            step = following(is_exhausted=True)
    is_finished = isinstance(step, Finished)
    return Outlook(len(suggestions) if is_finished else total, is_finished, spent)


def outlook_of(folder: StudyFolder) -> Outlook:
    """The outlook of the study in a folder."""
    spec = spec_of(folder)
    return outlook(
        spec,
        expected(folder, spec),
        read_suggestions(folder),
        read_results(folder),
        lambda: measure(read_rows(folder)),
        read_environment(folder),
        read_stints(folder),
        is_remote=bool(folder.remote),
    )


def state_of(folder: StudyFolder, found: Outlook) -> State:
    """The word for where the study in a folder stands."""
    if is_held(folder):
        return State.RUNNING
    if found.is_finished:
        return State.FINISHED
    return State.INTERRUPTED if read_suggestions(folder) else State.WAITING


def is_labelled(environment: Mapping[str, Any]) -> bool:
    """Whether the study's data have labels to learn from, as far as its environment says."""
    data = environment.get("data")
    images = data.get("images") if isinstance(data, dict) else None
    return not isinstance(images, dict) or images.get("train") != 0
