"""Which arm to try next, of those that a study's space holds.

To add a sampler, write a function of (seed, number of objectives) with keyword-only options that
returns an Optuna sampler, and add it to SAMPLERS; `None` instead stands for walking the grid, or,
if POPULATIONS names it, for a population (population.py). It is called anew for every question, so
it is cheap and keeps nothing; heavy libraries are imported when it is asked, not here. One that
learns has an option `startup`, the arms that chance decides before, in the shape of a `prior` where
the study has one; its proposals are put aside where everything alike has failed (optuna_study.py).
How it is asked, and what it is shown, is in optuna_study.py.
"""

from __future__ import annotations

import math
import random as random_module
import warnings
from bisect import bisect
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from itertools import accumulate
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field

from study import evolution
from trainables.late import Late
from trainables.metrics import PSNR

qmc = Late("scipy.stats.qmc")

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)

# What a study tells samplers beside its trials
NAMES, NUMBER, SEED, PRIORS = "parameters", "number", "seed", "priors"

SPREAD = 0.25  # of a prior around the likely value: a standard deviation, in ranges


def tpe(
    seed: int, num_objectives: int, *, startup: Annotated[int, Field(ge=1)] = 10
) -> BaseSampler:
    """Tree-structured Parzen estimator as in Optuna 5; chance decides the first `startup` arms."""
    with _quietly():
        return _TPE(
            seed=seed,
            n_startup_trials=startup,
            multivariate=num_objectives == 1,
            constant_liar=True,
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Optuna warns that samplers, or options of theirs, are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


class _TPE(TPESampler):  # type: ignore[misc]
    """Knows that a parameter has one distribution: Optuna compares those of all trials."""

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {} if len(study.directions) > 1 else _shared(study, ENDED)


def _shared(study: Study, states: Container[TrialState]) -> dict[str, BaseDistribution]:
    """The parameters that all trials in these states have, and that can take several values."""
    trials = study.get_trials(deepcopy=False, states=states)
    if not trials:
        return {}
    names = set(trials[0].params).intersection(*(trial.params for trial in trials))
    known = trials[0].distributions
    return {name: known[name] for name in sorted(names) if not known[name].single()}


def gp(seed: int, num_objectives: int, *, startup: Annotated[int, Field(ge=1)] = 10) -> BaseSampler:
    """Gaussian process as in Optuna 5 after `startup` arms; TPE decides what stands under labels.

    Learns faster than TPE where few, continuous settings are searched. It needs torch and SciPy in
    the driver, which imports them once there is something to learn from.
    """
    with _quietly():
        return _UntriedGP(
            seed=seed,
            n_startup_trials=startup,
            independent_sampler=TPESampler(seed=seed, n_startup_trials=startup),
            warn_independent_sampling=False,
        )


class _UntriedGP(GPSampler):  # type: ignore[misc]
    """Gives way to TPE for the rest of a question once it has proposed what was tried before.

    However it is seeded, it would propose the same again.
    """

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return _shared(study, [TrialState.COMPLETE])

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if study.user_attrs.get("gives_way"):
            return {}
        params: dict[str, Any] = super().sample_relative(study, trial, search_space)
        if params and any(params == other.params for other in study.get_trials(deepcopy=False)):
            study.set_user_attr("gives_way", True)
            return {}
        return params


def cma_es(
    seed: int, num_objectives: int, *, startup: Annotated[int, Field(ge=1)] = 10
) -> BaseSampler:
    """CMA-ES after `startup` arms, for one objective; TPE decides labels and what is under them.

    Learns from many cheap arms, of numbers that work together. Hansen 2016, arXiv 1604.00772; that
    the first arms say where it begins, and arms from anywhere fill its generations, is ours.
    """
    with _quietly():
        return _CMA(seed, startup)


class _OneByOne(BaseSampler):  # type: ignore[misc]
    """Decides each parameter when it is asked for, by `value`, and none of them before."""

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self.value(study, param_name, param_distribution)

    def value(self, study: Study, name: str, distribution: BaseDistribution) -> Any:
        raise NotImplementedError


class _CMA(BaseSampler):  # type: ignore[misc]
    """Draws numbers that all arms have; Optuna's keeps its state in trials, which are made anew."""

    def __init__(self, seed: int, startup: int) -> None:
        self._chance = np.random.default_rng(seed)
        self._startup = startup
        self._others = TPESampler(seed=seed, n_startup_trials=startup)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        found = _shared(study, [TrialState.COMPLETE])
        return {
            name: distribution
            for name, distribution in found.items()
            if not isinstance(distribution, CategoricalDistribution)
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        told = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        turned = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        points = np.array(
            [
                [share_of(each, one.params[name]) for name, each in search_space.items()]
                for one in told
            ]
        )
        normal = evolution.told(points, [turned * one.value for one in told], self._startup)
        shares = evolution.drawn(normal, self._chance).tolist()
        return {
            name: value_at(distribution, share)
            for (name, distribution), share in zip(search_space.items(), shares, strict=True)
        }

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._others.sample_independent(study, trial, param_name, param_distribution)


def nsga_ii(
    seed: int,
    num_objectives: int,
    *,
    startup: Annotated[int, Field(ge=1)] = 10,
    population: Annotated[int, Field(ge=2)] = 20,
) -> BaseSampler:
    """A child of two of the best arms so far, after `startup` arms, for several objectives.

    Deb et al. 2002, IEEE TEC 6 (2): fronts, and crowding within the last; crossover and mutation of
    numbers as there. Ours: generations of one arm (any that have ended may be parents, so nobody
    waits for a generation), choices from either parent, and what neither has by chance.
    """
    with _quietly():
        return _Child(_BestTwo(seed=seed, population_size=population), seed)


def nsga_iii(
    seed: int,
    num_objectives: int,
    *,
    startup: Annotated[int, Field(ge=1)] = 10,
    population: Annotated[int, Field(ge=2)] = 20,
) -> BaseSampler:
    """As nsga-ii, but parents are spread by reference points: for three objectives.

    Deb and Jain 2014, IEEE TEC 18 (4).
    """
    with _quietly():
        return _Child(_BestThree(seed=seed, population_size=population), seed)


class _OfAllTold:
    """Everything that was told is the population that the next parents are picked from."""

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return list(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return []


class _BestTwo(_OfAllTold, NSGAIISampler):  # type: ignore[misc]
    pass


class _BestThree(_OfAllTold, NSGAIIISampler):  # type: ignore[misc]
    pass


class _Child(_OneByOne):
    """Takes each parameter, those under labels too, from its parents where they have it."""

    def __init__(self, best: BaseSampler, seed: int) -> None:
        self._best = best
        self._chance = random_module.Random(seed)
        self._parents: list[dict[str, Any]] = []
        self._is_crossed = False

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        best = self._best.select_parent(study, 1)
        turned = [1 if each == StudyDirection.MAXIMIZE else -1 for each in study.directions]
        parents: list[FrozenTrial] = []
        while best and len(parents) < 2:
            pair = self._chance.sample(best, min(2, len(best)))
            winner = pair[-1] if _dominates(pair[-1], pair[0], turned) else pair[0]
            parents.append(winner)
            best.remove(winner)
        self._parents = [each.params for each in parents]
        self._is_crossed = self._chance.random() < evolution.CROSSED
        return {}

    def value(self, study: Study, name: str, distribution: BaseDistribution) -> Any:
        chance = self._chance
        values = [each[name] for each in self._parents if name in each]
        if not values:
            return value_at(distribution, chance.random())
        mutates = chance.random() < 1 / len(self._parents[0])
        is_crossed = self._is_crossed and chance.random() < evolution.CROSSED_EACH
        if isinstance(distribution, CategoricalDistribution):
            if mutates:
                return chance.choice(distribution.choices)
            return values[-1] if is_crossed else values[0]
        shares = [share_of(distribution, value) for value in values]
        share = evolution.crossed(shares[0], shares[-1], chance) if is_crossed else shares[0]
        return value_at(distribution, evolution.mutated(share, chance) if mutates else share)


def _dominates(one: FrozenTrial, other: FrozenTrial, turned: Sequence[int]) -> bool:
    pairs = [
        (sign * mine, sign * its)
        for sign, mine, its in zip(turned, one.values, other.values, strict=True)
    ]
    return all(mine >= its for mine, its in pairs) and any(mine > its for mine, its in pairs)


def random(seed: int, num_objectives: int) -> BaseSampler:
    """Every arm by chance."""
    return RandomSampler(seed=seed)


def quasi_random(seed: int, num_objectives: int) -> BaseSampler:
    """Every arm by chance, but spread out evenly: points of a scrambled Sobol sequence.

    Owen, 1998, J. Complexity 14 (4): scrambled nets are as fair as chance, with less variance.
    """
    return _Sobol()


class _Sobol(_OneByOne):
    """The next point of the study's own sequence, whatever the question's seed."""

    def value(self, study: Study, name: str, distribution: BaseDistribution) -> Any:
        names, number, seed = (study.user_attrs[key] for key in (NAMES, NUMBER, SEED))
        share = sobol_point(len(names), number, seed)[names.index(name)]
        prior = study.user_attrs[PRIORS].get(name)
        if prior is not None:
            return believed_at(distribution, share, prior)
        return value_at(distribution, share)


@lru_cache(maxsize=8)
def sobol_point(dimensions: int, number: int, seed: int) -> tuple[float, ...]:
    """Shares in [0, 1), one for each dimension: a point of a scrambled sequence."""
    points = qmc.Sobol(dimensions, scramble=True, rng=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that so many points are no balanced set
        return tuple(points.random(number + 1)[-1].tolist())


def value_at(distribution: BaseDistribution, share: float) -> Any:
    """The value below which that share of a distribution lies."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[
            min(int(share * len(distribution.choices)), len(distribution.choices) - 1)
        ]
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    elif step is not None:
        count = round((high - low) / step) + 1
        value = low + step * min(int(share * count), count - 1)
    else:
        value = low + share * (high - low)
    value = min(max(value, low), high)
    return round(value) if isinstance(distribution, IntDistribution) else value


def believed_at(distribution: BaseDistribution, share: float, prior: Any) -> Any:
    """The value below which that share of a prior lies.

    Of choices it is their weights; of a range a normal distribution around its likely value, cut
    off at both ends, on the range's own scale. The spread is ours.
    """
    if isinstance(distribution, CategoricalDistribution):
        sums = list(accumulate(prior))
        return distribution.choices[bisect(sums, share * sums[-1])]
    normal = NormalDist(share_of(distribution, prior), SPREAD)
    low, high = normal.cdf(0.0), normal.cdf(1.0)
    return value_at(distribution, normal.inv_cdf(low + share * (high - low)))


def share_of(distribution: BaseDistribution, value: float) -> float:
    """A share of a distribution of numbers at which `value_at` gives this value."""
    low, high, step = distribution.low, distribution.high, distribution.step
    if high == low:
        return 0.5
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    if step is not None:
        return float((round((value - low) / step) + 0.5) / (round((high - low) / step) + 1))
    return float((value - low) / (high - low))


def grid(seed: int, num_objectives: int) -> None:
    """Every combination once, in the order of the study file."""


def pbt(
    seed: int,
    num_objectives: int,
    *,
    population: Annotated[int, Field(ge=4, description="trials that train side by side")] = 8,
    metric: Annotated[
        str, Field(description="of pretraining, by which they are compared at its rungs")
    ] = PSNR,
    share: Annotated[
        float, Field(gt=0, le=0.5, description="replaced at a rung, by children of as many best")
    ] = 0.25,
    resample: Annotated[
        float, Field(ge=0, le=1, description="share of a child's values that are drawn anew")
    ] = 0.25,
    change: Annotated[
        float, Field(gt=0, lt=1, description="by which the others become larger or smaller")
    ] = 0.2,
) -> None:
    """Schedules found while training: population based training (Jaderberg et al. 2017).

    What is searched are values of constant schedules; what is found are `step` schedules.
    """


SAMPLERS = {
    "tpe": tpe,
    "gp": gp,
    "cma-es": cma_es,
    "nsga-ii": nsga_ii,
    "nsga-iii": nsga_iii,
    "random": random,
    "quasi-random": quasi_random,
    "grid": grid,
    "pbt": pbt,
}
LEARNING = [name for name, make in SAMPLERS.items() if "startup" in signature(make).parameters]
# Their arms come out of training
POPULATIONS = {"pbt"}
# They see nothing but values: what failed or was stopped is given some (optuna_study.py)
VALUES_ALONE = {"gp", "cma-es", "nsga-ii", "nsga-iii"}
ONE_OBJECTIVE = {"cma-es"}
OF_NUMBERS = {"cma-es"}  # whose work is done where all arms have a number
