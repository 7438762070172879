"""The study as Optuna sees it, built anew from what the ledger holds for every question.

An arm is one Optuna trial, however many seeds it has. The sampler is seeded with the question's
number. So a proposal depends on history and number alone, and a resumed study proposes what an
uninterrupted one would.
"""

from __future__ import annotations

import hashlib
import math
import random as random_module
from collections.abc import Iterable, Mapping
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from study import space
from study.best import CONFIRM
from study.ledger import Outcome, Result, Suggestion
from study.measured import Measured, final_value, values_at_rung
from study.resume import is_infrastructure
from study.samplers import SAMPLERS, random
from trainables.config import TrialConfig, arm_id
from trainables.metrics import metric_of, parse, sign

if TYPE_CHECKING:
    from study.spec import StudySpec

RETRIES = 50  # proposals of known arms before chance decides
LARGEST_WALK = 20_000  # points of a space that is searched for what is left of it

_BAD = {Outcome.DIVERGED, Outcome.OUT_OF_MEMORY, Outcome.FAILED}


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
        self._distributions = {
            name: _distribution(parameter.item)
            for name, parameter in space.parameters(spec.search).items()
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
        self._suggestions = list(suggestions)
        self._results = dict(results)
        self._measured = values

    def add(self, suggestion: Suggestion) -> None:
        """A trial was suggested (by this study or not): it is running from now on."""
        self._suggestions.append(suggestion)

    def report(self, trial: str, progress: float, values: Mapping[str, float]) -> None:
        """What a trial measured at a rung: "phase/metric" -> value."""
        metrics = self._measured.setdefault(trial, {})
        for name, value in values.items():
            metrics.setdefault(name, {}).setdefault(progress, value)

    def tell(self, result: Result) -> None:
        """How a trial ended; its values were reported before."""
        self._results[result.trial] = result

    def ask(self, number: int) -> Proposal | None:
        """An untried arm, which depends on the history and `number` only; None if none is left."""
        known = {suggestion.arm for suggestion in self._suggestions}
        if self._walks:
            return next((new for arm, new in self._grid.items() if arm not in known), None)
        study = self.study()
        for attempt in range(RETRIES):
            proposal = self._propose(study, self._sampler, number, attempt, self._options)
            if arm_id(proposal.config) not in known:
                return proposal
        left = self._left(known)
        if left is not None:
            chance = random_module.Random(_sub_seed(self.spec.seed, number, RETRIES))
            return chance.choice(left) if left else None
        for attempt in range(RETRIES, 20 * RETRIES):
            proposal = self._propose(study, random, number, attempt, {})
            if arm_id(proposal.config) not in known:
                return proposal
        return None

    def study(self) -> optuna.Study:
        """All arms that lie in the space, as Optuna sees them."""
        study = optuna.create_study(
            directions=[objective.goal for objective in self.spec.objectives],
            sampler=RandomSampler(seed=0),
        )
        arms: dict[str, list[Suggestion]] = {}
        for suggestion in self._suggestions:
            if suggestion.params and suggestion.origin != CONFIRM:
                arms.setdefault(suggestion.arm, []).append(suggestion)
        for trials in arms.values():
            frozen = self._frozen(trials)
            if frozen is not None:
                study.add_trial(frozen)
        return study

    def _propose(
        self, study: optuna.Study, sampler: Any, number: int, attempt: int, options: dict[str, Any]
    ) -> Proposal:
        seed = _sub_seed(self.spec.seed, number, attempt)
        study.sampler = sampler(seed, len(self.spec.objectives), **options)
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

    def _frozen(self, trials: list[Suggestion]) -> FrozenTrial | None:
        """An arm as an Optuna trial; None if the sampler is not to see it."""
        params = trials[0].params
        ends = [self._results.get(suggestion.trial) for suggestion in trials]
        if any(end is not None and is_infrastructure(end) for end in ends):
            return None
        outcomes = {end.outcome for end in ends if end is not None}
        values = None
        if Outcome.STOPPED in outcomes:
            state = TrialState.PRUNED
        elif outcomes & _BAD:
            state = TrialState.FAIL
        elif None in ends or len(ends) < self.spec.seeds:
            state = TrialState.RUNNING
        else:
            values = self._mean_values(trials)
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
        return optuna.create_trial(
            state=state,
            values=values,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            intermediate_values={} if state == TrialState.FAIL else self._intermediate(trials),
        )

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
        """Rung -> mean of the stopping metric, turned so that better is the objective's better.

        Optuna takes none for several objectives.
        """
        metric = self.spec.stopping.options().get("metric")
        if metric is None or len(self.spec.objectives) > 1:
            return {}
        phase = parse(metric).phase
        turned = sign(metric_of(metric).goal) * sign(self.spec.objectives[0].goal)
        curve = {}
        for rung in range(len(self.spec.rungs)):
            found = [
                values_at_rung(self._measured, trial.trial, phase, rung, self.spec.rungs)
                for trial in trials
            ]
            values = [turned * one[metric] for one in found if metric in one]
            if values and all(map(math.isfinite, values)):
                curve[rung] = fmean(values)
        return curve


def _sub_seed(seed: int, number: int, attempt: int) -> int:
    digest = hashlib.sha256(f"{seed}:{number}:{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _distribution(item: space.SearchItem) -> BaseDistribution:
    """What Optuna makes of the same item when it is asked to suggest it."""
    if item.choices is not None:
        return CategoricalDistribution(list(item.choices))
    if item.is_integer:
        return IntDistribution(item.low, item.high, log=item.log, step=item.step or 1)
    return FloatDistribution(item.low, item.high, log=item.log, step=item.step)
