"""What is left to do, decided from the ledger alone; somebody else does it.

The order: trials that were begun; the control arm and its twins; arms that a person asked for;
searched arms, all seeds of one before the next, until `budget.trials` trials exist; then the best
arms and the control once more with fresh seeds. An arm of which one seed ended badly or was stopped
gets no further seeds; where arms may be stopped, the first seed runs alone before the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from study.best import CONFIRM, to_confirm
from study.ledger import Outcome, Result, Suggestion
from study.measured import Measured
from study.space import params_of
from trainables.config import TrialConfig, arm_id, completed

if TYPE_CHECKING:
    from study.spec import StudySpec

RETRIES = 3  # of a trial that the infrastructure failed


@dataclass(frozen=True)
class Continue:
    """Run this trial (on): it was suggested and has not ended."""

    suggestion: Suggestion


@dataclass(frozen=True)
class Start:
    """Suggest and run a trial whose configuration is known."""

    origin: str
    config: TrialConfig
    seed: int
    params: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Enqueued:
    """An arm that a person asked for; `spec.budget` has room for its seeds."""

    config: TrialConfig
    params: dict[str, Any]
    labels: dict[str, Any]


@dataclass(frozen=True)
class AskSampler:
    """Suggest and run a new arm with this seed. `number` is what Optuna is to be asked with."""

    number: int
    seed: int


@dataclass(frozen=True)
class Wait:
    """Nothing can be started before a running trial ends."""


@dataclass(frozen=True)
class Finished:
    """Nothing is left."""


Step = Continue | Start | AskSampler | Wait | Finished


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
) -> Step:
    """The next thing to do. `running` are trials that are being run now.

    `is_labelled`: without labels nothing is segmented, and the control's twins would measure
    nothing. `is_exhausted`: Optuna has no untried arm left.
    """
    for suggestion in suggestions:
        if suggestion.trial not in running and is_unfinished(results.get(suggestion.trial)):
            return Continue(suggestion)
    for start in _controls(spec, suggestions, is_labelled):
        return start
    num_trials = sum(suggestion.origin != CONFIRM for suggestion in suggestions)
    if num_trials < spec.budget.trials:
        for start in _missing_seeds(spec, suggestions, results, enqueued):
            return start
        if spec.search and not is_exhausted and _has_room(spec, suggestions, results):
            return AskSampler(len(suggestions), spec.seed)
    if any(
        suggestion.trial in running and suggestion.origin != CONFIRM for suggestion in suggestions
    ):
        return Wait()
    for start in _confirmations(spec, suggestions, results, measured):
        return start
    return Wait() if running else Finished()


def is_unfinished(result: Result | None) -> bool:
    """Whether a trial is to be run (again)."""
    return result is None or 0 < result.infrastructure_failures <= RETRIES


def is_infrastructure(result: Result) -> bool:
    """A failure that says nothing about the arm."""
    return result.infrastructure_failures > 0


def infrastructure_error(failures: int, reason: str) -> str:
    """The `error` of a Result whose trial the infrastructure has failed so often."""
    return f"infrastructure (failure {failures} of {RETRIES + 1}): {reason}"


def num_planned(spec: StudySpec) -> int:
    """Trials of the whole study, if its space has that many arms."""
    confirm = spec.confirm
    return spec.budget.trials + ((confirm.arms + 1) * confirm.seeds if confirm else 0)


def num_pretrainings(spec: StudySpec) -> int | None:
    """How many the whole study takes where trials that pretrain alike do so once.

    None: each trial may have one of its own.
    """
    if not all(path.startswith("segment.") for path in spec.search):
        return None
    return spec.seeds + (spec.confirm.seeds if spec.confirm else 0)


def twin(spec: StudySpec, control: str) -> TrialConfig:
    """The control arm with another encoder: `random-init` or `frozen`."""
    segment = spec.trial.segment.model_copy(update={"encoder": control})
    return spec.trial.model_copy(update={"segment": segment})


def _controls(
    spec: StudySpec, suggestions: Sequence[Suggestion], is_labelled: bool
) -> Iterator[Start]:
    wanted = {"control": spec.trial}
    if is_labelled:
        wanted |= {f"control:{name}": twin(spec, name) for name in spec.controls}
    seen: set[str] = set()
    for origin, config in wanted.items():
        arm = arm_id(config)
        if arm in seen:
            continue
        seen.add(arm)
        begun = {suggestion.seed for suggestion in suggestions if suggestion.arm == arm}
        for index in range(spec.seeds):
            if spec.seed + index not in begun:
                params = params_of(spec, config) or {}
                labels = {path: params[path] for path in spec.search} if params else {}
                yield Start(origin, config, spec.seed + index, params, labels)


def _missing_seeds(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    results: Mapping[str, Result],
    enqueued: Sequence[Enqueued],
) -> Iterator[Start]:
    """Those of arms that were asked for, and then of those that were begun."""
    begun = _searched(suggestions)
    wanted = {arm_id(arm.config): arm for arm in enqueued}
    for arm in [*wanted, *(arm for arm in begun if arm not in wanted)]:
        trials = begun.get(arm, [])
        ends = [results.get(trial.trial) for trial in trials]
        if any(end is not None and end.outcome is not Outcome.COMPLETE for end in ends):
            continue
        if _waits_for_its_first(spec, ends) and arm not in wanted:
            continue
        seeds = {trial.seed for trial in trials}
        first: Suggestion | Enqueued = trials[0] if trials else wanted[arm]
        for index in range(spec.seeds):
            if spec.seed + index not in seeds:
                config = _config_of(first)
                yield Start("search", config, spec.seed + index, first.params, first.labels)


def _waits_for_its_first(spec: StudySpec, ends: Sequence[Result | None]) -> bool:
    """Whether an arm's first trial may still be stopped, and so spare the study its others."""
    return spec.stopping.name != "none" and bool(ends) and ends[0] is None


def _has_room(
    spec: StudySpec, suggestions: Sequence[Suggestion], results: Mapping[str, Result]
) -> bool:
    """Whether the budget holds another arm beside all seeds of those that were begun."""
    if spec.stopping.name == "none":
        return True
    begun = _searched(suggestions)
    taken = sum(each.origin not in (CONFIRM, "search") for each in suggestions)
    for trials in begun.values():
        ends = [results.get(trial.trial) for trial in trials]
        is_over = any(end is not None and end.outcome is not Outcome.COMPLETE for end in ends)
        taken += len(trials) if is_over else max(len(trials), spec.seeds)
    return taken < spec.budget.trials


def _confirmations(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    results: Mapping[str, Result],
    measured: Measured,
) -> Iterator[Start]:
    if spec.confirm is None:
        return
    control = arm_id(spec.trial)
    best = to_confirm(spec, suggestions, results, measured)
    firsts: dict[str, Suggestion] = {}
    for suggestion in suggestions:
        firsts.setdefault(suggestion.arm, suggestion)
    begun = {(suggestion.arm, suggestion.seed) for suggestion in suggestions}
    for arm in [*best[: spec.confirm.arms], control]:
        first = firsts[arm]
        for index in range(spec.confirm.seeds):
            seed = spec.seed + spec.seeds + index
            if (arm, seed) not in begun:
                config = _config_of(first)
                yield Start(CONFIRM, config, seed, first.params, first.labels)


def _config_of(arm: Suggestion | Enqueued) -> TrialConfig:
    if isinstance(arm.config, TrialConfig):
        return arm.config
    return TrialConfig.model_validate(completed(arm.config))


def _searched(suggestions: Sequence[Suggestion]) -> dict[str, list[Suggestion]]:
    """Searched arms in the order of their first trials."""
    arms: dict[str, list[Suggestion]] = {}
    for suggestion in suggestions:
        if suggestion.origin == "search":
            arms.setdefault(suggestion.arm, []).append(suggestion)
    return arms
