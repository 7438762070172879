"""Which arm to try next, of those that a study's space holds.

To add a sampler, write a function of (seed, number of objectives) with keyword-only options that
returns an Optuna sampler, and add it to SAMPLERS; `None` instead stands for walking the grid. It is
called anew for every question, so it is cheap and keeps nothing; heavy libraries are imported when
it is asked, not here. One that learns has an option `startup`, the arms that chance decides before;
its proposals are put aside where everything alike has failed (optuna_study.py).
How it is asked, and what it is shown, is in optuna_study.py.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial
from pydantic import Field


def tpe(
    seed: int, num_objectives: int, *, startup: Annotated[int, Field(ge=1)] = 10
) -> BaseSampler:
    """Tree-structured Parzen estimator as in Optuna 5; chance decides the first `startup` arms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of two options, before Optuna 5
        return TPESampler(
            seed=seed,
            n_startup_trials=startup,
            multivariate=num_objectives == 1,
            constant_liar=True,
        )


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


def grid(seed: int, num_objectives: int) -> None:
    """Every combination once, in the order of the study file."""


SAMPLERS = {"tpe": tpe, "gp": gp, "random": random, "grid": grid}
# They see nothing but values: what failed is told them as the worst that was measured
VALUES_ALONE = {"gp"}
