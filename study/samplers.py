"""Which arm to try next, of those that a study's space holds.

To add a sampler, write a function of (seed, number of objectives) with keyword-only options that
returns an Optuna sampler, and add it to SAMPLERS; `None` instead stands for walking the grid. It is
called anew for every question, so it is cheap and keeps nothing; heavy libraries are imported when
it is asked, not here. One that learns has an option `startup`, the arms that chance decides before;
its proposals are put aside where everything alike has failed (optuna_study.py).
How it is asked, and what it is shown, is in optuna_study.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Container
from functools import lru_cache
from typing import Annotated, Any

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field

from trainables.late import Late

qmc = Late("scipy.stats.qmc")

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)

# What a study tells samplers beside its trials
NAMES, NUMBER, SEED = "parameters", "number", "seed"


def tpe(
    seed: int, num_objectives: int, *, startup: Annotated[int, Field(ge=1)] = 10
) -> BaseSampler:
    """Tree-structured Parzen estimator as in Optuna 5; chance decides the first `startup` arms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of two options, before Optuna 5
        return _TPE(
            seed=seed,
            n_startup_trials=startup,
            multivariate=num_objectives == 1,
            constant_liar=True,
        )


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of the sampler, before Optuna 5
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


def random(seed: int, num_objectives: int) -> BaseSampler:
    """Every arm by chance."""
    return RandomSampler(seed=seed)


def quasi_random(seed: int, num_objectives: int) -> BaseSampler:
    """Every arm by chance, but spread out evenly: points of a scrambled Sobol sequence.

    Owen, 1998, J. Complexity 14 (4): scrambled nets are as fair as chance, with less variance.
    """
    return _Sobol()


class _Sobol(BaseSampler):  # type: ignore[misc]
    """The next point of the study's own sequence, whatever the question's seed."""

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
        names, number, seed = (study.user_attrs[key] for key in (NAMES, NUMBER, SEED))
        share = _sobol_point(len(names), number, seed)[names.index(param_name)]
        return value_at(param_distribution, share)


@lru_cache(maxsize=8)
def _sobol_point(dimensions: int, number: int, seed: int) -> tuple[float, ...]:
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


def grid(seed: int, num_objectives: int) -> None:
    """Every combination once, in the order of the study file."""


SAMPLERS = {
    "tpe": tpe,
    "gp": gp,
    "random": random,
    "quasi-random": quasi_random,
    "grid": grid,
}
# They see nothing but values: what failed or was stopped is given some (optuna_study.py)
VALUES_ALONE = {"gp"}
