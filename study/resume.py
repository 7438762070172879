"""What is left to do, decided from the ledger alone; somebody else does it.

The order: trials that were begun; the control arm and its twins; arms that a person asked for;
searched arms, all seeds of one before the next, until `budget.trials` trials exist, or a budget in
operations or hours has no room for another arm, or a population (population.py); then, for which
such a budget has kept room, the best arms with fresh seeds, and the control or, at last, the best
of them and the controls. An arm of which one seed ended badly or was stopped gets no further seeds;
where arms may be stopped, the first seed runs alone before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from study import population
from study.best import CONFIRM, FRESH, VERDICT, to_confirm, to_judge
from study.ledger import Outcome, Result, Suggestion
from study.measured import Measured
from study.space import params_of
from study.spending import Account, Amounts, Means, Planned, fits, is_spent
from trainables.config import TrialConfig, arm_id, completed

if TYPE_CHECKING:
    from study.spec import StudySpec

RETRIES = 3  # of a trial that the infrastructure failed
MOST_TO_CONFIRM = 1000  # seeds; those of a verdict come after them, as `confirm.seeds` may change


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
    born: dict[str, Any] | None = None  # into a population; see Suggestion


@dataclass(frozen=True)
class Enqueued:
    """An arm that a person asked for; `spec.budget` has room for its seeds."""

    config: TrialConfig
    params: dict[str, Any]
    labels: dict[str, Any]


@dataclass(frozen=True)
class AskSampler:
    """Suggest and run a new arm with this seed. `number` is what Optuna is to be asked with.

    `fits`: whether the budget has room for an arm; None: for any.
    """

    number: int
    seed: int
    fits: Callable[[TrialConfig], bool] | None = field(default=None, compare=False)


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
    for start in _controls(spec, suggestions, is_labelled):
        return start
    room = None
    if spec.budget.is_measured:
        account = account_of(suggestions, results, running, measured, means or Means())
        room = _Room(spec, suggestions, results, measured, enqueued, account, is_labelled)
    num_trials = num_counted(suggestions)
    if spec.budget.trials is None or num_trials < spec.budget.trials:
        for start in _missing_seeds(spec, suggestions, results, enqueued):
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
    for start in _confirmations(spec, suggestions, results, measured):
        if room is None or room.holds(start):
            return start
    if any(
        suggestion.trial in running and suggestion.origin == CONFIRM for suggestion in suggestions
    ):
        return Wait()
    judging = list(_verdict(spec, suggestions, results, measured, is_labelled))
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
    ended = {trial for trial, result in results.items() if not is_unfinished(result)} - running
    return Account(suggestions, ended, measured, means, num_running=len(running))


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


def num_planned(spec: StudySpec, *, is_labelled: bool = True) -> int | None:
    """Trials of the whole study, if its space has that many arms, and no child's parent fails.

    None: other units tell."""
    if spec.budget.trials is None or spec.budget.is_measured:
        return None
    num_best = spec.confirm.arms if spec.confirm and spec.search else 0
    confirmed = num_fresh(spec, num_best, is_labelled=is_labelled)
    return spec.budget.trials + population.num_children(spec) + confirmed


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
    if spec.stopping.name == "none" or spec.budget.trials is None:
        return True
    begun = _searched(suggestions)
    taken = sum(each.origin not in (*FRESH, "search") for each in suggestions)
    for trials in begun.values():
        ends = [results.get(trial.trial) for trial in trials]
        is_over = any(end is not None and end.outcome is not Outcome.COMPLETE for end in ends)
        taken += len(trials) if is_over else max(len(trials), spec.seeds)
    return taken < spec.budget.trials


@dataclass(frozen=True)
class _Room:
    """What else a budget in operations or hours has room for."""

    spec: StudySpec
    suggestions: Sequence[Suggestion]
    results: Mapping[str, Result]
    measured: Measured
    enqueued: Sequence[Enqueued]
    account: Account
    is_labelled: bool

    @property
    def is_left(self) -> bool:
        """Whether there is any beside what is owed: seeds of begun arms, and confirmations."""
        return not is_spent(
            self.spec.budget, self.account.expected(self._owed, self._to_confirm(()))
        )

    def is_in_time(self, start: Start) -> bool:
        """Whether a seed that an arm is to get is expected to end within the wall time.

        Whoever asks for an arm wants it all the same; of what else is limited the arm has its part.
        """
        arm, limit = arm_id(start.config), self.spec.budget.wall_hours
        if limit is None or any(arm == arm_id(each.config) for each in self.enqueued):
            return True
        return self._added(start).wall_hours <= limit

    def holds(self, start: Start) -> bool:
        """Whether there is room for one more confirmation."""
        return fits(self.spec.budget, self.account.expected(), self._added(start))

    def holds_verdict(self, starts: Sequence[Start]) -> bool:
        """Whether there is room for all of them, or they have begun: a part of one says nothing."""
        if any(each.origin == VERDICT for each in self.suggestions):
            return True
        return fits(self.spec.budget, self.account.expected(), self._added(*starts))

    def _added(self, *starts: Start) -> Amounts:
        return self.account.expected(
            [Planned(arm_id(start.config), start.config, start.seed) for start in starts]
        )

    def holds_arm(self, config: TrialConfig) -> bool:
        """Whether there is room for all seeds of a new arm, even if it is to be confirmed."""
        arm, seed = arm_id(config), self.spec.seed
        new = [Planned(arm, config, seed + index) for index in range(self.spec.seeds)]
        without = self.account.expected(self._owed, self._to_confirm(()))
        added = self.account.expected([*self._owed, *new], self._to_confirm([(arm, config)]))
        return fits(self.spec.budget, without, added)

    def is_confirming(self, running: AbstractSet[str]) -> bool:
        """Whether the search is over for now: what has begun to be confirmed comes first."""
        confirming = [each for each in self.suggestions if each.origin in FRESH]
        if any(each.trial in running for each in confirming):
            return True
        known = (self.spec, self.suggestions, self.results, self.measured)
        if any(map(self.holds, _confirmations(*known))) and confirming:
            return True
        judging = list(_verdict(*known, self.is_labelled))
        return bool(confirming and judging) and self.holds_verdict(judging)

    @cached_property
    def _owed(self) -> list[Planned]:
        """Seeds that arms are to get: of those that were begun, unless one has ended badly."""
        owed = []
        begun = _searched(self.suggestions)
        asked = {arm_id(each.config): each for each in self.enqueued}
        for arm in [*begun, *(arm for arm in asked if arm not in begun)]:
            trials = begun.get(arm, [])
            if self._has_failed(trials):
                continue
            first: Suggestion | Enqueued = trials[0] if trials else asked[arm]
            seeds = {trial.seed for trial in trials}
            owed += [
                Planned(arm, first.config, self.spec.seed + index)
                for index in range(self.spec.seeds)
                if self.spec.seed + index not in seeds
            ]
        return owed

    def _to_confirm(self, new: Sequence[tuple[str, TrialConfig]]) -> list[Planned]:
        """The fresh seeds to come, of the dearest arms that may be among the best by then."""
        confirm = self.spec.confirm
        if confirm is None:
            return []
        arms, seeds = [*self._candidates, *new], _seeds_to_confirm(self.spec)
        candidates = [self._fresh(arm, config, seeds) for arm, config in arms]
        found = sorted(candidates, key=self._flops, reverse=True)[: confirm.arms]
        if confirm.verdict is None:
            found.append(self._fresh(arm_id(self.spec.trial), self.spec.trial, seeds))
        else:
            seeds = _seeds_of_verdict(self.spec)
            judged = [self._fresh(arm, config, seeds) for arm, config in arms]
            found += sorted(judged, key=self._flops, reverse=True)[:1]
            for config in _control_arms(self.spec, self.is_labelled).values():
                found.append(self._fresh(arm_id(config), config, seeds))
        return [each for arm in found for each in arm]

    @cached_property
    def _candidates(self) -> list[tuple[str, TrialConfig | dict[str, Any]]]:
        """Arms that may be confirmed: the best ones so far, and those whose trials still run."""
        assert self.spec.confirm is not None
        ranked = to_confirm(self.spec, self.suggestions, self.results, self.measured)
        best = set(ranked[: self.spec.confirm.arms])
        found: list[tuple[str, TrialConfig | dict[str, Any]]] = []
        for arm, trials in _searched(self.suggestions).items():
            is_open = any(is_unfinished(self.results.get(each.trial)) for each in trials)
            if arm in best or (is_open and not self._has_failed(trials)):
                found.append((arm, trials[0].config))
        return found

    def _fresh(self, arm: str, config: TrialConfig | dict[str, Any], seeds: range) -> list[Planned]:
        begun = {each.seed for each in self.suggestions if each.arm == arm}
        return [Planned(arm, config, seed) for seed in seeds if seed not in begun]

    def _flops(self, planned: Sequence[Planned]) -> float:
        return self.account.expected(planned).flops

    def _has_failed(self, trials: Sequence[Suggestion]) -> bool:
        """Whether one of an arm's has ended other than complete, so that it gets no others."""
        ends = [self.results.get(trial.trial) for trial in trials]
        return any(end is not None and end.outcome is not Outcome.COMPLETE for end in ends)


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
    yield from _once_more(arms, CONFIRM, _seeds_to_confirm(spec), suggestions)


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
    if winner is None:
        return
    for seed in _seeds_of_verdict(spec):  # of one seed all arms, so that halves can be compared
        yield from _once_more([winner, *controls], VERDICT, range(seed, seed + 1), suggestions)


def _seeds_to_confirm(spec: StudySpec) -> range:
    first = spec.seed + spec.seeds
    return range(first, first + (spec.confirm.seeds if spec.confirm else 0))


def _seeds_of_verdict(spec: StudySpec) -> range:
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
