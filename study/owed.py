"""Trials that follow from what was begun: the controls, further seeds of arms, and fresh ones.

Fresh seeds are those by which nothing was chosen: `confirm` gives them to the best arms, and its
`verdict` to the best of these, to the control and to its twins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from study.best import CONFIRM, VERDICT, to_confirm, to_judge
from study.ledger import Outcome, Result, Suggestion
from study.measured import Measured
from study.space import params_of
from study.steps import Enqueued, Start
from trainables.config import TrialConfig, arm_id, completed

if TYPE_CHECKING:
    from study.spec import StudySpec

RETRIES = 3  # of a trial that the infrastructure failed
MOST_TO_CONFIRM = 1000  # seeds; those of a verdict come after them, as `confirm.seeds` may change


def is_unfinished(result: Result | None) -> bool:
    """Whether a trial is to be run (again)."""
    return result is None or 0 < result.infrastructure_failures <= RETRIES


def ended(results: Mapping[str, Result]) -> set[str]:
    """Trials that will not be run again."""
    return {trial for trial, result in results.items() if not is_unfinished(result)}


def is_infrastructure(result: Result) -> bool:
    """A failure that says nothing about the arm."""
    return result.infrastructure_failures > 0


def infrastructure_error(failures: int, reason: str) -> str:
    """The `error` of a Result whose trial the infrastructure has failed so often."""
    return f"infrastructure (failure {failures} of {RETRIES + 1}): {reason}"


def controls(
    spec: StudySpec, suggestions: Sequence[Suggestion], is_labelled: bool
) -> Iterator[Start]:
    """Their trials that have not begun."""
    for origin, config in control_arms(spec, is_labelled).items():
        arm = arm_id(config)
        begun = {suggestion.seed for suggestion in suggestions if suggestion.arm == arm}
        for index in range(spec.seeds):
            if spec.seed + index not in begun:
                params = params_of(spec, config) or {}
                labels = {path: params[path] for path in spec.search} if params else {}
                yield Start(origin, config, spec.seed + index, params, labels)


def control_arms(spec: StudySpec, is_labelled: bool) -> dict[str, TrialConfig]:
    """Origin -> arm of the control and of its twins, each arm once."""
    twins = {f"control:{name}": spec.twin(name) for name in spec.controls if is_labelled}
    wanted = {"control": spec.trial, **twins}
    first: dict[str, str] = {}
    for origin, config in wanted.items():
        first.setdefault(arm_id(config), origin)
    return {origin: wanted[origin] for origin in first.values()}


def missing_seeds(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    results: Mapping[str, Result],
    enqueued: Sequence[Enqueued],
    *,
    is_to_come: bool = False,
) -> Iterator[Start]:
    """Those of arms that were asked for, and then of those that were begun.

    `is_to_come`: those too that wait for the arm's first one.
    """
    begun = searched(suggestions)
    wanted = {arm_id(arm.config): arm for arm in enqueued}
    for arm in [*wanted, *(arm for arm in begun if arm not in wanted)]:
        trials = begun.get(arm, [])
        if ended_badly(trials, results):
            continue
        # where arms may be stopped, the first seed of one may yet spare the study its others
        may_stop = spec.stopping.name != "none" and arm not in wanted
        if may_stop and not is_to_come and trials[0].trial not in results:
            continue
        seeds = {trial.seed for trial in trials}
        first: Suggestion | Enqueued = trials[0] if trials else wanted[arm]
        for index in range(spec.seeds):
            if spec.seed + index not in seeds:
                config = _config_of(first)
                yield Start("search", config, spec.seed + index, first.params, first.labels)


def ended_badly(trials: Sequence[Suggestion], results: Mapping[str, Result]) -> bool:
    """Whether one of an arm's trials has ended other than complete, so that it gets no others."""
    ends = [results.get(trial.trial) for trial in trials]
    return any(end is not None and end.outcome is not Outcome.COMPLETE for end in ends)


def confirmations(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    results: Mapping[str, Result],
    measured: Measured,
) -> Iterator[Start]:
    """The best arms and, unless there is to be a verdict, the control."""
    if spec.confirm is None:
        return
    arms = to_confirm(spec, suggestions, results, measured)[: spec.confirm.arms]
    if spec.confirm.verdict is None:
        arms.append(arm_id(spec.trial))
    yield from _once_more(arms, CONFIRM, seeds_to_confirm(spec), suggestions)


def verdict(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    results: Mapping[str, Result],
    measured: Measured,
    is_labelled: bool,
) -> Iterator[Start]:
    """The winner, the control and its twins, on seeds that nothing was chosen by."""
    if spec.confirm is None or spec.confirm.verdict is None:
        return
    winner = to_judge(spec, suggestions, results, measured)
    if winner is None:
        return
    arms = [winner, *map(arm_id, control_arms(spec, is_labelled).values())]
    for seed in seeds_of_verdict(spec):  # of one seed all arms, so that halves can be compared
        yield from _once_more(arms, VERDICT, range(seed, seed + 1), suggestions)


def seeds_to_confirm(spec: StudySpec) -> range:
    first = spec.seed + spec.seeds
    return range(first, first + (spec.confirm.seeds if spec.confirm else 0))


def seeds_of_verdict(spec: StudySpec) -> range:
    first = spec.seed + spec.seeds + MOST_TO_CONFIRM
    return range(first, first + ((spec.confirm and spec.confirm.verdict) or 0))


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


def num_fresh(spec: StudySpec, num_searched: int, *, is_labelled: bool = True) -> int:
    """Trials with fresh seeds, after so many searched arms."""
    confirm = spec.confirm
    if confirm is None:
        return 0
    num_arms = min(confirm.arms, num_searched)
    if confirm.verdict is None:
        return (num_arms + 1) * confirm.seeds
    if num_arms == 0:
        return 0
    num_controls = 1 + (len(spec.controls) if is_labelled else 0)
    return num_arms * confirm.seeds + (1 + num_controls) * confirm.verdict


def _config_of(arm: Suggestion | Enqueued) -> TrialConfig:
    if isinstance(arm.config, TrialConfig):
        return arm.config
    return TrialConfig.model_validate(completed(arm.config))


def searched(suggestions: Sequence[Suggestion]) -> dict[str, list[Suggestion]]:
    """Searched arms in the order of their first trials."""
    arms: dict[str, list[Suggestion]] = {}
    for suggestion in suggestions:
        if suggestion.origin == "search":
            arms.setdefault(suggestion.arm, []).append(suggestion)
    return arms
