"""What is left to do, decided from the ledger alone; somebody else does it.

The order: trials that were begun; the control arm and its twins; arms that a person asked for;
searched arms, all seeds of one before the next, until `budget.trials` trials exist, or a budget in
operations or hours has no room for another arm, or a population (population.py); then, for which
such a budget has kept room, the best arms with fresh seeds, and the control or, at last, the best
of them and the controls. An arm of which one seed ended badly or was stopped gets no further seeds;
where arms may be stopped, the first seed runs alone before the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from study import population
from study.best import CONFIRM, FRESH
from study.ledger import Result, Suggestion
from study.measured import Measured
from study.owed import (
    confirmations,
    controls,
    ended,
    ended_badly,
    is_unfinished,
    missing_seeds,
    num_fresh,
    searched,
    verdict,
)
from study.room import Room
from study.spending import Account, Means
from study.steps import AskSampler, Continue, Enqueued, Finished, Start, Step, Wait

if TYPE_CHECKING:
    from study.spec import StudySpec


def next_step(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    results: Mapping[str, Result],
    running: AbstractSet[str],
    measured: Measured,
    *,
    enqueued: Sequence[Enqueued] = (),
    is_labelled: bool = True,
    is_exhausted: bool = False,
    means: Means | None = None,
) -> Step:
    """The next thing to do. `running` are trials that are being run now.

    `is_labelled`: without labels nothing is segmented, and the control's twins would measure
    nothing. `is_exhausted`: Optuna has no untried arm left, or none for which there is room.
    `means`: what a budget in operations or hours is counted by.
    """
    generations = population.generations(spec, suggestions, ended(results), measured)
    at_rest = population.resting(spec, generations, suggestions, measured)
    for suggestion in suggestions:
        is_free = suggestion.trial not in running and suggestion.trial not in at_rest
        if is_free and is_unfinished(results.get(suggestion.trial)):
            return Continue(suggestion)
    for start in controls(spec, suggestions, is_labelled):
        return start
    room = None
    if spec.budget.is_measured:
        account = account_of(suggestions, results, running, measured, means or Means())
        room = Room(spec, suggestions, results, measured, enqueued, account, is_labelled)
    num_trials = num_counted(suggestions)
    if spec.budget.trials is None or num_trials < spec.budget.trials:
        for start in missing_seeds(spec, suggestions, results, enqueued):
            if room is None or room.is_in_time(start):
                return start
        is_asked = bool(spec.search) and not population.has_population(spec)
        if is_asked and not is_exhausted and _has_room(spec, suggestions, results):
            if room is None:
                return AskSampler(len(suggestions), spec.seed)
            if room.is_left and not room.is_confirming(running):
                return AskSampler(len(suggestions), spec.seed, room.holds_arm)
    for birth in population.births(spec, generations, suggestions, running):
        params, labels = birth.params, {path: birth.params[path] for path in spec.search}
        return Start("search", birth.config, spec.seed, params, labels, birth.born)
    if any(
        suggestion.trial in running and suggestion.origin not in FRESH for suggestion in suggestions
    ):
        return Wait()
    for start in confirmations(spec, suggestions, results, measured):
        if room is None or room.holds(start):
            return start
    if any(
        suggestion.trial in running and suggestion.origin == CONFIRM for suggestion in suggestions
    ):
        return Wait()
    judging = list(verdict(spec, suggestions, results, measured, is_labelled))
    if judging and (room is None or room.holds_verdict(judging)):
        return judging[0]
    return Wait() if running else Finished()


def account_of(
    suggestions: Sequence[Suggestion],
    results: Mapping[str, Result],
    running: AbstractSet[str],
    measured: Measured,
    means: Means,
) -> Account:
    """What has been spent, and what is expected to be."""
    over = ended(results) - running
    return Account(suggestions, over, measured, means, num_running=len(running))


def num_planned(spec: StudySpec, *, is_labelled: bool = True) -> int | None:
    """Trials of the whole study, if its space has that many arms, and no child's parent fails.

    None: other units tell.
    """
    if spec.budget.trials is None or spec.budget.is_measured:
        return None
    num_best = spec.confirm.arms if spec.confirm and spec.search else 0
    confirmed = num_fresh(spec, num_best, is_labelled=is_labelled)
    return spec.budget.trials + population.num_children(spec) + confirmed


def num_counted(suggestions: Sequence[Suggestion]) -> int:
    """Trials as `budget.trials` counts them."""
    return sum(
        suggestion.origin not in FRESH and not population.is_child(suggestion)
        for suggestion in suggestions
    )


def num_pretrainings(spec: StudySpec) -> int | None:
    """How many the whole study takes where trials that pretrain alike do so once.

    None: each trial may have one of its own.
    """
    if not all(path.startswith("segment.") for path in spec.search):
        return None
    confirm = spec.confirm
    return spec.seeds + (confirm.seeds + (confirm.verdict or 0) if confirm else 0)


def shares_pretraining(spec: StudySpec) -> bool:
    """Whether trials may differ in segmentation alone."""
    return "frozen" in spec.controls or any(path.startswith("segment.") for path in spec.search)


def _has_room(
    spec: StudySpec, suggestions: Sequence[Suggestion], results: Mapping[str, Result]
) -> bool:
    """Whether the budget holds another arm beside all seeds of those that were begun."""
    if spec.stopping.name == "none" or spec.budget.trials is None:
        return True
    begun = searched(suggestions)
    taken = sum(each.origin not in (*FRESH, "search") for each in suggestions)
    for trials in begun.values():
        is_over = ended_badly(trials, results)
        taken += len(trials) if is_over else max(len(trials), spec.seeds)
    return taken < spec.budget.trials
