"""Which arm to try next, of those that a study's space holds.

To add a sampler, write a function of (seed, number of objectives) with keyword-only options that
returns an Optuna sampler, and add it to SAMPLERS; `None` instead stands for walking the grid. It is
called anew for every question, so it is cheap and keeps nothing; heavy libraries are imported when
it is asked, not here. One that learns has an option `startup`, the arms that chance decides before.
How it is asked, and what it is shown, is in optuna_study.py.
"""

from __future__ import annotations

import warnings
from typing import Annotated

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
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


def random(seed: int, num_objectives: int) -> BaseSampler:
    """Every arm by chance."""
    return RandomSampler(seed=seed)


def grid(seed: int, num_objectives: int) -> None:
    """Every combination once, in the order of the study file."""


SAMPLERS = {"tpe": tpe, "random": random, "grid": grid}
