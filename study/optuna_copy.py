"""A study's trials in a storage of Optuna's own, for optuna-dashboard and whatever reads such.

A copy that is brought up to date as often as one likes; nothing of it is ever read back. Each trial
of the ledger is one of Optuna's, as its plots know no seeds of an arm; its attributes say what it
is, and all that it measured at its end.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, Trial, TrialState

from study.ledger import Outcome, Result, Suggestion
from study.measured import Measured, final_value
from study.optuna_study import distributions
from study.owed import is_unfinished
from trainables.errors import UserError

if TYPE_CHECKING:
    from study.spec import StudySpec

TRIAL = "trial"  # the attribute by which a trial is known


def optuna_storage(where: str) -> Any:
    """Of a URL such as sqlite:///optuna.db, else of a journal in a file of that name."""
    try:
        if "://" in where:
            return optuna.storages.RDBStorage(where)
        backend = optuna.storages.journal.JournalFileBackend(where)
        return optuna.storages.JournalStorage(backend)
    except Exception as error:  # of whatever library the URL asks for
        raise UserError(
            f"--optuna: given {where!r}, which cannot be opened ({_last_line(error)}); expected a "
            f"URL such as sqlite:///optuna.db, or a file for a journal, in a folder that is there"
        ) from error


def bring_up_to_date(
    where: str,
    spec: StudySpec,
    suggestions: Iterable[Suggestion],
    results: Mapping[str, Result],
    measured: Measured,
) -> int:
    """Copy what is new; how many trials were new or had news."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    suggestions = list(suggestions)
    goals = [objective.goal for objective in spec.objectives]
    study = optuna.create_study(
        storage=optuna_storage(where), study_name=spec.study, directions=goals, load_if_exists=True
    )
    known = {each.user_attrs.get(TRIAL): each for each in study.get_trials(deepcopy=False)}
    is_other = bool(known.keys() - {each.trial for each in suggestions})
    if is_other or [each.name.lower() for each in study.directions] != goals:
        raise UserError(
            f"{where}: has a study {spec.study!r} that is no copy of this one; expected none of "
            f"that name; name another storage"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([objective.metric for objective in spec.objectives])
    space, changed = distributions(spec.search), 0
    for suggestion in suggestions:
        metrics, result = measured.get(suggestion.trial, {}), results.get(suggestion.trial)
        asked = _frozen(spec, suggestion, result, metrics, measured, space)
        copied = known.get(suggestion.trial)
        if copied is None:
            study.add_trial(asked)
        elif copied.state == TrialState.RUNNING and not _is_alike(copied, asked):
            _update(study, copied, asked)
        else:
            continue
        changed += 1
    return changed


def _frozen(
    spec: StudySpec,
    suggestion: Suggestion,
    result: Result | None,
    metrics: Mapping[str, Mapping[float, float]],
    measured: Measured,
    space: Mapping[str, BaseDistribution],
) -> FrozenTrial:
    finals = [final_value(measured, suggestion.trial, each.metric) for each in spec.objectives]
    values = [value for value in finals if value is not None and math.isfinite(value)]
    state, about = TrialState.RUNNING, dict[str, Any]()
    if result is not None and not is_unfinished(result):
        state = TrialState.PRUNED if result.outcome is Outcome.STOPPED else TrialState.FAIL
        if result.outcome is Outcome.COMPLETE and len(values) == len(finals):
            state = TrialState.COMPLETE
        lasts = {name: curve[max(curve)] for name, curve in sorted(metrics.items())}
        about = {name: value for name, value in lasts.items() if math.isfinite(value)}
        about |= {"outcome": result.outcome.value, "error": result.error}
    curve: Mapping[float, float] = {}
    if len(spec.objectives) == 1:  # Optuna takes none for several
        curve = metrics.get(spec.objectives[0].metric, {})
    return optuna.create_trial(
        state=state,
        values=values if state == TrialState.COMPLETE else None,
        params=suggestion.params,
        distributions={name: space[name] for name in suggestion.params},
        intermediate_values={
            round(100 * progress): value
            for progress, value in sorted(curve.items())
            if math.isfinite(value)
        },
        user_attrs={
            TRIAL: suggestion.trial,
            "arm": suggestion.arm,
            "seed": suggestion.seed,
            "origin": suggestion.origin,
            **about,
        },
    )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_alike(copied: FrozenTrial, asked: FrozenTrial) -> bool:
    return (copied.state, copied.intermediate_values) == (asked.state, asked.intermediate_values)


def _update(study: optuna.Study, copied: FrozenTrial, asked: FrozenTrial) -> None:
    trial = Trial(study, copied._trial_id)
    for step, value in asked.intermediate_values.items():
        if step not in copied.intermediate_values:
            trial.report(value, step)
    for name, value in asked.user_attrs.items():
        if copied.user_attrs.get(name) != value:
            trial.set_user_attr(name, value)
    if asked.state.is_finished():
        study.tell(copied.number, asked.values, state=asked.state)
