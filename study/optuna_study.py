"""The study as Optuna sees it, built anew from what the ledger holds for every question.

An arm is one Optuna trial, however many seeds it has. The sampler is seeded with the question's
number. So a proposal depends on history and number alone, and a resumed study proposes what an
uninterrupted one would. Trials of arms that have ended are kept between questions until there is
news of them.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random as random_module
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from study import space
from study.best import FRESH
from study.breaker import BAD
from study.ledger import Outcome, Result, Suggestion
from study.measured import Measured, final_value, value_at_rung
from study.owed import is_infrastructure
from study.samplers import (
    ENDED,
    NAMES,
    NUMBER,
    PRIORS,
    SAMPLERS,
    SEED,
    VALUES_ALONE,
    quasi_random,
    random,
)
from study.stopping import FEWEST_FINALS, FORETELLERS
from trainables.config import TrialConfig, arm_id
from trainables.metrics import PHASES, metric_of, parse, sign

if TYPE_CHECKING:
    from study.spec import StudySpec

RETRIES = 50  # proposals of known arms before chance decides
NEIGHBOURS = 3  # that all have to have failed, so that a proposal is put aside
FAILED = "failed"  # attribute of a trial
MOST_VETOED = 8  # of them for one question before chance proposes, and then of its own
TRIED_ALL_THE_SAME = 0.1  # share of questions, as what failed need not fail for ever
LARGEST_WALK = 20_000  # points of a space that is searched for what is left of it


class Proposal(NamedTuple):
    """An arm that has not been tried."""

    params: dict[str, Any]
    labels: dict[str, Any]
    config: TrialConfig


class OptunaStudy:
    """What has been suggested and heard, and what to suggest next."""

    def __init__(self, spec: StudySpec) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.spec = spec
        self._distributions = distributions(spec.search)
        self._priors = {
            name: parameter.item.prior
            for name, parameter in space.parameters(spec.search).items()
            if parameter.item.prior is not None
        }
        self._sampler = SAMPLERS[spec.sampler.name]
        self._options = spec.sampler.options()
        self._walks = self._sampler(0, len(spec.objectives), **self._options) is None
        self.replay([], {}, {})

    def replay(
        self,
        suggestions: Iterable[Suggestion],
        results: Mapping[str, Result],
        values: Measured,
    ) -> None:
        """Forget everything, then know what the ledger holds; `values` is kept and added to."""
        self._suggestions: list[Suggestion] = []
        self._shown: dict[str, list[Suggestion]] = {}  # arm -> its trials, if Optuna is to see it
        self._arm_of: dict[str, str] = {}
        self._kept: dict[str, FrozenTrial | None] = {}  # arm that has ended -> as Optuna sees it
        self._has_failed: dict[str, bool] = {}  # trial that has ended
        for suggestion in suggestions:
            self.add(suggestion)
        self._results = dict(results)
        self._measured = values

    def add(self, suggestion: Suggestion) -> None:
        """A trial was suggested (by this study or not): it is running from now on."""
        self._suggestions.append(suggestion)
        self._arm_of[suggestion.trial] = suggestion.arm
        if suggestion.params and suggestion.origin not in FRESH:
            self._shown.setdefault(suggestion.arm, []).append(suggestion)
        self._has_news(suggestion.trial)

    def report(self, trial: str, progress: float, values: Mapping[str, float]) -> None:
        """What a trial measured at a rung: "phase/metric" -> value."""
        self._has_news(trial)
        metrics = self._measured.setdefault(trial, {})
        for name, value in values.items():
            metrics.setdefault(name, {}).setdefault(progress, value)

    def tell(self, result: Result) -> None:
        """How a trial ended; its values were reported before."""
        self._has_news(result.trial)
        self._results[result.trial] = result

    def _has_news(self, trial: str) -> None:
        self._kept.pop(self._arm_of.get(trial, ""), None)
        self._has_failed.pop(trial, None)

    def ask(
        self, number: int, fits: Callable[[TrialConfig], bool] | None = None
    ) -> Proposal | None:
        """An untried arm, which depends on the history and `number` only; None if none is left.

        `fits`: whether an arm may be proposed at all; None: any.
        """
        known = {suggestion.arm for suggestion in self._suggestions}

        def is_open(proposal: Proposal) -> bool:
            arm = arm_id(proposal.config)
            if arm not in known and fits is not None and not fits(proposal.config):
                known.add(arm)
            return arm not in known

        if self._walks:
            return next(filter(is_open, self._grid.values()), None)
        study, ended = self.study(), self._ended()
        doomed: list[Proposal] = []
        chance = random_module.Random(_sub_seed(self.spec.seed, number, RETRIES))
        is_wary = "startup" in self._options and chance.random() > TRIED_ALL_THE_SAME
        sampler, options = self._sampler, self._options
        if len(study.get_trials(deepcopy=False, states=ENDED)) < options.get("startup", 0):
            sampler, options = quasi_random, {}
        for attempt in range(RETRIES):
            proposal = self._propose(study, sampler, number, attempt, options)
            if not is_open(proposal):
                continue
            if not (is_wary and is_doomed(proposal.params, ended, self._distributions)):
                return proposal
            doomed.append(proposal)
            if len(doomed) == MOST_VETOED:
                sampler, options = random, {}
            if len(doomed) == 2 * MOST_VETOED:
                break
        if doomed:
            return doomed[0]
        left = self._left(known)
        if left is not None:
            left = list(filter(is_open, left))
            return chance.choice(left) if left else None
        most = 20 * RETRIES if fits is None else 2 * RETRIES
        for attempt in range(RETRIES, most):
            proposal = self._propose(study, random, number, attempt, {})
            if is_open(proposal):
                return proposal
        return None

    def study(self) -> optuna.Study:
        """All arms that lie in the space, as Optuna sees them."""
        found = [frozen for arm in self._shown if (frozen := self._trial_of(arm)) is not None]
        if self.spec.sampler.name in VALUES_ALONE:
            found = _with_values(found, [objective.goal for objective in self.spec.objectives])
        study = optuna.create_study(
            storage=_Shown(found),
            directions=[objective.goal for objective in self.spec.objectives],
            sampler=RandomSampler(seed=0),
        )
        study.set_user_attr(NAMES, list(self._distributions))
        study.set_user_attr(SEED, self.spec.seed)
        study.set_user_attr(PRIORS, self._priors)
        return study

    def _propose(
        self, study: optuna.Study, sampler: Any, number: int, attempt: int, options: dict[str, Any]
    ) -> Proposal:
        seed = _sub_seed(self.spec.seed, number, attempt)
        study.sampler = sampler(seed, len(self.spec.objectives), **options)
        study.set_user_attr(NUMBER, len(study.get_trials(deepcopy=False)))
        trial = study.ask()
        point = space.suggest(self.spec, trial)
        # Failed trials are invisible to samplers; only the ledger says what is running
        study.tell(trial, state=TrialState.FAIL)
        return self._proposal(point)

    def _proposal(self, point: space.Point) -> Proposal:
        return Proposal(point.params, point.labels, space.resolve(self.spec, point.overrides))

    @cached_property
    def _grid(self) -> dict[str, Proposal]:
        proposals = map(self._proposal, space.enumerate_grid(self.spec))
        return {arm_id(proposal.config): proposal for proposal in proposals}

    def _left(self, known: set[str]) -> list[Proposal] | None:
        """Untried arms of a space that can be counted; None for others."""
        values = {
            name: space.finite_values(parameter.item)
            for name, parameter in space.parameters(self.spec.search).items()
        }
        if any(value is None for value in values.values()):
            return None
        left: dict[str, Proposal] = {}
        points = space.combinations(
            self.spec.search, lambda parameter: space.finite_values(parameter.item) or []
        )
        for count, point in enumerate(points):
            if count >= LARGEST_WALK:
                return None
            proposal = self._proposal(point)
            arm = arm_id(proposal.config)
            if arm not in known:
                left.setdefault(arm, proposal)
        return list(left.values())

    def _trial_of(self, arm: str) -> FrozenTrial | None:
        if arm in self._kept:
            return self._kept[arm]
        frozen = self._frozen(self._shown[arm])
        if frozen is None or frozen.state != TrialState.RUNNING:
            self._kept[arm] = frozen
        return frozen

    def _frozen(self, trials: list[Suggestion]) -> FrozenTrial | None:
        """An arm as an Optuna trial; None if the sampler is not to see it.

        Samplers do not see what failed, and would propose its like for ever. One that was pruned
        without a value is worse than any other to them: it repels.
        """
        params = trials[0].params
        ends = [self._results.get(suggestion.trial) for suggestion in trials]
        if any(end is not None and is_infrastructure(end) for end in ends):
            return None
        outcomes = {end.outcome for end in ends if end is not None}
        values = None
        has_failed = bool(outcomes & BAD)
        if has_failed or Outcome.STOPPED in outcomes:
            state = TrialState.PRUNED
        elif None in ends or len(ends) < self.spec.seeds:
            state = TrialState.RUNNING
        else:
            values = self._mean_values(trials)
            has_failed = values is None
            state = TrialState.PRUNED if has_failed else TrialState.COMPLETE
        return optuna.create_trial(
            state=state,
            values=values,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            intermediate_values={} if has_failed else self._intermediate(trials),
            user_attrs={FAILED: has_failed},
        )

    def _ended(self) -> list[tuple[Mapping[str, Any], bool]]:
        """(an arm's parameters, whether it failed) of all of which a trial has ended."""
        found: list[tuple[Mapping[str, Any], bool]] = []
        for suggestion in self._suggestions:
            end = self._results.get(suggestion.trial)
            if not suggestion.params or end is None or is_infrastructure(end):
                continue
            if suggestion.trial not in self._has_failed:
                self._has_failed[suggestion.trial] = self._failed(suggestion, end)
            found.append((suggestion.params, self._has_failed[suggestion.trial]))
        return found

    def _failed(self, suggestion: Suggestion, end: Result) -> bool:
        """A trial that came to its end and has no finite value has failed too."""
        if end.outcome is Outcome.COMPLETE:
            return self._mean_values([suggestion]) is None
        return end.outcome in BAD

    def _mean_values(self, trials: list[Suggestion]) -> list[float] | None:
        """Objective by objective over the seeds; None if anything is missing or not finite."""
        means = []
        for objective in self.spec.objectives:
            values = [
                final_value(self._measured, suggestion.trial, objective.metric)
                for suggestion in trials
            ]
            finite = [value for value in values if value is not None and math.isfinite(value)]
            if len(finite) < len(values):
                return None
            means.append(fmean(finite))
        return means

    def _intermediate(self, trials: list[Suggestion]) -> dict[int, float]:
        """Rung of the trial -> mean of what it is judged by there, turned as the objective is.

        Optuna takes none for several objectives, and compares only trials that ended at one rung.
        """
        options, objective = self.spec.stopping.options(), self.spec.objectives[0]
        if "metric" not in options or len(self.spec.objectives) > 1:
            return {}
        curve = {}
        for place, phase in enumerate(PHASES):
            by = [name for name in (options["metric"], objective.metric, *FORETELLERS) if name]
            name = next((one for one in by if parse(one).phase == phase), None)
            if name is None:
                continue
            turned = sign(metric_of(name).goal) * sign(objective.goal)
            for rung in range(len(self.spec.rungs)):
                found = [
                    value_at_rung(
                        self._measured.get(trial.trial, {}).get(name, {}), rung, self.spec.rungs
                    )
                    for trial in trials
                ]
                values = [turned * value for value in found if value is not None]
                if values and all(map(math.isfinite, values)):
                    curve[place * len(self.spec.rungs) + rung] = fmean(values)
        return curve


class _Shown(InMemoryStorage):  # type: ignore[misc]
    """Holds trials as they are; Optuna copies deeply each one that is added, as long as it samples.

    They are numbered in their order.
    """

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._given = trials

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        study: int = super().create_new_study(directions, study_name)
        for number, trial in enumerate(self._given):
            trial.number = trial._trial_id = number
            self._trial_id_to_study_id_and_number[number] = (study, number)
        self._studies[study].trials = list(self._given)
        self._max_trial_id = len(self._given) - 1
        return study


def _with_values(trials: Sequence[FrozenTrial], goals: Sequence[str]) -> list[FrozenTrial]:
    """Those that failed with the worst values of all, those that were stopped with likely ones.

    Of one objective: what a line through the complete trials foretells of the value at the rung
    where it was stopped, at best their median, since it was stopped for being worse.
    """
    complete = [each for each in trials if each.state == TrialState.COMPLETE]
    if not complete:
        return list(trials)
    values = np.array([each.values for each in complete])
    turned = np.array([sign(goal) for goal in goals])
    worst = (turned * (turned * values).min(axis=0)).tolist()
    lines: dict[int | None, tuple[float, float, float, float] | None] = {}
    found = []
    for each in trials:
        if each.state == TrialState.PRUNED:
            rung = max(each.intermediate_values, default=None)
            if rung not in lines:
                lines[rung] = _line(rung, complete)
            line = lines[rung]
            likely = worst
            if line is not None and not each.user_attrs[FAILED]:
                slope, level, mean, middle = line
                foretold = level + slope * each.intermediate_values[rung] if slope > 0 else mean
                likely = [float(turned[0] * min(turned[0] * foretold, turned[0] * middle))]
            each = copy.copy(each)
            each.state, each.values = TrialState.COMPLETE, likely
        found.append(each)
    return found


def _line(
    rung: int | None, complete: Sequence[FrozenTrial]
) -> tuple[float, float, float, float] | None:
    """(slope, level, mean, median) of final values over those at a rung; None: too few trials."""
    pairs = [
        (other.intermediate_values[rung], other.values[0])
        for other in complete
        if rung in other.intermediate_values
    ]
    if len({early for early, _ in pairs}) < FEWEST_FINALS:
        return None
    early, final = np.array(pairs).T
    slope, level = np.polyfit(early, final, 1)
    return float(slope), float(level), float(final.mean()), float(np.median(final))


def is_doomed(
    params: Mapping[str, Any],
    ended: Sequence[tuple[Mapping[str, Any], bool]],
    distributions: Mapping[str, BaseDistribution],
) -> bool:
    """Whether all that is like it has failed, of the arms that have ended: (parameters, failed).

    Those with the same choice somewhere, those at its end of a range, or its neighbours.
    """
    bad = [number for number, (_, failed) in enumerate(ended) if failed]
    fine = [number for number, (_, failed) in enumerate(ended) if not failed]
    if len(bad) < NEIGHBOURS:
        return False
    for name, value in params.items():
        # of thousands of arms one that is fine is mostly found soon, so these are looked at lazily
        others = (ended[number][0][name] for number in fine if name in ended[number][0])
        failed = [ended[number][0][name] for number in bad if name in ended[number][0]]
        if isinstance(distributions[name], CategoricalDistribution):
            if failed.count(value) >= NEIGHBOURS and value not in others:
                return True
            continue
        known = list(others)
        for turned in (1, -1):
            if any(turned * other >= turned * value for other in known):
                continue
            limit = max((turned * other for other in known), default=-math.inf)
            beyond = [turned * other for other in failed if turned * other > limit]
            if len(beyond) >= NEIGHBOURS and turned * value >= min(beyond):
                return True

    def nearness(number: int) -> tuple[float, int]:
        return _distance(params, ended[number][0], distributions), number

    last = sorted(map(nearness, bad))[NEIGHBOURS - 1]
    return not any(nearness(number) < last for number in fine)


def _distance(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
) -> float:
    """How many parameters two arms differ in; of a range, which share of it (Gower 1971)."""
    total = 0.0
    for name in one.keys() | other.keys():
        distribution = distributions[name]
        if name not in one or name not in other:
            total += 1.0
        elif isinstance(distribution, FloatDistribution | IntDistribution):
            ends = (distribution.low, distribution.high, one[name], other[name])
            low, high, here, there = map(math.log, ends) if distribution.log else ends
            total += abs(here - there) / (high - low) if high > low else 0.0
        else:
            total += one[name] != other[name]
    return total


def _sub_seed(seed: int, number: int, attempt: int) -> int:
    digest = hashlib.sha256(f"{seed}:{number}:{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def distributions(search: Mapping[str, space.SearchItem]) -> dict[str, BaseDistribution]:
    """Name of a parameter -> what Optuna takes it for."""
    found = space.parameters(search).items()
    return {name: _distribution(parameter.item) for name, parameter in found}


def _distribution(item: space.SearchItem) -> BaseDistribution:
    """What Optuna makes of the same item when it is asked to suggest it."""
    if item.choices is not None:
        return CategoricalDistribution(list(item.choices))
    if item.is_integer:
        return IntDistribution(item.low, item.high, log=item.log, step=item.step or 1)
    return FloatDistribution(item.low, item.high, log=item.log, step=item.step)
