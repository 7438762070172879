"""What is left to do, decided from the ledger alone; somebody else does it.

The order: trials that were begun; the control arm and its twins; arms that a person asked for;
searched arms, all seeds of one before the next, until `budget.trials` trials exist; then the best
arms with fresh seeds, and the control or, at last, the best of them and the controls. An arm of
which one seed ended badly or was stopped gets no further seeds; where arms may be stopped, the
first seed runs alone before the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from study.best import CONFIRM, FRESH, VERDICT, to_confirm, to_judge
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
    num_trials = sum(suggestion.origin not in FRESH for suggestion in suggestions)
    if num_trials < spec.budget.trials:
        for start in _missing_seeds(spec, suggestions, results, enqueued):
            return start
        if spec.search and not is_exhausted and _has_room(spec, suggestions, results):
            return AskSampler(len(suggestions), spec.seed)
    if any(
        suggestion.trial in running and suggestion.origin not in FRESH for suggestion in suggestions
    ):
        return Wait()
    for start in _confirmations(spec, suggestions, results, measured):
        return start
    if any(
        suggestion.trial in running and suggestion.origin == CONFIRM for suggestion in suggestions
    ):
        return Wait()
    for start in _verdict(spec, suggestions, results, measured, is_labelled):
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
    return spec.budget.trials + (num_fresh(spec, spec.confirm.arms) if spec.confirm else 0)


def num_fresh(spec: StudySpec, num_arms: int, *, is_labelled: bool = True) -> int:
    """Trials with fresh seeds where so many arms are confirmed."""
    confirm = spec.confirm
    if confirm is None:
        return 0
    if confirm.verdict is None:
        return (num_arms + 1) * confirm.seeds
    num_controls = 1 + (len(spec.controls) if is_labelled else 0)
    return num_arms * confirm.seeds + (min(num_arms, 1) + num_controls) * confirm.verdict


def num_pretrainings(spec: StudySpec) -> int | None:
    """How many the whole study takes where trials that pretrain alike do so once.

    None: each trial may have one of its own.
    """
    if not all(path.startswith("segment.") for path in spec.search):
        return None
    confirm = spec.confirm
    return spec.seeds + (confirm.seeds + (confirm.verdict or 0) if confirm else 0)


def twin(spec: StudySpec, control: str) -> TrialConfig:
    """The control arm with another encoder: `random-init` or `frozen`."""
    segment = spec.trial.segment.model_copy(update={"encoder": control})
    return spec.trial.model_copy(update={"segment": segment})


def _controls(
    spec: StudySpec, suggestions: Sequence[Suggestion], is_labelled: bool
) -> Iterator[Start]:
    for origin, config in _control_arms(spec, is_labelled).items():
        arm = arm_id(config)
        begun = {suggestion.seed for suggestion in suggestions if suggestion.arm == arm}
        for index in range(spec.seeds):
            if spec.seed + index not in begun:
                params = params_of(spec, config) or {}
                labels = {path: params[path] for path in spec.search} if params else {}
                yield Start(origin, config, spec.seed + index, params, labels)


def _control_arms(spec: StudySpec, is_labelled: bool) -> dict[str, TrialConfig]:
    """Origin -> arm of the control and of its twins, each arm once."""
    wanted = {"control": spec.trial}
    if is_labelled:
        wanted |= {f"control:{name}": twin(spec, name) for name in spec.controls}
    arms: dict[str, str] = {}
    for origin, config in wanted.items():
        arms.setdefault(arm_id(config), origin)
    return {origin: wanted[origin] for origin in arms.values()}


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
    taken = sum(each.origin not in (*FRESH, "search") for each in suggestions)
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
    arms = to_confirm(spec, suggestions, results, measured)[: spec.confirm.arms]
    if spec.confirm.verdict is None:
        arms.append(arm_id(spec.trial))
    first = spec.seed + spec.seeds
    yield from _once_more(arms, CONFIRM, range(first, first + spec.confirm.seeds), suggestions)


def _verdict(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    results: Mapping[str, Result],
    measured: Measured,
    is_labelled: bool,
) -> Iterator[Start]:
    """The winner, the control and its twins, on seeds that nothing was chosen by."""
    if spec.confirm is None or spec.confirm.verdict is None:
        return
    controls = [arm_id(config) for config in _control_arms(spec, is_labelled).values()]
    winner = to_judge(spec, suggestions, results, measured)
    arms = controls if winner is None else [winner, *controls]
    first = spec.seed + spec.seeds + spec.confirm.seeds
    yield from _once_more(arms, VERDICT, range(first, first + spec.confirm.verdict), suggestions)


def _once_more(
    arms: Sequence[str], origin: str, seeds: range, suggestions: Sequence[Suggestion]
) -> Iterator[Start]:
    """Arms that were begun, with further seeds."""
    firsts: dict[str, Suggestion] = {}
    for suggestion in suggestions:
        firsts.setdefault(suggestion.arm, suggestion)
    begun = {(suggestion.arm, suggestion.seed) for suggestion in suggestions}
    for arm in arms:
        first = firsts[arm]
        for seed in seeds:
            if (arm, seed) not in begun:
                yield Start(origin, _config_of(first), seed, first.params, first.labels)


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
